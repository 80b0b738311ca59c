"""Perceptual distances: LPIPS against torch, its weight file, and properties of every such distance."""

import functools
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from torch_reference import require_torch

from ssl_jax.errors import UserError
from ssl_jax.experiment.extractors import open_extractor
from ssl_jax.models.pretrained import vgg
from ssl_jax.objectives.perceptual import adaptive_weight, feature_distance, random_features, random_kernels


def pictures(seed, *shape):
    return np.random.default_rng(seed).random(shape).astype(np.float32)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """State dicts of torchvision's network and of linear layers with random weights, and the file converted from both."""
    torch = require_torch()
    folder, generator = tmp_path_factory.mktemp("lpips"), torch.Generator().manual_seed(0)
    layers, before = [], 3
    for stage, (channels, convolutions) in enumerate(vgg.STAGES):  # numbered as in torchvision, without its last pool
        layers += [torch.nn.MaxPool2d(2)] if stage else []
        for _ in range(convolutions):
            layers += [torch.nn.Conv2d(before, channels, 3, padding=1), torch.nn.ReLU()]
            before = channels
    network = torch.nn.Sequential(*layers)
    for layer in network:
        if isinstance(layer, torch.nn.Conv2d):
            layer.weight.data = torch.randn(layer.weight.shape, generator=generator) * (2 / (9 * layer.in_channels)) ** 0.5
            layer.bias.data = 0.1 * torch.randn(layer.bias.shape, generator=generator)
    lin = {f"lin{i}.model.1.weight": torch.rand((1, c, 1, 1), generator=generator) for i, (c, _) in enumerate(vgg.STAGES)}
    torch.save({f"features.{name}": value for name, value in network.state_dict().items()}, folder / "vgg16.pth")
    torch.save(lin, folder / "vgg.pth")
    digest = vgg.convert(str(folder / "vgg16.pth"), str(folder / "vgg.pth"), str(folder / "lpips.npz"))
    return folder, digest, network, lin


@pytest.fixture(scope="module")
def lpips(files):
    folder, digest, *_ = files
    weights = vgg.load(str(folder / "lpips.npz"), digest[:16])

    @jax.jit
    def both(x, y):
        def distance(y):
            d = feature_distance(vgg.features(weights, x), vgg.features(weights, y), vgg.lins(weights))
            return d.sum(), d

        (_, d), gradient = jax.value_and_grad(distance, has_aux=True)(y)
        return d, gradient

    return both


@pytest.mark.full
def test_lpips_equals_torch(files, lpips):
    """Scaling, outputs of the ReLUs before each pool, unit channels, linear weights, mean over positions, sum over layers."""
    torch = require_torch()
    _, _, network, lin = files
    x, y = pictures(0, 2, 32, 32, 3), pictures(1, 2, 32, 32, 3)
    shift, scale = (torch.tensor(v)[:, None, None] for v in ([-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]))
    hs, total = [(2 * torch.from_numpy(a).permute(0, 3, 1, 2) - 1 - shift) / scale for a in (x, y)], 0.0
    stage = 0
    for number, layer in enumerate(network):
        hs = [layer(h) for h in hs]
        if number in (3, 8, 15, 22, 29):  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
            a, b = (h / (h.pow(2).sum(1, keepdim=True).sqrt() + 1e-10) for h in hs)
            total = total + (lin[f"lin{stage}.model.1.weight"] * (a - b) ** 2).sum(1).mean((1, 2))
            stage += 1
    assert stage == 5
    np.testing.assert_allclose(lpips(x, y)[0], total.detach(), rtol=1e-4)
    assert sum(np.prod(shape) for name, shape in vgg.shapes().items() if "/" in name) == 14_714_688


def random_distance(x, y):
    kernels = random_kernels()
    return feature_distance(random_features(kernels, x), random_features(kernels, y))


@functools.cache
def random_both():
    @jax.jit
    def both(x, y):
        return random_distance(x, y), jax.grad(lambda y: random_distance(x, y).sum())(y)

    return both


@pytest.mark.parametrize("name", [pytest.param("lpips", marks=pytest.mark.full), "random_conv"])
def test_perceptual_distances_are_zero_symmetric_and_grow_with_noise(name, lpips):
    both = lpips if name == "lpips" else random_both()
    x, y = pictures(0, 2, 32, 32, 3), pictures(1, 2, 32, 32, 3)
    d, gradient = both(x, y)
    np.testing.assert_allclose(both(x, x)[0], 0, atol=1e-11)  # 0 up to rounding: the two branches compile differently
    np.testing.assert_allclose(both(y, x)[0], d, rtol=1e-5)
    assert np.all(d > 0)
    assert np.abs(gradient).max() > 0
    np.testing.assert_allclose(both(x, x)[1], 0, atol=1e-6)
    assert np.all(feature_distance([x], [x]) == 0)
    np.testing.assert_allclose(both(x[::-1], y[::-1])[0], d[::-1], rtol=1e-5)
    noise = np.random.default_rng(2).standard_normal(x.shape).astype(np.float32)
    ladder = np.stack([both(x, x + s * noise)[0] for s in (0.02, 0.05, 0.1, 0.2)])
    assert np.all(np.diff(ladder, axis=0) > 0), ladder
    black = np.zeros_like(x)  # ReLUs that are all zero
    assert np.isfinite(both(x, black)[1]).all()


@pytest.mark.full
def test_channels_that_are_all_zero_have_a_distance_and_a_gradient():
    a, b = jnp.zeros((1, 2, 2, 3)), jnp.ones((1, 2, 2, 3))
    np.testing.assert_allclose(feature_distance([a], [b]), 1, rtol=1e-6)
    np.testing.assert_array_equal(jax.grad(lambda a: feature_distance([a], [b]).sum())(a), np.zeros(a.shape))
    np.testing.assert_allclose(feature_distance([b], [2 * b]), 0, atol=1e-7)  # only directions count
    np.testing.assert_allclose(feature_distance([a, a], [b, b], [jnp.full(3, 2.0), jnp.full(3, 0.5)]), 2.5, rtol=1e-6)


def test_random_features_equal_the_random_conv_extractor():
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    theirs = open_extractor("random_conv").encode(images)["pooled"]
    ours = random_features(random_kernels(), images / np.float32(255))[-1].mean((1, 2))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_missing_or_wrong_lpips_file_raises_user_error(files, tmp_path):
    torch = require_torch()
    folder, digest, *_ = files
    with pytest.raises(UserError, match=r"path='/no/lpips.npz' is no file; create it once from torchvision's vgg16.*convert"):
        vgg.load("/no/lpips.npz", digest)
    for wrong in ("", "0123"):
        with pytest.raises(UserError, match=f"is {digest}, not '{wrong}'; to use this file"):
            vgg.load(str(folder / "lpips.npz"), wrong)
    np.savez(tmp_path / "other.npz", lin1=np.ones(64))
    other_digest = hashlib.sha256((tmp_path / "other.npz").read_bytes()).hexdigest()
    with pytest.raises(UserError, match="holds no weights of LPIPS: conv1_1/kernel"):
        vgg.load(str(tmp_path / "other.npz"), other_digest)
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "half.pth")
    with pytest.raises(UserError, match=r"has no 'features.0.bias'; give the files of torchvision's vgg16"):
        vgg.convert(str(tmp_path / "half.pth"), str(folder / "vgg.pth"), str(tmp_path / "x.npz"))


@pytest.mark.full
def test_adaptive_weight_equalizes_gradient_norms():
    """The gradients get equal norms; the weight scales with the first loss and has no gradient."""
    w, x = pictures(0, 8), pictures(1, 8)
    first, second = (lambda w, c=1.0: c * jnp.sum((w - x) ** 2)), (lambda w: jnp.sum(jnp.sin(3 * w)))

    def weight(w, c=1.0):
        return adaptive_weight(jax.grad(first)(w, c), jax.grad(second)(w))

    scale = weight(w)
    np.testing.assert_allclose(scale * np.linalg.norm(jax.grad(second)(w)), np.linalg.norm(jax.grad(first)(w)), rtol=1e-3)
    np.testing.assert_allclose(weight(w, 5.0), 5 * scale, rtol=1e-5)
    np.testing.assert_array_equal(jax.grad(weight)(w), np.zeros(8))
    assert adaptive_weight(jnp.ones(3), jnp.zeros(3)) == 1e4

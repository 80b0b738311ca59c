"""The networks of StyleGAN 1 and 2 against published parameter counts, closed forms, and float64 references."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from torch_reference import require_torch

from ssl_jax.errors import UserError
from ssl_jax.models import common
from ssl_jax.models.gan import stylegan_layers as layers
from ssl_jax.models.gan.stylegan import StyleGAN2, StyleGAN2Discriminator, modulated_conv
from ssl_jax.models.gan.stylegan1 import StyleGAN1, StyleGAN1Discriminator, instance_norm

TINY = dict(size=8, channel_base=64, channel_max=16, features=8)
GENERATORS = {"1": StyleGAN1(**TINY, mapping_layers=2), "2": StyleGAN2(**TINY, mapping_layers=2)}
TINY_D = {k: v for k, v in TINY.items() if k != "features"}
DISCRIMINATORS = {
    "1": StyleGAN1Discriminator(**TINY_D),
    "2": StyleGAN2Discriminator(**TINY_D),
    "2 plain": StyleGAN2Discriminator(**TINY_D, residual=False),
}
every_generator = pytest.mark.parametrize("name", GENERATORS)
every_discriminator = pytest.mark.parametrize("name", DISCRIMINATORS)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def keys(n, seed=0):
    return jax.random.split(jax.random.key(seed), n)


def run(module, params, *args, method="__call__"):
    return common.run(module, params, {}, *args, train=False, method=method)[0]


@functools.cache
def create_generator(name):
    """(generator, its parameters with some noise)."""
    params, state = common.create(GENERATORS[name], jax.random.key(0), normal(0, 4, 8), None, keys(4))
    assert state == {}
    loud = jax.tree_util.tree_map_with_path(lambda path, x: x + 0.5 * ("noise_strength" in str(path)), params)
    return GENERATORS[name], loud


def count(module, *args):
    tree = jax.eval_shape(lambda: module.init(jax.random.key(0), *args, train=True))["params"]
    return {name: sum(math.prod(x.shape) for x in jax.tree.leaves(part)) for name, part in tree.items()}


def total(module, *args):
    return sum(count(module, *args).values())


@pytest.mark.full
@pytest.mark.parametrize(
    ("fields", "plain", "classes", "mapping", "generator", "discriminator"),
    [
        (dict(size=1024), False, 0, 2_101_248, 30_370_060, 29_012_513),  # configuration F
        (dict(size=1024, channel_base=16384), False, 0, 2_101_248, 24_900_764, 24_038_161),  # E
        (dict(size=256, channel_base=16384), False, 0, 2_101_248, 24_767_458, 24_001_089),
        (dict(size=32), True, 0, 525_312, 19_947_539, 20_720_641),  # CIFAR-10
        (dict(size=32), True, 10, 525_312 + 267_776, 20_215_315, 23_089_664),
    ],
    ids=["F", "E", "256", "cifar10", "cifar10 conditional"],
)
def test_parameter_counts_of_stylegan2(fields, plain, classes, mapping, generator, discriminator):
    label = jnp.zeros(4, int) if classes else None
    found = count(StyleGAN2(**fields, mapping_layers=2 if plain else 8, classes=classes), jnp.zeros((4, 512)), label)
    assert (found["mapping"], sum(found.values())) == (mapping, generator)
    if fields == dict(size=1024):
        assert found["synthesis"] == 28_268_812
    images = jnp.zeros((4, fields["size"], fields["size"], 3))
    assert total(StyleGAN2Discriminator(**fields, residual=not plain, classes=classes), images, label) == discriminator


@pytest.mark.parametrize(("resolution", "generator", "discriminator"), [(1024, 26_219_627, 23_087_249), (256, 26_086_229, None)])
def test_parameter_counts_of_stylegan1(resolution, generator, discriminator):
    """The published counts include the image heads of every resolution that progressive growing goes through."""
    lower = [min(16384 // r, 512) for r in layers.levels(resolution)[:-1]]
    heads, images = sum(3 * c + 3 for c in lower), jnp.zeros((4, resolution, resolution, 3))
    assert total(StyleGAN1(resolution), jnp.zeros((4, 512))) + heads == generator
    if discriminator:
        assert total(StyleGAN1Discriminator(resolution), images) + sum(3 * c + c for c in lower) == discriminator


@pytest.mark.full
def test_number_of_layers_and_invalid_sizes():
    assert [StyleGAN2(r).layers for r in (1024, 256, 128, 32)] == [18, 14, 12, 8]
    assert [StyleGAN1(r).layers for r in (1024, 4)] == [18, 2]
    strengths = [path for path, _ in jax.tree_util.tree_leaves_with_path(create_generator("2")[1]) if "noise_strength" in str(path)]
    assert len(strengths) == GENERATORS["2"].layers - 1  # the last image head has a style and no noise
    for size in (2, 48):
        with pytest.raises(UserError, match=f"4, 8, 16, ... pixels, not {size}"):
            layers.levels(size)
    with pytest.raises(UserError, match="built for 8 pixels"):
        jax.eval_shape(lambda: common.create(DISCRIMINATORS["2"], jax.random.key(0), jnp.zeros((2, 32, 32, 3))))


def torch_filter(x, taps, padding, gain):
    """float64 depthwise filter of [B, C, H, W]."""
    torch = require_torch()
    F = torch.nn.functional
    kernel = torch.tensor(np.outer(taps, taps) / np.sum(taps) ** 2 * gain)
    return F.conv2d(F.pad(x, (*padding, *padding)), kernel.expand(x.shape[1], 1, *kernel.shape), groups=x.shape[1])


def insert_zeros(x):
    """Insert zeros after every pixel."""
    torch = require_torch()
    out = torch.zeros(*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3], dtype=x.dtype)
    out[:, :, ::2, ::2] = x
    return out


def to_torch(x):
    torch = require_torch()
    return torch.tensor(np.asarray(x, np.float64)).permute(0, 3, 1, 2)


def from_torch(x):
    return x.permute(0, 2, 3, 1).numpy()


@pytest.mark.full
def test_resampling_filters_equal_float64_reference():
    x, wide = normal(0, 2, 6, 6, 3), (1, 3, 3, 1)
    t = to_torch(x)
    np.testing.assert_allclose(layers.upsample(x), from_torch(torch_filter(insert_zeros(t), wide, (2, 1), 4)), atol=1e-6)
    np.testing.assert_allclose(layers.downsample(x), from_torch(torch_filter(t, wide, (1, 1), 1)[..., ::2, ::2]), atol=1e-6)
    blurred = from_torch(torch_filter(t, (1, 2, 1), (1, 1), 1))
    np.testing.assert_allclose(layers.smooth(x, (1, 2, 1), (1, 1)), blurred, atol=1e-6)
    np.testing.assert_allclose(layers.nearest(x), np.repeat(np.repeat(x, 2, 1), 2, 2))
    one = layers.upsample(jnp.ones((1, 6, 6, 1)))[0, :, :, 0]
    np.testing.assert_allclose(one[1:-1, 1:-1], 1, rtol=1e-6)
    np.testing.assert_allclose(one[0, 0], 0.5625)
    row = layers.upsample(x)[:, 2:4, 2:4]  # the four pixels of cell (1, 1)
    near, up, left, both = x[:, 1, 1], x[:, 0, 1], x[:, 1, 0], x[:, 0, 0]
    np.testing.assert_allclose(row[:, 0, 0], (9 * near + 3 * up + 3 * left + both) / 16, rtol=1e-5, atol=1e-6)


def by_hand(x, kernel, style, up, demodulate):
    """float64, with one kernel per example."""
    torch = require_torch()
    F = torch.nn.functional
    out = []
    for image, s in zip(to_torch(x), np.asarray(style, np.float64), strict=True):
        w = np.asarray(kernel, np.float64) * s[:, None]
        if demodulate:
            w = w / np.sqrt(np.sum(w**2, axis=(0, 1, 2)) + 1e-8)
        w = torch.tensor(w).permute(3, 2, 0, 1)
        if up:  # the published order: transposed convolution without cropping, then the filter
            full = F.conv2d(F.pad(insert_zeros(image[None])[..., :-1, :-1], (2, 2, 2, 2)), w)
            out.append(torch_filter(full, (1, 3, 3, 1), (1, 1), 4))
        else:
            out.append(F.conv2d(image[None], w, padding=w.shape[-1] // 2))
    return from_torch(torch.cat(out))


@pytest.mark.parametrize(("size", "up", "demodulate"), [(3, False, True), (3, True, True), (1, False, False)])
def test_modulated_convolution_equals_one_kernel_per_example(size, up, demodulate):
    x, kernel, style = normal(0, 3, 5, 5, 7), normal(1, size, size, 7, 4) / 8, 1 + normal(2, 3, 7)
    expected = by_hand(x, kernel, style, up, demodulate)
    np.testing.assert_allclose(modulated_conv(x, kernel, style, up, demodulate), expected, rtol=1e-4, atol=1e-5)
    if demodulate:
        scaled, plain = modulated_conv(x, kernel, -7 * style, up), modulated_conv(x, kernel, style, up)
        np.testing.assert_allclose(scaled, -plain, rtol=1e-4, atol=1e-5)


def test_demodulation_keeps_unit_variance_in_float32_and_bfloat16():
    x, kernel, style = normal(0, 4, 16, 16, 64), normal(1, 3, 3, 64, 64), 1 + normal(2, 4, 64)
    inside = modulated_conv(x, kernel, style)[:, 1:-1, 1:-1]
    assert abs(float(jnp.std(inside)) - 1) < 0.02
    half = modulated_conv(x.astype(jnp.bfloat16), kernel, style)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half[:, 1:-1, 1:-1].astype(jnp.float32), inside, atol=0.06)


@pytest.mark.full
def test_downsampling_convolution_equals_float64_reference():
    torch = require_torch()
    F = torch.nn.functional
    layer, x = layers.EqualConv(4, down=True), normal(0, 2, 8, 8, 3)
    params = layer.init(jax.random.key(0), x)
    w = torch.tensor(np.asarray(params["params"]["kernel"], np.float64) / np.sqrt(27)).permute(3, 2, 0, 1)
    expected = F.conv2d(torch_filter(to_torch(x), (1, 3, 3, 1), (2, 2), 1), w, stride=2)
    np.testing.assert_allclose(layer.apply(params, x), from_torch(expected), atol=1e-5)
    narrow = layers.EqualConv(4, 1, down=True, use_bias=False)
    params = narrow.init(jax.random.key(0), x)
    w = torch.tensor(np.asarray(params["params"]["kernel"], np.float64) / np.sqrt(3)).permute(3, 2, 0, 1)
    expected = F.conv2d(torch_filter(to_torch(x), (1, 3, 3, 1), (1, 1), 1), w, stride=2)
    np.testing.assert_allclose(narrow.apply(params, x), from_torch(expected), atol=1e-5)


@pytest.mark.parametrize(("size", "kernel", "stride", "padding"), [(5, 3, 1, 1), (5, 2, 1, 1), (5, 1, 1, 0), (7, 3, 2, 0)])
def test_first_and_second_order_gradients_of_convolutions(size, kernel, stride, padding):
    x, k = normal(0, 2, size, size, 3), normal(1, kernel, kernel, 3, 4)

    def plain(x, k, stride, padding):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, k, (stride, stride), ((padding, padding),) * 2, dimension_numbers=numbers)

    def second(convolve):
        def penalty(x, k):
            return jnp.sum(jax.grad(lambda x: jnp.sum(jnp.sin(convolve(x, k, stride, padding))))(x) ** 2)

        def first(x, k):
            return jnp.sum(jnp.sin(convolve(x, k, stride, padding)))

        return jax.tree.leaves((jax.grad(first, (0, 1))(x, k), jax.grad(penalty, (0, 1))(x, k)))

    for ours, theirs in zip(second(jax.jit(layers.convolve, static_argnums=(2, 3))), second(plain), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=max(1e-4, 1e-6 * float(jnp.abs(theirs).max())))


@pytest.mark.parametrize("multiplier", [1.0, 0.01])
def test_equalized_learning_rate(multiplier):
    """Stored kernels have deviation 1 / multiplier, used ones 1 / sqrt(C); gradients of stored kernels have the scale."""
    layer, x = layers.EqualDense(300, lr_multiplier=multiplier, bias_init=1.0), normal(0, 5, 200)
    params = layer.init(jax.random.key(0), x)["params"]
    np.testing.assert_allclose((jnp.std(params["kernel"]), params["bias"][0]), (1 / multiplier, 1 / multiplier), rtol=0.01)
    scale = multiplier / np.sqrt(200)
    np.testing.assert_allclose(layer.apply({"params": params}, x), x @ params["kernel"] * scale + 1, atol=1e-4)
    slope = jax.grad(lambda p: layer.apply({"params": p}, x).sum())(params)
    np.testing.assert_allclose(slope["kernel"][:, 0], x.sum(0) * scale, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(slope["bias"], 5 * multiplier, rtol=1e-5)


@pytest.mark.full
def test_mapping_depends_on_direction_of_z_and_on_label():
    z = normal(0, 6, 8)
    np.testing.assert_allclose(jnp.linalg.norm(layers.unit_second_moment(z), axis=-1), np.sqrt(8), rtol=1e-6)
    mapping = layers.Mapping(16, 3, classes=5)
    params = mapping.init(jax.random.key(0), z, jnp.zeros(6, int))
    w = mapping.apply(params, z, jnp.zeros(6, int))
    np.testing.assert_allclose(mapping.apply(params, 9 * z, jnp.zeros(6, int)), w, rtol=1e-5, atol=1e-5)
    assert not np.allclose(mapping.apply(params, z, jnp.ones(6, int)), w, atol=1e-2)


@pytest.mark.full
def test_minibatch_deviation():
    constant = layers.minibatch_deviation(jnp.ones((8, 4, 4, 3)), 4)
    assert constant.shape == (8, 4, 4, 4)
    np.testing.assert_allclose(constant[..., 3], 1e-4, rtol=1e-5)
    halves = jnp.tile(jnp.array([-1.0, 1.0]), 4)[:, None, None, None] * jnp.ones((8, 4, 4, 3))
    np.testing.assert_allclose(layers.minibatch_deviation(halves, 4)[..., 3], 1, rtol=1e-6)
    x = normal(0, 8, 4, 4, 3)
    expected = [np.sqrt(np.var(np.asarray(x[i : i + 4], np.float64), 0) + 1e-8).mean() for i in (0, 4)]
    np.testing.assert_allclose(layers.minibatch_deviation(x, 4)[:, 1, 2, 3], np.repeat(expected, 4), rtol=1e-5)
    odd = [layers.minibatch_deviation(x[:n], 4)[:3, 0, 0, 3] for n in (6, 3)]  # no group of 4 goes into 6
    np.testing.assert_allclose(*odd, rtol=1e-6)


def test_instance_norm_removes_mean_and_scale():
    x = normal(0, 2, 6, 6, 3)
    y = instance_norm(x)
    np.testing.assert_allclose((y.mean((1, 2)), y.std((1, 2))), (np.zeros((2, 3)), np.ones((2, 3))), atol=1e-5)
    np.testing.assert_allclose(instance_norm(5 * x + 3), y, atol=1e-4)


@pytest.mark.full
@every_generator
def test_images_depend_on_each_style_and_on_their_own_noise(name):
    model, params = create_generator(name)
    z = normal(1, 4, 8)
    w = run(model, params, z, method="map")
    ws = jnp.repeat(w[:, None], model.layers, 1)

    def synthesize(ws, keys=None):
        return run(model, params, ws, keys, method="synthesize")

    images = synthesize(ws, keys(4))
    assert images.shape == (4, 8, 8, 3)
    assert images.dtype == jnp.float32
    np.testing.assert_allclose(run(model, params, z, None, keys(4)), images, atol=1e-5)
    for layer in range(model.layers):
        assert not np.allclose(synthesize(ws.at[:, layer].add(1.0), keys(4)), images, atol=1e-4), layer
    permuted = jnp.array([1, 2, 3, 0])
    np.testing.assert_allclose(synthesize(ws[permuted], keys(4)[permuted]), images[permuted], atol=1e-5)
    other = synthesize(ws, keys(4, 1))
    assert np.abs(other - images).max() > 1e-2
    quiet = jax.tree_util.tree_map_with_path(lambda path, x: x * ("noise_strength" not in str(path)), params)
    silent = run(model, quiet, ws, keys(4), method="synthesize")
    np.testing.assert_allclose(silent, synthesize(ws), atol=1e-5)  # the same as without noise
    assert sum(x.sum() for path, x in jax.tree_util.tree_leaves_with_path(params) if "noise_strength" in str(path)) == 0.5 * sum(
        x.size for path, x in jax.tree_util.tree_leaves_with_path(params) if "noise_strength" in str(path)
    )


@pytest.mark.full
@every_generator
def test_bfloat16_generator_is_close_to_float32(name):
    model, params = create_generator(name)
    half = model.clone(dtype=jnp.bfloat16)
    z = normal(1, 4, 8)
    expected = run(model, params, z, None, keys(4))
    images = run(half, params, z, None, keys(4))
    assert images.dtype == jnp.float32
    assert np.abs(images - expected).mean() < 0.03 * np.abs(expected).mean() + 0.01


@pytest.mark.full
@every_discriminator
def test_discriminator_features_are_per_image_but_logits_depend_on_the_batch(name):
    model, x = DISCRIMINATORS[name], normal(0, 4, 8, 8, 3)
    params, _ = common.create(model, jax.random.key(0), x)
    logits, features = run(model, params, x)
    assert logits.shape == (4,)
    assert {k: v.shape for k, v in features.items()} == {"layer1": (4, 4, 4, 16), "pooled": (4, 16)}
    np.testing.assert_allclose(features["pooled"], features["layer1"].mean((1, 2)), rtol=1e-5, atol=1e-6)
    alone, one_features = run(model, params, x[:1])
    np.testing.assert_allclose(one_features["pooled"], features["pooled"][:1], rtol=1e-5, atol=1e-6)
    assert abs(alone[0] - logits[0]) > 1e-4  # the minibatch deviation depends on the batch
    half, _ = run(model.clone(dtype=jnp.bfloat16), params, x)
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, logits, atol=0.1)


@pytest.mark.full
def test_residual_discriminator_blocks_keep_the_variance():
    x = normal(0, 4, 8, 8, 3)
    model = StyleGAN2Discriminator(8, channel_base=1024, channel_max=128)
    params, _ = common.create(model, jax.random.key(0), x)
    _, features = run(model, params, x)
    rms = float(jnp.sqrt(jnp.mean(features["layer1"] ** 2)))
    assert 0.3 < rms < 1.1  # below 1, since the filter removes high frequencies


@pytest.mark.full
def test_conditional_discriminator_projects_on_the_mapped_label():
    x, model = normal(0, 4, 8, 8, 3), StyleGAN2Discriminator(8, 64, 8, classes=3, mapping_layers=2)
    params, _ = common.create(model, jax.random.key(0), x, jnp.zeros(4, int))
    zero, _ = run(model, params, x, jnp.zeros(4, int))
    mixed, _ = run(model, params, x, jnp.array([0, 1, 2, 0]))
    np.testing.assert_allclose(mixed[jnp.array([0, 3])], zero[jnp.array([0, 3])], rtol=1e-5)
    assert np.abs(mixed - zero)[1:3].min() > 1e-4

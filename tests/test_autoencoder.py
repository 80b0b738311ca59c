"""Autoencoders: published sizes, codes, reconstructions, losses written out, the linear optimum, and sparse codes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ssl_jax.engine.method import State
from ssl_jax.errors import UserError
from ssl_jax.experiment import config as configs
from ssl_jax.methods import autoencoder as subject
from ssl_jax.models import autoencoders as models
from ssl_jax.models.common import create, run
from ssl_jax.objectives import autoencoding

COLORS = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), np.uint8)
DIGITS = np.repeat(np.random.default_rng(1).integers(0, 256, (6, 28, 28, 1), np.uint8), 3, -1)


def load(variant, size, **model):
    config = configs.load(f"configs/autoencoder.py:{variant}", ())
    with config.unlocked():
        config.dtype, config.data.image_shape = "float32", (size, size, 3)
        for name, value in model.items():
            config.model[name].update(value) if isinstance(value, dict) else config.model.update({name: value})
    return config


def begin(config, images, seed=0):
    method = subject.build(config, {})
    params, mutable = jax.jit(method.init)(jax.random.key(seed), {"image": images}, {})
    return method, State(jnp.zeros((), jnp.int32), params, {}, mutable, {})


@pytest.mark.parametrize(
    ("variant", "size"),
    [
        ("mnist_t10k_deep", 2_837_314),
        ("mnist_t10k_deep_logistic", 2_837_314),
        ("mnist_t10k_keras_simple", 50_992),
        ("mnist_t10k_keras_sparse", 50_992),
        ("mnist_t10k_keras_deep", 222_384),
        ("mnist_t10k_keras_conv", 4_385),
        ("mnist_t10k_keras_denoising", 28_353),
        ("mnist_t10k_contractive", 784 * 256 + 256 + 784),  # tied
    ],
)
def test_parameter_counts_of_published_models(variant, size):
    method = subject.build(load(variant, 28), {})
    images = jax.ShapeDtypeStruct((2, 28, 28, 3), np.uint8)
    params, mutable = jax.eval_shape(method.init, jax.random.key(0), {"image": images}, {})
    assert sum(x.size for x in jax.tree.leaves(params)) == size
    reconstructed = jax.eval_shape(method.fns.reconstruct, params, mutable, images)
    assert (reconstructed.shape, reconstructed.dtype) == ((2, 28, 28, 3), jnp.float32)


def run_loss(config, images):
    """(method, state, loss, logs, x, corrupted) of one evaluation of the loss."""
    method, state = begin(config, images)
    key = jax.random.key(5)
    loss, (_, logs) = jax.jit(method.phases[0].loss)(state.params, state, {"image": images}, key)
    views_key, noise_key = jax.random.split(key)
    x = models.to_channels(method.views(images, views_key)[:, 0], config.model.channels)
    corruption = config.model.corruption
    return method, state, loss, logs, x, autoencoding.CORRUPTIONS[corruption.name](noise_key, x, corruption.level)


@pytest.mark.full
def test_denoising_loss_with_sparsity_and_contraction_equals_float64():
    """In float64 from the weights: a tied perceptron that denoises, with emphasis, sparsity and contraction."""
    config = load("mnist_t10k_contractive", 28, sparsity=0.3, contraction=0.7, code=dict(size=5),
                  corruption=dict(name="masking", level=0.4, emphasis=(1.0, 0.5)))  # fmt: skip
    _, state, loss, logs, x, corrupted = run_loss(config, DIGITS)
    net = jax.tree.map(np.float64, state.params["net"])
    kernel = net["encoder"]["code"]["kernel"]
    clean, noisy = np.float64(x).reshape(6, -1), np.float64(corrupted).reshape(6, -1)
    code = 1 / (1 + np.exp(-(noisy @ kernel)))  # biases start at zero
    logits = code @ kernel.T
    weights = np.where(clean == noisy, 0.5, 1.0)
    assert 0.3 < (weights == 1).mean() < 0.5
    entropy = np.sum(weights * (np.logaddexp(0, logits) - clean * logits), -1)
    contraction = ((code * (1 - code)) ** 2 * (kernel**2).sum(0)).sum(-1)
    np.testing.assert_allclose(logs["reconstruction"], entropy.mean(), rtol=1e-5)
    np.testing.assert_allclose([logs["sparsity"], logs["contraction"]], [code.sum(-1).mean(), contraction.mean()], rtol=1e-4)
    np.testing.assert_allclose(loss, np.mean(entropy + 0.3 * code.sum(-1) + 0.7 * contraction), rtol=1e-5)


@pytest.fixture(scope="module")
def colors():
    return run_loss(load("smoke", 16), COLORS)


def test_contraction_of_convolutions_equals_jacobian_norm(colors):
    method, state, _, logs, _, corrupted = colors

    @jax.jit
    def norm(image):
        nudge = jnp.zeros(image.shape)
        jacobian = jax.jacrev(lambda nudge: method.encode(state.params, {}, (image + nudge)[None])["code"][0])(nudge)
        return jnp.sum(jacobian**2)

    np.testing.assert_allclose(logs["contraction"], np.mean([norm(image) for image in corrupted]), rtol=1e-4)


def test_shapes_and_ranges_of_codes_layers_and_reconstructions(colors):
    method, state, *_ = colors
    features = jax.jit(method.encode)(state.params, {}, COLORS)
    assert features["pooled"].shape == (6, 6)
    np.testing.assert_array_equal(features["pooled"], features["code"])
    assert features["code"].min() > 0  # sigmoid
    assert (features["layer1"].shape, features["layer2"].shape, features["layer3"].shape) == ((6, 8, 8, 8), (6, 4, 4, 16), (6, 32))
    reconstruct = jax.jit(method.fns.reconstruct)
    reconstructed = reconstruct(state.params, {}, COLORS)
    assert reconstructed.shape == (6, 16, 16, 3)
    assert reconstructed.min() >= 0
    assert reconstructed.max() <= 1
    np.testing.assert_allclose(reconstruct(state.params, {}, COLORS / np.float32(255)), reconstructed, atol=1e-5)


def test_grayscale_reconstructions_and_mean_of_input_channels():
    config = load("mnist_t10k_deep", 28, encoder=dict(widths=(16, 8)), decoder=dict(widths=(8, 16)), code=dict(size=4))
    method, state = begin(config, DIGITS)
    encode, reconstruct = jax.jit(method.encode), jax.jit(method.fns.reconstruct)
    reconstructed = reconstruct(state.params, {}, DIGITS)
    np.testing.assert_array_equal(reconstructed[..., 0], reconstructed[..., 2])
    colored = np.stack([DIGITS[..., 0] * 0, DIGITS[..., 0], DIGITS[..., 0]], -1) / np.float32(255) * 1.5  # the same mean
    np.testing.assert_allclose(*(encode(state.params, {}, x)["code"] for x in (DIGITS, colored)), atol=1e-5)


@pytest.mark.full
def test_recurrent_encoder_reads_rows_in_order():
    x = jax.random.uniform(jax.random.key(0), (3, 6, 4, 2))
    encoder, decoder = models.RecurrentEncoder(5), models.RecurrentDecoder((6, 4, 2), width=7)
    params, state = create(encoder, jax.random.key(1), x)
    read = jax.jit(lambda x: run(encoder, params, {}, x, train=False)[0])
    out = read(x)
    assert state == {}
    np.testing.assert_array_equal(out["out"], out["layer1"][:, -1])
    later = read(x.at[:, 3:].set(0.0))["layer1"]
    np.testing.assert_allclose(later[:, :3], out["layer1"][:, :3], atol=1e-6)  # earlier states do not see later rows
    assert np.abs(later[:, 3:] - out["layer1"][:, 3:]).max() > 1e-3
    params, _ = create(decoder, jax.random.key(2), out["out"])
    assert run(decoder, params, {}, out["out"], train=False)[0].shape == x.shape


@pytest.mark.parametrize("shape", [(32, 32, 3), (16, 24, 1)])
def test_strided_convolutions_halve_and_double_sizes(shape):
    encoder, decoder = models.ConvEncoder(5, (8, 4), (12,)), models.ConvDecoder(shape, (4, 8), (12,))
    x = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
    out = jax.eval_shape(lambda key, x: encoder.init_with_output(key, x, train=True)[0], jax.random.key(0), x)
    assert out["layer2"].shape == (2, shape[0] // 4, shape[1] // 4, 4)
    reconstructed = jax.eval_shape(lambda key, z: decoder.init_with_output(key, z, train=True)[0], jax.random.key(0), out["out"])
    assert reconstructed.shape == x.shape


def minimize(loss, params, steps=2000, rate=0.02):
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    return jax.jit(lambda start: jax.lax.scan(step, start, length=steps)[0][0])((params, optimizer.init(params)))


@pytest.mark.full
def test_linear_autoencoder_learns_the_principal_components():
    """Baldi and Hornik 1989: the least squared error of k linear units is that of k components, and the subspace is theirs."""
    r = np.random.default_rng(0)
    x = (r.normal(size=(300, 12)) * np.array([3, 2.5, 2, *[0.6] * 9])) @ np.linalg.qr(r.normal(size=(12, 12)))[0]
    images = jnp.float32(x - x.mean(0)).reshape(300, 2, 6, 1)
    encoder, decoder = models.MLPEncoder(3, widths=()), models.MLPDecoder((2, 6, 1), widths=())
    net = {"encoder": create(encoder, jax.random.key(0), images)[0]}
    net["decoder"] = create(decoder, jax.random.key(1), jnp.zeros((1, 3)))[0]

    def loss(net):
        code = run(encoder, net["encoder"], {}, images, train=False)[0]["out"]
        return autoencoding.squared(images, run(decoder, net["decoder"], {}, code, train=False)[0]).mean()

    net = minimize(loss, net)
    _, values, components = np.linalg.svd(np.float64(images).reshape(300, 12))
    np.testing.assert_allclose(loss(net), (values[3:] ** 2).sum() / 300, rtol=1e-3)
    subspace = np.linalg.qr(np.float64(net["decoder"]["image"]["kernel"]).T)[0]
    np.testing.assert_allclose(np.linalg.svd(components[:3] @ subspace)[1], 1, atol=1e-3)  # cosines of the principal angles


def objective(method, state, images, params):
    return method.phases[0].loss(params, state, {"image": images}, jax.random.key(0))[0]


@pytest.mark.full
def test_sparse_code_collapses_only_for_a_heavy_penalty():
    """1e-4 beside a mean over pixels is 784e-4 beside a sum; a hundred times that makes one code of all images."""
    x = np.random.default_rng(0).random((32, 1, 1)) * np.ones((32, 28, 28))
    x[:, :14] = np.random.default_rng(1).random((32, 1, 1))
    images = np.repeat(np.uint8(255 * x)[..., None], 3, -1)
    deviations = {}
    for weight in (784e-4, 784e-1):
        method, state = begin(load("mnist_t10k_keras_sparse", 28, sparsity=weight, code=dict(size=8)), images)
        params = minimize(functools.partial(objective, method, state, images), state.params, steps=300, rate=3e-3)
        deviations[weight] = jax.jit(method.encode)(params, {}, images)["code"].std(0).mean()
    assert deviations[784e-4] > 0.1
    assert deviations[784e-1] < 1e-3


@pytest.mark.full
def test_a_backbone_below_the_code_keeps_its_statistics_and_its_pooled_features():
    config = load("smoke", 16)
    with config.unlocked():
        config.model.encoder = dict(name="resnet", depth=10, width=0.125, stem="stride2")
    method, state = begin(config, COLORS)
    value, (mutable, _) = jax.jit(method.phases[0].loss)(state.params, state, {"image": COLORS}, jax.random.key(1))
    assert np.isfinite(value)
    before, after = state.mutable["batch_stats"], mutable["batch_stats"]
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))
    encode = jax.jit(method.encode)
    features = encode(state.params, mutable, COLORS)
    assert features["pooled"].shape == (6, 64) and features["code"].shape == (6, 6) and features["layer3"].ndim == 4
    np.testing.assert_allclose(encode(state.params, mutable, COLORS[:2])["code"], features["code"][:2], rtol=1e-4, atol=1e-6)


def test_invalid_model_config_raises_user_error():
    for changes, message in (
        (dict(loss="hinge"), r"config.model.loss='hinge' is unknown; choose cross_entropy, squared"),
        (dict(corruption=dict(name="blur")), r"config.model.corruption.name='blur' is unknown; choose none, masking"),
        (dict(code=dict(activation="gelu")), r"config.model.code.activation='gelu' is unknown"),
        (dict(encoder=dict(name="vim")), r"config.model.encoder.name has no 'vim'.*pooled.*resnet"),
        (dict(encoder=dict(name="vit")), r"config.model.encoder \(vit\) has no 'hidden'"),
        (dict(decoder=dict(name="tied")), r"config.model.decoder.name='tied' needs encoder"),
        (dict(decoder=dict(depth=3)), r"config.model.decoder \(conv\) has no 'depth'; valid: widths, hidden, kernel"),
        (dict(encoder=dict(name="mlp", hidden=(8,))), r"config.model.encoder \(mlp\) has no 'hidden'"),
        (dict(decoder=dict(widths=(8,) * 5)), "double a map 5 times, which images of 16 x 16 pixels do not allow"),
    ):
        config = load("smoke", 16)
        with config.unlocked():
            for name, value in changes.items():
                config.model[name].update(value) if isinstance(value, dict) else config.model.update({name: value})
        with pytest.raises(UserError, match=message):
            subject.build(config, {})
    with pytest.raises(UserError, match=r"config.model.encoder.activation has no 'gelu'"):
        subject.build(load("mnist_t10k_deep", 28, encoder=dict(activation="gelu")), {})
    with pytest.raises(UserError, match="the last map has 128 values"):
        begin(load("mnist_t10k_keras_conv", 28, code=dict(size=64)), DIGITS)
    with pytest.raises(UserError, match=r"config.model.decoder.valid=\(\) gives images of 32 x 32 pixels, not 28 x 28"):
        begin(load("mnist_t10k_keras_conv", 28, decoder=dict(valid=())), DIGITS)

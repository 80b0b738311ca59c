"""VAE: published sizes, the loss written out, likelihood bounds, codes, samples and traversals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from ssl_jax.engine.method import State
from ssl_jax.errors import UserError
from ssl_jax.experiment import config as configs
from ssl_jax.methods import vae as subject
from ssl_jax.objectives import likelihood

COLORS = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), np.uint8)
DIGITS = np.repeat(np.random.default_rng(1).integers(0, 256, (8, 28, 28, 1), np.uint8), 3, -1)


def load(variant, size, **model):
    config = configs.load(f"configs/vae.py:{variant}", ())
    with config.unlocked():
        config.dtype, config.data.image_shape = "float32", (size, size, 3)
        for name, value in model.items():
            config.model[name].update(value) if isinstance(value, dict) else config.model.update({name: value})
    return config


def begin(config, images):
    method = subject.build(config, {})
    params, mutable = jax.jit(method.init)(jax.random.key(0), {"image": images}, {})
    return method, State(jnp.zeros((), jnp.int32), params, {}, mutable, {})


def parameter_count(config):
    method = subject.build(config, {})
    images = jax.ShapeDtypeStruct((2, *config.data.image_shape), np.uint8)
    params, _ = jax.eval_shape(method.init, jax.random.key(0), {"image": images}, {})
    return sum(x.size for x in jax.tree.leaves(params))


def test_parameter_counts_of_published_models():
    assert parameter_count(load("mnist", 28)) == 815_824  # 784-500-20
    assert parameter_count(load("mnist_iwae", 28)) == 425_284  # 784-200-200-50
    tutorial = dict(widths=(256,), activation="relu")
    assert parameter_count(load("mnist", 28, latent_size=2, encoder=tutorial, decoder=tutorial)) == 404_244
    benchmark = load("beta_vae", 64)
    assert jax.eval_shape(subject.build(benchmark, {}).init, jax.random.key(0), {"image": jnp.zeros((2, 64, 64, 3), np.uint8)}, {})[0][
        "net"]["encoder"]["linear1"]["kernel"].shape == (4 * 4 * 64, 256)  # fmt: skip


@pytest.fixture(scope="module")
def digits():
    small = dict(widths=(16,))
    return begin(load("mnist_t10k", 28, latent_size=3, encoder=small, decoder=small), DIGITS)


def loss_of(config, state, images, key):
    """The loss, with the same weights."""
    method = subject.build(config, {})
    return jax.jit(method.phases[0].loss)(state.params, state, {"image": images}, key)


def perceptron(x, layers, tanh):
    for name in layers[:-1]:
        x = np.tanh(x @ tanh[name]["kernel"] + tanh[name]["bias"])
    return x @ tanh[layers[-1]]["kernel"] + tanh[layers[-1]]["bias"]


@pytest.mark.full
def test_loss_equals_the_paper_written_out(digits):
    """In float64 from the weights; only the random numbers are the method's."""
    method, state = digits
    key = jax.random.key(5)
    loss, (_, logs) = jax.jit(method.phases[0].loss)(state.params, state, {"image": DIGITS}, key)
    views_key, data_key, sample_key = jax.random.split(key, 3)
    gray = method.views(DIGITS, views_key)[:, 0].mean(-1, keepdims=True)
    x = np.float64(jax.random.bernoulli(data_key, gray)).reshape(8, -1)
    net = jax.tree.map(np.float64, state.params["net"])
    mean, log_variance = np.split(perceptron(x, ("linear1", "code"), net["encoder"]), 2, -1)
    noise = jax.random.normal(sample_key, (8, 3))
    logits = perceptron(mean + np.exp(log_variance / 2) * noise, ("linear1", "image"), net["decoder"])
    log_likelihood = np.sum(x * logits - np.logaddexp(0, logits), -1)
    kl = 0.5 * np.sum(mean**2 + np.exp(log_variance) - 1 - log_variance, -1)
    np.testing.assert_allclose(loss, np.mean(kl - log_likelihood), rtol=1e-5)
    np.testing.assert_allclose([logs["log_likelihood"], logs["kl"]], [log_likelihood.mean(), kl.mean()], rtol=1e-5)
    np.testing.assert_allclose(logs["elbo"], -loss, rtol=1e-6)


@pytest.mark.full
def test_beta_free_bits_and_warmup_weigh_the_kl(digits):
    _, state = digits
    small, key = dict(widths=(16,)), jax.random.key(5)
    options = dict(latent_size=3, encoder=small, decoder=small)
    loss, (_, logs) = loss_of(load("mnist_t10k_beta4", 28, **options), state, DIGITS, key)
    np.testing.assert_allclose(loss, 4 * logs["kl"] - logs["log_likelihood"], rtol=1e-6)
    warm = load("mnist_t10k", 28, warmup=10, free_bits=100.0, **options)
    loss, (_, logs) = loss_of(warm, state._replace(step=jnp.int32(3)), DIGITS, key)
    np.testing.assert_allclose(loss, 0.4 * 300 - logs["log_likelihood"], rtol=1e-6)  # every latent has 100 nats free
    assert subject.build(warm, {}).couples_batch
    loss, _ = loss_of(warm, state._replace(step=jnp.int32(30)), DIGITS, key)
    np.testing.assert_allclose(loss, 300 - logs["log_likelihood"], rtol=1e-6)


@pytest.mark.full
def test_importance_bound_of_several_samples(digits):
    _, state = digits
    small = dict(widths=(16,))
    options = dict(latent_size=3, encoder=small, decoder=small)
    loss = {}
    for bound, k in (("elbo", 64), ("iwae", 64), ("iwae", 1)):
        loss[bound, k], (_, logs) = loss_of(load("mnist_t10k", 28, bound=bound, samples=k, **options), state, DIGITS, jax.random.key(1))
        assert logs["log_likelihood"].shape == ()
    assert loss["iwae", 64] < loss["elbo", 64] - 0.1
    np.testing.assert_allclose(loss["iwae", 1], loss["elbo", 64], rtol=0.02)  # with one sample it is an ELBO with a sampled KL


@pytest.mark.full
def test_log_prob_of_a_decoder_that_ignores_its_code(digits):
    """log w = log p(x) + log p(z) - log q(z): the ELBO is log p(x) - KL, and the importance bound lies between it and log p(x)."""
    method, state = digits
    net = jax.tree.map(jnp.zeros_like, state.params["net"])
    net["encoder"]["code"]["bias"] = jnp.array([0.7, -0.5, 0.0, -0.4, 0.3, 0.0])  # means, log-variances
    log_prob = jax.jit(method.fns.log_prob, static_argnums=4)
    few, many = (log_prob({"net": net}, {}, DIGITS, jax.random.key(0), k) for k in (20, 3000))
    assert few["dimensions"] == 784
    evidence = 784 * np.log(0.5)  # of any binary image under logits of zero
    mean, log_variance = net["encoder"]["code"]["bias"].reshape(2, 3)
    kl = likelihood.kl_gaussian(mean, log_variance).sum()
    np.testing.assert_allclose(many["elbo"], evidence - kl, atol=0.1)
    np.testing.assert_allclose(many["iwae"], evidence, atol=0.1)
    for bounds in (few, many):
        assert bounds["elbo"].shape == bounds["iwae"].shape == (8,)
        assert (bounds["elbo"] <= bounds["iwae"]).all()
    repeated = log_prob({"net": net}, {}, DIGITS, jax.random.key(0), 20)
    np.testing.assert_array_equal(few["iwae"], repeated["iwae"])


@pytest.mark.full
def test_scanned_importance_bound_equals_all_samples_at_once(digits):
    method, state = digits
    key, k = jax.random.key(3), 6
    bounds = jax.jit(method.fns.log_prob, static_argnums=4)(state.params, {}, DIGITS, key, k)
    net = jax.tree.map(np.float64, state.params["net"])
    data_key, sample_key = jax.random.split(key)
    x = np.float64(jax.random.bernoulli(data_key, DIGITS[..., :1] / np.float32(255))).reshape(8, -1)
    mean, log_variance = np.split(perceptron(x, ("linear1", "code"), net["encoder"]), 2, -1)
    log_weights = []
    for one in jax.random.split(sample_key, k):
        z = mean + np.exp(log_variance / 2) * np.float64(jax.random.normal(one, (8, 3)))
        logits = perceptron(z, ("linear1", "image"), net["decoder"])
        prior, posterior = scipy.stats.norm.logpdf(z), scipy.stats.norm.logpdf(z, mean, np.exp(log_variance / 2))
        log_weights.append(np.sum(x * logits - np.logaddexp(0, logits), -1) + np.sum(prior - posterior, -1))
    np.testing.assert_allclose(bounds["elbo"], np.mean(log_weights, 0), rtol=1e-5)
    np.testing.assert_allclose(bounds["iwae"], np.log(np.mean(np.exp(np.array(log_weights)), 0)), rtol=1e-5)


@pytest.fixture(scope="module")
def colors():
    return begin(load("smoke", 16), COLORS)


@pytest.mark.full
def test_untrained_color_model_needs_about_8_bits_per_dimension(colors):
    method, state = colors
    bounds = jax.jit(method.fns.log_prob, static_argnums=4)(state.params, {}, COLORS, jax.random.key(0), 2)
    assert bounds["dimensions"] == 768
    bits = likelihood.bits_per_dimension(bounds["iwae"], 768)
    assert bits.min() > 7
    assert bits.max() < 10
    assert method.notes == {"likelihood": "discretized logistic, 256 levels"}


@pytest.mark.full
def test_codes_samples_reconstructions_and_traversals(colors):
    method, state = colors
    features = jax.jit(method.encode)(state.params, {}, COLORS)
    assert features["layer2"].shape == (8, 4, 4, 16)
    np.testing.assert_array_equal(features["pooled"], features["code"])
    reconstructed = jax.jit(method.fns.reconstruct)(state.params, {}, COLORS)
    prepared = method.sampler.prepare(state.params, {}, jax.random.key(0))
    sample = jax.jit(method.sampler.sample)
    np.testing.assert_allclose(sample(prepared, {"z": features["code"]}), reconstructed, atol=1e-6)
    np.testing.assert_allclose(jax.jit(method.fns.reconstruct)(state.params, {}, COLORS / np.float32(255)), reconstructed, atol=1e-5)

    walk = jax.jit(method.fns.traverse)(state.params, {}, COLORS[:2], jnp.array([-2.0, 0.0, 2.0]))
    assert walk.shape == (2, 8, 3, 16, 16, 3)
    assert walk.min() >= 0
    assert walk.max() <= 1
    z = np.array(features["code"][1])
    z[5] = 2.0
    np.testing.assert_allclose(walk[1, 5, 2], sample(prepared, {"z": np.tile(z, (8, 1))})[0], atol=1e-5)

    latents = method.sampler.latents(jax.random.key(1), 8)
    whole, cut = (sample(prepared, latents, truncation) for truncation in (None, 0.3))
    assert np.abs(whole - cut).max() > 1e-4


def test_grayscale_model_has_one_channel_and_reconstructions_three(digits):
    method, state = digits
    reconstructed = jax.jit(method.fns.reconstruct)(state.params, {}, DIGITS)
    assert reconstructed.shape == (8, 28, 28, 3)
    np.testing.assert_array_equal(reconstructed[..., 0], reconstructed[..., 2])
    assert state.params["net"]["encoder"]["linear1"]["kernel"].shape == (784, 16)
    assert state.params["net"]["decoder"]["image"]["kernel"].shape == (16, 784)


def test_invalid_model_config_raises_user_error():
    with pytest.raises(UserError, match=r"config.model.likelihood='poisson' is unknown; choose bernoulli, cross_entropy"):
        subject.build(load("smoke", 16, likelihood="poisson"), {})
    with pytest.raises(UserError, match=r"config.model.bound='vimco' is unknown; choose elbo or iwae"):
        subject.build(load("smoke", 16, bound="vimco"), {})
    with pytest.raises(UserError, match="bound='iwae' has no KL to weigh"):
        subject.build(load("smoke", 16, bound="iwae", beta=2.0), {})
    assert subject.build(load("beta_vae", 64), {}).fns.log_prob is None  # cross-entropy of gray values is no likelihood

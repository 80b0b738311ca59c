"""Densities that sum to one, bounds against exact evidence, and common mistakes in the ELBO."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats

from ssl_jax.objectives import likelihood

rng = np.random.default_rng(0)
LEVELS = np.arange(256, dtype=np.float32) / 255


# ----------------------------------------------------------------------------------------------- densities of pixels


def test_bernoulli_and_gaussian_equal_scipy():
    x, logits = rng.integers(0, 2, 50), rng.normal(0, 3, 50)
    exact = scipy.stats.bernoulli.logpmf(x, 1 / (1 + np.exp(-logits)))
    np.testing.assert_allclose(likelihood.bernoulli(jnp.float32(x), jnp.float32(logits)), exact, rtol=1e-5, atol=1e-6)
    x, mean, log_std = rng.normal(size=(3, 50))
    exact = scipy.stats.norm.logpdf(x, mean, np.exp(log_std))
    np.testing.assert_allclose(likelihood.gaussian(*map(jnp.float32, (x, mean, log_std))), exact, rtol=2e-4, atol=1e-4)


@pytest.mark.parametrize("log_scale", [-7.0, -4.0, -1.0, 3.0])
@pytest.mark.parametrize("mean", [-0.5, 0.0, 0.3, 0.999])
def test_discretized_logistic_levels_sum_to_one(mean, log_scale):
    log_prob = likelihood.discretized_logistic(LEVELS, jnp.float32(mean), jnp.float32(log_scale))
    assert np.isfinite(log_prob).all()
    np.testing.assert_allclose(np.exp(np.float64(log_prob)).sum(), 1, rtol=2e-5)


@pytest.mark.full
def test_discretized_logistic_equals_cdf_differences_with_finite_gradients():
    mean, scale = 0.4, 0.05
    cdf = scipy.stats.logistic(mean, scale).cdf
    edges = np.concatenate([[0], cdf((np.arange(255) + 0.5) / 255), [1]])
    log_prob = likelihood.discretized_logistic(LEVELS, jnp.float32(mean), jnp.log(scale))
    np.testing.assert_allclose(np.exp(log_prob), np.diff(edges), rtol=5e-4)

    def total(mean, log_scale):
        return likelihood.discretized_logistic(LEVELS[:, None], mean, log_scale).sum()

    means, log_scales = (m.ravel() for m in jnp.meshgrid(jnp.array([-3.0, 0.5, 4.0]), jnp.array([-7.0, 0.0, 9.0])))
    grads = jax.grad(total, (0, 1))(means, log_scales)
    assert np.isfinite(grads).all()


def test_values_between_levels_count_as_the_nearest_level():
    x = np.array([0.0019, 0.0021, 0.5, 100.4 / 255, 100.6 / 255, 0.9985])
    nearest = np.round(x * 255) / 255
    for mean in (0.0, 0.4, 1.0):
        found, expected = (likelihood.discretized_logistic(jnp.asarray(a, jnp.float32), mean, -4.0) for a in (x, nearest))
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    drawn = likelihood.LIKELIHOODS["gaussian"].data(jax.random.key(0), jnp.asarray(x, jnp.float32)) * 256
    np.testing.assert_array_equal(np.floor(drawn), np.round(x * 255))


def test_uniform_pixels_cost_8_bits():
    bits = likelihood.bits_per_dimension(10 * 3 * -np.log(256), 30)
    np.testing.assert_allclose(bits, 8, rtol=1e-12)
    wide = likelihood.discretized_logistic(LEVELS[1:-1], jnp.float32(0.5), jnp.float32(8.0))  # flat between the two tails
    np.testing.assert_allclose(wide - wide[0], 0, atol=1e-4)


@pytest.mark.parametrize(("mean", "b"), [(0.0, 0.3), (1.2, 0.7), (-2.0, 0.1)])
def test_logit_laplace_integrates_to_one(mean, b):
    """Over x' in (0, 1), which is x in (-1/8, 9/8); the density is that of x'."""

    def density(shrunk):
        x = (shrunk - 0.1) / 0.8
        return float(np.exp(likelihood.logit_laplace(np.float64(x), mean, np.log(b))))

    peak = 1 / (1 + np.exp(-mean))
    area = sum(scipy.integrate.quad(density, *part, epsabs=1e-6)[0] for part in ((1e-5, peak), (peak, 1 - 1e-5)))
    np.testing.assert_allclose(area, 1, atol=2e-4)


def test_logit_laplace_maximum_likelihood_scale_is_the_distance():
    x, mean = jnp.float32(0.7), jnp.float32(-0.4)
    shrunk = 0.8 * 0.7 + 0.1
    distance = abs(np.log(shrunk / (1 - shrunk)) + 0.4)
    slope = jax.grad(lambda log_b: likelihood.logit_laplace(x, mean, log_b))
    np.testing.assert_allclose(slope(jnp.log(distance)), 0, atol=1e-5)
    assert slope(jnp.log(distance) - 0.1) > 0 > slope(jnp.log(distance) + 0.1)
    np.testing.assert_allclose(likelihood.logit_laplace_image(jnp.log(shrunk / (1 - shrunk))), 0.7, atol=1e-6)
    np.testing.assert_array_equal(likelihood.logit_laplace_image(jnp.array([-9.0, 9.0])), [0, 1])


@pytest.mark.full
def test_likelihoods_sample_their_data_and_return_means_in_range():
    x, key = jnp.broadcast_to(LEVELS[[0, 51, 255]], (20_000, 3)), jax.random.key(0)
    data = {name: np.asarray(density.data(key, x)) for name, density in likelihood.LIKELIHOODS.items()}
    assert set(np.unique(data["bernoulli"])) == {0, 1}
    np.testing.assert_allclose(data["bernoulli"].mean(0), [0, 0.2, 1], atol=0.01)
    np.testing.assert_array_equal(np.floor(256 * data["gaussian"]), np.broadcast_to([0, 51, 255], x.shape))
    for name in ("cross_entropy", "discretized_logistic"):
        np.testing.assert_array_equal(data[name], x)
    for name, density in likelihood.LIKELIHOODS.items():
        out = jax.random.normal(key, (2, 4, 4, 3 * density.outputs))
        mean = density.mean(out)
        assert mean.shape == density.log_prob(jnp.full((2, 4, 4, 3), 0.2), out).shape == (2, 4, 4, 3), name
        assert 0 <= mean.min() < mean.max() <= 1, name


def test_dequantized_density_is_a_lower_bound_of_level_probability():
    """exp of the expected log-density, summed over all levels: at most one, and near one for a flat density."""
    density = likelihood.LIKELIHOODS["gaussian"]
    out = jnp.broadcast_to(jnp.array([0.0, 1.0]), (4000, 256, 2))
    x = density.data(jax.random.key(0), jnp.broadcast_to(LEVELS, (4000, 256)))[..., None]
    total = np.exp(density.log_prob(x, out).mean(0)).sum()
    inside = np.diff(scipy.stats.norm(0.5, np.exp(-1)).cdf([0, 1]))
    assert total < inside
    np.testing.assert_allclose(total, inside, rtol=1e-3)


# ----------------------------------------------------------------------------------------------- posteriors and bounds


def test_kl_gaussian_equals_monte_carlo_and_is_zero_at_the_prior():
    mean, log_variance = np.float32([0.7, -0.2]), np.float32([-1.0, 0.5])
    z = np.float64(mean) + np.exp(log_variance / 2) * np.random.default_rng(1).standard_normal((1_000_000, 2))
    ratio = scipy.stats.norm.logpdf(z, mean, np.exp(log_variance / 2)) - scipy.stats.norm.logpdf(z)
    np.testing.assert_allclose(likelihood.kl_gaussian(mean, log_variance), ratio.mean(0), atol=3e-3)
    np.testing.assert_array_equal(likelihood.kl_gaussian(jnp.zeros(3), jnp.zeros(3)), 0)


def test_elbo_has_no_log_variance_or_mean_reduction_mistakes():
    """Mistakes of a widely copied tutorial: log-variance as log-deviation in the sample, means over latents and pixels."""
    log_variance = jnp.full((200_000, 1), -2.0)
    z = likelihood.sample_gaussian(jax.random.key(0), 3 * jnp.ones_like(log_variance), log_variance)
    np.testing.assert_allclose([z.mean(), z.std()], [3, np.exp(-1)], rtol=1e-2)  # exp(-2) with the mistake
    kl, log_likelihood = jnp.array([[1.0, 2.0, 3.0], [2.0, 2.0, 2.0]]), jnp.array([-100.0, -200.0])
    np.testing.assert_allclose(likelihood.elbo(log_likelihood, kl), -150 - 6)
    np.testing.assert_allclose(likelihood.elbo(log_likelihood, kl, beta=4.0), -150 - 24)
    means, slopes = jax.value_and_grad(lambda m: likelihood.kl_gaussian(m, jnp.zeros(5)).sum())(jnp.arange(5.0))
    np.testing.assert_allclose(means, 15)
    np.testing.assert_allclose(slopes, np.arange(5.0))


def test_free_bits_cost_nothing_and_have_no_gradient():
    kl = jnp.array([[0.1, 2.0], [0.3, 4.0]])
    np.testing.assert_allclose(likelihood.elbo(jnp.zeros(2), kl, free_bits=0.5), -(0.5 + 3))
    slope = jax.grad(lambda kl: likelihood.elbo(jnp.zeros(2), kl, free_bits=0.5))(kl)
    np.testing.assert_allclose(slope, [[0, -0.5], [0, -0.5]])


@pytest.fixture(scope="module")
def toy():
    """z ~ N(0, I_2), x = A z + N(0, s^2 I_5): evidence and posterior have closed forms."""
    r = np.random.default_rng(3)
    a, s = r.normal(size=(5, 2)), 0.7
    x = a @ r.normal(size=2) + s * r.normal(size=5)
    evidence = scipy.stats.multivariate_normal(np.zeros(5), a @ a.T + s**2 * np.eye(5)).logpdf(x)
    precision = np.eye(2) + a.T @ a / s**2
    covariance = np.linalg.inv(precision)
    mean = covariance @ a.T @ x / s**2

    def log_joint(z):  # [..., 2]
        reconstruction = likelihood.gaussian(jnp.float32(x), z @ jnp.float32(a.T), jnp.log(jnp.float32(s))).sum(-1)
        return reconstruction + likelihood.gaussian(z, 0.0, jnp.zeros(())).sum(-1)

    return evidence, log_joint, mean, covariance


def test_importance_weights_of_the_exact_posterior_equal_the_evidence(toy):
    evidence, log_joint, mean, covariance = toy
    z = np.random.default_rng(0).multivariate_normal(mean, covariance, 100)
    log_weights = log_joint(jnp.float32(z)) - scipy.stats.multivariate_normal(mean, covariance).logpdf(z)
    np.testing.assert_allclose(log_weights, evidence, atol=3e-4)


@pytest.mark.full
def test_importance_bound_grows_with_samples_and_stays_below_the_evidence(toy):
    evidence, log_joint, mean, covariance = toy
    q_mean, q_log_variance = jnp.float32(mean + 0.1), jnp.log(jnp.float32(np.diag(covariance)) * 1.5)
    z = likelihood.sample_gaussian(jax.random.key(0), jnp.broadcast_to(q_mean, (5000, 40, 2)), q_log_variance)
    log_weights = log_joint(z) - likelihood.gaussian(z, q_mean, 0.5 * q_log_variance).sum(-1)
    log_weights = np.asarray(log_weights)
    bounds = [likelihood.importance_bound(log_weights.reshape(k, -1)).mean() for k in (1, 5, 50, 5000)]  # each from all samples
    assert np.all(np.diff(bounds) > 1e-3), bounds
    assert bounds[-2] < evidence - 1e-3
    np.testing.assert_allclose(bounds[-1], evidence, atol=0.01)
    kl = likelihood.kl_gaussian(q_mean, q_log_variance).sum()  # the ELBO with an analytic KL equals the sampled one
    reconstruction = log_joint(z) - likelihood.gaussian(z, 0.0, jnp.zeros(())).sum(-1)
    np.testing.assert_allclose(reconstruction.mean() - kl, log_weights.mean(), atol=0.05)


def test_importance_bound_is_the_log_of_the_mean_weight():
    log_weights = rng.normal(0, 2, (7, 3)).astype(np.float32)
    np.testing.assert_allclose(likelihood.importance_bound(log_weights), np.log(np.exp(np.float64(log_weights)).mean(0)), rtol=1e-5)
    np.testing.assert_allclose(likelihood.importance_bound(log_weights - 2000), np.log(np.exp(log_weights).mean(0)) - 2000, rtol=1e-5)
    np.testing.assert_array_equal(likelihood.importance_bound(log_weights[:1]), log_weights[0])

"""Losses, penalties and corruptions of autoencoders against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax.objectives import autoencoding

rng = np.random.default_rng(0)


def test_reconstruction_losses_are_sums_over_an_image():
    x, out = rng.random((4, 5, 3, 2)).astype(np.float32), rng.normal(0, 2, (4, 5, 3, 2)).astype(np.float32)
    p = 1 / (1 + np.exp(-np.float64(out)))
    exact = -(x * np.log(p) + (1 - x) * np.log(1 - p))
    np.testing.assert_allclose(autoencoding.cross_entropy(x, out), exact.sum((1, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(autoencoding.squared(x, out), ((x - out) ** 2).sum((1, 2, 3)), rtol=1e-5)
    weights = rng.random(x.shape).astype(np.float32)
    np.testing.assert_allclose(autoencoding.cross_entropy(x, out, weights), (weights * exact).sum((1, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(autoencoding.sparsity(jnp.array([[1.0, -2.0], [0.0, 0.5]])), [3, 0.5])


def test_saturated_logits_have_finite_losses_and_gradients():
    x, out = jnp.array([[1.0, 0.0]]), jnp.array([[-200.0, 200.0]])
    loss, slope = jax.value_and_grad(lambda out: autoencoding.cross_entropy(x, out).sum())(out)
    np.testing.assert_allclose(loss, 400)
    np.testing.assert_allclose(slope, [[-1, 1]])


@pytest.mark.full
def test_contraction_of_a_sigmoid_layer_equals_its_jacobian_norm():
    x, kernel, bias = (rng.normal(size=s).astype(np.float32) for s in ((6, 9), (9, 4), (4,)))

    def encode(x):
        return jax.nn.sigmoid(x @ kernel + bias)

    jacobian = np.stack([jax.jacfwd(encode)(row) for row in x])
    exact = (np.float64(jacobian) ** 2).sum((1, 2))
    np.testing.assert_allclose(autoencoding.contraction_of_sigmoid(encode(x), kernel), exact, rtol=1e-5)
    np.testing.assert_allclose(autoencoding.contraction(encode, jnp.asarray(x)), exact, rtol=1e-5)
    # Images, and the gradient of the kernel: rows of different images do not mix.
    wide = autoencoding.contraction(lambda x: encode(x.reshape(6, 9)), jnp.asarray(x).reshape(6, 3, 3, 1))
    np.testing.assert_allclose(wide, exact, rtol=1e-5)
    slopes = [
        jax.grad(lambda w, f=f: f(w).sum())(kernel)
        for f in (
            lambda w: autoencoding.contraction_of_sigmoid(jax.nn.sigmoid(x @ w + bias), w),
            lambda w: autoencoding.contraction(lambda x: jax.nn.sigmoid(x @ w + bias), jnp.asarray(x)),
        )
    ]
    np.testing.assert_allclose(*slopes, rtol=1e-4, atol=1e-6)


def test_contraction_of_a_linear_map_equals_its_squared_norm():
    w = rng.normal(size=(7, 3)).astype(np.float32)
    np.testing.assert_allclose(autoencoding.contraction(lambda x: x @ w, jnp.ones((2, 7))), np.full(2, (w**2).sum()), rtol=1e-5)


X = jnp.full((200, 10, 10, 1), 0.25)


@pytest.mark.parametrize("level", [0.1, 0.4])
def test_masking_and_salt_and_pepper_corrupt_the_given_share(level):
    masked = np.asarray(autoencoding.masking(jax.random.key(0), X, level))
    assert set(np.unique(masked)) == {0, 0.25}
    np.testing.assert_allclose((masked == 0).mean(), level, atol=0.01)
    peppered = np.asarray(autoencoding.salt_and_pepper(jax.random.key(0), X, level))
    assert set(np.unique(peppered)) == {0, 0.25, 1}
    np.testing.assert_allclose([(peppered == 0).mean(), (peppered == 1).mean()], level / 2, atol=0.01)


def test_gaussian_noise_has_its_deviation_and_can_be_clipped():
    noisy = np.asarray(autoencoding.gaussian(jax.random.key(0), X, 0.5))
    np.testing.assert_allclose([noisy.mean(), noisy.std()], [0.25, 0.5], atol=0.01)
    clipped = autoencoding.clipped_gaussian(jax.random.key(0), X, 0.5)
    np.testing.assert_allclose(clipped, noisy.clip(0, 1))
    np.testing.assert_array_equal(autoencoding.CORRUPTIONS["none"](jax.random.key(0), X, 0.5), X)
    assert not np.array_equal(autoencoding.gaussian(jax.random.key(1), X, 0.5), noisy)


def test_emphasis_weights_corrupted_values():
    x, corrupted = jnp.array([[0.2, 0.0, 1.0]]), jnp.array([[0.0, 0.0, 1.0]])
    np.testing.assert_allclose(autoencoding.emphasis(x, corrupted, 1.0, 0.25), [[1, 0.25, 0.25]])


def test_denoising_loss_is_minimal_at_the_wiener_filter():
    """With noisy inputs and clean targets the loss is minimal at Sigma (Sigma + s^2 I)^-1, not at the identity."""
    mixing, level = np.random.default_rng(1).normal(size=(4, 4)), 0.6
    sigma = mixing @ mixing.T
    x = jnp.float32(np.random.default_rng(2).multivariate_normal(np.zeros(4), sigma, 200_000))
    noisy = autoencoding.CORRUPTIONS["gaussian"](jax.random.key(0), x, level)
    best = (sigma @ np.linalg.inv(sigma + level**2 * np.eye(4))).T.astype(np.float32)
    np.testing.assert_allclose(np.linalg.lstsq(np.asarray(noisy), np.asarray(x))[0], best, atol=1e-2)
    loss = jax.jit(jax.value_and_grad(lambda w: autoencoding.squared(x, noisy @ w).mean()))
    (least, slope), (identity, _) = loss(best), loss(jnp.eye(4))
    assert np.abs(slope).max() < 0.03
    assert least < identity - 0.1
    np.testing.assert_allclose(identity, 4 * level**2, rtol=1e-2)

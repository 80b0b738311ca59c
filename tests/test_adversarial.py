"""Adversarial objectives against closed forms and float64 arithmetic by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax.objectives import adversarial as subject

LN2 = np.log(2)
ZERO = {
    "minimax": (2 * LN2, -LN2),
    "non_saturating": (2 * LN2, LN2),
    "hinge": (2, 0),
    "least_squares": (0.5, 0.5),
    "wasserstein": (0, 0),
}


def logits(seed, n=64, scale=3.0):
    return scale * np.random.default_rng(seed).standard_normal(n)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


BY_HAND = {  # float64: (discriminator loss, generator loss, gradient of the generator loss times n)
    "minimax": (
        lambda r, f: np.mean(-np.log(sigmoid(r))) + np.mean(-np.log(1 - sigmoid(f))),
        lambda f: np.mean(np.log(1 - sigmoid(f))),
        lambda f: -sigmoid(f),
    ),
    "non_saturating": (
        lambda r, f: np.mean(-np.log(sigmoid(r))) + np.mean(-np.log(1 - sigmoid(f))),
        lambda f: np.mean(-np.log(sigmoid(f))),
        lambda f: -sigmoid(-f),
    ),
    "hinge": (
        lambda r, f: np.mean(np.maximum(0, 1 - r)) + np.mean(np.maximum(0, 1 + f)),
        lambda f: -np.mean(f),
        lambda f: -np.ones_like(f),
    ),
    "least_squares": (
        lambda r, f: np.mean((r - 1) ** 2) / 2 + np.mean(f**2) / 2,
        lambda f: np.mean((f - 1) ** 2) / 2,
        lambda f: f - 1,
    ),
    "wasserstein": (lambda r, f: np.mean(f) - np.mean(r), lambda f: -np.mean(f), lambda f: -np.ones_like(f)),
}


@pytest.mark.parametrize("name", subject.GAN_LOSSES)
def test_gan_losses_at_zero_and_by_hand(name):
    losses, nothing = subject.GAN_LOSSES[name], jnp.zeros(5)
    np.testing.assert_allclose((losses.discriminator(nothing, nothing), losses.generator(nothing)), ZERO[name], atol=1e-6)
    real, fake = logits(0), logits(1)
    d, g, slope = BY_HAND[name]
    np.testing.assert_allclose(losses.discriminator(real, fake), d(real, fake), rtol=1e-5)
    np.testing.assert_allclose(losses.generator(fake), g(fake), rtol=1e-5)
    np.testing.assert_allclose(jax.grad(losses.generator)(jnp.asarray(fake)) * len(fake), slope(fake), rtol=1e-4, atol=1e-6)


def test_gan_losses_of_saturated_logits_are_finite_and_hinge_has_dead_zones():
    for losses in subject.GAN_LOSSES.values():
        assert np.isfinite(losses.discriminator(jnp.array([200.0]), jnp.array([-200.0])))
    slope = jax.grad(subject.GAN_LOSSES["hinge"].discriminator, (0, 1))
    real, fake = slope(jnp.array([1.5, 0.5]), jnp.array([-1.5, -0.5]))
    np.testing.assert_array_equal(real, [0, -0.5])
    np.testing.assert_array_equal(fake, [0, 0.5])
    minimax, other = (jax.grad(subject.GAN_LOSSES[n].generator)(jnp.array([-20.0]))[0] for n in ("minimax", "non_saturating"))
    assert abs(minimax) < 1e-8 < 0.9 < abs(other)  # saturates


def test_bigan_starts_at_ln2_and_swaps_labels():
    np.testing.assert_allclose(subject.bigan(jnp.zeros(4), jnp.zeros(4)), (LN2, LN2), rtol=1e-6)
    real, fake = logits(2), logits(3)
    d, ge = subject.bigan(real, fake)
    np.testing.assert_allclose(d, 0.5 * BY_HAND["minimax"][0](real, fake), rtol=1e-5)
    np.testing.assert_allclose(ge, 0.5 * BY_HAND["minimax"][0](fake, real), rtol=1e-5)


def test_bigbigan_sums_hinge_losses_and_routes_gradients():
    zeros = [jnp.zeros(4)] * 3
    np.testing.assert_array_equal(subject.bigbigan(zeros, zeros), (6, 0))
    encoded, generated = [logits(i) for i in range(3)], [logits(i) for i in range(3, 6)]
    d, eg = subject.bigbigan(encoded, generated)
    np.testing.assert_allclose(d, sum(BY_HAND["hinge"][0](e, g) for e, g in zip(encoded, generated, strict=True)), rtol=1e-5)
    np.testing.assert_allclose(eg, sum(map(np.mean, encoded)) - sum(map(np.mean, generated)), rtol=1e-4)

    def loss(z_hat, x_hat):  # linear scores: s_x(x), s_z(z), s_xz(x, z), with x = 1 and z = 2 given
        x, z = jnp.ones(1), 2 * jnp.ones(1)
        return subject.bigbigan((3 * x, 5 * z_hat, 7 * x * z_hat), (3 * x_hat, 5 * z, 7 * x_hat * z))[1]

    of_encoder, of_generator = jax.grad(loss, (0, 1))(jnp.ones(1), jnp.ones(1))
    assert (of_encoder[0], of_generator[0]) == (5 + 7 * 1, -(3 + 7 * 2))


@pytest.mark.full
def test_r1_and_gradient_penalty_of_linear_and_quadratic_scores():
    rng = np.random.default_rng(0)
    x, w, a = rng.standard_normal((8, 2, 3)), rng.standard_normal((2, 3)), rng.standard_normal((6, 6))
    a = a + a.T
    linear = lambda x: jnp.einsum("nij,ij->n", x, w)  # noqa: E731
    quadratic = lambda x: 0.5 * jnp.einsum("ni,ij,nj->n", x.reshape(len(x), -1), a, x.reshape(len(x), -1))  # noqa: E731
    np.testing.assert_allclose(subject.r1(linear, jnp.asarray(x)), 0.5 * np.sum(w**2), rtol=1e-5)
    expected = 0.5 * np.mean(np.sum((x.reshape(8, -1) @ a) ** 2, -1))  # per example, summed over pixels
    np.testing.assert_allclose(subject.r1(quadratic, jnp.asarray(x)), expected, rtol=1e-5)
    other = jnp.asarray(rng.standard_normal(x.shape))
    got = subject.gradient_penalty(linear, jnp.asarray(x), other, jax.random.key(0))
    np.testing.assert_allclose(got, (np.linalg.norm(w) - 1) ** 2, rtol=1e-4)
    constant = lambda s: lambda x: s * jnp.zeros(len(x)) * x.sum()  # noqa: E731
    value, slope = jax.value_and_grad(lambda s: subject.gradient_penalty(constant(s), other, other, jax.random.key(0)))(1.0)
    np.testing.assert_allclose(value, 1, rtol=1e-5)
    assert np.isfinite(slope)


def test_gradient_penalty_samples_one_point_per_example():
    """The gradient of |x|^2 / 2 is x, which is the sampled point between 0 and 1."""
    half_square = lambda x: 0.5 * jnp.sum(x**2, (1, 2))  # noqa: E731
    zeros, key = jnp.zeros((64, 2, 3)), jax.random.key(0)
    t = np.asarray(jax.random.uniform(key, (64, 1, 1)))
    assert len(np.unique(t)) == 64
    got = subject.gradient_penalty(half_square, zeros, zeros + 1, key)
    np.testing.assert_allclose(got, np.mean((t * np.sqrt(6) - 1) ** 2), rtol=1e-5)


@pytest.mark.full
def test_orthogonality_value_and_gradient():
    kernel = jnp.asarray(np.linalg.qr(np.random.default_rng(0).standard_normal((12, 5)))[0].reshape(2, 2, 3, 5) * [1, 2, 3, 4, 5])
    assert subject.orthogonality(kernel) < 1e-8  # lengths do not matter
    for rows in (6, 3):  # a wide kernel uses the smaller product
        w = jnp.asarray(np.random.default_rng(1).standard_normal((rows, 4)))
        off = w.T @ w * (1 - jnp.eye(4))
        np.testing.assert_allclose(subject.orthogonality(w), jnp.sum(off**2), rtol=1e-5)
        np.testing.assert_allclose(jax.grad(subject.orthogonality)(w), 4 * w @ off, rtol=1e-4, atol=1e-4)
    shapes = jax.make_jaxpr(jax.grad(subject.orthogonality))(jnp.zeros((20, 3000)))
    assert "3000,3000" not in str(shapes)


def test_path_length_of_a_linear_generator():
    """Lengths have a root mean square of |A|_F / sqrt(H W layers); the penalty is their variance around a moving mean."""
    rng = np.random.default_rng(0)
    a = jnp.asarray(rng.standard_normal((3, 5, 4 * 4 * 2)) * 0.3, jnp.float32)  # layers, D, pixels

    def synthesize(w):
        return jnp.einsum("nld,ldp->np", w, a).reshape(-1, 4, 4, 2)

    w = jnp.zeros((20_000, 3, 5))
    penalty, mean = subject.path_length(synthesize, w, jnp.zeros(()), jax.random.key(0), decay=0.0)
    variance = float(penalty)  # decay 0: around the mean of this batch
    np.testing.assert_allclose(np.sqrt(mean**2 + variance), np.linalg.norm(a) / np.sqrt(16 * 3), rtol=1e-2)
    penalty, average = subject.path_length(synthesize, w, jnp.asarray(2.0), jax.random.key(0))
    np.testing.assert_allclose(average, 2 + 0.01 * (mean - 2), rtol=1e-5)
    np.testing.assert_allclose(penalty, variance + (mean - average) ** 2, rtol=1e-3)

"""Spectral normalization against SVD: estimates, gradients, state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax.models.gan.spectral import SpectralConv, SpectralDense, SpectralEmbed, power_step


def iterate(kernel, steps, seed=0):
    u = jax.random.normal(jax.random.key(seed), (kernel.shape[-1],))
    u = u / jnp.linalg.norm(u)
    for _ in range(steps):
        sigma, u = power_step(kernel, u)
    return float(sigma), u


def largest(kernel):
    return np.linalg.svd(np.asarray(kernel, np.float64).reshape(-1, kernel.shape[-1]), compute_uv=False)[0]


@pytest.mark.full
def test_power_iteration_converges_from_below():
    rng = np.random.default_rng(0)
    q, p = np.linalg.qr(rng.standard_normal((40, 12)))[0], np.linalg.qr(rng.standard_normal((12, 12)))[0]
    assert iterate(jnp.asarray(q), 1)[0] == pytest.approx(1, abs=1e-5)
    planted = jnp.asarray(q * np.array([3.0, 1.5, *np.linspace(1, 0.1, 10)]) @ p, jnp.float32)
    assert iterate(planted, 10)[0] == pytest.approx(3, rel=1e-3)
    gaussian = jax.random.normal(jax.random.key(1), (3, 3, 64, 64))
    estimates = [iterate(gaussian, steps)[0] for steps in (1, 5, 20, 200)]
    assert estimates == sorted(estimates)
    assert estimates[-1] <= largest(gaussian) * (1 + 1e-5)
    assert 1 - 1e-6 <= largest(gaussian / estimates[-1]) < 1.02


@pytest.mark.full
def test_gradient_equals_equation_12_of_miyato_and_has_no_radial_part():
    """dL/dW = (G - <G, W / s> u v^T) / s, equation 12 of the paper."""
    w = jax.random.normal(jax.random.key(0), (10, 6))
    sigma, u = iterate(w, 300)
    g = jax.random.normal(jax.random.key(1), w.shape)
    got = jax.grad(lambda w: jnp.sum(g * w / power_step(w, u)[0]))(w)
    left, _, right = np.linalg.svd(np.asarray(w, np.float64))
    expected = (g - np.sum(g * w / sigma) * np.outer(left[:, 0], right[0])) / sigma
    np.testing.assert_allclose(got, expected, atol=1e-4)
    assert abs(float(jnp.sum(got * w))) < 1e-3


@pytest.mark.parametrize("layer", [SpectralDense(8), SpectralConv(8, kernel=4, stride=2)], ids=["dense", "conv"])
def test_spectral_state_is_a_collection_updated_in_training_only(layer):
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    variables = layer.init(jax.random.key(1), x, True)
    assert set(variables) == {"params", "spectral"}
    assert variables["spectral"]["u"].shape == (8,)
    kernel = variables["params"]["kernel"]
    y, updates = layer.apply(variables, x, True, mutable=["spectral"])
    _sigma, u = power_step(kernel, variables["spectral"]["u"])
    np.testing.assert_allclose(updates["spectral"]["u"], u, rtol=1e-6)
    assert y.shape == ((2, 8, 8, 8) if isinstance(layer, SpectralDense) else (2, 4, 4, 8))
    scaled = {**variables, "params": {**variables["params"], "kernel": 7 * kernel}}
    np.testing.assert_allclose(layer.apply(scaled, x, False), layer.apply(variables, x, False), rtol=1e-4, atol=1e-6)
    _, kept = layer.apply(variables, x, False, mutable=["spectral"])
    np.testing.assert_array_equal(kept["spectral"]["u"], variables["spectral"]["u"])


def test_power_iteration_is_float32_in_bfloat16_networks():
    x = jnp.ones((2, 4, 4, 3), jnp.bfloat16)
    layer = SpectralConv(8, dtype=jnp.bfloat16)
    variables = layer.init(jax.random.key(0), x, True)
    y, updates = layer.apply(variables, x, True, mutable=["spectral"])
    assert y.dtype == jnp.bfloat16
    assert updates["spectral"]["u"].dtype == variables["params"]["kernel"].dtype == jnp.float32


def test_spectral_embedding_is_normalized_as_a_matrix():
    layer, labels = SpectralEmbed(6, classes=9), jnp.array([[3, 0], [8, 3]])
    variables = layer.init(jax.random.key(0), labels, True)
    table = 5 * jax.random.normal(jax.random.key(1), (9, 6))
    variables = {"params": {"embedding": table}, "spectral": variables["spectral"]}
    for _ in range(60):
        rows, updates = layer.apply(variables, labels, True, mutable=["spectral"])
        variables |= updates
    assert rows.shape == (2, 2, 6)
    np.testing.assert_allclose(rows, table[labels] / largest(table), rtol=1e-4)

"""GELU: against closed forms in float64, and what it leaves for the backward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from ssl_jax.models.activations import gelu

POINTS = np.concatenate([np.linspace(-12, 12, 481), [0.0, 1e-6, -1e-6, 100.0, -100.0]])


def exact(x):
    return x * special.ndtr(x)


def slope(x):
    return special.ndtr(x) + x * np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)


def bend(x):
    return (2 - x**2) * np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)


def test_gelu_and_its_derivatives_equal_the_closed_forms():
    x = jnp.asarray(POINTS, jnp.float32)
    first = jax.grad(lambda x: gelu(x).sum())
    np.testing.assert_allclose(gelu(x), exact(POINTS), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(first(x), slope(POINTS), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.grad(lambda x: first(x).sum())(x), bend(POINTS), rtol=1e-4, atol=1e-5)


def test_gelu_of_bfloat16_rounds_once():
    """Half a unit in the last place is at most 2^-8 of a number. `jax.nn.gelu` has several times this error."""
    x = jnp.asarray(POINTS, jnp.bfloat16)
    wide = np.asarray(x, np.float64)
    large = np.abs(exact(wide)) > 1e-3
    for found, expected in ((gelu(x), exact(wide)), (jax.vjp(gelu, x)[1](jnp.ones_like(x))[0], slope(wide))):
        assert found.dtype == jnp.bfloat16
        error = np.abs(np.asarray(found, np.float64) - expected)
        assert np.all(error[large] <= 1.01 * 2**-8 * np.abs(expected[large]) + 1e-6)
    assert (
        np.max(np.abs(np.asarray(jax.nn.gelu(x, False), np.float64) - exact(wide))[large] / np.abs(exact(wide)[large]))
        > 2**-8
    )


def test_gelu_by_tanh_is_that_of_jax():
    x = jnp.asarray(POINTS, jnp.float32)
    for function in (lambda f: f(x), lambda f: jax.grad(lambda x: f(x).sum())(x)):
        np.testing.assert_allclose(
            function(lambda x: gelu(x, True)), function(lambda x: jax.nn.gelu(x, True)), rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize(("platform", "barriers"), [("cpu", 0), ("cuda", 1), ("tpu", 1)])
def test_accelerators_compute_erfc_again_in_the_backward_pass(platform, barriers):
    gradient = jax.jit(jax.grad(lambda x: gelu(x).sum()))
    text = gradient.trace(jnp.zeros(8, jnp.bfloat16)).lower(lowering_platforms=(platform,)).as_text()
    assert text.count("optimization_barrier") == barriers

"""Max-pooling and its gradient equal Flax's (XLA's), ties and padding included."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax.models.pool import max_pool


@pytest.mark.parametrize(("side", "window", "stride", "padding"), [
    (8, 3, 2, ((1, 1), (1, 1))), (9, 3, 2, "SAME"), (8, 2, 2, "VALID"), (7, 3, 1, "SAME"), (11, 3, 2, "VALID"), (8, 2, 3, "VALID"),
])  # fmt: skip
@pytest.mark.parametrize("values", ["distinct", "ties"])
@pytest.mark.full
def test_values_and_gradients_equal_flax(side, window, stride, padding, values):
    x = jax.random.normal(jax.random.key(0), (2, side, side + 1, 3))
    if values == "ties":
        x = jnp.maximum(jnp.round(x), 0)
    arguments = ((window, window), (stride, stride), padding)
    y, backward = jax.vjp(lambda x: max_pool(x, *arguments), x)
    expected, expected_backward = jax.vjp(lambda x: nn.max_pool(x, *arguments), x)
    np.testing.assert_array_equal(y, expected)
    g = jax.random.normal(jax.random.key(1), y.shape)
    np.testing.assert_allclose(backward(g)[0], expected_backward(g)[0], atol=1e-6)


@pytest.mark.full
def test_second_derivatives_and_bfloat16():
    x = jax.random.normal(jax.random.key(0), (2, 6, 6, 3))

    def penalty(pool, x):
        return jnp.sum(jax.grad(lambda x: jnp.sum(jnp.sin(pool(x, (3, 3), (2, 2), "SAME")) ** 2))(x) ** 2)

    ours, flax = (jax.grad(lambda x, pool=pool: penalty(pool, x))(x) for pool in (max_pool, nn.max_pool))
    np.testing.assert_allclose(ours, flax, atol=1e-5)
    half = jax.jit(lambda x: max_pool(x, (2, 2), (2, 2)))(x.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16


def test_nan_stays_nan():
    x = jnp.zeros((1, 4, 4, 1)).at[0, 1, 1].set(jnp.nan)
    assert np.isnan(max_pool(x, (2, 2), (2, 2))[0, 0, 0, 0]) and np.isfinite(max_pool(x, (2, 2), (2, 2))).sum() == 3

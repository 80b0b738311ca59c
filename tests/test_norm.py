"""Batch normalization with its sum and ReLU equals Flax's followed by both, in values, statistics and gradients."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax.models.norm import BatchNorm


def both(relu, with_residual, dtype=jnp.float32, train=True, **fields):
    """Two functions (params, stats, x, residual) -> (y, new stats): ours, and Flax's layers."""
    ours = BatchNorm(use_running_average=not train, relu=relu, dtype=dtype, **fields)
    flax = nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=dtype, **fields)

    def run_ours(params, stats, x, residual):
        return ours.apply({"params": params, "batch_stats": stats}, x, residual if with_residual else None, mutable="batch_stats")

    def run_flax(params, stats, x, residual):
        y, new = flax.apply({"params": params, "batch_stats": stats}, x, mutable="batch_stats")
        y = y + residual if with_residual else y
        return (nn.relu(y) if relu else y), new

    return run_ours, run_flax


def arrays(shape=(4, 5, 6, 7), dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 6)
    width = shape[-1:]
    params = {"scale": 1 + jax.random.normal(keys[0], width), "bias": jax.random.normal(keys[1], width)}
    stats = {"mean": jax.random.normal(keys[2], width), "var": jnp.exp(jax.random.normal(keys[3], width))}
    x, residual = 3 + 2 * jax.random.normal(keys[4], shape, dtype), jax.random.normal(keys[5], shape, dtype)
    return params, stats, x, residual


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("shape", [(4, 5, 6, 7), (16, 3)])
def test_values_statistics_and_gradients_equal_flax(relu, with_residual, shape):
    params, stats, x, residual = arrays(shape)
    g = jax.random.normal(jax.random.key(9), shape)

    def everything(run):
        y, backward, new = jax.vjp(lambda p, x, r: run(p, stats, x, r), params, x, residual, has_aux=True)
        return y, new, backward(g)

    ours, flax = (jax.jit(everything, static_argnums=0)(run) for run in both(relu, with_residual))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), ours, flax)


@pytest.mark.full
def test_second_derivatives_equal_flax():
    params, stats, x, residual = arrays()

    def penalty(run):
        first = jax.grad(lambda p, x: jnp.sum(jnp.sin(run(p, stats, x, residual)[0])), argnums=1)
        return jax.grad(lambda p: jnp.sum(first(p, x) ** 2))(params)

    ours, flax = (penalty(run) for run in both(True, True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), ours, flax)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.full
def test_bfloat16_and_running_statistics_equal_flax(train):
    params, stats, x, residual = arrays(dtype=jnp.bfloat16)
    for (y, new), (expected, expected_new) in [[run(params, stats, x, residual) for run in both(True, False, jnp.bfloat16, train)]]:
        assert y.dtype == jnp.bfloat16
        np.testing.assert_allclose(y.astype(jnp.float32), expected.astype(jnp.float32), rtol=2e-2, atol=2e-2)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), new, expected_new)
    gradient = jax.grad(lambda x: jnp.sum(both(True, True, jnp.bfloat16)[0](params, stats, x, residual)[0].astype(jnp.float32)))(x)
    assert gradient.dtype == jnp.bfloat16


@pytest.mark.parametrize("fields", [{"use_scale": False}, {"use_bias": False}, {"use_scale": False, "use_bias": False}])
def test_without_scale_or_bias(fields):
    params, stats, x, residual = arrays()
    params = {name: value for name, value in params.items() if fields.get(f"use_{name}", True)}
    ours, flax = (run(params, stats, x, residual)[0] for run in both(False, False, **fields))
    np.testing.assert_allclose(ours, flax, rtol=1e-5, atol=1e-5)
    assert set(BatchNorm(use_running_average=False, **fields).init(jax.random.key(0), x).get("params", {})) == set(params)

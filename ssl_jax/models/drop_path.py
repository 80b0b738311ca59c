"""Stochastic depth: residual branches that are left out at random while a network trains (Huang et al. 2016, arXiv:1603.09382)."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def drop_path(x: jax.Array, rate: float | jax.Array, key: jax.Array) -> jax.Array:
    """The branch x [B, ...]: 0 with probability `rate` in [0, 1), else x / (1 - rate), independently for each example.

    Its expectation is x, so inference runs the network without it.
    """
    kept = jax.random.uniform(key, (len(x), *(1,) * (x.ndim - 1))) >= rate
    return jnp.where(kept, x / jnp.asarray(1 - rate, x.dtype), 0)


def rates(rate: float, depth: int) -> jax.Array:
    """float32 [depth]: the rates of the blocks, which rise linearly from 0 to `rate`."""
    return jnp.linspace(0.0, rate, depth, dtype=jnp.float32)

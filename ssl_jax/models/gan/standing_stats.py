"""Moving average of a generator's weights, and batch statistics recomputed for them ("standing statistics")."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from ssl_jax.models.common import run
from ssl_jax.models.norm import BatchNorm

Tree = Any


def update_ema(average: Tree, params: Tree, step: jax.Array, decay: float, start: int) -> Tree:
    """Exponential moving average of weights after `step`; before the step `start` it is a copy of them."""
    return optax.incremental_update(params, average, jnp.where(step < start, 1.0, 1 - decay))


def standing_stats(
    module: nn.Module, params: Tree, state: Tree, batch: Callable[[jax.Array], tuple], key: jax.Array, passes: int = 16
) -> Tree:
    """`state` with batch statistics averaged over `passes` batches (Brock et al. 2019).

    The running averages of training belong to earlier weights, and not to a moving average of the weights.

    Args:
        module: a module whose batch normalizations are `models.norm.BatchNorm`.
        batch: key -> positional arguments of `module`, sampled as for generation.

    Power iterations continue during the passes, so they converge for these weights too. Returns `state` if it has no batch
    statistics.
    """
    if "batch_stats" not in state:
        return state
    empty = jax.tree.map(jnp.zeros_like, state["batch_stats"])  # from zeros, one batch gives (1 - momentum) times its statistics

    def step(carry, key):
        total, others = carry
        _, new = run(module, params, {**others, "batch_stats": empty}, *batch(key), train=True)
        return (jax.tree.map(jnp.add, total, new.pop("batch_stats")), new), None

    others = {name: tree for name, tree in state.items() if name != "batch_stats"}
    (total, others), _ = jax.lax.scan(step, (empty, others), jax.random.split(key, passes))
    share = passes * (1 - BatchNorm.momentum)
    return {**others, "batch_stats": jax.tree.map(lambda x: x / share, total)}

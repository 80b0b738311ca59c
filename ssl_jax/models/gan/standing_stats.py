"""The generator that samples: averaged weights, and batch statistics recomputed with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from ssl_jax.models.common import BatchNorm, run

Tree = Any


def update_ema(average: Tree, params: Tree, step: jax.Array, decay: float, start: int) -> Tree:
    """The exponential average of weights after `step`: a copy of them before the step `start`, from which it decays."""
    return optax.incremental_update(params, average, jnp.where(step < start, 1.0, 1 - decay))


def standing_stats(
    module: nn.Module, params: Tree, state: Tree, batch: Callable[[jax.Array], tuple], key: jax.Array, passes: int = 16
) -> Tree:
    """`state` with batch statistics that are the plain averages of those of `passes` batches (Brock et al. 2019).

    Running averages belong to weights that moved, and to the raw ones where the samples are made by averaged ones.

    Args:
        module: whose batch normalizations are `models.common.BatchNorm`.
        batch: key -> positional arguments of `module`, drawn as for sampling.

    Power iterations go on during the passes and so settle on the weights too. Where there are no batch statistics, `state` comes back.
    """
    if "batch_stats" not in state:
        return state
    empty = jax.tree.map(jnp.zeros_like, state["batch_stats"])  # after one batch: (1 - momentum) times its statistics

    def step(carry, key):
        total, others = carry
        _, moved = run(module, params, {**others, "batch_stats": empty}, *batch(key), train=True)
        return (jax.tree.map(jnp.add, total, moved.pop("batch_stats")), moved), None

    others = {name: tree for name, tree in state.items() if name != "batch_stats"}
    (total, others), _ = jax.lax.scan(step, (empty, others), jax.random.split(key, passes))
    share = passes * (1 - BatchNorm.keywords["momentum"])
    return {**others, "batch_stats": jax.tree.map(lambda x: x / share, total)}

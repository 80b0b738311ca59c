"""The contract between a method and the house: three records of pure functions and arrays, no base class.

A method file (`ssl_jax/methods/<name>.py`) exports one function, `build(config, stages) -> Method`. The engine knows no
method by name; it runs the phases, owns the optimizers, the mesh, the checkpoints and the clock.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from ssl_jax.errors import UserError

Tree = Any  # a pytree of arrays
Batch = Mapping[str, jax.Array]
Metrics = Mapping[str, jax.Array]  # name -> float32 scalar


class Spec(NamedTuple):
    """One input of one example: its shape without the batch, and its type."""

    shape: tuple[int, ...]  # (H, W, 3), (V, H, W, 3), (), (4,), (M, 4), (T,)
    dtype: str = "uint8"  # uint8 images and masks; int32 labels and token ids; float32 boxes, poses, motions

    def batch(self, size: int) -> jax.ShapeDtypeStruct:
        """Of `size` examples."""
        return jax.ShapeDtypeStruct((size, *self.shape), self.dtype)


class State(NamedTuple):
    """The whole run: one pytree, one checkpoint (minus `frozen`).

    There is no random state: every key is `fold_in(root, step, ...)`; and no data position: it is a function of the step.
    """

    step: jax.Array  # int32 scalar, number of steps done
    params: dict[str, Tree]  # {group: tree}; trained; every group is owned by at least one phase
    opt: dict[str, Tree]  # {group: optax state}
    mutable: dict[str, Tree]  # moves but is not differentiated: batch_stats, ema, queue, codebook, center, ...
    frozen: dict[str, Tree]  # fixed: stage 1, perceptual nets; an argument of the step, never a jit constant, never saved


class Phase(NamedTuple):
    """Differentiate `loss` with respect to the groups in `trains`, then update exactly those.

    A simultaneous game has several players: `trains` is a tuple of tuples of groups, `loss` returns a tuple of scalars, one for
    each player, from one forward pass, and every group gets the gradient of its own player's loss.
    """

    name: str  # metric prefix: 'd', 'g', 'ssl'
    trains: tuple[str, ...] | tuple[tuple[str, ...], ...]  # ('net',), or (('discriminator',), ('generator', 'encoder'))
    loss: Callable[[dict, State, Batch, jax.Array], tuple[jax.Array | tuple[jax.Array, ...], tuple[dict, Metrics]]]
    # loss(train, state, batch, key) -> (loss, (mutable_update, metrics)); `train` is {group: params} of `trains`
    repeat: int = 1  # n sub-steps, each on 1/n of the batch (discriminator steps)
    when: Callable[[jax.Array], jax.Array] | None = None  # step -> bool: lazy regularizers, late starts, layer windows


def every(interval: int) -> Callable[[jax.Array], jax.Array]:
    """For `Phase.when`: the last step of every `interval`, so that the line of a step whose number, from 1, is a multiple of it has
    what the phase tells. With the first step of each no line at a round number ever would.

    Raises UserError for an interval below 1.
    """
    if interval < 1:
        raise UserError(f"a phase of config.model has interval={interval}; it must be at least 1 (a weight of 0 leaves the phase out)")
    return lambda step: (step + 1) % interval == 0


class Method(NamedTuple):
    """What `build(config, stages)` returns."""

    inputs: Mapping[str, Spec]  # {'image': Spec((H, W, 3))}: what a batch holds, checked against the data
    init: Callable[[jax.Array, Batch, dict], tuple[dict, dict]]  # (key, batch, frozen) -> (params, mutable)
    phases: tuple[Phase, ...]
    encode: Callable[[dict, dict, jax.Array], dict[str, jax.Array]]
    # (params, mutable, images uint8 [B, H, W, 3]) -> {'pooled': [B, D], 'layer3': [B, h, w, C], ...}, in inference mode;
    # `mutable` holds the frozen stages too, here and in `fns` (see `visible`)
    after: Callable[[State], dict] = lambda state: state.mutable  # teachers and moving averages, once per step
    fns: Mapping[str, Callable] = {}  # optional pure functions: 'views', 'tokens', 'decode', 'sample', ...
    frozen: Mapping[str, Callable[[], Tree]] = {}
    # {name: read}: arrays that only training needs (a perceptual network); the house reads them into `State.frozen`
    couples_batch: bool = False  # the loss mixes examples: gradient accumulation is refused
    notes: Mapping[str, str] = {}  # what the protocol of every evaluation has to name: {'likelihood': 'bernoulli, ...'}


class Stage(NamedTuple):
    """A finished run that another method stands on; its arrays are in `State.frozen[name]` as {'params': ..., 'mutable': ...}."""

    config: Any  # resolved, as it was trained
    method: Method


def inference_state(state: State) -> dict[str, Tree]:
    """What `encode` and `fns` are given as `mutable`: with the frozen stages by their names."""
    return {**state.mutable, **state.frozen}


def loss_groups(phase: Phase) -> tuple[tuple[str, ...], ...]:
    """The groups of each player of `phase`: one player, except in a simultaneous game."""
    return phase.trains if isinstance(phase.trains[0], tuple) else (phase.trains,)


def trained(phase: Phase) -> tuple[str, ...]:
    """All groups that `phase` trains."""
    return tuple(group for player in loss_groups(phase) for group in player)


def groups(method: Method) -> set[str]:
    """The parameter groups that the phases of `method` train."""
    return {group for phase in method.phases for group in trained(phase)}

"""The contract between a method and the house: records of pure functions and arrays, no base class.

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


class ModelFns(NamedTuple):
    """What a model can do beside `encode`; None for what it cannot.

    All are pure functions of (params, mutable, ...): `mutable` is that of `visible`. An argument called `count` is a Python integer,
    static where the function is compiled; all others are arrays. "images" are uint8 [B, H, W, 3] or float32 in [0, 1]; "pictures"
    are float32 [B, h, w, 3] in [0, 1]. Evaluations get this record with `params` and `mutable` bound.
    """

    reconstruct: Callable | None = None  # (params, mutable, images) -> pictures: what the code of an image gives
    traverse: Callable | None = None
    # (params, mutable, images, values [V]) -> float32 [B, Z, V, h, w, 3] in [0, 1]: one latent at a time takes each of the values
    log_prob: Callable | None = None
    # (params, mutable, images, key, count) -> {'elbo': [B], 'iwae': [B], 'dimensions': []}: bounds on log p(image) in nats from
    # `count` draws, and how many values an image has
    token_nll: Callable | None = None
    # (params, mutable, images, labels [B]) -> {'nll': [B], 'tokens': int32 [B, T]}: -log p of all tokens of an image, in nats; a
    # label of -1 is padding
    discriminate: Callable | None = None  # (params, mutable, images) -> float32 logits [B]: how real an image is
    # A tokenizer has these three:
    tokens: Callable | None = None  # (params, mutable, images) -> int32 [B, h, w], below the size of the codebook
    decode: Callable | None = None  # (params, mutable, tokens int32 [B, h, w]) -> pictures
    codebook: Callable | None = None  # (params, mutable) -> float32 [codes, D]


class Sampler(NamedTuple):
    """How a model makes pictures: draw latents, prepare once, sample as often as one likes.

    "latents" are {name: array [N, ...]}: 'z' float32 [N, Z], where there is one vector for a picture; 'label' int32 [N], where
    pictures are of classes; and whatever else `sample` needs. `truncation` is None or a float32 scalar: samples nearer to the middle.
    "pictures" are float32 [N, h, w, 3] in [0, 1].
    """

    latents: Callable  # (key, count) -> latents, `count` of them; `count` is a Python integer, and static where this is compiled
    prepare: Callable
    # (params, mutable, key, truncation=None) -> prepared, a tree: averaged weights, batch statistics of such latents, ...
    sample: Callable  # (prepared, latents, truncation=None) -> pictures; UserError where latents cannot be truncated
    mix: Callable | None = None
    # (prepared, coarse latents, fine latents, layer int32 [], truncation=None) -> pictures: layers before `layer` have the styles of
    # `coarse`, the others those of `fine`
    complete: Callable | None = None  # (prepared, latents, images) -> pictures that begin as `images` do and go on
    between: Mapping[str, Callable] = {}
    # {space: (prepared, start latents, end latents, place float32 [N]) -> float32 [N, h, w, 3] of about [0, 1], not clipped}: pictures
    # at `place` of the way from start (0) to end (1); Karras et al. 2019 measure its length in the spaces 'z' and 'w'


class Method(NamedTuple):
    """What `build(config, stages)` returns."""

    inputs: Mapping[str, Spec]  # {'image': Spec((H, W, 3))}: what a batch holds, checked against the data
    init: Callable[[jax.Array, Batch, dict], tuple[dict, dict]]  # (key, batch, frozen) -> (params, mutable)
    phases: tuple[Phase, ...]
    encode: Callable[[dict, dict, jax.Array], dict[str, jax.Array]]
    # (params, mutable, images uint8 [B, H, W, 3]) -> {'pooled': [B, D], 'layer3': [B, h, w, C], ...}, in inference mode;
    # `mutable` holds the frozen stages too, here and in `fns` (see `visible`)
    views: Callable[[jax.Array, jax.Array], jax.Array] | None = None
    # (images uint8 [B, H, W, 3], key) -> float32 [B, V, h, w, 3] in [0, 1]: the augmented views that training sees;
    # views of several sizes are {group: such an array}
    after: Callable[[State], dict] = lambda state: state.mutable  # teachers and moving averages, once per step
    fns: ModelFns = ModelFns()
    sampler: Sampler | None = None
    encoder: tuple[str, ...] | None = None
    # the network of config.model.encoder: ('net', 'encoder') is its place among the parameters, or, if they have no such group, in
    # `mutable` (an averaged encoder); None for a method that has no such network
    encoder_stats: tuple[str, ...] = ("batch_stats", "encoder")  # the place of its batch statistics in `mutable`, where it has any
    frozen: Mapping[str, Callable[[], Tree]] = {}
    # {name: read}: arrays that only training needs (a perceptual network), read into `State.frozen`
    couples_batch: bool = False  # the loss mixes examples: gradient accumulation is refused
    notes: Mapping[str, str] = {}  # what the protocol of every evaluation has to name: {'likelihood': 'bernoulli, ...'}


class Stage(NamedTuple):
    """A finished run that another method stands on; its arrays are in `State.frozen[name]` as {'params': ..., 'mutable': ...}."""

    config: Any  # resolved, as it was trained
    method: Method


def inference_state(state: State) -> dict[str, Tree]:
    """What `encode`, `fns` and `sampler` are given as `mutable`: with the frozen stages by their names."""
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


def encoder_weights(method: Method, params: Tree, mutable: Tree) -> Tree:
    """The parameters at `Method.encoder`, which must not be None. Raises KeyError where there is no such place."""
    path = method.encoder
    return _at(params if path[0] in params else mutable, path)


def encoder_statistics(method: Method, mutable: Tree) -> Tree:
    """The batch statistics at `Method.encoder_stats`. Raises KeyError where there is no such place."""
    return _at(mutable, method.encoder_stats)


def _at(tree: Tree, path: tuple[str, ...]) -> Tree:
    for name in path:
        tree = tree[name]
    return tree

"""The contract between methods and the engine: records of pure functions and arrays, no base class.

A method file (`ssl_jax/methods/<name>.py`) exports one function, `build(config, stages) -> Method`. The engine knows no
method by name. It runs the phases and owns the optimizers, the mesh, the checkpoints and the timing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from ssl_jax.errors import UserError

Tree = Any  # a pytree of arrays
Batch = Mapping[str, jax.Array]
Metrics = Mapping[str, jax.Array]  # name -> float32 scalar
FEATURES = "features"  # not logged: features [B, V, D] of a training pass, which a loss may return for `with_online_probe`


class Spec(NamedTuple):
    """One input of one example: its shape without the batch, and its type."""

    shape: tuple[int, ...]  # (H, W, 3), (V, H, W, 3), (), (4,), (M, 4), (T,)
    dtype: str = "uint8"  # uint8 images and masks; int32 labels and token ids; float32 boxes, poses, motions

    def batch(self, size: int) -> jax.ShapeDtypeStruct:
        """The shape of this input for `size` examples."""
        return jax.ShapeDtypeStruct((size, *self.shape), self.dtype)


class State(NamedTuple):
    """The whole run: one pytree, one checkpoint (minus `frozen`).

    It holds no random state, since every key is `fold_in(root, step, ...)`, and no position in the data, which follows from the
    step.
    """

    step: jax.Array  # int32 scalar, number of completed steps
    params: dict[str, Tree]  # {group: tree}; at least one phase trains each group
    opt: dict[str, Tree]  # {group: optax state}
    mutable: dict[str, Tree]  # updated without gradients: batch_stats, ema, queue, codebook, center, ...
    frozen: dict[str, Tree]  # never updated: stages, perceptual networks; an argument of the step, not a jit constant; not saved


class Phase(NamedTuple):
    """Differentiate `loss` with respect to the parameter groups in `trains`, then update exactly those groups.

    Simultaneous updates of adversarial networks have several loss groups: `trains` is a tuple of tuples, and `loss` returns a tuple
    of scalars, one per loss group, from one forward pass. Every parameter group gets the gradient of its own loss.
    """

    name: str  # prefix of its metrics: 'd', 'g', 'ssl'
    trains: tuple[str, ...] | tuple[tuple[str, ...], ...]  # ('net',), or (('discriminator',), ('generator', 'encoder'))
    loss: Callable[[dict, State, Batch, jax.Array], tuple[jax.Array | tuple[jax.Array, ...], tuple[dict, Metrics]]]
    # loss(train, state, batch, key) -> (loss, (mutable_update, metrics)); `train` is {group: params} of `trains`
    repeat: int = 1  # n sub-steps, each on 1/n of the batch (discriminator steps)
    when: Callable[[jax.Array], jax.Array] | None = None  # step -> bool, whether the phase runs: lazy regularizers, late starts


def every(interval: int) -> Callable[[jax.Array], jax.Array]:
    """For `Phase.when`: the last step of every `interval` steps.

    Logged steps are multiples of round numbers, counted from 1. The last step of an interval is such a step, so the phase's metrics
    are logged; those of the first step never would be.

    Raises:
        UserError: an interval below 1.
    """
    if interval < 1:
        raise UserError(f"config.model: a phase has interval={interval}; it must be at least 1 (a weight of 0 disables the phase)")
    return lambda step: (step + 1) % interval == 0


class ModelFns(NamedTuple):
    """What a model offers beside `encode`; None for what it does not have.

    All are pure functions of (params, mutable, ...), where `mutable` is the result of `inference_state`. `count` is a Python
    integer and static under jit; all other arguments are arrays. "images" are uint8 [B, H, W, 3] or float32 in [0, 1]; "pictures"
    are float32 [B, h, w, 3] in [0, 1]. Evaluations get this record with `params` and `mutable` bound.
    """

    reconstruct: Callable | None = None  # (params, mutable, images) -> pictures, decoded from the codes of the images
    traverse: Callable | None = None
    # (params, mutable, images, values [V]) -> float32 [B, Z, V, h, w, 3] in [0, 1]: one of Z latents at a time takes each of the
    # values
    log_prob: Callable | None = None
    # (params, mutable, images, key, count) -> {'elbo': [B], 'iwae': [B], 'dimensions': []}: bounds on log p(image) in nats from
    # `count` samples, and the number of values in an image
    token_nll: Callable | None = None
    # (params, mutable, images, labels [B]) -> {'nll': [B], 'tokens': int32 [B, T]}: -log p of all tokens of an image, in nats; a
    # label of -1 is padding
    discriminate: Callable | None = None  # (params, mutable, images) -> float32 logits [B], larger for images that look real
    # A tokenizer has these three:
    tokens: Callable | None = None  # (params, mutable, images) -> int32 [B, h, w], below the size of the codebook
    decode: Callable | None = None  # (params, mutable, tokens int32 [B, h, w]) -> pictures
    codebook: Callable | None = None  # (params, mutable) -> float32 [codes, D]
    # `batch` has the features of `Method.inputs`, with images as above. A pretext task asks about views of each example:
    pretext: Callable | None = None
    # (params, mutable, batch, key) -> {kind of question: {'logits': float32 [B, Q, C], 'answers': int32 [B, Q]}}: Q questions of
    # each kind with C possible answers; a task with a single kind calls it ''
    draw_pretext: Callable | None = None
    # (params, mutable, batch, key) -> {'pictures': float32 [B, 2, h, w, 3] in [0, 1], 'right': bool [B]}: one question of `pretext`
    # about each example, the most likely answer, and whether it is right
    motion: Callable | None = None
    # (params, mutable, batch, key) -> {axis: {'predicted': float32 [B], 'true': float32 [B]}}: the motion between two views
    affinity: Callable | None = None
    # (params, mutable, images) -> {'pmi': float32 [B, N, N], 'corners': int32 [N, 2], 'size': int32 []}: pointwise mutual
    # information in nats of N square patches of each image, with the row and column of their top left pixels
    inpaint: Callable | None = None
    # (params, mutable, images) -> {'pictures': pictures, the images with painted holes; 'removed': bool [B or 1, h, w], the holes}
    # A task on top of a backbone:
    segment: Callable | None = None  # (params, mutable, images) -> float32 logits [B, H, W, classes] for each pixel
    detect: Callable | None = None
    # (params, mutable, images) -> {'boxes': float32 [B, N, 4] as (ymin, xmin, ymax, xmax) in fractions of the image, 'scores':
    # float32 [B, N] in [0, 1], falling; 'labels': int32 [B, N]}: the N best boxes of each image; a score of 0 is padding
    answer: Callable | None = None
    # (params, mutable, batch) -> {'logits': float32 [B, answers], 'attention': float32 [B, h, w], which sums to 1 over h and w}


class Sampler(NamedTuple):
    """How a model generates pictures: sample latents, prepare once, then sample any number of times.

    "latents" are {name: array [N, ...]}: 'z' float32 [N, Z] if there is one vector per picture, 'label' int32 [N] if the model is
    conditional on classes, and whatever else `sample` needs. `truncation` is None or a float32 scalar; smaller values sample nearer
    to the mean. "pictures" are float32 [N, h, w, 3] in [0, 1].
    """

    latents: Callable  # (key, count) -> `count` latents; `count` is a Python integer, static under jit
    prepare: Callable
    # (params, mutable, key, truncation=None) -> prepared, a tree: averaged weights, batch statistics of such latents, ...
    sample: Callable  # (prepared, latents, truncation=None) -> pictures; UserError if the latents cannot be truncated
    mix: Callable | None = None
    # (prepared, coarse latents, fine latents, layer int32 [], truncation=None) -> pictures: layers before `layer` take the styles
    # of `coarse`, the others those of `fine`
    complete: Callable | None = None  # (prepared, latents, images) -> pictures: the first part of `images`, completed
    between: Mapping[str, Callable] = {}
    # {space: (prepared, start latents, end latents, place float32 [N]) -> float32 [N, h, w, 3], about [0, 1], not clipped}:
    # pictures on the path from start (place 0) to end (1); Karras et al. 2019 measure perceptual path lengths in the spaces 'z' and
    # 'w'


class Method(NamedTuple):
    """A method, as `build(config, stages)` returns it."""

    inputs: Mapping[str, Spec]  # {'image': Spec((H, W, 3))}: the features of a batch, checked against the data
    init: Callable[[jax.Array, Batch, dict], tuple[dict, dict]]  # (key, batch, frozen) -> (params, mutable)
    phases: tuple[Phase, ...]
    encode: Callable[[dict, dict, jax.Array], dict[str, jax.Array]]
    # (params, mutable, images uint8 [B, H, W, 3]) -> {'pooled': [B, D], 'layer3': [B, h, w, C], ...}, in inference mode;
    # `mutable` also holds the frozen stages, here and in `fns` (see `inference_state`)
    views: Callable[[jax.Array, jax.Array], jax.Array] | None = None
    # (images uint8 [B, H, W, 3], key) -> float32 [B, V, h, w, 3] in [0, 1], the augmented views of training;
    # for views of several sizes {group: such an array}
    after: Callable[[State], dict] = lambda state: state.mutable  # the new `mutable`: teachers and moving averages, once per step
    fns: ModelFns = ModelFns()
    sampler: Sampler | None = None
    encoder: tuple[str, ...] | None = None
    # path of the network of config.model.encoder in the parameters, such as ('net', 'encoder'); if they have no such group, in
    # `mutable` (an averaged encoder); None for a method without such a network
    encoder_stats: tuple[str, ...] = ("batch_stats", "encoder")  # path of the encoder's batch statistics, if any, in `mutable`
    frozen: Mapping[str, Callable[[], Tree]] = {}
    # {name: read}: arrays that only training needs (a perceptual network), read into `State.frozen`
    couples_batch: bool = False  # the loss mixes examples, so gradient accumulation is refused
    reads: str = ""
    # what the encoder reads of pixels x in [0, 1], if not (x - model.mean) / model.std: for the card of an export
    absent: Mapping[str, str] = {}  # {input: what to do if the data do not have it}, the end of the error message
    checks: Mapping[str, Callable[[Any], str]] = {}
    # {input: (NumPy array of one or several examples) -> what is wrong with it, or ''}: on the host, before a step reads it
    notes: Mapping[str, str] = {}  # added to the protocol of every evaluation: {'likelihood': 'bernoulli, ...'}


class Stage(NamedTuple):
    """A finished run that another method builds on; its arrays are `State.frozen[name]`, {'params': ..., 'mutable': ...}."""

    config: Any  # resolved, as it was trained
    method: Method


def inference_state(state: State) -> dict[str, Tree]:
    """The `mutable` argument of `encode`, `fns` and `sampler`: the mutable state, and the frozen stages by name."""
    return {**state.mutable, **state.frozen}


def loss_groups(phase: Phase) -> tuple[tuple[str, ...], ...]:
    """The parameter groups of each loss of `phase`: one tuple, except with simultaneous adversarial losses."""
    return phase.trains if isinstance(phase.trains[0], tuple) else (phase.trains,)


def trained(phase: Phase) -> tuple[str, ...]:
    """All groups that `phase` trains."""
    return tuple(group for loss_group in loss_groups(phase) for group in loss_group)


def groups(method: Method) -> set[str]:
    """The parameter groups that the phases of `method` train."""
    return {group for phase in method.phases for group in trained(phase)}


def encoder_weights(method: Method, params: Tree, mutable: Tree) -> Tree:
    """The parameters at `Method.encoder`, which must not be None. Raises KeyError if the path does not exist."""
    path = method.encoder
    return _at(params if path[0] in params else mutable, path)


def encoder_statistics(method: Method, mutable: Tree) -> Tree:
    """The batch statistics at `Method.encoder_stats`. Raises KeyError if the path does not exist."""
    return _at(mutable, method.encoder_stats)


def _at(tree: Tree, path: tuple[str, ...]) -> Tree:
    for name in path:
        tree = tree[name]
    return tree

"""What methods share that ask about views and know the answer: rotation, relative patches, jigsaw puzzles, egomotion, co-occurrence.

    views -> features of each view -> one row of features for each question -> logits -> cross-entropy with the answers

`pretext_network` makes the network. A method about single images says only what it asks (`Task`), and `pretext_method` makes the
rest of its `Method`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ssl_jax.augment.pixels import to_float, to_input
from ssl_jax.augment.tiles import standardize, tiles
from ssl_jax.augment.views import make_patch_views, make_views
from ssl_jax.engine.method import Method, ModelFns, Phase, Spec
from ssl_jax.errors import UserError
from ssl_jax.models.backbones.encoders import build_encoder
from ssl_jax.models.build import construct
from ssl_jax.models.common import apply, init_variables
from ssl_jax.models.heads import LinearHead, ProjectionHead
from ssl_jax.objectives.classification import cross_entropy


class Network(NamedTuple):
    """A network that reads views and answers questions about them; `net` and `stats` are {part: tree}.

    Its parts are 'encoder', 'embed' and 'head' (see `pretext_network`) and 'classifier', the linear layer on top.
    """

    init: Callable
    # (4 keys, views float32 [B, V, h, w, 3] in [0, 1], join: features [B, V, D] -> rows [B, Q, E]) -> (net, stats)
    read: Callable  # (net, stats, views, train) -> (features float32 [B, V, D], new statistics)
    answer: Callable  # (net, stats, rows [B, Q, E], train) -> (logits float32 [B, Q, classes], new statistics)
    encode: Callable  # `Method.encode`: (params with the group 'net', mutable, images) -> {layer: array} of the encoder
    reads: str  # `Method.reads`


class Task(NamedTuple):
    """Q questions about V views of each of B images; each has `classes` possible answers."""

    classes: int
    ask: Callable  # (images uint8 [B, H, W, 3], key) -> (views float32 [B, V, h, w, 3] in [0, 1], answers int32 [B, Q])
    join: Callable  # (features [B, V, D], answers [B, Q]) -> what the head reads, [B, Q, E]; answers only arrange a puzzle
    draw: Callable
    # (views, answers [B, Q], given [B, Q]) -> float32 [B, Q, 2, h, w, 3] in [0, 1]: each question, and the `given` answer to it


def one_view(config) -> Callable:
    """(images uint8 [B, H, W, 3], key) -> float32 [B, h, w, 3] in [0, 1], by the only recipe in `config.views`, else UserError."""
    if hasattr(config.views, "keys") or len(config.views) != 1:
        there = "groups" if hasattr(config.views, "keys") else len(config.views)
        raise UserError(f"config.method={config.method!r} asks about one view of an image; config.views has {there}: give one recipe")
    views = make_views(config.views)
    return lambda images, key: views(images, key)[:, 0]


def pretext_network(config, classes: int) -> Network:
    """The network of `config.model`, with `classes` outputs for each question:

    encoder: see `build_encoder`.
    layer: its output that is read; maps are flattened.
    embed: fields of ProjectionHead, with a ReLU on its output, for the features of each view; without widths there is none.
    head: the same for the joined features of each question. A linear layer follows, which starts at zero: the loss is at first
      ln(classes).
    mean and std of the input; or standardize=True: each view, and each image that is encoded, gets mean 0 and deviation 1.
    """
    model = config.model
    encoder = build_encoder(model.encoder, config.dtype)
    embed, head = (construct(ProjectionHead, name, getattr(model, name), dtype=config.dtype) for name in ("embed", "head"))
    classifier = LinearHead(classes)

    def to_network(images):
        return standardize(to_float(images)) if model.get("standardize") else to_input(images, model.mean, model.std)

    def through(part, params, stats, x, train):
        """(output of a ProjectionHead with a ReLU, new statistics); x itself for one without layers."""
        if not part.widths:
            return x, stats
        out, stats = apply(part, params, stats, x, train)
        return jax.nn.relu(out[-1]), stats

    def each_view(views):
        return to_network(views.reshape(-1, *views.shape[2:]))  # all views in one BatchNorm; the batch stays outermost

    def flat(layers):
        if model.layer not in layers:
            raise UserError(f"config.model.layer={model.layer!r} does not exist; the encoder has {', '.join(sorted(layers))}")
        return layers[model.layer].reshape(len(layers[model.layer]), -1)

    def init(keys, views, join):
        x = each_view(views)
        net, stats = {"embed": {}, "head": {}}, {"embed": {}, "head": {}}
        net["encoder"], stats["encoder"] = init_variables(encoder, keys[0], x)
        if embed.widths:
            h, _ = apply(encoder, net["encoder"], stats["encoder"], x, train=True)
            net["embed"], stats["embed"] = init_variables(embed, keys[1], flat(h))
        rows = join(read(net, stats, views, train=True)[0])
        x = rows.reshape(-1, rows.shape[-1])
        if head.widths:
            net["head"], stats["head"] = init_variables(head, keys[2], x)
        x, _ = through(head, net["head"], stats["head"], x, train=True)
        net["classifier"], _ = init_variables(classifier, keys[3], x)
        return net, stats

    def read(net, stats, views, train):
        h, encoder_stats = apply(encoder, net["encoder"], stats["encoder"], each_view(views), train)
        e, embed_stats = through(embed, net["embed"], stats["embed"], flat(h), train)
        return e.reshape(*views.shape[:2], -1), {**stats, "encoder": encoder_stats, "embed": embed_stats}

    def answer(net, stats, rows, train):
        z, head_stats = through(head, net["head"], stats["head"], rows.reshape(-1, rows.shape[-1]), train)
        logits, _ = apply(classifier, net["classifier"], {}, z, train)
        return logits.reshape(*rows.shape[:2], classes), {**stats, "head": head_stats}

    def encode(params, mutable, images):
        net, stats = params["net"], mutable["batch_stats"]
        return apply(encoder, net["encoder"], stats["encoder"], to_network(images), train=False)[0]

    reads = "each image with mean 0 and standard deviation 1 over its pixels and channels" if model.get("standardize") else ""
    return Network(init, read, answer, encode, reads)


def pretext_method(config, task: Task) -> Method:
    """The method that solves `task` with the network of `config.model` (see `pretext_network`)."""
    network = pretext_network(config, task.classes)

    def logits_of(net, stats, views, answers, train):
        """(logits [B, Q, classes], new statistics)"""
        features, stats = network.read(net, stats, views, train)
        return network.answer(net, stats, task.join(features, answers), train)

    def init(key, batch, frozen):
        keys = jax.random.split(key, 5)
        views, answers = task.ask(batch["image"], keys[0])
        net, stats = network.init(keys[1:], views, lambda features: task.join(features, answers))
        return {"net": net}, {"batch_stats": stats}

    def loss(train, state, batch, key):
        views, answers = task.ask(batch["image"], key)
        logits, stats = logits_of(train["net"], state.mutable["batch_stats"], views, answers, train=True)
        value, logs = cross_entropy(logits.reshape(-1, task.classes), answers.ravel())
        return value, ({"batch_stats": stats}, {**logs, "chance": jnp.float32(1 / task.classes)})

    def asked(params, mutable, batch, key):
        """(views, answers, logits) in inference mode."""
        views, answers = task.ask(to_uint8(batch["image"]), key)
        return views, answers, logits_of(params["net"], mutable["batch_stats"], views, answers, train=False)[0]

    def pretext(params, mutable, batch, key):
        _, answers, logits = asked(params, mutable, batch, key)
        return {"": {"logits": logits, "answers": answers}}

    def draw_pretext(params, mutable, batch, key):
        views, answers, logits = asked(params, mutable, batch, key)
        given, rows = jnp.argmax(logits, -1), jnp.arange(len(answers))
        question = rows % answers.shape[1]  # image after image another question
        return {"pictures": task.draw(views, answers, given)[rows, question], "right": (given == answers)[rows, question]}

    return Method(
        inputs={"image": Spec(tuple(config.data.image_shape))},
        init=init,
        phases=(Phase("ssl", ("net",), loss),),
        encode=network.encode,
        views=lambda images, key: task.ask(images, key)[0],
        fns=ModelFns(pretext=pretext, draw_pretext=draw_pretext),
        encoder=("net", "encoder"),
        reads=network.reads,
    )


def mosaic(pieces: jax.Array, rows: int | None = None) -> jax.Array:
    """Tiles [..., N, h, w, 3] of a grid, row by row -> one picture [..., H, W, 3] with gray lines of a pixel.

    The grid has `rows` rows; None: as many as columns.
    """
    *outer, count, height, width, channels = pieces.shape
    rows = rows or math.isqrt(count)
    columns = count // rows
    lined = jnp.pad(pieces, [(0, 0)] * (len(outer) + 1) + [(0, 1), (0, 1), (0, 0)], constant_values=0.5)
    lined = lined.reshape(*outer, rows, columns, height + 1, width + 1, channels).swapaxes(-4, -3)
    return lined.reshape(*outer, rows * (height + 1), columns * (width + 1), channels)


def other_image(features: jax.Array) -> jax.Array:
    """[B, ...] -> the features of another image for each: of the one before it, and for the first of the second.

    Padding is at the end of a batch, so no image meets it while there are two. Raises UserError for a batch of one.
    """
    if len(features) < 2:
        raise UserError("this task compares different images, and a batch has one; give batches of 2 or more")
    return jnp.concatenate([features[1:2], features[:-1]])


def to_uint8(images: jax.Array) -> jax.Array:
    """Images as uint8; floats are in [0, 1]."""
    return images if images.dtype == jnp.uint8 else jnp.round(images * 255).astype(jnp.uint8)


def tile_views(config) -> Callable:
    """(images uint8 [B, H, W, 3], key) -> float32 [B, grid^2, tile, tile, 3] in [0, 1], row by row.

    `config.views`: one recipe for the whole image. `config.model`: grid, tile and jitter (see `augment.tiles`), and
    tile_operations, a recipe for each tile by itself, such as (("drop_colors", dict()),).
    """
    model, view, each = config.model, one_view(config), make_patch_views(config.model.tile_operations)

    def views(images, key):
        keys = jax.random.split(key, 3)
        cut, _ = tiles(view(images, keys[0]), keys[1], model.grid, model.tile, model.jitter)
        return each(cut, keys[2])

    return views

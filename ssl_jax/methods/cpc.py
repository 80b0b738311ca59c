"""Contrastive predictive coding: what an image shows above predicts the features of its patches below.

    view -> overlapping patches -> augment and encode each patch by itself -> grid of latents z
    for each direction: turn the grid, contexts c of the rows up to each row, predictions W_k c of the latents k rows ahead
    InfoNCE: the patch that is there against all other patches of all images of the batch

van den Oord et al. 2018, "Representation learning with contrastive predictive coding" (arXiv:1807.03748), section 3.3, predicts
downwards. Henaff et al. 2020, "Data-efficient image recognition with contrastive predictive coding" (arXiv:1905.09272), section 2 and
appendix A.2, predicts in four directions and normalizes without batch statistics, through which patches would tell about each other.
Predictions start at zero, so the loss starts at the logarithm of the number of patches in the batch.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax.augment.pixels import to_input
from ssl_jax.augment.tiles import grid_patches, join_patches
from ssl_jax.augment.views import make_patch_views, output_size
from ssl_jax.engine.method import Method, ModelFns, Phase, Spec
from ssl_jax.engine.pretext import mosaic, one_view, to_uint8
from ssl_jax.errors import UserError
from ssl_jax.models.backbones.encoders import build_encoder
from ssl_jax.models.build import construct
from ssl_jax.models.common import apply, init_variables
from ssl_jax.models.cpc import ContextNet
from ssl_jax.models.heads import LinearHead
from ssl_jax.objectives.contrastive import patch_info_nce

TURNS = {"down": 0, "left": 1, "up": 2, "right": 3}  # quarter turns, counterclockwise, after which the direction points down
BLANK, FRAME = 0.9, (1.0, 0.55, 0.0)  # of pictures: gray of hidden patches, color around the place in question


def build(config, stages) -> Method:
    """`config.model`: patch and stride in pixels, patch_operations (a recipe for each patch), encoder (see `build_encoder`), context
    (fields of ContextNet), directions (names in TURNS), offsets (rows ahead), target_dim (width of predictions and of projected
    targets; 0: predict the latents themselves), embedding_scale (factor of the predictions), mean and std of the input.
    `config.views`: one recipe for the whole image.
    """
    model, offsets, directions = config.model, tuple(config.model.offsets), tuple(config.model.directions)
    view, each = one_view(config), make_patch_views(model.patch_operations)
    rows, columns = grid = grid_size(config)
    encoder = build_encoder(model.encoder, config.dtype)
    context = construct(ContextNet, "context", model.context, dtype=config.dtype)

    def patches(images, key):
        """uint8 [B, H, W, 3] -> augmented patches [B, rows columns, h, w, 3] in [0, 1]"""
        view_key, patch_key = jax.random.split(key)
        cut = grid_patches(view(images, view_key), model.patch, model.stride)
        return each(cut.reshape(len(cut), rows * columns, *cut.shape[3:]), patch_key)

    def encode_patches(net, stats, x, train):
        """Patches [B, N, h, w, 3] -> (layers of the encoder [B N, ...], latents [B, N, D], new statistics)"""
        x = to_input(x, model.mean, model.std)
        h, stats = apply(encoder, net["encoder"], stats, x.reshape(-1, *x.shape[2:]), train)
        return h, h["pooled"].reshape(*x.shape[:2], -1), stats

    def heads(latents):
        """(projection of targets, predictions for all offsets)"""
        width = model.target_dim or latents.shape[-1]
        return LinearHead(width, zero_init=False), LinearHead(len(offsets) * width)

    def turned(latents, direction):
        return jnp.rot90(latents.reshape(-1, *grid, latents.shape[-1]), TURNS[direction], axes=(1, 2))

    def predict(net, latents, direction):
        """([predictions [B, r - k, c, D] for each offset k], targets [B, r, c, D]) on the turned grid of r x c patches"""
        z, part, (project, ahead) = turned(latents, direction), net[direction], heads(latents)
        c, _ = apply(context, part["context"], {}, z, train=True)
        targets = apply(project, part["project"], {}, z, train=True)[0] if model.target_dim else z
        out = model.embedding_scale * apply(ahead, part["ahead"], {}, c, train=True)[0]
        out = jnp.split(out, len(offsets), axis=-1)
        return [x[:, :-k] for x, k in zip(out, offsets, strict=True)], targets

    def init(key, batch, frozen):
        first, *keys = jax.random.split(key, 1 + len(directions))
        x = to_input(patches(batch["image"], first)[:1], model.mean, model.std)
        net = {}
        net["encoder"], stats = init_variables(encoder, first, x[0])
        latents = apply(encoder, net["encoder"], stats, x[0], train=True)[0]["pooled"][None]
        for direction, own in zip(directions, keys, strict=True):
            z, own, (project, ahead) = turned(latents, direction), jax.random.split(own, 3), heads(latents)
            parts = {"context": context, "ahead": ahead} | ({"project": project} if model.target_dim else {})
            net[direction] = {name: init_variables(part, k, z)[0] for k, (name, part) in zip(own, parts.items(), strict=False)}
        return {"net": net}, {"batch_stats": {"encoder": stats}}

    def loss(train, state, batch, key):
        x = patches(batch["image"], key)
        _, latents, stats = encode_patches(train["net"], state.mutable["batch_stats"]["encoder"], x, train=True)
        found = []
        for direction in directions:
            predictions, targets = predict(train["net"], latents, direction)
            found += [patch_info_nce(x, targets) for x in predictions]
        value, accuracy = (sum(x) / len(found) for x in zip(*((value, logs["accuracy"]) for value, logs in found), strict=True))
        logs = {"accuracy": accuracy, "chance": jnp.float32(1 / (len(x) * rows * columns))}
        return value, ({"batch_stats": {"encoder": stats}}, logs)

    def encode(params, mutable, images):
        """All patches without augmentation: maps lie side by side, 'pooled' is the mean, 'latents' the grid [B, r, c, D]."""
        cut = grid_patches(images, model.patch, model.stride)
        x = cut.reshape(cut.shape[0], -1, *cut.shape[3:])
        h, latents, _ = encode_patches(params["net"], mutable["batch_stats"]["encoder"], x, train=False)
        layers = {name: join_patches(values.reshape(*cut.shape[:3], *values.shape[1:])) for name, values in h.items()}
        return {**layers, "latents": latents.reshape(*cut.shape[:3], -1)}

    def ask(params, mutable, x):
        """Logits [B, Q, rows columns]: which patch of its own image does each prediction mean? For the questions of `places`."""
        _, latents, _ = encode_patches(params["net"], mutable["batch_stats"]["encoder"], x, train=False)
        logits = []
        for direction in directions:
            predictions, targets = predict(params["net"], latents, direction)
            back = jnp.rot90(targets, -TURNS[direction], axes=(1, 2)).reshape(len(x), rows * columns, -1)
            asked = jnp.concatenate([p.reshape(len(x), -1, p.shape[-1]) for p in predictions], 1)
            logits.append(jnp.einsum("bqd,bnd->bqn", asked, back, precision="highest"))
        return jnp.concatenate(logits, 1)

    answers, seen = places(grid, directions, offsets)

    def pretext(params, mutable, batch, key):
        logits = ask(params, mutable, patches(to_uint8(batch["image"]), key))
        return {"": {"logits": logits, "answers": jnp.broadcast_to(jnp.asarray(answers), logits.shape[:2])}}

    def draw_pretext(params, mutable, batch, key):
        """The rows that a context may read, then all patches as strong as their scores; a frame marks the place that is asked for."""
        x = patches(to_uint8(batch["image"]), key)
        one = np.arange(len(x))
        which = 11 * one % len(answers)  # another row, column and offset in each image
        scores = jax.nn.softmax(ask(params, mutable, x)[one, which])
        place = jax.nn.one_hot(answers[which], rows * columns)
        border = np.pad(np.zeros(np.subtract(x.shape[2:4], 2)), 1, constant_values=1)[..., None]

        def picture(strength):
            strength, framed = strength[..., None, None, None], place[..., None, None, None] * border
            faded = strength * x + (1 - strength) * BLANK
            return mosaic(framed * jnp.asarray(FRAME) + (1 - framed) * faded, rows)

        strongest = jnp.max(scores, -1, keepdims=True)
        pictures = [picture(jnp.asarray(seen[which], jnp.float32)), picture(scores / strongest)]
        return {"pictures": jnp.stack(pictures, 1), "right": jnp.argmax(scores, -1) == answers[which]}

    return Method(
        inputs={"image": Spec(tuple(config.data.image_shape))},
        init=init,
        phases=(Phase("ssl", ("net",), loss),),
        encode=encode,
        views=patches,
        fns=ModelFns(pretext=pretext, draw_pretext=draw_pretext),
        encoder=("net", "encoder"),
        couples_batch=True,
    )


def grid_size(config) -> tuple[int, int]:
    """(rows, columns) of the patches of a view. Raises UserError for patches, operations, directions or offsets that do not fit."""
    model, size = config.model, output_size(config.views, config.data.image_shape[-3:-1])
    for name, valid in (("directions", TURNS), ("offsets", model.offsets)):
        given = tuple(model[name])
        if not set(given) <= set(valid) or len(set(given)) < len(given):
            hint = f"choose from {', '.join(TURNS)}" if name == "directions" else "give numbers of rows"
            raise UserError(f"config.model.{name}={given!r}: {hint}, each at most once")
    view = jax.ShapeDtypeStruct((1, *size, 3), "float32")
    rows, columns = jax.eval_shape(lambda x: grid_patches(x, model.patch, model.stride), view).shape[1:3]
    if output_size([model.patch_operations], (model.patch, model.patch)) != (model.patch, model.patch):
        raise UserError(f"config.model.patch_operations change the size of patches; end in ('random_crop', dict(size={model.patch}))")
    most = min(columns if direction in ("left", "right") else rows for direction in model.directions) - 1
    if most < max(model.offsets):
        raise UserError(
            f"config.model.offsets={tuple(model.offsets)!r} reach beyond the grid of {rows} x {columns} patches; "
            f"{f'give offsets of at most {most}, or ' if most else ''}use larger views, smaller patches or a smaller stride"
        )
    return rows, columns


def places(grid, directions, offsets) -> tuple[np.ndarray, np.ndarray]:
    """(answers int32 [Q], seen bool [Q, rows columns]): the place that each prediction means, and the rows up to that of its context.

    Direction by direction, offset by offset, row by row of the turned grid; places are numbered row by row of the grid itself.
    """
    answers, seen = [], []
    for direction in directions:
        numbers = np.rot90(np.arange(grid[0] * grid[1]).reshape(grid), TURNS[direction])
        for offset in offsets:
            for row, column in np.ndindex(len(numbers) - offset, numbers.shape[1]):
                answers.append(numbers[row + offset, column])
                seen.append(np.isin(np.arange(numbers.size), numbers[: row + 1]))
    return np.array(answers, np.int32), np.array(seen)

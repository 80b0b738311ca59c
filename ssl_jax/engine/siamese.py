"""What methods share that compare embeddings of two views: encoder, projector and predictor, and a teacher that follows them.

The networks see all views of a batch in one pass, so BatchNorm normalizes them together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from ssl_jax.augment.pixels import to_input
from ssl_jax.augment.views import make_views
from ssl_jax.engine.durations import to_steps
from ssl_jax.engine.method import State, Tree
from ssl_jax.errors import UserError
from ssl_jax.models.backbones.encoders import build_encoder
from ssl_jax.models.build import construct
from ssl_jax.models.common import apply, init_variables
from ssl_jax.models.heads import ProjectionHead

NO_LAYERS = {"widths": ()}


class Siamese(NamedTuple):
    """Pure functions of the networks of `config.model`.

    Views are [B, V, h, w, 3] with values in [0, 1], or {group: such an array} for several sizes. V counts those of all groups, in
    order.
    """

    first: int  # number of views of the first group
    groups: tuple[str, ...]  # of the parameters: 'net', and 'predictor' if it has layers
    views: Callable  # (images uint8 [B, H, W, 3], key) -> views
    init: Callable  # (key, views) -> ({'net': {'encoder', 'projector'}[, 'predictor']}, batch statistics of these parts)
    embed: Callable
    # (net, statistics, views, train, key=None) -> (projections float32 [B, V, D], features [B, V, F], new statistics); without a key
    # no path is dropped
    predict: Callable  # (params of the groups, statistics, projections [B, V, D], train) -> (predictions [B, V, D], new statistics)
    encode: Callable  # as `Method.encode`: features of the encoder, and 'projection'


def siamese(config, crops: bool = False, head: Callable = ProjectionHead) -> Siamese:
    """`config.model`: encoder (see `build_encoder`), projector and perhaps predictor (fields of ProjectionHead), mean and std of the
    input. A predictor without widths predicts the projection itself.

    Args:
        crops: any number of views, also of several sizes, but at least two in the first group; else exactly two.
        head: the class of the projector.

    Raises:
        UserError: another number of views, a batch of one image, or an impossible network.
    """
    model, name = config.model, config.method
    if config.batch_size < 2:
        raise UserError(f"config.batch_size={config.batch_size}: {name} compares the images of a batch; give 2 or more")
    sizes = hasattr(config.views, "keys")
    first = len(next(iter(config.views.values()), ())) if sizes else len(config.views)
    if crops and first < 2:
        raise UserError(f"config.method={name!r} compares views, and the first group of config.views has {first}; give two or more")
    if not crops and (sizes or first != 2):
        there = "groups" if sizes else first
        raise UserError(f"config.method={name!r} compares two views of an image, and config.views has {there}; give two recipes")
    views = make_views(config.views)
    encoder = build_encoder(model.encoder, config.dtype)
    calm = build_encoder({**model.encoder, "drop_path": 0.0}, config.dtype) if "drop_path" in model.encoder else encoder
    projector = construct(head, "projector", model.projector, dtype=config.dtype)
    predictor = construct(ProjectionHead, "predictor", model.get("predictor", NO_LAYERS), dtype=config.dtype)

    def forward(net, stats, x, train, key=None):
        h, encoder_stats = apply(calm if key is None else encoder, net["encoder"], stats["encoder"], x, train, key)
        z, projector_stats = apply(projector, net["projector"], stats["projector"], h["pooled"], train)
        return h, z[-1], {**stats, "encoder": encoder_stats, "projector": projector_stats}

    def to_network(views):
        return to_input(views.reshape(-1, *views.shape[2:]), model.mean, model.std)

    def by_size(views):
        return list(views.values()) if hasattr(views, "values") else [views]

    def init(key, views):
        keys, x = jax.random.split(key, 3), to_network(by_size(views)[0])
        net, stats = {}, {}
        net["encoder"], stats["encoder"] = init_variables(calm, keys[0], x)
        h, _ = apply(calm, net["encoder"], stats["encoder"], x, train=True)
        net["projector"], stats["projector"] = init_variables(projector, keys[1], h["pooled"])
        if not predictor.widths:
            return {"net": net}, stats
        params, of_predictor = init_variables(predictor, keys[2], forward(net, stats, x, train=True)[1])
        return {"net": net, "predictor": params}, {**stats, "predictor": of_predictor}

    def embed(net, stats, views, train, key=None):
        projections, features = [], []
        for i, of_a_size in enumerate(by_size(views)):  # one pass for each
            drop = None if key is None else jax.random.fold_in(key, i)
            h, z, stats = forward(net, stats, to_network(of_a_size), train, drop)
            projections.append(z.reshape(*of_a_size.shape[:2], -1))
            features.append(h["pooled"].reshape(*of_a_size.shape[:2], -1))
        return jnp.concatenate(projections, 1), jnp.concatenate(features, 1), stats

    def predict(params, stats, z, train):
        if not predictor.widths:
            return z, stats
        p, of_predictor = apply(predictor, params["predictor"], stats["predictor"], z.reshape(-1, z.shape[-1]), train)
        return p[-1].reshape(z.shape), {**stats, "predictor": of_predictor}

    def encode(params, mutable, images):
        h, z, _ = forward(params["net"], mutable["batch_stats"], to_input(images, model.mean, model.std), train=False)
        return {**h, "projection": z}

    return Siamese(first, ("net", "predictor") if predictor.widths else ("net",), views, init, embed, predict, encode)


def enqueue(queue: dict, rows: jax.Array) -> dict:
    """{'rows': [K, ...], 'next': int32} with the oldest rows replaced by `rows` [N, ...], where N divides K."""
    start = queue["next"]
    return {
        "rows": jax.lax.dynamic_update_slice_in_dim(queue["rows"], rows, start, 0),
        "next": (start + len(rows)) % len(queue["rows"]),
    }


def new_teacher(params: Tree, stats: Tree) -> Tree:
    """A copy of encoder and projector with batch statistics of its own, for `State.mutable['teacher']`."""
    own = {part: stats[part] for part in params["net"]}
    return jax.tree.map(jnp.copy, {"net": params["net"], "batch_stats": own})


def follow(momentum: Callable[[jax.Array], jax.Array]) -> Callable[[State], dict]:
    """`Method.after`: teacher <- m teacher + (1 - m) student, with the student's new parameters and m = momentum(step).

    Batch statistics are those of the teacher's own passes. BYOL and DINO update the teacher behind the optimizer, MoCo before the
    next forward pass; both are this, since the student does not change in between.
    """

    def after(state):
        teacher = state.mutable["teacher"]
        net = optax.incremental_update(state.params["net"], teacher["net"], 1 - momentum(state.step))
        return {**state.mutable, "teacher": {**teacher, "net": net}}

    return after


def momentum_schedule(config) -> Callable[[jax.Array], jax.Array]:
    """`config.model.momentum` at the first step, rising to 1 over the run as a half cosine with `momentum_schedule='cosine'`.

    Grill et al. 2020 (BYOL), section 3.3; Chen et al. 2021 (MoCo v3), section 4.1. 'linear' rises along a line (I-JEPA), and 'constant'
    keeps it.
    """
    model = config.model
    start, total = model.momentum, to_steps(config.total, "config.total", config.batch_size, config.data.examples)
    shapes = {
        "cosine": lambda step: 1 - (1 - start) * (jnp.cos(math.pi * step / total) + 1) / 2,
        "linear": lambda step: start + (1 - start) * step / total,
        "constant": lambda step: jnp.float32(start),
    }
    if model.momentum_schedule not in shapes:
        raise UserError(f"config.model.momentum_schedule={model.momentum_schedule!r} is unknown; choose {', '.join(shapes)}")
    return shapes[model.momentum_schedule]

"""The pretrained encoder below a task: frozen, or copied and trained with the task.

`config.stages.backbone` names it: a run of any method, or a file of foreign weights. A frozen backbone is read as `Method.encode`
reads it, with its own colors and sizes. A trained one starts as a copy of its encoder and is normalized by the batches of the task.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax

from ssl_jax.augment.pixels import to_float, to_input
from ssl_jax.augment.tiles import standardize
from ssl_jax.engine.method import Stage, encoder_statistics, encoder_weights
from ssl_jax.errors import UserError
from ssl_jax.models.backbones.encoders import build_encoder
from ssl_jax.models.common import apply, init_variables

MODES = ("frozen", "trained")


class Backbone(NamedTuple):
    """`net` and `stats` are {part: tree} of a method; a trained backbone is their part 'backbone', a frozen one has none."""

    init: Callable  # (frozen: the stages, as in `Method.init`) -> (net, stats): copies of the encoder's weights and statistics
    read: Callable
    # (net, stats, frozen, images uint8 or float32 in [0, 1] [B, H, W, 3], train[, key]) -> ({layer: array} of the encoder, new
    # stats); `frozen` is `State.frozen` in a loss and `mutable` in `encode` and `fns`; `key` for `config.model.drop_path`
    encoder: tuple[str, ...] | None  # for `Method.encoder`
    encoder_stats: tuple[str, ...]


def encoder_model(config):
    """The part of a resolved config with `encoder`, `mean` and `std`: `config.model`, or that of the run whose encoder it trains on."""
    if "encoder" in config.model or "backbone" not in config.get("stages", {}):
        return config.model
    return encoder_model(config.stages.backbone.config)


def open_backbone(config, stages: Mapping[str, Stage]) -> Backbone:
    """The stage 'backbone', by `config.model.backbone`: 'frozen' or 'trained'.

    Raises:
        UserError: no such mode or stage; or the encoder cannot be trained, because it does not read plain images; or a frozen one
            is to drop paths.
    """
    mode, stage = config.model.backbone, stages["backbone"]
    if mode not in MODES:
        raise UserError(f"config.model.backbone={mode!r} is unknown; choose {' or '.join(MODES)}")
    if mode == "frozen" and config.model.get("drop_path"):
        raise UserError(f"config.model.drop_path={config.model.drop_path} needs config.model.backbone='trained'; give 0 if 'frozen'")
    if mode == "frozen":
        return _frozen(stage)
    method, model = stage.method, encoder_model(stage.config)
    if method.encoder is None or (method.reads and not model.get("standardize")):
        what = f"reads {method.reads}" if method.reads else "is not a single network"
        raise UserError(f"config.model.backbone='trained': the encoder of {stage.config.method!r} {what}; give 'frozen'")

    def init(frozen):
        weights = frozen["backbone"]
        try:
            stats = encoder_statistics(method, weights["mutable"])
        except KeyError:  # an encoder without batch statistics
            stats = {}
        return {"backbone": encoder_weights(method, weights["params"], weights["mutable"])}, {"backbone": stats}

    return _of_encoder(init, "backbone", _encoder(model, config), model)


def own_encoder(config) -> Backbone:
    """An encoder of `config.model.encoder` that starts at random, the part 'encoder'; its `init` takes (key, images)."""
    model = config.model
    encoder = _encoder(model, config)

    def init(key, images):
        params, stats = init_variables(encoder, key, images)
        return {"encoder": params}, {"encoder": stats}

    return _of_encoder(init, "encoder", encoder, model)


def _encoder(model, config):
    """The network of `model.encoder`, with the stochastic depth of the task."""
    rate = config.model.get("drop_path", 0.0)
    return build_encoder({**model.encoder, **({"drop_path": rate} if rate else {})}, config.dtype)


def _of_encoder(init, part: str, encoder, model) -> Backbone:
    """The backbone whose weights are `part` and whose input is that of `model`."""

    def read(net, stats, frozen, images, train, key=None):
        x = standardize(to_float(images)) if model.get("standardize") else to_input(images, model.mean, model.std)
        layers, new = apply(encoder, net[part], stats[part], x, train, key)
        return layers, {**stats, part: new}

    return Backbone(init, read, ("net", part), ("batch_stats", part))


def _frozen(stage: Stage) -> Backbone:
    def read(net, stats, frozen, images, train, key=None):
        weights = frozen["backbone"]
        layers = stage.method.encode(weights["params"], weights["mutable"], images)
        # By name, because a tree would be sorted, and the last map is looked for by its place.
        return {name: jax.lax.stop_gradient(x) for name, x in layers.items()}, stats

    return Backbone(lambda frozen: ({}, {}), read, None, ("batch_stats", "backbone"))


def feature_map(layers: Mapping[str, jax.Array], name: str) -> jax.Array:
    """The maps [B, h, w, C] called `name`; '' is the last layer with maps (of a ViT its normalized patches).

    Raises:
        UserError: there is no such layer, or it has no rows and columns.
    """
    maps = [key for key, x in layers.items() if x.ndim == 4]
    if not maps:
        raise UserError(f"config.model.layer: the backbone has no maps but {_listing(layers)}; take another encoder")
    name = name or maps[-1]
    if name not in maps:
        raise UserError(f"config.model.layer={name!r} is no map of the backbone; it has {_listing({k: layers[k] for k in maps})}")
    return layers[name]


def _listing(layers: Mapping[str, jax.Array]) -> str:
    return ", ".join(f"{name} {tuple(x.shape[1:])}" for name, x in layers.items())

"""Detection: where the objects are and what they are, on the maps of a pretrained backbone, by a head of one stage.

The default head predicts centers (Zhou et al. 2019, "Objects as points", arXiv:1904.07850): a heat map for each class, and at each
place a size and an offset. The other is FCOS (Tian et al. 2019, arXiv:1904.01355), with places of several strides. Evaluations that
compare backbones train the same head on each.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax

from ssl_jax.engine.backbone import feature_map, open_backbone
from ssl_jax.engine.method import Method, ModelFns, Phase, Spec
from ssl_jax.errors import UserError
from ssl_jax.models.build import build as build_by_name
from ssl_jax.models.common import create, run
from ssl_jax.models.tasks.detection import Fcos, Points
from ssl_jax.objectives import detection

IGNORED = "box_ignored"  # optional input: objects that are neither targets nor background


class Head(NamedTuple):
    """A detector: outputs of `net`, losses by name, and the boxes that it finds."""

    net: Points | Fcos
    losses: Callable  # (outputs, targets, shapes of the maps) -> {name: loss}
    find: Callable  # (outputs, shapes of the maps, most) -> `ModelFns.detect`


def points(size, classes: int, dtype, width: int = 64, stride: int = 4) -> Head:
    """width and stride: fields of `Points`."""
    return Head(
        Points(classes, width, stride, dtype),
        lambda outputs, targets, shapes: detection.point_losses(outputs, targets),
        lambda outputs, shapes, most: detection.find_points(outputs, most),
    )


def fcos(size, classes: int, dtype, width: int = 64, towers: int = 2, reach=(4.0, 10.0), candidates=1000, overlap=0.6) -> Head:
    """width and towers: fields of `Fcos`; reach: half diagonals of the boxes of a map, in strides; candidates and overlap: of the
    suppression.
    """
    return Head(
        Fcos(classes, width, towers, dtype),
        lambda outputs, targets, shapes: detection.fcos_losses(outputs, targets, detection.grid_of(shapes, size, reach), size),
        lambda outputs, shapes, most: detection.find_fcos(outputs, detection.grid_of(shapes, size, reach), candidates, overlap, most),
    )


HEADS = {"points": points, "fcos": fcos}


def build(config, stages) -> Method:
    """`config.model`:

    backbone: 'frozen' or 'trained', of `config.stages.backbone` (see `open_backbone`).
    maps: layers of the backbone that the head reads, from fine to coarse.
    head: a name in `HEADS` and its fields.
    weights: {name: weight} of the losses of the head.
    objects: the most objects of an image in the data.
    detections: the most boxes that `detect` gives for an image.

    The data need 'boxes' and 'box_label'; `config.data.features` renames others. 'box_ignored' is read if it is renamed, too.
    """
    model, shape = config.model, tuple(config.data.image_shape)
    size, backbone = shape[-3:-1], open_backbone(config, stages)
    head = build_by_name(HEADS, "head", model.head, size=size, classes=classes_of(config), dtype=config.dtype)
    ignored = {IGNORED: Spec((model.objects,), "bool")} if IGNORED in config.data.features else {}

    def forward(net, stats, frozen, images, train):
        """(outputs of the head, shapes of the maps, layers of the backbone, new statistics)"""
        layers, stats = backbone.read(net, stats, frozen, images, train)
        maps = from_fine_to_coarse(layers, model.maps)
        outputs, own = run(head.net, net["head"], {"batch_stats": stats["head"]}, maps, size, train=train)
        return outputs, [x.shape[1:3] for x in maps], layers, {**stats, "head": own["batch_stats"]}

    def init(key, batch, frozen):
        net, stats = backbone.init(frozen)
        layers, _ = backbone.read(net, stats, frozen, batch["image"], train=False)
        params, own = create(head.net, key, from_fine_to_coarse(layers, model.maps), size)
        return {"net": {**net, "head": params}}, {"batch_stats": {**stats, "head": own["batch_stats"]}}

    def loss(train, state, batch, key):
        stats = state.mutable["batch_stats"]
        outputs, shapes, _, stats = forward(train["net"], stats, state.frozen, batch["image"], train=True)
        targets = detection.targets_of(batch["boxes"], batch["box_label"], batch["boxes_valid"], batch.get(IGNORED))
        terms = head.losses(outputs, targets, shapes)
        logs = {**terms, "objects": targets.usable.sum(1).mean()}
        return sum(model.weights[name] * term for name, term in terms.items()), ({"batch_stats": stats}, logs)

    def encode(params, mutable, images):
        return backbone.read(params["net"], mutable["batch_stats"], mutable, images, train=False)[0]

    def detect(params, mutable, images):
        outputs, shapes, *_ = forward(params["net"], mutable["batch_stats"], mutable, images, train=False)
        return head.find(outputs, shapes, model.detections)

    return Method(
        inputs={
            "image": Spec(shape),
            "boxes": Spec((model.objects, 4), "float32"),
            "boxes_valid": Spec((model.objects,), "bool"),
            "box_label": Spec((model.objects,), "int32"),
            **ignored,
        },
        init=init,
        phases=(Phase("detection", ("net",), loss),),
        encode=encode,
        fns=ModelFns(detect=detect),
        encoder=backbone.encoder,
        encoder_stats=backbone.encoder_stats,
        reads="what its backbone reads, see config.stages.backbone",
        couples_batch=True,  # sums are over the objects of the batch
    )


def classes_of(config) -> int:
    """Raises UserError if neither the data nor the config say how many classes there are."""
    classes = config.data.get("classes", {}).get("box_label")
    if not classes:
        raise UserError(
            f"data {config.data.name!r} do not say how many classes 'box_label' has; give --config.data.classes.box_label=N"
        )
    return classes


def from_fine_to_coarse(layers, names) -> list[jax.Array]:
    """The maps [B, h, w, C] called `names`. Raises UserError if one does not exist, or is finer than the one before."""
    maps = [feature_map(layers, name) for name in names]
    sizes = [x.shape[1:3] for x in maps]
    if any(one < other for one, other in itertools.pairwise(sizes)):
        raise UserError(f"config.model.maps={tuple(names)} have the sizes {sizes}; give them from fine to coarse")
    return maps

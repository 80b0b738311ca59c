"""Semantic segmentation: a class for each pixel, from the maps of a pretrained encoder.

Long et al. 2015, "Fully convolutional networks for semantic segmentation" (arXiv:1411.4038). A head reads maps of the encoder, and its
logits are resized to the image before the loss. With a frozen encoder and the linear head this is the linear protocol of DINOv2
(arXiv:2304.07193); with a trained one it is the transfer of MoCo (arXiv:1911.05722).
"""

from __future__ import annotations

import jax
import numpy as np

from ssl_jax.augment.views import in_place_view
from ssl_jax.engine.backbone import feature_map, open_backbone
from ssl_jax.engine.method import Method, ModelFns, Phase, Spec
from ssl_jax.errors import UserError
from ssl_jax.models.common import create, run
from ssl_jax.models.hypercolumns import read_maps
from ssl_jax.models.tasks.segmentation import build_head, side_by_side, upsample
from ssl_jax.objectives.classification import pixel_cross_entropy


def build(config, stages) -> Method:
    """`config.model`: backbone ('frozen' or 'trained'), maps (names of its layers, side by side; ("last",) is the last one), head (a
    name in `HEADS` and its fields), classes, and ignore, the label of pixels without a class. `config.views`: one recipe of colors.
    """
    model, shape = config.model, tuple(config.data.image_shape)
    if not model.classes:
        raise UserError("config.model.classes is not set; give the number of classes of the masks, --config.model.classes=N")
    if len(shape) != 3:
        raise UserError("config.method='segmentation' reads one crop of an image; give config.data.ops random_resized_crop")
    backbone = open_backbone(config, stages)
    head = build_head(model.head, model.classes, config.dtype)
    view = in_place_view(config.views)

    def maps_of(layers):
        maps = [feature_map(layers, "")] if tuple(model.maps) == ("last",) else read_maps(layers, model.maps)
        return side_by_side(maps)

    def init(key, batch, frozen):
        net, stats = backbone.init(frozen)
        layers, _ = backbone.read(net, stats, frozen, view(batch["image"], key)[:, 0], train=True)
        net["head"], state = create(head, key, maps_of(layers))
        return {"net": net}, {"batch_stats": {**stats, "head": state["batch_stats"]}}

    def logits_of(net, stats, frozen, images, train, noise=None):
        """(logits [B, H, W, classes], new statistics)"""
        layers, new = backbone.read(net, stats, frozen, images, train)
        logits, state = run(head, net["head"], {"batch_stats": stats["head"]}, maps_of(layers), train=train, noise=noise)
        return upsample(logits, images.shape[1:3]), {**new, "head": state["batch_stats"]}

    def loss(train, state, batch, key):
        of_view, noise = jax.random.split(key)
        images = view(batch["image"], of_view)[:, 0]
        logits, stats = logits_of(train["net"], state.mutable["batch_stats"], state.frozen, images, True, noise)
        value, logs = pixel_cross_entropy(logits, batch["mask"][..., 0], model.ignore)
        return value, ({"batch_stats": stats}, logs)

    def encode(params, mutable, images):
        return backbone.read(params["net"], mutable["batch_stats"], mutable, images, False)[0]

    def segment(params, mutable, images):
        return logits_of(params["net"], mutable["batch_stats"], mutable, images, False)[0]

    return Method(
        inputs={"image": Spec(shape), "mask": Spec((*shape[:2], 1))},
        init=init,
        phases=(Phase("seg", ("net",), loss),),
        encode=encode,
        views=view,
        fns=ModelFns(segment=segment),
        encoder=backbone.encoder,
        encoder_stats=backbone.encoder_stats,
        reads=stages["backbone"].method.reads,
        couples_batch=True,  # the loss is a mean over the valid pixels of the whole batch
        absent={"mask": "name the mask of each image, --config.data.features.mask=NAME"},
        checks={"mask": lambda masks: wrong_ids(masks, model.classes, model.ignore)},
    )


def wrong_ids(masks: np.ndarray, classes: int, ignore: int) -> str:
    """What is wrong with the class ids of masks (uint8), '' if nothing is."""
    ids = np.flatnonzero(np.bincount(masks.ravel()))  # every batch is looked at, and sorting takes three times as long
    wrong = ids[(ids >= classes) & (ids != ignore)]
    if not len(wrong):
        return ""
    return (
        f"has class id {wrong[0]}, and config.model.classes={classes} with config.model.ignore={ignore} allow 0 to {classes - 1} and"
        f" {ignore}; give the number of classes, or the label to ignore"
    )

"""The classes of pixels as the model predicts them, against true masks: intersection over union and accuracy.

The measures of Long et al. 2015 (arXiv:1411.4038, section 5). Sums are over the pixels of all test images, at the size of the images
that the model sees (`config.data.eval_ops`).
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax.engine.pictures import grid
from ssl_jax.errors import UserError
from ssl_jax.evals.context import Context, Result
from ssl_jax.evals.evaluator import Evaluator, Option
from ssl_jax.evals.lib import confusion
from ssl_jax.evals.lib.features import side_by_side

SHOWN = 8  # images of the picture
VOID, WRONG = (255, 255, 255), (214, 39, 40)


def prepare(context: Context, *, names: Sequence[str], **_) -> None:
    """UserError before training: names of another number of classes, or images that are too large to count exactly."""
    *_, height, width, classes = jax.eval_shape(context.model.fns.segment, context.images()).shape
    if names and len(names) != classes:
        raise UserError(f"the evaluation 'segmentation' has {len(names)} names for {classes} classes; give one for each, or none")
    if height * width > confusion.MOST_PIXELS:
        raise UserError(f"the evaluation 'segmentation' counts at most {confusion.MOST_PIXELS} pixels of an image; use eval_ops")


def evaluate(
    context: Context, *, examples: int | None = None, mask: str = "mask", ignore: int = 255, names: Sequence[str] = ()
) -> Result:
    """All test images, or the first `examples`; everything in percent. Pixels with the label `ignore` count nowhere.

    miou: mean intersection over union of the classes that occur in the true masks; other classes are left out.
    accuracy: share of the pixels that are right. class_accuracy: mean of that share over the classes that occur.
    miou_majority, accuracy_majority: the same if every pixel had the most frequent class of these masks.
    iou_NAME: of each class that occurs, by its name or number.
    """
    shapes = {}

    def rows(images, masks):
        logits = context.model.fns.segment(images)
        found, true = jnp.argmax(logits, -1), masks[..., 0]
        shapes.update(classes=logits.shape[-1], image=images.shape[1:])
        return {
            "counts": confusion.counts(true, found, logits.shape[-1], ignore).reshape(len(images), -1),
            "pictures": side_by_side(images, true, found),
        }

    found = context.encode_with(rows, "test", "counts", examples, (mask,)).x
    classes = shapes["classes"]
    each = found.reshape(len(found), classes + 1, classes).astype(np.int64)
    wrong = np.flatnonzero(each[:, classes].any(1))
    if len(wrong):
        raise UserError(
            f"test image {wrong[0]} has a {mask!r} with a class id from {classes} on that is not ignore={ignore}, and the model has"
            f" {classes} classes; give the option ignore, or correct the masks"
        )
    matrix = each[:, :classes].sum(0)
    if not matrix.any():
        raise UserError(f"no pixel of {context.name('test', len(found))} has a class but ignore={ignore}; give another label to ignore")
    metrics = confusion.measures(matrix, names)
    shown = context.encode_with(rows, "test", "pictures", min(SHOWN, len(found)), (mask,)).x
    height, width, channels = shapes["image"]
    images, true, own = np.split(shown, np.cumsum([height * width * channels, height * width]), axis=1)
    columns = [
        column(image.reshape(height, width, channels), *(x.reshape(height, width).astype(int) for x in pair), classes, ignore)
        for image, *pair in zip(images, true, own, strict=True)
    ]
    protocol = (
        f"segmentation of {context.name('test', len(found))} at {height}x{width} pixels, {classes} classes of {mask}, ignore={ignore}; "
        f"IoU of the {int((matrix.sum(1) > 0).sum())} classes that occur"
    )
    return Result(metrics, protocol, grid(np.stack(columns, 1)))


EVALUATOR = Evaluator(
    evaluate,
    {
        "examples": Option("number of test images, the first ones; None: all", least=1),
        "mask": Option("feature with the true class of each pixel"),
        "ignore": Option("label of pixels without a class", least=0, most=255),
        "names": Option("names of the classes, for the metrics; empty: their numbers"),
    },
    needs=("segment",),
    data=("mask",),
    prepare=prepare,
)


def palette(classes: int) -> np.ndarray:
    """uint8 [classes, 3]: colors that differ, by golden steps around the circle of hues at three levels of light."""
    hues = (0.6 + 0.618034 * np.arange(classes)) % 1
    light = np.resize([0.85, 0.6, 1.0], classes)[:, None]
    around = np.abs((6 * hues[:, None] + np.array([3, 1, 5])) % 6 - 3) - 1  # red, green and blue of a hue, as in HSV
    return np.round(255 * light * (0.25 + 0.75 * np.clip(around, 0, 1))).astype(np.uint8)


def column(image, true, found, classes: int, ignore: int) -> np.ndarray:
    """uint8 [4, H, W, 3]: the image, its true classes (white: ignored), the predicted ones, and red where they are wrong."""
    image, valid = image.astype(np.uint8), (true != ignore)[..., None]
    image = np.broadcast_to(image, (*image.shape[:2], 3))
    colors = palette(classes)
    error = np.where(valid & (true != found)[..., None], WRONG, image // 2 + 96)
    error = np.where(valid, error, VOID)
    return np.stack([image, np.where(valid, colors[np.where(valid[..., 0], true, 0)], VOID), colors[found], error]).astype(np.uint8)

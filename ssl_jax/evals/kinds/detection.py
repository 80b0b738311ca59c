"""Average precision of the boxes that a detector finds in test images, by COCO's rules and, on demand, by VOC's."""

from __future__ import annotations

import colorsys
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

from ssl_jax.engine.pictures import grid
from ssl_jax.errors import UserError
from ssl_jax.evals.context import Context, Result
from ssl_jax.evals.evaluator import Evaluator, Option
from ssl_jax.evals.lib import average_precision
from ssl_jax.evals.lib.average_precision import Found, Truth
from ssl_jax.evals.lib.features import side_by_side

BOXES = ("boxes", "boxes_valid", "box_label")
IGNORED = "box_ignored"
SHOWN, LEAST, SIDE = 8, 0.3, 192  # images of the picture, their least score of a box, their least height in pixels


def prepare(context: Context, **_) -> None:
    """UserError before training where a split has no object."""
    for split in ("train", "test"):
        if not any(context.columns(split, BOXES[1:2], count)["boxes_valid"].any() for count in (256, 2**31 - 1)):
            raise UserError(
                f"the evaluation 'detection' needs objects, and no example of {context.name(split, 0).removesuffix('(0)')} has one; "
                "choose another split, or the feature with the boxes: --config.data.features.boxes=NAME"
            )


def evaluate(
    context: Context, *, examples: int | None = None, voc: Literal["none", "11_points", "all_points"] = "none"
) -> Result:
    """The first `examples` test images; None: all. In percent, means over the classes that have objects.

    ap: average precision, the mean over overlaps (intersection over union) of 0.5, 0.55, ..., 0.95.
    ap50, ap75: that at an overlap of 0.5 and of 0.75.
    ap_small, ap_medium, ap_large: ap of objects below 32^2, up to 96^2, and above 96^2 pixels of the image that the model sees. The
        area is that of the box, where COCO's own numbers take that of a mask.
    ar: average recall of the best 100 boxes of each image and class, mean over the same overlaps.
    ap50_NAME: ap50 of the class NAME.
    voc_ap50: VOC's average precision at an overlap of 0.5, with `voc`.

    Objects that 'box_ignored' marks count neither as found nor as missed. COCO's rule is that of crowds, VOC's that of difficult
    objects.
    """
    names, shape = (*BOXES, *((IGNORED,) if IGNORED in context.model.inputs else ())), []

    def rows(images, *truth):
        found = context.model.fns.detect(images)
        shape[:] = (*images.shape[1:3], found["scores"].shape[1], truth[1].shape[1])
        return {"rows": side_by_side(found["boxes"], found["scores"], found["labels"], *truth)}

    table = context.encode_with(rows, "test", "rows", examples, names).x
    height, width, most, objects = shape
    parts = np.split(table, np.cumsum([4 * most, most, most, 4 * objects, *[objects] * (len(names) - 1)])[:-1], axis=1)
    scale = np.array([height, width, height, width], np.float64)
    truths, found = [], []
    for boxes, scores, labels, true, valid, own, *ignored in zip(*parts, strict=True):
        there, kept = valid > 0, scores > 0  # a score of 0 is padding
        out = ignored[0][there] > 0 if ignored else np.zeros(there.sum(), bool)
        truths.append(Truth(true.reshape(-1, 4)[there] * scale, own[there].astype(int), out))
        found.append(Found(boxes.reshape(-1, 4)[kept] * scale, labels[kept].astype(int), scores[kept]))
    classes = class_names(context, truths, found)
    stats, ap50 = average_precision.coco(truths, found, len(classes))
    if stats["ap"] < 0:
        raise UserError(f"the evaluation 'detection': the first {len(table)} of {context.name('test', len(table))} have no object")
    metrics = {"ap": stats["ap"], "ap50": stats["ap50"], "ap75": stats["ap75"], "ar": stats["ar100"]}
    metrics |= {name: stats[name] for name in ("ap_small", "ap_medium", "ap_large") if stats[name] >= 0}
    metrics |= {f"ap50_{name}": value for name, value in zip(classes, ap50, strict=True) if value >= 0}
    if voc != "none":
        each = average_precision.voc(truths, found, len(classes), voc)
        metrics["voc_ap50"] = each[each >= 0].mean() if (each >= 0).any() else 0.0
    protocol = (
        f"detection by COCO's rules{'' if voc == 'none' else f' and voc={voc}'}, areas of boxes at {height}x{width} pixels,"
        f"{' box_ignored,' if len(names) > len(BOXES) else ''} first of {context.name('test', len(table))}"
    )
    picture = draw(first_images(context), truths, found, classes)
    return Result({name: 100 * float(value) for name, value in metrics.items()}, protocol, picture)


EVALUATOR = Evaluator(
    evaluate,
    {
        "examples": Option("number of test images, the first ones", least=1),
        "voc": Option("VOC's average precision, too: at 11 recalls, as until 2009, or the whole area, as since 2010"),
    },
    needs=("detect",),  # its method reads the boxes, so the data have them
    prepare=prepare,
)


def class_names(context: Context, truths: list[Truth], found: list[Found]) -> tuple[str, ...]:
    """Names for metrics, those of the data or numbers. Raises UserError for a label that has no name."""
    count = 1 + max((int(each.labels.max()) for each in (*truths, *found) if len(each.labels)), default=0)
    names = context.model.class_names.get("box_label") or tuple(map(str, range(count)))
    if count > len(names):
        raise UserError(f"the evaluation 'detection': 'box_label' is {count - 1} somewhere, and the data name {len(names)} classes")
    return tuple(name.replace(" ", "_") for name in names)


def first_images(context: Context) -> np.ndarray:
    """uint8 [at most SHOWN, H, W, 3], on every process."""
    shape = []

    def rows(images):
        shape[:] = images.shape[1:]
        return {"rows": side_by_side(images)}

    return context.encode_with(rows, "test", "rows", SHOWN).x.reshape(-1, *shape).astype(np.uint8)


def draw(images: np.ndarray, truths: list[Truth], found: list[Found], names: tuple[str, ...]) -> np.ndarray:
    """uint8 [H, W, 3]: images with their true boxes, and below them those that were found, with their scores."""
    columns = []
    for image, truth, boxes in zip(images, truths, found, strict=False):  # only the first have a picture
        sure = np.flatnonzero(boxes.scores >= LEAST)[::-1]  # the best one last, on top
        texts = [f"{names[boxes.labels[i]]} {boxes.scores[i]:.2f}" for i in sure]
        columns.append([
            with_boxes(image, truth.boxes, truth.labels, [names[label] for label in truth.labels], len(names)),
            with_boxes(image, boxes.boxes[sure], boxes.labels[sure], texts, len(names)),
        ])  # fmt: skip
    return grid(np.stack(columns, 1))


def with_boxes(image: np.ndarray, boxes: np.ndarray, labels: np.ndarray, texts: list[str], classes: int) -> np.ndarray:
    """uint8 [H, W, 3], enlarged by a whole number where it is small: `boxes` in pixels, a color for each class, each with a text."""
    factor = max(1, -(-SIDE // image.shape[0]))
    picture = Image.fromarray(image.repeat(factor, 0).repeat(factor, 1))
    canvas = ImageDraw.Draw(picture)
    for (top, left, bottom, right), label, text in zip(boxes * factor, labels, texts, strict=True):
        color = tuple(round(255 * x) for x in colorsys.hsv_to_rgb(label / classes, 0.9, 1.0))
        canvas.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=color, width=2)
        place = canvas.textbbox((left + 2, top + 1), text)
        canvas.rectangle(place, fill=(0, 0, 0))
        canvas.text((left + 2, top + 1), text, fill=color)
    return np.asarray(picture)

"""Average precision of detected boxes, by the rules of COCO and of Pascal VOC, in float64.

COCO (Lin et al. 2014, arXiv:1405.0312; `coco` gives the twelve numbers of its evaluation): the mean over ten overlaps from 0.5 to
0.95, 101 recalls, and the classes with objects. VOC (Everingham et al. 2010, section 4.2): one overlap, 11 recalls or all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

OVERLAPS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
MOST = (1, 10, 100)  # detections of an image and class that count
SIZES = {"": (0, 1e10), "small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e10)}  # areas in square pixels
TINY = np.spacing(1)


class Truth(NamedTuple):
    """The objects of one image."""

    boxes: np.ndarray  # [N, 4] as (ymin, xmin, ymax, xmax) in pixels
    labels: np.ndarray  # int [N]
    ignored: np.ndarray  # bool [N]: COCO's crowds, VOC's difficult objects
    areas: np.ndarray | None = None  # [N] in square pixels: COCO's are those of masks; None: of the boxes


class Found(NamedTuple):
    """The detections in one image, in any order; of equal scores the first counts as the better one."""

    boxes: np.ndarray  # [M, 4]
    labels: np.ndarray  # int [M]
    scores: np.ndarray  # [M]


class Coco(NamedTuple):
    """Numbers in [0, 1]; -1 where there is no object."""

    stats: dict[str, float]  # ap, ap50, ap75, ap_small, ap_medium, ap_large, ar1, ar10, ar100, ar_small, ar_medium, ar_large
    ap50: np.ndarray  # [classes], of all sizes


def areas(boxes: np.ndarray) -> np.ndarray:
    """[N] of boxes [N, 4]."""
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def overlaps(found: np.ndarray, truth: np.ndarray, crowd: np.ndarray | None = None) -> np.ndarray:
    """Intersection over union [M, N] of boxes [M, 4] and [N, 4]; for a `crowd` [N] over the area of the found box, as in COCO."""
    sides = np.minimum(found[:, None, 2:], truth[None, :, 2:]) - np.maximum(found[:, None, :2], truth[None, :, :2])
    inside = np.where((sides > 0).all(-1), sides.prod(-1), 0)
    own = areas(found)[:, None] + np.zeros(len(truth))
    union = own + areas(truth) - inside
    return inside / np.maximum(union if crowd is None else np.where(crowd, own, union), TINY)


def coco(truths: Sequence[Truth], found: Sequence[Found], classes: int) -> Coco:
    """COCO's evaluation of boxes: `truths` and `found` of the same images.

    A detection takes the free object of its class with the largest overlap, in the order of scores; of equal overlaps the last. It
    takes an ignored object only if no other one will do, and then counts neither as right nor as wrong. Crowds are ignored and may
    be taken by many. Objects of other sizes are ignored, and so are detections of other sizes that take no object.
    """
    precision = -np.ones((len(OVERLAPS), len(RECALLS), classes, len(SIZES), len(MOST)))
    recall = -np.ones((len(OVERLAPS), classes, len(SIZES), len(MOST)))
    for label in range(classes):
        images = [own for own in map(_of_class, truths, found, [label] * len(truths)) if len(own[0].boxes) or len(own[1].boxes)]
        for size, bounds in enumerate(SIZES.values()):
            matched = [_match(truth, boxes, bounds) for truth, boxes in images]
            objects = sum(count for *_, count in matched)
            if not objects:
                continue
            for place, most in enumerate(MOST):
                scores = np.concatenate([boxes.scores[:most] for _, boxes in images])
                order = np.argsort(-scores, kind="stable")
                hit, out = (np.concatenate([each[i][:, :most] for each in matched], 1)[:, order] for i in (0, 1))
                for row in range(len(OVERLAPS)):
                    right, wrong = np.cumsum(hit[row] & ~out[row]), np.cumsum(~hit[row] & ~out[row])
                    recalls, envelope = right / objects, _envelope(right / (right + wrong + TINY))
                    at = np.searchsorted(recalls, RECALLS)
                    precision[row, :, label, size, place] = np.append(envelope, 0)[at]
                    recall[row, label, size, place] = recalls[-1] if len(recalls) else 0
    stats = {"ap": _mean(precision[..., 0, 2]), "ap50": _mean(precision[0, :, :, 0, 2]), "ap75": _mean(precision[5, :, :, 0, 2])}
    stats |= {f"ap_{name}": _mean(precision[..., size, 2]) for size, name in enumerate(SIZES) if name}
    stats |= {f"ar{most}": _mean(recall[..., 0, place]) for place, most in enumerate(MOST)}
    stats |= {f"ar_{name}": _mean(recall[..., size, 2]) for size, name in enumerate(SIZES) if name}
    return Coco(stats, precision[0, :, :, 0, 2].mean(0))


def _mean(values: np.ndarray) -> float:
    """The mean of all values but -1; -1 if there is no other."""
    return float(values[values > -1].mean()) if (values > -1).any() else -1.0


def _of_class(truth: Truth, found: Found, label: int) -> tuple[Truth, Found]:
    """One class in one image, in float64: objects with areas, and at most MOST[-1] detections, the best first."""
    own = truth.labels == label
    boxes = np.asarray(truth.boxes, np.float64)[own]
    sizes = areas(boxes) if truth.areas is None else np.asarray(truth.areas, np.float64)[own]
    rows = np.flatnonzero(found.labels == label)
    rows = rows[np.argsort(-found.scores[rows], kind="stable")][: MOST[-1]]
    best = Found(np.asarray(found.boxes, np.float64)[rows], found.labels[rows], np.asarray(found.scores, np.float64)[rows])
    return Truth(boxes, truth.labels[own], np.asarray(truth.ignored, bool)[own], sizes), best


def _match(truth: Truth, found: Found, bounds: tuple[float, float]) -> tuple[np.ndarray, np.ndarray, int]:
    """(bool [T, M]: the detection takes an object, bool [T, M]: it does not count, number of objects that count)."""
    outside = truth.ignored | (truth.areas < bounds[0]) | (truth.areas > bounds[1])
    order = np.argsort(outside, kind="stable")  # those that count first
    outside, crowd = outside[order], truth.ignored[order]
    each = overlaps(found.boxes, truth.boxes[order], crowd)
    hit, out = np.zeros((2, len(OVERLAPS), len(found.boxes)), bool)
    for row, least in enumerate(OVERLAPS):
        taken = np.zeros(len(order), bool)
        for d in range(len(found.boxes) if len(order) else 0):
            best, chosen = min(least, 1 - 1e-10), -1
            for g in range(len(order)):
                if taken[g] and not crowd[g]:
                    continue
                if chosen >= 0 and not outside[chosen] and outside[g]:
                    break
                if each[d, g] >= best:
                    best, chosen = each[d, g], g
            if chosen >= 0:
                hit[row, d], out[row, d], taken[chosen] = True, outside[chosen], True
    own = areas(found.boxes)
    return hit, out | (~hit & ((own < bounds[0]) | (own > bounds[1]))), int((~outside).sum())


def _envelope(precision: np.ndarray) -> np.ndarray:
    """The largest precision at the same or a higher recall."""
    return np.maximum.accumulate(precision[::-1])[::-1]


def voc(truths: Sequence[Truth], found: Sequence[Found], classes: int, rule: str, least: float = 0.5) -> np.ndarray:
    """float64 [classes], the average precision of each class; -1 where no object counts.

    A detection is right if its object of the largest overlap, at least `least`, was not yet found; else it is wrong. One whose
    object is ignored (difficult) is neither. Boxes are not one pixel larger, as those of the devkit are.

    Args:
        rule: '11_points' takes the mean at the recalls 0, 0.1, ..., 1, as VOC did until 2009; 'all_points' the whole area.
    """
    result = -np.ones(classes)
    for label in range(classes):
        images = [_of_class(truth, boxes, label) for truth, boxes in zip(truths, found, strict=True)]
        objects = sum(int((~truth.ignored).sum()) for truth, _ in images)
        if not objects:
            continue
        rows = [(score, image, d) for image, (_, boxes) in enumerate(images) for d, score in enumerate(boxes.scores)]
        each = [overlaps(boxes.boxes, truth.boxes) for truth, boxes in images]
        taken, right = [np.zeros(len(truth.boxes), bool) for truth, _ in images], []
        for _, image, d in sorted(rows, key=lambda row: -row[0]):
            g = int(each[image][d].argmax()) if each[image].shape[1] else -1
            if g < 0 or each[image][d, g] < least:
                right.append(False)
            elif not images[image][0].ignored[g]:
                right.append(not taken[image][g])
                taken[image][g] = True
        result[label] = voc_area(np.array(right, bool), objects, rule)
    return result


def voc_area(right: np.ndarray, objects: int, rule: str) -> float:
    """The average precision of detections in the order of scores, bool [M]: which are right."""
    hits = np.cumsum(right)
    recall, envelope = hits / objects, _envelope(hits / np.arange(1, len(right) + 1))
    if rule == "11_points":
        return float(np.mean([np.append(envelope, 0)[np.searchsorted(recall, tenth / 10 - 1e-12)] for tenth in range(11)]))
    return float(np.sum(np.diff(recall, prepend=0) * envelope))

"""A linear classifier of the cells of a map, on frozen features: what an encoder knows about places, without training a head.

The logistic probe of CAPI (Darcet et al. 2025, arXiv:2502.08769): the class of a cell is the most frequent one of its pixels. All
pixels of a cell get the class that is found for it. `miou_ceiling` is what the right class of every cell would reach.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax.errors import UserError
from ssl_jax.evals.context import Context, Result
from ssl_jax.evals.evaluator import SEED, Evaluator, Option
from ssl_jax.evals.lib import confusion, linear_probe
from ssl_jax.evals.lib.features import Features, side_by_side


def prepare(context: Context, *, layer: str, **_) -> None:
    """Raises UserError if the encoder has no maps `layer`."""
    outputs = jax.eval_shape(context.encode, context.images())
    if layer not in outputs or outputs[layer].ndim != 4:
        maps = ", ".join(sorted(name for name, x in outputs.items() if x.ndim == 4)) or "none"
        raise UserError(f"segmentation_linear reads maps, and {layer!r} is none; maps of the encoder: {maps}")


def evaluate(
    context: Context,
    *,
    layer: str = "layer2",
    examples: int | None = None,
    images: int = 1000,
    cells: int = 20_000,
    mask: str = "mask",
    ignore: int = 255,
    names: Sequence[str] = (),
    l2: Sequence[float] = (1e-4, 1e-3, 1e-2),
    iterations: int = 300,
    seed: int = 0,
) -> Result:
    """Fitted to `cells` random cells of the first `images` train images; the penalty is chosen on a tenth of these.

    Percent of the pixels of all test images, or of the first `examples`; pixels with the label `ignore` count nowhere.

    miou, accuracy, class_accuracy, miou_majority, accuracy_majority, iou_NAME: as in the evaluation 'segmentation'.
    miou_ceiling: miou of the true class of every cell.
    """
    bank, query = (read(context, layer, split, count, mask, ignore) for split, count in (("train", images), ("test", examples)))
    known = np.flatnonzero(bank.counts.any(1))
    chosen = np.sort(np.random.default_rng(seed).permutation(known)[:cells])
    if not len(chosen):
        raise UserError(f"no pixel of these masks has a class but ignore={ignore}; give another label to ignore")
    features = Features(bank.x[chosen], bank.counts[chosen].argmax(1).astype(np.int32))
    fitted = linear_probe.fit(features, "lbfgs", seed=seed, mesh=context.mesh, l2=tuple(l2), iterations=iterations)
    found = linear_probe.predict(fitted.probe, query.x, context.mesh)[:, 0].argmax(-1)
    classes = max(bank.counts.shape[1], query.counts.shape[1])
    if names and len(names) < classes:
        raise UserError(f"'segmentation_linear' has {len(names)} names, and the masks have class {classes - 1}; name each, or none")
    metrics = confusion.measures(of_cells(query.counts, found, classes), names)
    metrics["miou_ceiling"] = confusion.measures(of_cells(query.counts, query.counts.argmax(1), classes))["miou"]
    protocol = (
        f"segmentation by linear probe lbfgs{linear_probe.convergence(fitted)} of {len(chosen)} of the {bank.rows}x{bank.columns} cells"
        f" of layer={layer}, {mask} ignore={ignore} l2={tuple(l2)} iterations={iterations} seed={seed}"
        f" train={context.name('train', bank.images)} test={context.name('test', query.images)}"
    )
    return Result(metrics, protocol)


EVALUATOR = Evaluator(
    evaluate,
    {
        "layer": Option("layer of the encoder with maps"),
        "examples": Option("number of test images, the first ones; None: all", least=1),
        "images": Option("number of train images, the first ones", least=1),
        "cells": Option("number of cells of these that the probe is fitted to", least=2),
        "mask": Option("feature with the true class of each pixel"),
        "ignore": Option("label of pixels without a class", least=0, most=255),
        "names": Option("names of the classes, for the metrics; empty: their numbers"),
        "l2": Option("penalties to choose from", above=0),
        "iterations": Option("largest number of iterations of a fit", least=1),
        "seed": SEED,
    },
    needs=("model",),
    data=("mask",),
    prepare=prepare,
)


class Cells:
    """Cells of the maps of N images, row by row: x float32 [cells, D], counts int64 [cells, C] of pixels of each class."""

    def __init__(self, found: np.ndarray, map_shape: tuple[int, int, int], mask_shape: tuple[int, int], ignore: int):
        self.images, (self.rows, self.columns, channels) = len(found), map_shape
        size = self.rows * self.columns * channels
        self.x = np.ascontiguousarray(found[:, :size]).reshape(-1, channels)
        masks = found[:, size:].astype(np.int64)
        classes = int(np.where(masks == ignore, -1, masks).max()) + 1
        place = places(mask_shape, (self.rows, self.columns)).ravel() * classes
        cells = self.rows * self.columns * classes
        each = [np.bincount((place + mask)[mask != ignore], minlength=cells) for mask in masks]
        self.counts = np.stack(each).reshape(-1, classes) if classes else np.zeros((len(self.x), 1), np.int64)


def read(context: Context, layer: str, split: str, count: int | None, mask: str, ignore: int) -> Cells:
    """The cells of a split, or of its first `count` images."""
    shapes = {}

    def rows(images, masks):
        x = context.encode(images)[layer].astype(jnp.float32)
        shapes.update(map=x.shape[1:], mask=masks.shape[1:3])
        return {"rows": side_by_side(x, masks)}

    found = context.encode_with(rows, split, "rows", count, (mask,)).x
    return Cells(found, shapes["map"], shapes["mask"], ignore)


def places(shape: tuple[int, int], cells: tuple[int, int]) -> np.ndarray:
    """int64 [H, W]: the number of the cell over each pixel, row by row."""
    rows, columns = (np.arange(size) * count // size for size, count in zip(shape, cells, strict=True))
    return rows[:, None] * cells[1] + columns


def of_cells(counts: np.ndarray, found: np.ndarray, classes: int) -> np.ndarray:
    """The confusion matrix of pixels, int64 [classes, classes], if all pixels of a cell [N] get its class `found` [N]."""
    matrix = np.zeros((classes, classes), np.int64)
    np.add.at(matrix.T, found, np.pad(counts, ((0, 0), (0, classes - counts.shape[1]))))
    return matrix

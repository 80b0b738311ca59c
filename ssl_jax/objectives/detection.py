"""One-stage detection: targets of padded boxes, losses, and the best boxes of an image, all of static shape.

Two kinds of outputs. Points (Zhou et al. 2019, "Objects as points", arXiv:1904.07850): a heat map whose peaks are centers of
objects, and at each peak a size. FCOS (Tian et al. 2019, arXiv:1904.01355): on maps of several strides each place inside of a box
tells its class and the distances to its sides.

Boxes are (ymin, xmin, ymax, xmax) in fractions of the image, [N, 4] with labels int [N]; those that are not `usable` change nothing.
Functions of one image are mapped over a batch by `jax.vmap`. Logits are computed with in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ssl_jax.objectives import boxes as geometry

MIN_OVERLAP = 0.7  # of a box whose corners are off by the radius of a peak
ALPHA, GAMMA = 0.25, 2.0  # of the focal loss (Lin et al. 2017, arXiv:1708.02002)


class Targets(NamedTuple):
    """The objects of a batch."""

    boxes: jax.Array  # [B, N, 4]
    labels: jax.Array  # int [B, N]
    usable: jax.Array  # bool [B, N]: an object to find
    ignored: jax.Array  # bool [B, N]: places inside of it are not background, such as a crowd


def targets_of(boxes: jax.Array, labels: jax.Array, valid: jax.Array, ignored: jax.Array | None = None) -> Targets:
    """Boxes that are padding, inverted or empty are neither usable nor ignored."""
    proper = geometry.usable(boxes, valid)
    ignored = jnp.zeros_like(proper) if ignored is None else ignored & proper
    return Targets(boxes, labels, proper & ~ignored, ignored)


def mean_over_objects(values: jax.Array, count: jax.Array) -> jax.Array:
    """The sum of `values` over `count`, or over 1 where there is no object."""
    return jnp.sum(values) / jnp.maximum(count, 1)


# ------------------------------------------------------------------------------------------------------------------- points


def radii(height: jax.Array, width: jax.Array, overlap: float = MIN_OVERLAP) -> tuple[jax.Array, jax.Array, jax.Array]:
    """By how much the corners of a box of [...] x [...] may move until its overlap with the box is `overlap`.

    (both in the same direction, both inwards, both outwards); CornerNet, Law and Deng 2018 (arXiv:1808.01244), section 3.2.
    """
    around, area = height + width, height * width
    moved = (1 - overlap) / (1 + overlap) * area
    moved = 2 * moved / (around + jnp.sqrt(jnp.maximum(around**2 - 4 * moved, 0)))
    inner, outer = (1 - overlap) * area, (1 / overlap - 1) * area
    shrunk = inner / (around + jnp.sqrt(jnp.maximum(around**2 - 4 * inner, 0)))
    grown = outer / (around + jnp.sqrt(around**2 + 4 * outer))
    return moved, shrunk, grown


def cells_of(boxes: jax.Array, shape: tuple[int, int]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(int [..., 2] the cell of the center, float [..., 2] the center in it in [0, 1], float [..., 2] the size in cells)."""
    size = jnp.array(shape, jnp.float32)
    center = (boxes[..., :2] + boxes[..., 2:]) / 2 * size
    cell = jnp.clip(jnp.floor(center), 0, size - 1)
    return cell.astype(jnp.int32), center - cell, (boxes[..., 2:] - boxes[..., :2]) * size


def heat_map(boxes: jax.Array, labels: jax.Array, usable: jax.Array, shape: tuple[int, int], classes: int) -> jax.Array:
    """float32 [h, w, classes] of one image: 1 at the cell of each center, falling around it as a Gaussian.

    Its deviation is a sixth of its width, 2 r + 1 cells with the smallest of `radii`. Where two meet, the larger one counts.
    """
    cell, _, size = cells_of(boxes, shape)
    radius = jnp.floor(jnp.min(jnp.stack(radii(size[:, 0], size[:, 1])), 0))[:, None, None]
    rows, columns = (jnp.arange(n) for n in shape)
    y, x = rows[None, :, None] - cell[:, 0, None, None], columns[None, None, :] - cell[:, 1, None, None]
    bump = jnp.exp(-(y**2 + x**2) / (2 * ((2 * radius + 1) / 6) ** 2))
    near = (jnp.maximum(jnp.abs(y), jnp.abs(x)) <= radius) & usable[:, None, None]
    heat = jnp.zeros((classes, *shape), jnp.float32).at[labels].max(jnp.where(near, bump, 0))
    return jnp.moveaxis(heat, 0, -1)


def inside_any(boxes: jax.Array, chosen: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """bool [h, w] of one image: cells whose center is in one of the `chosen` boxes."""
    distances = geometry.to_distances(geometry.centers_of_cells(*shape)[:, None], boxes[None])
    return jnp.any((distances.min(-1) > 0) & chosen, 1).reshape(shape)


def heat_loss(logits: jax.Array, heat: jax.Array) -> jax.Array:
    """Elementwise focal loss of a heat map in [0, 1], with less weight of the background near peaks (CenterNet, equation 1)."""
    logits = logits.astype(jnp.float32)
    p = jax.nn.sigmoid(logits)
    peak, other = (1 - p) ** 2 * jax.nn.log_sigmoid(logits), (1 - heat) ** 4 * p**2 * jax.nn.log_sigmoid(-logits)
    return -jnp.where(heat == 1, peak, other)


def point_losses(outputs: dict[str, jax.Array], targets: Targets) -> dict[str, jax.Array]:
    """Means over the objects of a batch: 'heat', 'size' (L1, in cells, summed over height and width) and 'offset' (the same).

    outputs: 'heat' logits [B, h, w, classes], 'size' and 'offset' [B, h, w, 2].
    """
    shape, classes = outputs["heat"].shape[1:3], outputs["heat"].shape[3]
    heat = jax.vmap(lambda *image: heat_map(*image, shape, classes))(targets.boxes, targets.labels, targets.usable)
    counts = ~jax.vmap(lambda *image: inside_any(*image, shape))(targets.boxes, targets.ignored)[..., None] | (heat == 1)
    cell, offset, size = cells_of(targets.boxes, shape)
    count, found = targets.usable.sum(), {}
    for name, wanted in (("size", size), ("offset", offset)):
        at_centers = jax.vmap(lambda x, cell: x[cell[:, 0], cell[:, 1]])(outputs[name].astype(jnp.float32), cell)
        found[name] = mean_over_objects(jnp.where(targets.usable[..., None], jnp.abs(at_centers - wanted), 0), count)
    return {"heat": mean_over_objects(jnp.where(counts, heat_loss(outputs["heat"], heat), 0), count), **found}


def find_points(outputs: dict[str, jax.Array], most: int) -> dict[str, jax.Array]:
    """The `most` highest peaks, or all cells if they are fewer, as `ModelFns.detect` gives them. A peak is the largest of 3 x 3."""
    heat = jax.nn.sigmoid(outputs["heat"].astype(jnp.float32))
    batch, rows, columns, classes = heat.shape
    around = jax.lax.reduce_window(heat, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 1, 1, 1), "SAME")
    peaks = jnp.where(heat == around, heat, 0).reshape(batch, -1)
    scores, index = jax.lax.top_k(peaks, min(most, peaks.shape[1]))
    place = index // classes
    flat = (outputs[name].astype(jnp.float32).reshape(batch, -1, 2) for name in ("size", "offset"))
    size, offset = (jnp.take_along_axis(x, place[..., None], 1) for x in flat)
    grid = jnp.array([rows, columns], jnp.float32)
    center, half = (jnp.stack([place // columns, place % columns], -1) + offset) / grid, jnp.maximum(size, 0) / grid / 2
    boxes = jnp.clip(jnp.concatenate([center - half, center + half], -1), 0, 1)
    return {"boxes": boxes, "scores": scores, "labels": index % classes}


# --------------------------------------------------------------------------------------------------------------------- FCOS


class Grid(NamedTuple):
    """The places of several maps, one after the other, row by row."""

    places: jax.Array  # [L, 2], in fractions
    cell: jax.Array  # [L, 2], height and width of a cell in fractions
    bounds: jax.Array  # [L, 2], smallest and largest half diagonal of boxes that the place predicts, in pixels


def grid_of(shapes: Sequence[tuple[int, int]], size: tuple[int, int], reach: tuple[float, float]) -> Grid:
    """Maps of `shapes`, from fine to coarse, of an image of `size` pixels.

    reach: bounds of half a diagonal in strides. The finest map has no lower and the coarsest no upper bound. Neighbors overlap.
    """
    parts = []
    for level, (rows, columns) in enumerate(shapes):
        stride = (size[0] / rows + size[1] / columns) / 2
        low, high = 0 if level == 0 else reach[0] * stride, jnp.inf if level == len(shapes) - 1 else reach[1] * stride
        constants = (jnp.tile(jnp.array([pair], jnp.float32), (rows * columns, 1)) for pair in ((1 / rows, 1 / columns), (low, high)))
        parts.append((geometry.centers_of_cells(rows, columns), *constants))
    return Grid(*(jnp.concatenate(part) for part in zip(*parts, strict=True)))


def assign(boxes: jax.Array, usable: jax.Array, grid: Grid, size: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
    """(int [L] the box of each place of one image, bool [L] whether it has one).

    A place belongs to a box if it is in the box, in the 3 x 3 cells around its center, and the box is of the map's sizes. Of several
    boxes it takes the smallest (Tian et al. 2019, section 3.1).
    """
    distances = geometry.to_distances(grid.places[:, None], boxes[None])
    center = (boxes[:, :2] + boxes[:, 2:]) / 2
    steps = jnp.abs(jnp.floor(grid.places / grid.cell)[:, None] - jnp.floor(center[None] / grid.cell[:, None]))
    half = jnp.linalg.norm((boxes[:, 2:] - boxes[:, :2]) * jnp.array(size, jnp.float32), axis=-1) / 2
    own = usable & (distances.min(-1) > 0) & (steps.max(-1) <= 1) & (half >= grid.bounds[:, :1]) & (half < grid.bounds[:, 1:])
    area = jnp.where(own, geometry.areas(boxes), jnp.inf)
    return jnp.argmin(area, 1), own.any(1)


def focal_loss(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Elementwise focal loss with targets of 0 or 1 (Lin et al. 2017, equation 5)."""
    logits = logits.astype(jnp.float32)
    p = jax.nn.sigmoid(logits)
    right = ALPHA * (1 - p) ** GAMMA * jax.nn.log_sigmoid(logits)
    return -jnp.where(targets == 1, right, (1 - ALPHA) * p**GAMMA * jax.nn.log_sigmoid(-logits))


def fcos_losses(outputs: dict[str, jax.Array], targets: Targets, grid: Grid, size: tuple[int, int]) -> dict[str, jax.Array]:
    """Means over the places of a batch that belong to objects: 'class' (focal) and 'box' (1 - GIoU).

    outputs: 'class' logits [B, L, classes], 'distances' [B, L, 4] above 0, in cells.
    """
    def of_image(logits, distances, boxes, labels, usable, ignored):
        owner, positive = jax.lax.stop_gradient(assign(boxes, usable, grid, size))
        wanted = jax.nn.one_hot(labels[owner], logits.shape[-1]) * positive[:, None]
        in_ignored = jnp.any((geometry.to_distances(grid.places[:, None], boxes[None]).min(-1) > 0) & ignored, 1)
        each = jnp.where((positive | ~in_ignored)[:, None], focal_loss(logits, wanted), 0)
        overlap = geometry.giou(boxes_at(grid, distances), jnp.where(positive[:, None], boxes[owner], jnp.array([0.0, 0, 1, 1])))
        return each.sum(), jnp.where(positive, 1 - overlap, 0).sum(), positive.sum()

    classes, box, positives = jax.vmap(of_image)(outputs["class"], outputs["distances"], *targets)
    return {"class": mean_over_objects(classes, positives.sum()), "box": mean_over_objects(box, positives.sum())}


def boxes_at(grid: Grid, distances: jax.Array) -> jax.Array:
    """Boxes [..., L, 4] of distances [..., L, 4] in cells."""
    return geometry.from_distances(grid.places, distances.astype(jnp.float32) * jnp.tile(grid.cell, 2))


def find_fcos(outputs: dict[str, jax.Array], grid: Grid, candidates: int, overlap: float, most: int) -> dict[str, jax.Array]:
    """The `most` best boxes, or `candidates` if they are fewer, as `ModelFns.detect` gives them.

    The best `candidates` go through non-maximum suppression at `overlap`; those that it removes have score 0.
    """
    def of_image(logits, distances):
        classes = logits.shape[-1]
        flat = jax.nn.sigmoid(logits.astype(jnp.float32)).ravel()
        scores, index = jax.lax.top_k(flat, min(candidates, len(flat)))
        boxes, labels = jnp.clip(boxes_at(grid, distances)[index // classes], 0, 1), index % classes
        scores, order = jax.lax.top_k(jnp.where(geometry.suppress(boxes, labels, overlap), scores, 0), min(most, len(scores)))
        return {"boxes": boxes[order], "scores": scores, "labels": labels[order]}

    return jax.vmap(of_image)(outputs["class"], outputs["distances"])

"""Boxes on the device: overlaps, distances to their sides, and non-maximum suppression, all of static shape.

A box is (ymin, xmin, ymax, xmax) in fractions of the height and width. Overlaps do not depend on the unit of an axis.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def usable(boxes: jax.Array, valid: jax.Array) -> jax.Array:
    """bool [..., N]: boxes [..., N, 4] that are `valid` [..., N] (no padding) and neither inverted nor empty."""
    return valid & (boxes[..., 2] > boxes[..., 0]) & (boxes[..., 3] > boxes[..., 1])


def areas(boxes: jax.Array) -> jax.Array:
    """[...] of boxes [..., 4]."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def _shared_and_union(a, b):
    low, high = jnp.maximum(a[..., :2], b[..., :2]), jnp.minimum(a[..., 2:], b[..., 2:])
    shared = areas(jnp.concatenate([low, jnp.maximum(low, high)], -1))
    return shared, areas(a) + areas(b) - shared


def iou(a: jax.Array, b: jax.Array) -> jax.Array:
    """Intersection over union in [0, 1], [...] of boxes [..., 4]; 0 for two empty boxes."""
    shared, union = _shared_and_union(a, b)
    return shared / jnp.maximum(union, 1e-12)


def giou(a: jax.Array, b: jax.Array) -> jax.Array:
    """Generalized intersection over union in (-1, 1], [...] of boxes [..., 4] (Rezatofighi et al. 2019, arXiv:1902.09630).

    IoU - (hull - union) / hull, where the hull is the smallest box around both.
    """
    shared, union = _shared_and_union(a, b)
    hull = areas(jnp.concatenate([jnp.minimum(a[..., :2], b[..., :2]), jnp.maximum(a[..., 2:], b[..., 2:])], -1))
    return shared / jnp.maximum(union, 1e-12) - (hull - union) / jnp.maximum(hull, 1e-12)


def centers_of_cells(rows: int, columns: int) -> jax.Array:
    """float32 [rows * columns, 2]: (y, x) of the centers of the cells of a grid, row by row, in fractions."""
    y, x = jnp.meshgrid((jnp.arange(rows) + 0.5) / rows, (jnp.arange(columns) + 0.5) / columns, indexing="ij")
    return jnp.stack([y.ravel(), x.ravel()], -1)


def to_distances(places: jax.Array, boxes: jax.Array) -> jax.Array:
    """[..., 4]: how far the sides of boxes [..., 4] are from places [..., 2] inside (Tian et al. 2019, equation 1)."""
    return jnp.concatenate([places - boxes[..., :2], boxes[..., 2:] - places], -1)


def from_distances(places: jax.Array, distances: jax.Array) -> jax.Array:
    """The inverse of `to_distances`: boxes [..., 4]."""
    return jnp.concatenate([places - distances[..., :2], places + distances[..., 2:]], -1)


def suppress(boxes: jax.Array, labels: jax.Array, threshold: float) -> jax.Array:
    """Greedy non-maximum suppression within classes: bool [N], which boxes stay.

    Args:
        boxes: [N, 4], the best first.
        labels: int [N].
        threshold: a box goes if a better one of its class that stays overlaps it by more than this.
    """
    count = len(boxes)
    index = jnp.arange(count)
    beats = (iou(boxes[:, None], boxes[None]) > threshold) & (labels[:, None] == labels[None]) & (index[:, None] < index[None])
    return jax.lax.fori_loop(0, count, lambda i, stays: stays & ~(stays[i] & beats[i]), jnp.ones(count, bool))

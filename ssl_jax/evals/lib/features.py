"""Frozen features in host memory, and array functions that evaluators share."""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ssl_jax.engine.sharding import from_local_rows, put_global
from ssl_jax.errors import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Features(NamedTuple):
    """Features and labels of one split, in the order of the data."""

    x: np.ndarray  # [N, D] float32
    y: np.ndarray  # [N] int32; -1 without labels


def extract(
    encode: Callable[..., Mapping[str, jax.Array]],
    batches: Iterable[Mapping[str, np.ndarray]],
    layer: str = "pooled",
    mesh: Mesh | None = None,
    limit: int | None = None,
    names: Sequence[str] = (),
) -> Features:
    """Encode every example with `_valid` 1 and copy one layer to the host.

    `encode` is jitted with its parameters bound: images uint8 [B, H, W, 3] -> {layer: array}. Maps [B, h, w, C] and tokens
    [B, N, C] are averaged over space. A batch has 'image', 'label' [B] (missing: -1) and '_valid' [B] (0: padding, dropped).
    With a `mesh` the batch is sharded over ('data', 'fsdp'). With several processes each one passes its rows, as in
    `local_parts`, and all get all features. Features are copied one batch behind the encoder.

    limit: largest number of examples.
    names: features of the batch that `encode` takes after the images.
    Raises UserError for an unknown layer, an empty split or features that are not finite.
    """
    put = jax.device_put if mesh is None else functools.partial(from_local_rows, mesh=mesh)
    whole = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    to_rows = jax.jit(lambda feature, *others: (pool(feature), *others), out_shardings=whole)
    x, y, count = deque(), deque(), 0

    def fetch(pending):
        rows, labels, mask = jax.device_get(pending)
        keep = mask.astype(bool)
        x.append(rows[keep])
        y.append(labels[keep].astype(np.int32))
        return int(keep.sum())

    pending = None
    for batch in batches:
        batch = {"label": np.full(len(batch["_valid"]), -1, np.int32), **batch}
        images, labels, mask = (put(np.asarray(batch[name])) for name in ("image", "label", "_valid"))
        outputs = encode(images, *(labels if name == "label" else put(np.asarray(batch[name])) for name in names))
        if layer not in outputs:
            raise UserError(f"evaluation layer {layer!r} does not exist; the encoder has {', '.join(sorted(outputs))}")
        current = to_rows(outputs[layer], labels, mask)
        if pending is not None:
            count += fetch(pending)
        pending = current
        if limit is not None and count >= limit:
            jax.block_until_ready(pending)  # nothing may be running when Python ends, see models/onednn.py
            pending = None
            break
    if pending is not None:
        count += fetch(pending)
    if count == 0:
        raise UserError("an evaluation split has no examples; check the split name and its slice")
    features = Features(_join(x)[:limit], _join(y)[:limit])
    if not np.isfinite(features.x).all():
        raise UserError(f"layer {layer!r} has features that are not finite; the model diverged or overflows its type")
    return features


@jax.jit
def pixel_encode(images: jax.Array) -> dict[str, jax.Array]:
    """Raw pixels as an encoder: images uint8 [B, H, W, 3] -> {'pooled', 'normalized'}, both float32 [B, H*W*3].

    'pooled' is in [0, 1]; 'normalized' has the ImageNet channel mean and std removed. That choice alone changes the accuracy of
    a pixel kNN on CIFAR-10 by up to ten points.
    """
    pixels = images.astype(jnp.float32) / 255
    normalized = (pixels - jnp.array(IMAGENET_MEAN, jnp.float32)) / jnp.array(IMAGENET_STD, jnp.float32)
    flat = (images.shape[0], -1)
    return {"pooled": pixels.reshape(flat), "normalized": normalized.reshape(flat)}


def pixels(batches: Iterable[Mapping[str, np.ndarray]], mesh: Mesh | None = None) -> Features:
    """Raw pixels in [0, 1] as features [N, H*W*3], the baseline of every representation."""
    return extract(pixel_encode, batches, "pooled", mesh)


def flat_mesh(mesh: Mesh | None) -> Mesh:
    """The devices of `mesh` (or one device) on a single axis 'shard'."""
    devices = np.asarray(jax.local_devices()[:1]) if mesh is None else mesh.devices.reshape(-1)
    return Mesh(devices, ("shard",), axis_types=(AxisType.Auto,))


def replicate_tree(tree, mesh: Mesh):
    """Put every array of `tree` on all devices, as float32."""
    return jax.tree.map(lambda leaf: put_global(np.asarray(leaf, np.float32), NamedSharding(mesh, PartitionSpec())), tree)


def chunks(count: int, size: int) -> Iterator[tuple[int, int]]:
    """(start, stop) ranges of at most `size` that cover range(count)."""
    for start in range(0, count, size):
        yield start, min(start + size, count)


def padded(rows: np.ndarray, size: int) -> np.ndarray:
    """Append zero rows up to `size`, so that all chunks share one compiled shape."""
    if len(rows) == size:
        return rows
    return np.concatenate([rows, np.zeros((size - len(rows), *rows.shape[1:]), rows.dtype)])


def moments(x: np.ndarray, size: int = 65536) -> tuple[np.ndarray, np.ndarray]:
    """Mean and std (ddof 0) per dimension in two float64 passes over chunks; x [N, D] -> two [D] float32.

    A dimension that is constant up to rounding gets std 1, so that standardizing does not amplify its rounding noise.
    """
    mean = sum(x[a:b].sum(0, dtype=np.float64) for a, b in chunks(len(x), size)) / len(x)
    variance = sum(np.square(x[a:b] - mean).sum(0) for a, b in chunks(len(x), size)) / len(x)
    std = np.sqrt(variance)
    constant = std <= 1e-5 * np.sqrt(np.square(mean) + variance)
    return mean.astype(np.float32), np.where(constant, 1, std).astype(np.float32)


def hits(scores: np.ndarray, labels: np.ndarray, k: int) -> np.ndarray:
    """Whether the label is among the k best scores: scores [N, C], labels [N] -> bool [N].

    Equal scores are ranked by class index, as in argmax. A label without a finite score (not in the bank, no vote, a diverged
    head) is a miss.
    """
    rows = np.arange(len(labels))
    valid = (labels >= 0) & (labels < scores.shape[1])
    inside = np.where(valid, labels, 0)
    own = np.where(valid, scores[rows, inside], -np.inf)[:, None]
    earlier = np.arange(scores.shape[1])[None] < labels[:, None]
    rank = ((scores > own) | ((scores == own) & earlier)).sum(1)
    return np.isfinite(own[:, 0]) & (rank < k)


def share_of_each_class(features: Features, share: float, seed: int) -> Features:
    """A random `share` of the examples of each class, at least one of each, in the order of the data.

    The shares of one seed are nested. Of examples with several classes, y [N, C], it is a share of all.
    """
    generator = np.random.default_rng([seed, 2])
    y = features.y
    groups = [np.arange(len(y))] if y.ndim == 2 else [np.flatnonzero(y == label) for label in np.unique(y)]
    kept = np.sort(np.concatenate([generator.permutation(rows)[: max(1, round(share * len(rows)))] for rows in groups]))
    return Features(features.x[kept], y[kept])


def pool(feature: jax.Array) -> jax.Array:
    """float32 [B, D]; maps [B, h, w, C] and tokens [B, N, C] are averaged over space."""
    space = tuple(range(1, feature.ndim - 1))
    return feature.astype(jnp.float32).mean(space) if space else feature.astype(jnp.float32)


def grid_side(shape: Sequence[int], most: int) -> tuple[int, int]:
    """Rows and columns to which `pool_to_grid` pools a layer of this shape; (1, 1) for tokens and vectors."""
    if len(shape) != 4:
        return 1, 1
    side = max(1, math.isqrt(most // shape[-1]))
    return min(side, shape[1]), min(side, shape[2])


def pool_to_grid(feature: jax.Array, most: int, largest: bool = False) -> jax.Array:
    """Maps [B, h, w, C] -> float32 [B, rows * columns * C]: the largest square grid with at most `most` numbers, row by row.

    Cells are those of PyTorch's adaptive pools: cell i of n covers pixels floor(i h / n) to ceil((i + 1) h / n), and holds their
    mean, or their maximum if `largest`. Maps are not enlarged. Tokens [B, N, C] and grids of one cell become one [B, C], vectors
    stay. 9,600 numbers give the grids of the papers: 10, 6, 5, 5, 6 for the five convolutions of Caffe's AlexNet (Zhang et al. 2016,
    arXiv:1603.08511), 12, 7, 5, 6, 6 for RotNet's (arXiv:1803.07728) and 12, 6, 4, 3, 2 for a ResNet-50.
    """
    x = feature.astype(jnp.float32)
    reduce = jnp.max if largest else jnp.mean
    if x.ndim != 4:
        return reduce(x, axis=tuple(range(1, x.ndim - 1)))
    for axis, cells in enumerate(grid_side(x.shape, most), 1):
        size = x.shape[axis]
        bounds = [(i * size // cells, -(-(i + 1) * size // cells)) for i in range(cells)]
        x = jnp.stack([reduce(jax.lax.slice_in_dim(x, *bound, axis=axis), axis=axis) for bound in bounds], axis)
    return x.reshape(len(x), -1)


@jax.jit
def side_by_side(*arrays: jax.Array) -> jax.Array:
    """Flatten batches [B, ...] and concatenate them along the features, float32 [B, D1 + D2 + ...]."""
    return jnp.concatenate([x.astype(jnp.float32).reshape(len(x), -1) for x in arrays], axis=1)


def _join(blocks: deque) -> np.ndarray:
    """Concatenate the blocks and free each one after its copy, so that memory peaks near one copy."""
    out = np.empty((sum(map(len, blocks)), *blocks[0].shape[1:]), blocks[0].dtype)
    start = 0
    while blocks:
        block = blocks.popleft()
        out[start : start + len(block)] = block
        start += len(block)
    return out

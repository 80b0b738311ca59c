"""Second moments of standardized features, and ridge regression from them: of the D dimensions, or of the rows where they are fewer.

With an l2 penalty the best kernel is a weighted sum of the rows, as the gradient of the loss is (the representer theorem, Kimeldorf
and Wahba 1971). The weights sum to zero where the intercept is best, so centered rows give the same sum. Hence n rows of more than
n dimensions need no matrix larger than [n, n].
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ssl_jax.engine.sharding import put_global
from ssl_jax.evals.lib.features import Features, chunks, padded, replicate_tree

CHUNK_BYTES = 256 * 2**20  # bytes of features at a time, over all devices
HIGHEST = jax.lax.Precision.HIGHEST  # the default precision on accelerators is bfloat16 or TF32


def ridge(bank: Features, rows, scale, grid, mesh: Mesh):
    """Least squares on targets -1, 1 for every (l2,) of `grid`. Returns kernels [D, H, C], biases [H, C] of scaled features."""
    targets = 2 * (bank.y[:, None] == np.arange(int(bank.y.max()) + 1)).astype(np.float32) - 1
    if len(rows) < bank.x.shape[1]:
        x, centered = bank.x[rows], targets[rows] - targets[rows].mean(0, dtype=np.float64)
        gram, x_mean = gram_of_rows(x, scale)
        target_mean = targets[rows].mean(0, dtype=np.float64)
        kernels = [sum_of_rows(x, scale, x_mean, _solve(gram, len(x) * l2, centered)) for (l2,) in grid]
    else:
        covariance, x_mean, cross, target_mean = covariances(bank.x, targets, rows, scale, mesh)
        kernels = [_solve(covariance, l2, cross) for (l2,) in grid]
    return np.stack(kernels, 1), np.stack([target_mean - x_mean @ kernel for kernel in kernels])


def _solve(matrix, shift, right):
    """(matrix + shift I)^-1 right."""
    import scipy.linalg  # takes a quarter of a second, which a training run need not wait for

    shifted = matrix.copy()
    shifted[np.diag_indices_from(shifted)] += shift
    try:
        return scipy.linalg.cho_solve(scipy.linalg.cho_factor(shifted, overwrite_a=True), right)
    except np.linalg.LinAlgError:  # float32 sums of features that depend on each other have directions slightly below zero
        values, vectors = np.linalg.eigh(matrix)
        return vectors @ ((vectors.T @ right) / (np.maximum(values, 0) + shift)[:, None])


def gram_of_rows(x: np.ndarray, scale) -> tuple[np.ndarray, np.ndarray]:
    """Products [n, n] of the scaled and centered rows of x [n, D], and their center [D]: float64, some dimensions at a time."""
    gram, centers = np.zeros((len(x), len(x))), []
    for part in _parts(x):
        scaled = (x[:, part].astype(np.float64) - scale[0][part]) / scale[1][part]
        centers.append(scaled.mean(0))
        scaled -= centers[-1]
        gram += scaled @ scaled.T
    return gram, np.concatenate(centers)


def sum_of_rows(x: np.ndarray, scale, center: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Sums [D, C] of the scaled and centered rows of x [n, D] with `weights` [n, C]."""
    parts = [((x[:, part].astype(np.float64) - scale[0][part]) / scale[1][part] - center[part]).T @ weights for part in _parts(x)]
    return np.concatenate(parts)


def _parts(x):
    return [slice(*ends) for ends in chunks(x.shape[1], max(1, CHUNK_BYTES // (8 * len(x))))]


def covariances(x: np.ndarray, targets: np.ndarray, rows: np.ndarray, scale, mesh: Mesh):
    """Covariance [D, D] and mean [D] of scaled features, their covariance [D, C] with `targets` [N, C], the mean target [C].

    Sums over a chunk are float32 on the devices; the rest is float64 on the host.
    """
    dim, n = x.shape[1], len(rows)
    size = chunk_rows(dim, n, mesh)
    split = NamedSharding(mesh, PartitionSpec("shard"))
    mean, std = replicate_tree(scale, mesh)
    gram, cross, total = np.zeros((dim, dim)), np.zeros((dim, targets.shape[1])), np.zeros(dim)
    for start, stop in chunks(n, size):
        part, weight = rows[start:stop], np.ones(stop - start, np.float32)
        arrays = (put_global(padded(array, size), split) for array in (x[part], targets[part], weight))
        sums = jax.device_get(_chunk_sums(*arrays, mean, std, mesh=mesh))
        gram, cross, total = gram + sums[0], cross + sums[1], total + sums[2]
    x_mean, target_mean = total / n, targets[rows].mean(0, dtype=np.float64)
    return gram / n - np.outer(x_mean, x_mean), x_mean, cross / n - np.outer(x_mean, target_mean), target_mean


@functools.partial(jax.jit, static_argnames="mesh")
def _chunk_sums(x, targets, weight, mean, std, *, mesh):
    x = (x - mean) / std * weight[:, None]
    sums = (jnp.matmul(x.T, x, precision=HIGHEST), jnp.matmul(x.T, targets, precision=HIGHEST), x.sum(0))
    return jax.lax.with_sharding_constraint(sums, NamedSharding(mesh, PartitionSpec()))


def chunk_rows(dim: int, count: int, mesh: Mesh) -> int:
    """Rows of `dim` float32 numbers in a chunk; a multiple of the devices."""
    rows = max(1, min(CHUNK_BYTES // (4 * dim), count))
    return -(-rows // mesh.size) * mesh.size

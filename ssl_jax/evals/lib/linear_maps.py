"""Linear baselines in pixels, in float64 on the host: principal components and the best denoising filter."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
import scipy.sparse.linalg
import scipy.special

from ssl_jax.errors import UserError
from ssl_jax.evals.context import Context, Split
from ssl_jax.evals.lib import distances
from ssl_jax.evals.lib.features import chunks

LARGEST = 12288  # most values per image for a covariance: 64 x 64 pixels in color
READ = 2**29  # most values of training images in memory

# --- pixels of real images


class Pixels(NamedTuple):
    """Real images as rows [N, D] float32 in [0, 1]; channels is 3, or 1 if all images are gray."""

    x: np.ndarray
    channels: int


@functools.partial(jax.jit, static_argnums=1)
def at_size(images: jax.Array, size: tuple[int, int]) -> jax.Array:
    """uint8 [B, H, W, 3] -> float32 [B, *size, 3] in [0, 1], resized by bicubic interpolation if needed."""
    x = images.astype(jnp.float32) / 255
    shape = (len(x), *size, x.shape[3])
    return x if x.shape == shape else jnp.clip(jax.image.resize(x, shape, "cubic"), 0, 1)


def picture_size(context: Context, most: int = LARGEST) -> tuple[int, int]:
    """(height, width) of reconstructions.

    Raises:
        UserError: a reconstruction has more than `most` values.
    """
    _, *size, channels = jax.eval_shape(context.model.fns.reconstruct, context.images()).shape
    if size[0] * size[1] * channels > most:
        raise UserError(
            f"reconstructions of {size[0]}x{size[1]} pixels are too large for linear maps of at most {most} numbers; leave it out"
        )
    return tuple(size)


def training_pixels(context: Context, size: tuple[int, int]) -> Pixels:
    """Training images at `size`: all, or the first ones that have at most READ values."""
    x = pixels(context, "train", size, READ // (3 * size[0] * size[1]))
    colored = x.reshape(len(x), -1, 3)
    gray = all((part == part[..., :1]).all() for part in (colored[a:b] for a, b in chunks(len(x), 8192)))
    return Pixels(np.ascontiguousarray(colored[..., 0]), 1) if gray else Pixels(x, 3)


def pixels(context: Context, split: Split, size: tuple[int, int], count: int | None = None) -> np.ndarray:
    """Images of a split at `size`, float32 [N, h * w * 3] in [0, 1]."""
    return context.encode_with(lambda images: {"pixels": at_size(images, size).reshape(len(images), -1)}, split, "pixels", count).x


# --- linear maps


class Linear(NamedTuple):
    """x -> (x - before) @ inward @ outward + after in float64; inward [D, k], outward [k, D] or None for the identity."""

    before: np.ndarray
    inward: np.ndarray
    outward: np.ndarray | None
    after: np.ndarray

    def code(self, x: np.ndarray) -> np.ndarray:
        """[N, k] float64."""
        return (np.asarray(x, np.float64) - self.before) @ self.inward

    def __call__(self, x: np.ndarray) -> np.ndarray:
        code = self.code(x)
        return (code if self.outward is None else code @ self.outward) + self.after


class FittedMap(NamedTuple):
    """A linear map that was fitted to `count` training images with `channels` channels."""

    linear: Linear
    count: int
    channels: int


def fit_once(context: Context, size: tuple[int, int], name: tuple, fit: Callable[[np.ndarray], Linear]) -> FittedMap:
    """`fit` applied to training images [N, D] at `size`; cached under `name` for the run."""
    cache, key = context.model.cache, (*name, size)
    if key not in cache:
        x, channels = training_pixels(context, size)
        cache[key] = FittedMap(fit(x), len(x), channels)
    return cache[key]


def pca(moments: distances.Moments, k: int) -> Linear:
    """The projection on the min(k, D) directions of largest variance."""
    dim = len(moments.mean)
    k = min(k, dim)
    if 4 * k < dim:  # few of many directions: the iterative solver is faster
        _, vectors = scipy.sparse.linalg.eigsh(moments.scatter, k, v0=np.ones(dim))
    else:
        _, vectors = scipy.linalg.eigh(moments.scatter, subset_by_index=(dim - k, dim - 1))
    vectors = vectors[:, ::-1]  # the largest first
    return Linear(moments.mean, vectors, vectors.T, moments.mean)


def principal_components(context: Context, size: tuple[int, int], count: int) -> FittedMap:
    """The projection on `count` principal components of training images at `size`; cached for the run."""

    def fit(x):
        return pca(distances.chunked_moments(x), count)

    return fit_once(context, size, ("principal components", count), fit)


def best_filter(x: np.ndarray, sigma: float, clip: bool) -> Linear:
    """The affine map with the least mean squared error from noisy rows to clean rows x [N, D].

    Noisy rows are x + sigma * normal noise, clipped to [0, 1] if `clip`. The expectation over the noise is exact. Without
    clipping the map is Sigma (Sigma + sigma^2 I)^-1 around the mean.
    """
    count, dim = x.shape
    mean, of_noisy, across = np.zeros((2, dim)), np.zeros((dim, dim)), np.zeros((dim, dim))
    noise = np.zeros(dim)
    for start, stop in chunks(count, 4096):
        part = np.asarray(x[start:stop], np.float64)
        seen, variance = clipped(part, sigma) if clip else (part, np.full(part.shape, sigma**2))
        mean += part.sum(0) / count, seen.sum(0) / count
        of_noisy += seen.T @ seen / count  # the mean of pixels is small: uncentered float64 sums are precise enough
        across += seen.T @ part / count if clip else 0
        noise += variance.sum(0) / count
    of_noisy -= np.outer(mean[1], mean[1])
    across = across - np.outer(mean[1], mean[0]) if clip else of_noisy.copy()
    of_noisy[np.diag_indices(dim)] += noise
    return Linear(mean[1], scipy.linalg.solve(of_noisy, across, assume_a="pos"), None, mean[0])


def clipped(x: np.ndarray, sigma: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of clip(x + sigma * normal noise, 0, 1), each with the shape of x."""
    low, high = -x / sigma, (1 - x) / sigma
    inside = scipy.special.ndtr(high) - scipy.special.ndtr(low)
    at_low, at_high = (np.exp(-0.5 * edge**2) / np.sqrt(2 * np.pi) for edge in (low, high))
    above = scipy.special.ndtr(-high)
    mean = x * inside + sigma * (at_low - at_high) + above
    square = (x**2 + sigma**2) * inside + sigma * (x * at_low - (1 + x) * at_high) + above
    return mean, square - mean**2

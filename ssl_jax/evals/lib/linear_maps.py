"""What is linear in pixels, in float64 on the host, to compare networks with: principal components and the best filter."""

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

LARGEST = 12288  # numbers of a picture whose covariance is taken: 64 x 64 pixels in color
READ = 2**29  # numbers of real pixels that are read at most

# --- pixels of real images


class Pixels(NamedTuple):
    """Real images: rows [N, D] float32 in [0, 1]. channels: 1 where all are gray, and rows have one channel of three then."""

    x: np.ndarray
    channels: int


@functools.partial(jax.jit, static_argnums=1)
def at_size(images: jax.Array, size: tuple[int, int]) -> jax.Array:
    """uint8 [B, H, W, 3] -> float32 [B, *size, 3] in [0, 1]; bicubic where the size differs."""
    x = images.astype(jnp.float32) / 255
    shape = (len(x), *size, x.shape[3])
    return x if x.shape == shape else jnp.clip(jax.image.resize(x, shape, "cubic"), 0, 1)


def picture_size(context: Context, most: int = LARGEST) -> tuple[int, int]:
    """(height, width) of reconstructions.

    Raises:
        UserError: a picture has more than `most` numbers.
    """
    _, *size, channels = jax.eval_shape(context.model.fns.reconstruct, context.images()).shape
    if size[0] * size[1] * channels > most:
        raise UserError(
            f"reconstructions of {size[0]}x{size[1]} pixels are too large for linear maps of at most {most} numbers; leave it out"
        )
    return tuple(size)


def training_pixels(context: Context, size: tuple[int, int]) -> Pixels:
    """All training images of `size`, or the first ones where all would take too much memory."""
    x = pixels(context, "train", size, READ // (3 * size[0] * size[1]))
    colored = x.reshape(len(x), -1, 3)
    gray = all((part == part[..., :1]).all() for part in (colored[a:b] for a, b in chunks(len(x), 8192)))
    return Pixels(np.ascontiguousarray(colored[..., 0]), 1) if gray else Pixels(x, 3)


def pixels(context: Context, split: Split, size: tuple[int, int], count: int | None = None) -> np.ndarray:
    """Images of a split [N, h * w * 3] float32 in [0, 1]."""
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


class Learned(NamedTuple):
    """A linear map that was fitted to `count` training images of so many `channels`."""

    linear: Linear
    count: int
    channels: int


def learned(context: Context, size: tuple[int, int], name: tuple, make: Callable[[np.ndarray], Linear]) -> Learned:
    """`make` of the rows of all training images of `size`; computed once in a run, where `name` tells maps apart."""
    known = context.model.known
    if (*name, size) not in known:
        x, channels = training_pixels(context, size)
        known[(*name, size)] = Learned(make(x), len(x), channels)
    return known[(*name, size)]


def principal(moments: distances.Moments, k: int) -> Linear:
    """The projection on the `k` (at most D) directions of the largest variance."""
    dim = len(moments.mean)
    k = min(k, dim)
    if 4 * k < dim:  # some directions of many
        _, vectors = scipy.sparse.linalg.eigsh(moments.scatter, k, v0=np.ones(dim))
    else:
        _, vectors = scipy.linalg.eigh(moments.scatter, subset_by_index=(dim - k, dim - 1))
    vectors = vectors[:, ::-1]  # the largest first
    return Linear(moments.mean, vectors, vectors.T, moments.mean)


def principal_components(context: Context, size: tuple[int, int], count: int) -> Learned:
    """The projection on `count` principal components of training images of `size`; computed once in a run."""

    def make(x):
        return principal(distances.in_parts(x), count)

    return learned(context, size, ("principal components", count), make)


def best_filter(x: np.ndarray, sigma: float, clip: bool) -> Linear:
    """The affine map of rows x + sigma * normal noise, cut off at 0 and 1 if `clip`, that is nearest to rows x [N, D] in the mean.

    The mean over the noise is taken exactly. Without clipping it is Sigma (Sigma + sigma^2 I)^-1 around the mean.
    """
    count, dim = x.shape
    mean, of_noisy, across = np.zeros((2, dim)), np.zeros((dim, dim)), np.zeros((dim, dim))
    noise = np.zeros(dim)
    for start, stop in chunks(count, 4096):
        part = np.asarray(x[start:stop], np.float64)
        seen, variance = clipped(part, sigma) if clip else (part, np.full(part.shape, sigma**2))
        mean += part.sum(0) / count, seen.sum(0) / count
        of_noisy += seen.T @ seen / count  # pixels are near their mean: sums in float64 lose nothing
        across += seen.T @ part / count if clip else 0
        noise += variance.sum(0) / count
    of_noisy -= np.outer(mean[1], mean[1])
    across = across - np.outer(mean[1], mean[0]) if clip else of_noisy.copy()
    of_noisy[np.diag_indices(dim)] += noise
    return Linear(mean[1], scipy.linalg.solve(of_noisy, across, assume_a="pos"), None, mean[0])


def clipped(x: np.ndarray, sigma: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of x + sigma * normal noise after it is cut off at 0 and 1, each of the shape of x."""
    low, high = -x / sigma, (1 - x) / sigma
    inside = scipy.special.ndtr(high) - scipy.special.ndtr(low)
    at_low, at_high = (np.exp(-0.5 * edge**2) / np.sqrt(2 * np.pi) for edge in (low, high))
    above = scipy.special.ndtr(-high)
    mean = x * inside + sigma * (at_low - at_high) + above
    square = (x**2 + sigma**2) * inside + sigma * (x * at_low - (1 + x) * at_high) + above
    return mean, square - mean**2

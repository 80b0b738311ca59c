"""Image resizing as in three implementations of the Frechet inception distance (Parmar et al. 2022, arXiv:2104.11222).

The choice changes FID by more than many papers report as progress.
"""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

Resize = Literal["legacy", "pytorch_fid", "clean"]


def resize(images: jax.Array, size: tuple[int, int], mode: Resize) -> jax.Array:
    """Images [B, H, W, C] in [0, 255] -> float32 [B, *size, C] in [0, 255].

    legacy: bilinear of TensorFlow 1, without half-pixel centers and antialiasing; most published figures use it.
    pytorch_fid: bilinear with half-pixel centers, without antialiasing.
    clean: Pillow's bicubic with antialiasing on floats.
    """
    x = images.astype(jnp.float32)
    shape = (x.shape[0], *size, x.shape[3])
    if mode == "legacy":
        rows, columns = (_without_centers(*lengths) for lengths in zip(x.shape[1:3], size, strict=True))
        return jnp.einsum("hi,bijc,wj->bhwc", rows, x, columns, precision="highest")
    if mode == "pytorch_fid":
        return jax.image.resize(x, shape, "bilinear", antialias=False)
    return jnp.clip(jax.image.resize(x, shape, "cubic", antialias=True), 0, 255)


@functools.partial(jax.jit, static_argnums=1)
def to_size(images: jax.Array, size: tuple[int, int]) -> jax.Array:
    """uint8 images [B, H, W, C] -> uint8 [B, *size, C]: 'clean', rounded to the nearest of 256 levels."""
    return jnp.round(resize(images, size, "clean")).astype(jnp.uint8)


def _without_centers(length: int, out: int) -> np.ndarray:
    """float32 [out, length]: row i interpolates at position i * length / out between two pixels."""
    at = np.arange(out, dtype=np.float32) * np.float32(length / out)  # in float32, as in TensorFlow 1
    low = np.floor(at).astype(int)
    matrix = np.zeros((out, length), np.float32)
    np.add.at(matrix, (np.arange(out), low), 1 - (at - low))
    np.add.at(matrix, (np.arange(out), np.minimum(low + 1, length - 1)), at - low)
    return matrix

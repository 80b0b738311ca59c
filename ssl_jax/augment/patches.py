"""Images as rows of square patches, and which of them a network sees."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def patchify(images: jax.Array, patch: int) -> jax.Array:
    """[B, H, W, C] -> [B, N, patch * patch * C]: patches row by row, each as (row, column, channel)."""
    batch, height, width, channels = images.shape
    rows, columns = height // patch, width // patch
    x = images.reshape(batch, rows, patch, columns, patch, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, patch * patch * channels)


def unpatchify(patches: jax.Array, patch: int, grid: tuple[int, int]) -> jax.Array:
    """The inverse: [B, rows * columns, patch * patch * C] -> [B, H, W, C]."""
    batch, (rows, columns) = len(patches), grid
    x = patches.reshape(batch, rows, columns, patch, patch, -1)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * patch, columns * patch, -1)


def random_order(key: jax.Array, batch: int, count: int) -> jax.Array:
    """int32 [batch, count]: the numbers 0 to count - 1 in a random order for each image."""
    return jnp.argsort(jax.random.uniform(key, (batch, count)), axis=1).astype(jnp.int32)

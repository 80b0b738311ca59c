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


def blocks(key: jax.Array, batch: int, count: int, size: tuple[int, int], grid: tuple[int, int]) -> jax.Array:
    """int32 [batch, count, size[0] * size[1]]: the patches of `count` blocks at places of their own in each image.

    Every place is equally likely, the last row and column included. (The sampler of the official I-JEPA never reaches these.)
    """
    corner = jax.random.randint(key, (batch, count, 2), 0, jnp.array([g - s + 1 for g, s in zip(grid, size, strict=True)]))
    rows, columns = jnp.meshgrid(jnp.arange(size[0]), jnp.arange(size[1]), indexing="ij")
    inside = (rows * grid[1] + columns).ravel()
    return (corner[..., 0] * grid[1] + corner[..., 1])[..., None] + inside


def context(key: jax.Array, block: jax.Array, targets: jax.Array, kept: int, patches: int) -> jax.Array:
    """int32 [B, kept]: random patches of `block` [B, n] that are in no target [B, T, t], in ascending order.

    n - T t is at least `kept`, so that there are enough in every image.
    """
    batch = len(block)
    rows = jnp.arange(batch)[:, None]
    allowed = jnp.zeros((batch, patches), bool).at[rows, block].set(True)
    allowed = allowed.at[rows, targets.reshape(batch, -1)].set(False)
    order = jnp.argsort(jnp.where(allowed, jax.random.uniform(key, (batch, patches)), 2.0), axis=1)
    return jnp.sort(order[:, :kept], axis=1).astype(jnp.int32)

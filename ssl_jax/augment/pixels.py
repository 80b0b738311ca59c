"""From pixels to the input of an encoder."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def to_input(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """uint8 in [0, 255] or float in [0, 1], [..., H, W, 3] RGB -> float32 (x - mean) / std, per channel."""
    return (to_float(images) - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)


def to_float(images: jax.Array) -> jax.Array:
    """uint8 in [0, 255] -> float32 in [0, 1]; floats become float32 and stay in their range."""
    x = images.astype(jnp.float32)
    return x / 255 if images.dtype == jnp.uint8 else x


def block_means(x: jax.Array, size: int) -> jax.Array:
    """Means of blocks of size x size pixels: [B, H, W, C] -> [B, H / size, W / size, C]. `size` divides H and W."""
    batch, height, width, channels = x.shape
    return jnp.mean(x.reshape(batch, height // size, size, width // size, size, channels), axis=(2, 4))

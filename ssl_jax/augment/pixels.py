"""From pixels to the input of an encoder."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def to_input(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """uint8 in [0, 255] or float in [0, 1], [..., H, W, 3] RGB -> float32 (x - mean) / std, per channel."""
    x = images.astype(jnp.float32)
    if images.dtype == jnp.uint8:
        x = x / 255
    return (x - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)

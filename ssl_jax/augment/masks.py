"""Masks of what a network does not see and has to paint: context encoders (Pathak et al. 2016, arXiv:1604.07379).

A mask is bool and True where pixels are removed. Remove them before the network, not from its features: only then its gradient with
respect to them is exactly 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax.errors import UserError


def center_mask(image_hw: tuple[int, int], size: int) -> np.ndarray:
    """bool [H, W]: the square of `size` pixels in the center of an image of image_hw = (H, W).

    The paper's hole of 64 in 128 pixels with an overlap of 4 hides a square of 56 and predicts 64. Raises UserError if the square is
    not smaller than the image.
    """
    height, width = image_hw
    if not 1 <= size < min(image_hw):
        raise UserError(
            f"a mask of {size} x {size} pixels does not leave anything of images of {height} x {width} pixels; use a size from 1 to "
            f"{min(image_hw) - 1}"
        )
    mask = np.zeros(image_hw, bool)
    top, left = (height - size) // 2, (width - size) // 2
    mask[top : top + size, left : left + size] = True
    return mask


def random_region_masks(
    key: jax.Array, count: int, image_hw: tuple[int, int], area: Sequence[float] = (0.2, 0.3), cell: int = 16
) -> jax.Array:
    """bool [count, H, W]: regions of random shape, each of a share of the image drawn uniformly from `area`, to the pixel.

    The shape is smooth noise, random numbers `cell` pixels apart resized with bicubic weights, where it is lowest. (The published
    code has one mask per batch, a fixed threshold, and rejects areas outside of 0.2 to 0.3; its cells have about 17 pixels.) Example
    i draws with fold_in(key, i). Raises UserError for an area or a cell that is not possible.
    """
    height, width = image_hw
    if not 0 < area[0] <= area[1] < 1:
        raise UserError(f"masks of area={tuple(area)} are not possible; give (least, most) with 0 < least <= most < 1")
    if not 1 <= cell <= max(image_hw):
        raise UserError(f"mask cells of {cell} pixels do not fit images of {height} x {width} pixels; use 1 to {max(image_hw)}")
    cells = math.ceil(height / cell) + 1, math.ceil(width / cell) + 1

    def mask(key):
        noise_key, place_key, area_key = jax.random.split(key, 3)
        noise = jax.random.uniform(noise_key, cells)
        smooth = jax.image.resize(noise, (cells[0] * cell, cells[1] * cell), "bicubic", precision=jax.lax.Precision.HIGHEST)
        window = jax.lax.dynamic_slice(smooth, jax.random.randint(place_key, (2,), 0, cell), image_hw)
        share = jax.random.uniform(area_key, minval=area[0], maxval=area[1])
        pixels = jnp.clip(jnp.round(share * height * width), 1, height * width - 1).astype(jnp.int32)
        return window <= jnp.sort(window.ravel())[pixels - 1]

    return jax.vmap(lambda example: mask(jax.random.fold_in(key, example)))(jnp.arange(count))


def remove(images: jax.Array, mask: jax.Array, fill: float | Sequence[float]) -> jax.Array:
    """Images [B, H, W, C] with `fill`, one number or one per channel, where the mask [H, W] or [B, H, W] is True."""
    return jnp.where(jnp.asarray(mask)[..., None], jnp.asarray(fill, images.dtype), images)

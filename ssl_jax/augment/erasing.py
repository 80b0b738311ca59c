"""Random erasing (Zhong et al. 2017, arXiv:1708.04896) as in timm's mode 'pixel'."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
ATTEMPTS = 10


def erase(image, key, p=0.25, area=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3)):
    """With probability p, a rectangle becomes noise that is standard normal after the normalization of ImageNet.

    Its share of the image is uniform in `area`, the logarithm of height / width uniform in that of `ratio`. Of ten draws the first
    that fits is taken; if none does, nothing is erased. Noise leaves [0, 1], so erase after all other operations.
    """
    height, width = image.shape[:2]
    draw_key, place_key, apply_key, noise_key = jax.random.split(key, 4)
    share, shape = jax.random.uniform(draw_key, (2, ATTEMPTS))
    target = height * width * (area[0] + (area[1] - area[0]) * share)
    aspect = jnp.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * shape)
    rows, columns = (jnp.round(jnp.sqrt(side)).astype(jnp.int32) for side in (target * aspect, target / aspect))
    fits = (rows < height) & (columns < width)
    first = jnp.argmax(fits)
    rows, columns = rows[first], columns[first]
    place = jax.random.uniform(place_key, (2,))
    top, left = (jnp.floor(u * (side + 1)).astype(jnp.int32) for u, side in zip(place, (height - rows, width - columns), strict=True))
    row, column = jnp.arange(height)[:, None], jnp.arange(width)[None, :]
    inside = (row >= top) & (row < top + rows) & (column >= left) & (column < left + columns)
    erased = inside & fits.any() & (jax.random.uniform(apply_key) < p)
    noise = jnp.asarray(MEAN) + jnp.asarray(STD) * jax.random.normal(noise_key, image.shape)
    return jnp.where(erased[..., None], noise, image)

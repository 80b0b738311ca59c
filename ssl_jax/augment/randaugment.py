"""RandAugment (Cubuk et al. 2020, arXiv:1909.13719) with the operations and magnitudes of timm's 'rand-m9-mstd0.5-inc1'.

Every operation is a table of 256 values per channel, a blend with a degraded image, or an affine map. An image goes through one of
each, with those that were not drawn as the identity, so a batch under `vmap` computes three operations rather than all fifteen.
Values are whole numbers from 0 to 255 between operations, as in Pillow, whose results these are up to rounding.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

FILL = (124, 116, 104)  # the mean color of ImageNet, where an affine map reads outside of the image
DRAWN = 0.5  # probability that a drawn operation is applied
TABLES = ("auto_contrast", "equalize", "invert", "posterize", "solarize", "solarize_add")
BLENDS = ("color", "contrast", "brightness", "sharpness")
AFFINE = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
OPERATIONS = (*TABLES, *BLENDS, *AFFINE)


def rand_augment(image, key, layers=2, magnitude=9.0, deviation=0.5):
    """`layers` operations, each drawn from `OPERATIONS` and applied with probability 1/2.

    Args:
        magnitude: mean strength, from 0 to 10.
        deviation: standard deviation of the strengths, which are clipped to [0, 10].
    """
    x = jnp.round(image * 255).astype(jnp.int32)
    for layer_key in jax.random.split(key, layers):
        keys = jax.random.split(layer_key, 4)
        operation = jax.random.randint(keys[0], (), 0, len(OPERATIONS))
        level = jnp.clip(magnitude + deviation * jax.random.normal(keys[1]), 0, 10)
        sign = jnp.where(jax.random.bernoulli(keys[2]), 1.0, -1.0)
        x = jnp.where(jax.random.uniform(keys[3]) < DRAWN, apply_operation(x, operation, level, sign), x)
    return x.astype(jnp.float32) / 255


def apply_operation(x: jax.Array, operation: jax.Array, level: jax.Array, sign: jax.Array) -> jax.Array:
    """int32 [H, W, 3] from 0 to 255 -> the same, after the `operation` (an index of OPERATIONS) of strength `level` in [0, 10].

    sign: 1 or -1, the direction of blends and affine maps.
    """
    x = _through_table(x, operation, level)
    x = _blended(x, operation - len(TABLES), level, sign)
    return _moved(x, operation - len(TABLES) - len(BLENDS), level, sign)


def _through_table(x, operation, level):
    """The value of each channel by one of TABLES; others are the identity. Strengths of timm's 'increasing' operations."""
    value = jnp.arange(256)
    counts = jax.vmap(lambda channel: jnp.zeros(256, jnp.int32).at[channel.reshape(-1)].add(1), -1)(x)  # [3, 256]

    bits = 4 - jnp.floor(level / 10 * 4).astype(jnp.int32)  # bits that are kept
    threshold = 256 - jnp.minimum(256, jnp.floor(level / 10 * 256).astype(jnp.int32))
    added = jnp.minimum(128, jnp.floor(level / 10 * 110).astype(jnp.int32))
    same = (
        255 - value,
        value & ~(2 ** (8 - bits) - 1),
        jnp.where(value < threshold, value, 255 - value),
        jnp.where(value < 128, jnp.minimum(255, value + added), value),
        value,
    )
    tables = [_auto_contrast(counts), _equalize(counts), *(jnp.broadcast_to(table, (3, 256)) for table in same)]
    table = jnp.stack(tables)[jnp.minimum(operation, len(TABLES))]
    return jnp.stack([table[channel][x[..., channel]] for channel in range(3)], -1)


def _auto_contrast(counts):
    """Tables [3, 256] that stretch each channel to 0 ... 255."""
    value = jnp.arange(256)
    low = jnp.argmax(counts > 0, -1, keepdims=True)
    high = 255 - jnp.argmax(counts[:, ::-1] > 0, -1, keepdims=True)
    stretched = jnp.clip(255 * (value - low) // jnp.maximum(high - low, 1), 0, 255)
    return jnp.where(high > low, stretched, value)


def _equalize(counts):
    """Tables [3, 256] that make the histogram of each channel flat, as `PIL.ImageOps.equalize`."""
    high = 255 - jnp.argmax(counts[:, ::-1] > 0, -1, keepdims=True)
    step = (counts.sum(-1, keepdims=True) - jnp.take_along_axis(counts, high, -1)) // 255
    before = jnp.cumsum(counts, -1) - counts
    flat = jnp.clip((step // 2 + before) // jnp.maximum(step, 1), 0, 255)
    return jnp.where(step > 0, flat, jnp.arange(256))


def _blended(x, operation, level, sign):
    """degraded + factor (x - degraded) for one of BLENDS; others are the identity. Rounded down and clipped, as in Pillow."""
    drawn = (operation >= 0) & (operation < len(BLENDS))
    factor = jnp.where(drawn, jnp.maximum(0.1, 1 + sign * level / 10 * 0.9), 1.0)
    luma = (19595 * x[..., 0] + 38470 * x[..., 1] + 7471 * x[..., 2] + 32768) >> 16
    gray = jnp.broadcast_to(luma[..., None], x.shape)
    mean = jnp.broadcast_to(jnp.floor(luma.mean() + 0.5).astype(jnp.int32), x.shape)
    degraded = jnp.stack([gray, mean, jnp.zeros_like(x), _smooth(x)])[jnp.clip(operation, 0, len(BLENDS) - 1)]
    blended = jnp.clip(jnp.floor(degraded + factor * (x - degraded)), 0, 255).astype(jnp.int32)
    return jnp.where(drawn, blended, x)


def _smooth(x):
    """The 3 x 3 filter (1 1 1, 1 5 1, 1 1 1) / 13; the border stays, as in Pillow."""
    height, width = x.shape[:2]
    if min(height, width) < 3:
        return x
    total = sum(x[i : i + height - 2, j : j + width - 2] for i in range(3) for j in range(3)) + 4 * x[1:-1, 1:-1]
    return x.at[1:-1, 1:-1].set((2 * total + 13) // 26)


def _moved(x, operation, level, sign):
    """One of AFFINE with bilinear interpolation; others are the identity. Maps are from a place in the result to one in `x`."""
    drawn = operation >= 0
    height, width = x.shape[:2]
    strength = sign * level / 10
    angle, shear = math.radians(30) * strength, 0.3 * strength
    cos, sin, zero, one = jnp.cos(angle), jnp.sin(angle), jnp.zeros(()), jnp.ones(())
    center_x, center_y = width / 2, height / 2
    rotation = (
        jnp.stack([cos, -sin, center_x - center_x * cos + center_y * sin]),
        jnp.stack([sin, cos, center_y - center_x * sin - center_y * cos]),
    )
    identity_x, identity_y = jnp.stack([one, zero, zero]), jnp.stack([zero, one, zero])
    maps = (
        rotation,
        (jnp.stack([one, shear, zero]), identity_y),
        (identity_x, jnp.stack([shear, one, zero])),
        (jnp.stack([one, zero, 0.45 * strength * width]), identity_y),
        (identity_x, jnp.stack([zero, one, 0.45 * strength * height])),
    )
    to_x, to_y = jnp.stack([jnp.stack(pair) for pair in maps])[jnp.clip(operation, 0, len(AFFINE) - 1)]
    row, column = jnp.meshgrid(jnp.arange(height) + 0.5, jnp.arange(width) + 0.5, indexing="ij")
    source_x, source_y = (a * column + b * row + c for a, b, c in (to_x, to_y))
    inside = (source_x >= 0) & (source_x < width) & (source_y >= 0) & (source_y < height)
    value = _interpolate(x.astype(jnp.float32), source_x - 0.5, source_y - 0.5)
    moved = jnp.where(inside[..., None], jnp.floor(value).astype(jnp.int32), jnp.asarray(FILL))
    return jnp.where(drawn, moved, x)


def _interpolate(x, column, row):
    """Bilinear values of x [H, W, C] at places [H, W]; beyond the outer pixels these are repeated."""
    height, width, _ = x.shape
    left, top = jnp.floor(column), jnp.floor(row)

    def at(row, column):
        return x[jnp.clip(row, 0, height - 1).astype(jnp.int32), jnp.clip(column, 0, width - 1).astype(jnp.int32)]

    across, down = (column - left)[..., None], (row - top)[..., None]
    above = at(top, left) + across * (at(top, left + 1) - at(top, left))
    below = at(top + 1, left) + across * (at(top + 1, left + 1) - at(top + 1, left))
    return above + down * (below - above)

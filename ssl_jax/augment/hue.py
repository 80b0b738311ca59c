"""Hue and chroma, and their local histograms: colorization after Larsson et al. 2016 (arXiv:1603.06668).

Gray is the mean of the channels, chroma the difference of the largest and the smallest, and hue that of HSV, in turns. Gray, hue
and chroma together give back the color.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ssl_jax.augment.pixels import to_float
from ssl_jax.errors import UserError


def hue_chroma(rgb: jax.Array) -> tuple[jax.Array, jax.Array]:
    """RGB, uint8 or float in [0, 1], [..., 3] -> (hue in [0, 1), chroma in [0, 1]), both [...]. The hue of a gray color is 0."""
    rgb = to_float(rgb)
    r, g, b = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    chroma = jnp.max(rgb, axis=-1) - jnp.min(rgb, axis=-1)
    inverse = 1 / jnp.where(chroma > 0, chroma, 1)
    sector = jnp.where(
        (r >= g) & (r >= b),
        (g - b) * inverse,
        jnp.where(g >= b, 2 + (b - r) * inverse, 4 + (r - g) * inverse),
    )
    hue = sector / 6
    hue = hue - jnp.floor(hue)
    return jnp.where(hue >= 1, 0, hue), chroma  # a tiny negative hue rounds to 1


def color_from_hue(gray: jax.Array, hue: jax.Array, chroma: jax.Array) -> jax.Array:
    """The inverse of `hue_chroma`: gray (mean of the channels), hue and chroma, all [...] -> RGB [..., 3], not clipped."""
    distance = jnp.abs((hue[..., None] * 6 - jnp.array([0.0, 2, 4]) + 3) % 6 - 3)  # to red, green and blue, in sixths of a turn
    pure = jnp.clip(2 - distance, 0, 1)
    return gray[..., None] + chroma[..., None] * (pure - jnp.mean(pure, axis=-1, keepdims=True))


def local_histograms(values: jax.Array, bins: int = 32, window: int = 7, stride: int = 1) -> jax.Array:
    """Values in [0, 1], [B, H, W] -> shares [B, h, w, bins] of equal bins in each window of window x window pixels.

    Windows lie inside of the image, so h = (H - window) // stride + 1. Value 1 is in the last bin. Raises UserError if the window
    is larger than the image.
    """
    if window > min(values.shape[1:3]):
        height, width = values.shape[1:3]
        raise UserError(f"a window of {window} pixels for histograms does not fit images of {height} x {width}; use a smaller one")
    codes = jnp.clip(jnp.floor(values * bins), 0, bins - 1)
    one_hot = (codes[..., None] == jnp.arange(bins)).astype(jnp.float32)
    counts = jax.lax.reduce_window(
        one_hot, 0.0, jax.lax.add, (1, window, window, 1), (1, stride, stride, 1), "VALID"
    )
    return counts / window**2


def possible_chroma(gray: jax.Array) -> jax.Array:
    """Weights in [0, 1] of the loss on chroma: 0 for black and white, which have no chroma, and 1 from 1/3 to 2/3."""
    return jnp.clip(jnp.minimum(3 * gray, 3 * (1 - gray)), 0, 1)


def expected_color(gray: jax.Array, hue: jax.Array, chroma: jax.Array, fade: float = 0.03) -> jax.Array:
    """Gray [...] and distributions of hue and chroma [..., bins] -> RGB [..., 3] in [0, 1].

    The chroma is the median. The hue is the direction of the mean on the color circle; where the directions cancel out to a length
    below `fade`, the chroma fades in proportion.
    """
    bins = hue.shape[-1]
    angle = (jnp.arange(bins) + 0.5) * (2 * jnp.pi / bins)
    x, y = jnp.sum(hue * jnp.cos(angle), axis=-1), jnp.sum(hue * jnp.sin(angle), axis=-1)
    direction = jnp.arctan2(y, x) / (2 * jnp.pi) % 1.0
    median = (jnp.argmax(jnp.cumsum(chroma, axis=-1) >= 0.5 - 1e-6, axis=-1) + 0.5) / chroma.shape[-1]
    median = median * jnp.clip(jnp.sqrt(x * x + y * y) / fade, 0, 1)
    return jnp.clip(color_from_hue(gray, direction, median), 0, 1)

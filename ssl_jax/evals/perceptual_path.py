"""Perceptual path length (Karras et al. 2019, arXiv:1812.04948, section 4.1): how much images change along a short way of latents.

Numbers only: the distance is the caller's. The published figures take LPIPS with VGG-16 on images in [0, 255] of at most 256 pixels,
and for faces the middle of the image.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np


def lerp(a: jax.Array, b: jax.Array, t: jax.Array) -> jax.Array:
    """The straight line between a and b [N, D] at t [N]; for w."""
    return a + (b - a) * t[:, None]


def slerp(a: jax.Array, b: jax.Array, t: jax.Array) -> jax.Array:
    """The great circle between the directions of a and b [N, D] at t [N], on the unit sphere; for z, whose length does not count."""
    a, b = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (a, b))
    angle = t * jnp.arccos(jnp.clip(jnp.sum(a * b, -1), -1, 1))
    across = b - jnp.sum(a * b, -1, keepdims=True) * a
    across = across / jnp.linalg.norm(across, axis=-1, keepdims=True)
    return a * jnp.cos(angle)[:, None] + across * jnp.sin(angle)[:, None]


def path_lengths(
    synthesize: Callable[[jax.Array], jax.Array],
    distance: Callable[[jax.Array, jax.Array], jax.Array],
    start: jax.Array,
    end: jax.Array,
    place: jax.Array,
    interpolate: Callable[[jax.Array, jax.Array, jax.Array], jax.Array] = lerp,
    epsilon: float = 1e-4,
) -> jax.Array:
    """[N]: the distance of the images at `place` and at `place + epsilon` of each way, over epsilon^2.

    Args:
        synthesize: latents [N, D] -> images, float32 (differences of half precision are noise), with the same noise in every call.
        distance: of two batches of images -> [N]; quadratic in small differences, as LPIPS is.
        start, end: latents of both ends.
        place: [N] in [0, 1]; uniform for a 'full' path, 0 for the 'end'.
    """
    first, second = (synthesize(interpolate(start, end, place + shift)) for shift in (0.0, epsilon))
    return distance(first, second) / epsilon**2


def trimmed_mean(lengths: np.ndarray, least: float = 1, most: float = 99) -> float:
    """The mean of what lies between two percentiles (values of the sample), as published."""
    low, high = np.percentile(lengths, least, method="lower"), np.percentile(lengths, most, method="higher")
    return float(np.mean(lengths[(lengths >= low) & (lengths <= high)]))

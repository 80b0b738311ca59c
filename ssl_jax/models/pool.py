"""Max-pooling that remembers which pixel was the largest, so that its gradient is read instead of searched again."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

Pads = tuple[tuple[int, int], tuple[int, int]]


def max_pool(
    x: jax.Array, window: tuple[int, int], strides: tuple[int, int], padding: str | Pads = "VALID"
) -> jax.Array:
    """x [B, H, W, C] -> [B, h, w, C], as `flax.linen.max_pool`, with at most 255 pixels per window.

    Of equal pixels the first one of a window gets the gradient, as in XLA and PyTorch. XLA's gradient compares every window with
    its result again; on CPUs it takes a tenth of a ResNet-50 step.
    """
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(x.shape[1:3], window, strides, padding)
    assert math.prod(window) <= 255, "places are uint8"
    return _max_pool(x, tuple(window), tuple(strides), tuple((int(low), int(high)) for low, high in padding))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _max_pool(x, window, strides, padding):
    return _forward(x, window, strides, padding)[0]


def _forward(x, window, strides, padding):
    padded = jnp.pad(x, ((0, 0), *padding, (0, 0)), constant_values=-jnp.inf)
    h, w = ((n - size) // stride + 1 for n, size, stride in zip(padded.shape[1:3], window, strides, strict=True))
    largest, place = None, None
    for i, j in _positions(window):
        end = (x.shape[0], i + (h - 1) * strides[0] + 1, j + (w - 1) * strides[1] + 1, x.shape[3])
        pixel = lax.slice(padded, (0, i, j, 0), end, (1, *strides, 1))
        if largest is None:
            largest, place = pixel, jnp.zeros(pixel.shape, jnp.uint8)
        else:
            place = jnp.where(pixel > largest, jnp.uint8(i * window[1] + j), place)
            largest = jnp.maximum(largest, pixel)
    return largest, (place, jnp.empty((0, *x.shape[1:3])))  # the second for its shape


def _backward(window, strides, padding, kept, g):
    """Each position of the windows spreads its part of `g` back to pixels."""
    place, like = kept
    total = 0
    for i, j in _positions(window):
        part = jnp.where(place == i * window[1] + j, g, 0)
        pads = [(0, 0, 0)]
        for size, n, offset, stride, (low, _) in zip(
            like.shape[1:], g.shape[1:3], (i, j), strides, padding, strict=True
        ):
            before = offset - low
            pads.append((before, size - before - ((n - 1) * stride + 1), stride - 1))
        total = total + lax.pad(part, jnp.zeros((), g.dtype), [*pads, (0, 0, 0)])
    return (total,)


def _positions(window):
    return [(i, j) for i in range(window[0]) for j in range(window[1])]


_max_pool.defvjp(_forward, _backward)

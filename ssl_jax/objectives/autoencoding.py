"""Losses of autoencoders and the corruptions that they undo. Values x are in [0, 1], losses are float32 sums over an image, [B]: where
a penalty of the code is added, its weight depends on that (a mean over 784 pixels makes it 784 times as heavy).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ssl_jax.objectives.likelihood import bernoulli


def _per_image(x: jax.Array) -> jax.Array:
    return x.reshape(x.shape[0], -1).sum(-1)


def cross_entropy(x: jax.Array, out: jax.Array, weights: jax.Array | float = 1.0) -> jax.Array:
    """Of sigmoid(out) [B, ...] to gray levels x: at its least the entropy of those, not zero."""
    return _per_image(-weights * bernoulli(x, out))


def squared(x: jax.Array, out: jax.Array, weights: jax.Array | float = 1.0) -> jax.Array:
    """Squared error of out [B, ...] itself."""
    return _per_image(weights * (x - out) ** 2)


RECONSTRUCTIONS = {  # name -> (loss, the decoder's output as an image in [0, 1])
    "cross_entropy": (cross_entropy, jax.nn.sigmoid),
    "squared": (squared, lambda out: jnp.clip(out, 0, 1)),
}


def sparsity(code: jax.Array) -> jax.Array:
    """Sum of the absolute values of a code [B, ...] -> [B]."""
    return _per_image(jnp.abs(code))


# ------------------------------------------------------------------------------------------------------- contraction


def contraction_of_sigmoid(code: jax.Array, kernel: jax.Array) -> jax.Array:
    """|dh / dx|_F^2 of one layer h = sigmoid(x W + b): code h [B, Z], kernel W [D, Z] -> [B] (Rifai et al. 2011, equation 7)."""
    return (code * (1 - code)) ** 2 @ jnp.sum(kernel**2, 0)


def contraction(encode: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """|d encode / dx|_F^2 of any encoder that treats every image by itself: x [B, ...], encode(x) [B, Z] -> [B].

    One backward pass for each of the Z numbers of the code.
    """
    code, backward = jax.vjp(encode, x)
    rows = jnp.eye(code.shape[-1], dtype=code.dtype)
    jacobian = jax.vmap(lambda row: backward(jnp.broadcast_to(row, code.shape))[0])(rows)  # [Z, B, ...]
    return jnp.sum(jacobian**2, axis=(0, *range(2, jacobian.ndim)))


# ------------------------------------------------------------------------------------- corruptions and what undoes them


def masking(key: jax.Array, x: jax.Array, level: float) -> jax.Array:
    """A part `level` of the values becomes 0."""
    return jnp.where(jax.random.bernoulli(key, level, x.shape), 0.0, x)


def salt_and_pepper(key: jax.Array, x: jax.Array, level: float) -> jax.Array:
    """A part `level` of the values becomes 0 or 1, as a coin falls."""
    hit, coin = jax.random.split(key)
    return jnp.where(jax.random.bernoulli(hit, level, x.shape), jax.random.bernoulli(coin, 0.5, x.shape), x)


def gaussian(key: jax.Array, x: jax.Array, level: float) -> jax.Array:
    """Normal noise of deviation `level`."""
    return x + level * jax.random.normal(key, x.shape)


def clipped_gaussian(key: jax.Array, x: jax.Array, level: float) -> jax.Array:
    """The same, cut off at 0 and 1: what images of noise look like."""
    return jnp.clip(gaussian(key, x, level), 0, 1)


CORRUPTIONS = {  # Vincent et al. 2010 (JMLR 11), section 3.3; each (key, x, level) -> x, the same shape
    "none": lambda key, x, level: x,
    "masking": masking,
    "salt_and_pepper": salt_and_pepper,
    "gaussian": gaussian,
    "clipped_gaussian": clipped_gaussian,
}


def emphasis(x: jax.Array, corrupted: jax.Array, on_corrupted: float, on_rest: float) -> jax.Array:
    """Weights of the values of x in a loss: those that the corruption changed, and the rest (section 3.4; 1 and 0.5, or 1 and 0)."""
    return jnp.where(x == corrupted, on_rest, on_corrupted)

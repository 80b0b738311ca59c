"""Losses of autoencoders, and corruptions for denoising autoencoders.

Values x are in [0, 1]. Losses are float32 sums over an image, [B]. The weight of a penalty on the code depends on that: with a
mean over 784 pixels it would count 784 times as much.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ssl_jax.objectives.likelihood import bernoulli


def _per_image(x: jax.Array) -> jax.Array:
    return x.reshape(x.shape[0], -1).sum(-1)


def cross_entropy(x: jax.Array, out: jax.Array, weights: jax.Array | float = 1.0) -> jax.Array:
    """Binary cross-entropy of sigmoid(out) [B, ...] with gray levels x -> [B]. Its minimum is the entropy of x, not zero."""
    return _per_image(-weights * bernoulli(x, out))


def squared(x: jax.Array, out: jax.Array, weights: jax.Array | float = 1.0) -> jax.Array:
    """Squared error of out [B, ...] -> [B]."""
    return _per_image(weights * (x - out) ** 2)


RECONSTRUCTIONS = {  # name -> (loss, decoder output -> image in [0, 1])
    "cross_entropy": (cross_entropy, jax.nn.sigmoid),
    "squared": (squared, lambda out: jnp.clip(out, 0, 1)),
}


def sparsity(code: jax.Array) -> jax.Array:
    """Sum of the absolute values of a code [B, ...] -> [B]."""
    return _per_image(jnp.abs(code))


# ------------------------------------------------------------------------------------------------------- contraction


def contraction_of_sigmoid(code: jax.Array, kernel: jax.Array) -> jax.Array:
    """|dh / dx|_F^2 of one layer h = sigmoid(x W + b): code h [B, Z], kernel W [D, Z] -> [B] (Rifai et al. 2011, equation 7)."""
    return jnp.matmul((code * (1 - code)) ** 2, jnp.sum(kernel**2, 0), precision="highest")


def contraction(encode: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """|d encode / dx|_F^2 of any encoder that does not mix images: x [B, ...], encode(x) [B, Z] -> [B].

    Takes one backward pass per dimension of the code.
    """
    code, backward = jax.vjp(encode, x)
    rows = jnp.eye(code.shape[-1], dtype=code.dtype)
    jacobian = jax.vmap(lambda row: backward(jnp.broadcast_to(row, code.shape))[0])(rows)  # [Z, B, ...]
    return jnp.sum(jacobian**2, axis=(0, *range(2, jacobian.ndim)))


# ------------------------------------------------------------------------------------------------------ corruptions


def masking(key: jax.Array, x: jax.Array, level: float) -> jax.Array:
    """Set each value to 0 with probability `level`."""
    return jnp.where(jax.random.bernoulli(key, level, x.shape), 0.0, x)


def salt_and_pepper(key: jax.Array, x: jax.Array, level: float) -> jax.Array:
    """Set each value with probability `level` to 0 or 1, with equal chances."""
    hit, coin = jax.random.split(key)
    return jnp.where(jax.random.bernoulli(hit, level, x.shape), jax.random.bernoulli(coin, 0.5, x.shape), x)


def gaussian(key: jax.Array, x: jax.Array, level: float) -> jax.Array:
    """Add normal noise with standard deviation `level`."""
    return x + level * jax.random.normal(key, x.shape)


def clipped_gaussian(key: jax.Array, x: jax.Array, level: float) -> jax.Array:
    """Add normal noise with standard deviation `level` and clip to [0, 1]."""
    return jnp.clip(gaussian(key, x, level), 0, 1)


CORRUPTIONS = {  # Vincent et al. 2010 (JMLR 11), section 3.3; each is (key, x, level) -> corrupted x
    "none": lambda key, x, level: x,
    "masking": masking,
    "salt_and_pepper": salt_and_pepper,
    "gaussian": gaussian,
    "clipped_gaussian": clipped_gaussian,
}


def emphasis(x: jax.Array, corrupted: jax.Array, on_corrupted: float, on_rest: float) -> jax.Array:
    """Loss weights: `on_corrupted` for values of x that the corruption changed, `on_rest` for the others (section 3.4)."""
    return jnp.where(x == corrupted, on_rest, on_corrupted)

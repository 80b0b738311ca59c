"""Differentiable augmentations between images and a discriminator.

The discriminator sees real and generated images augmented, so that it cannot memorize a small dataset. Gradients pass through
the operations to the generator.

Operations and strengths are those of DiffAugment (Zhao et al. 2020, arXiv:2006.10738). `adapt` controls their probability as in
adaptive augmentation (Karras et al. 2020, arXiv:2006.06676), which has more operations. Images are float [B, H, W, 3] in about
[-1, 1]. Every example has its own random numbers, by its index in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from ssl_jax.errors import UserError


def brightness(x, u):
    """Adds a number from -0.5 to 0.5."""
    return x + (u[0] - 0.5)


def saturation(x, u):
    """Scales the distance from the mean over channels by 0 to 2."""
    mean = jnp.mean(x, axis=3, keepdims=True)
    return mean + (x - mean) * (2 * u[0])


def contrast(x, u):
    """Scales the distance from the mean of the image by 0.5 to 1.5."""
    mean = jnp.mean(x, axis=(1, 2, 3), keepdims=True)
    return mean + (x - mean) * (0.5 + u[0])


def _uniform_integer(u, low, high):
    """u, uniform in [0, 1), as integers from `low` to `high` inclusive."""
    return low + jnp.floor(u * (high - low + 1))


def translation(x, u):
    """Shifts by whole pixels, up to an eighth of the size, and fills with zeros."""
    for axis, u_axis in zip((1, 2), u, strict=True):
        size = x.shape[axis]
        most = int(size / 8 + 0.5)
        shift = _uniform_integer(u_axis, -most, most).reshape(-1, 1, 1)
        pixels = jnp.arange(size)
        # [B, to, from]: products are faster than gathers, also in the backward pass
        move = (pixels[:, None] - shift == pixels).astype(x.dtype)
        subscripts = "bts,bswc->btwc" if axis == 1 else "bts,bhsc->bhtc"
        x = jnp.einsum(subscripts, move, x, precision=jax.lax.Precision.HIGHEST)
    return x


def cutout(x, u):
    """Zeros a square of half the size. Its center lies anywhere in the image, so it may extend beyond the border."""
    covered = jnp.ones((len(x), 1, 1, 1), bool)
    for axis, u_axis in zip((1, 2), u, strict=True):
        size = x.shape[axis]
        side = int(size / 2 + 0.5)
        start = _uniform_integer(u_axis, 0, size - side % 2).reshape(-1, 1) - side // 2
        pixels = jnp.arange(size)
        shape = (len(x), size, 1, 1) if axis == 1 else (len(x), 1, size, 1)
        covered = covered & ((pixels >= start) & (pixels < start + side)).reshape(shape)
    return jnp.where(covered, 0, x)


OPERATIONS = {  # name -> ((function of images and uniform numbers [n, B, 1, 1, 1] in [0, 1), n), ...)
    "color": ((brightness, 1), (saturation, 1), (contrast, 1)),
    "translation": ((translation, 2),),
    "cutout": ((cutout, 2),),
}


def check_policy(policy: Sequence[str]) -> tuple[str, ...]:
    """`policy` as a tuple. Raises UserError for an unknown name."""
    unknown = [name for name in policy if name not in OPERATIONS]
    if unknown:
        raise UserError(f"config.model.augment.policy has no {unknown[0]!r}; choose from {', '.join(OPERATIONS)}")
    return tuple(policy)


def augment(images: jax.Array, key: jax.Array, policy: Sequence[str], p: jax.Array | float = 1.0) -> jax.Array:
    """Applies each operation of `policy`, in order, to each image with probability `p`, which may be traced."""
    operations = [operation for name in policy for operation in OPERATIONS[name]]
    # One call, because many calls take long to compile.
    u = jax.random.uniform(key, (sum(1 + n for _, n in operations), len(images), 1, 1, 1))
    for operation, n in operations:
        images, u = jnp.where(u[0] < p, operation(images, u[1 : 1 + n]), images), u[1 + n :]
    return images


def adapt(p: jax.Array, certainty: jax.Array, images: int, target: float = 0.6, horizon: int = 500_000) -> jax.Array:
    """The next probability, in [0, 1]: a step up if `certainty` exceeds `target`, else a step down.

    Karras et al. 2020b, section 3.1. `certainty` is the mean sign of the discriminator's logits of real images, over the `images`
    images since the last step. p can go from 0 to 1 within `horizon` images. (The published code has no upper bound.)
    """
    return jnp.clip(p + jnp.sign(certainty - target) * images / horizon, 0, 1)

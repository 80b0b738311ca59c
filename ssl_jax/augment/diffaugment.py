"""Augmentations between images and a discriminator: differentiable, on real and generated images alike, so that few images do not teach
the discriminator by heart and what it sees of the generator's can flow back.

Operations and strengths are those of DiffAugment (Zhao et al. 2020, arXiv:2006.10738); with a probability p that follows the
discriminator's certainty they are controlled as in adaptive augmentation (Karras et al. 2020, arXiv:2006.06676), whose own list of
operations is longer. Images are float [B, H, W, 3] in about [-1, 1]; every example has its own draws, by its index in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from ssl_jax.errors import UserError


def brightness(x, u):
    """Adds up to 0.5 in either direction."""
    return x + (u[0] - 0.5)


def saturation(x, u):
    """Scales the distance from the mean of the channels by 0 .. 2."""
    mean = jnp.mean(x, axis=3, keepdims=True)
    return mean + (x - mean) * (2 * u[0])


def contrast(x, u):
    """Scales the distance from the mean of the image by 0.5 .. 1.5."""
    mean = jnp.mean(x, axis=(1, 2, 3), keepdims=True)
    return mean + (x - mean) * (0.5 + u[0])


def _whole(u, low, high):
    """Uniform in [0, 1) to whole numbers from `low` up to and including `high`."""
    return low + jnp.floor(u * (high - low + 1))


def translation(x, u):
    """Shifts by whole pixels, up to an eighth of the size; zeros come in."""
    for axis, u_axis in zip((1, 2), u, strict=True):
        size = x.shape[axis]
        most = int(size / 8 + 0.5)
        shift = _whole(u_axis, -most, most).reshape(-1, 1, 1)
        place = jnp.arange(size)
        move = (place[:, None] - shift == place).astype(x.dtype)  # [B, to, from]: a product is quicker than gathering both ways
        subscripts = "bts,bswc->btwc" if axis == 1 else "bts,bhsc->bhtc"
        x = jnp.einsum(subscripts, move, x, precision=jax.lax.Precision.HIGHEST)
    return x


def cutout(x, u):
    """Zeros a square of half the size, the center of which lies anywhere in the image (the square may stick out)."""
    covered = jnp.ones((len(x), 1, 1, 1), bool)
    for axis, u_axis in zip((1, 2), u, strict=True):
        size = x.shape[axis]
        side = int(size / 2 + 0.5)
        start = _whole(u_axis, 0, size - side % 2).reshape(-1, 1) - side // 2
        place = jnp.arange(size)
        shape = (len(x), size, 1, 1) if axis == 1 else (len(x), 1, size, 1)
        covered = covered & ((place >= start) & (place < start + side)).reshape(shape)
    return jnp.where(covered, 0, x)


OPERATIONS = {  # name -> (function of images and of `n` uniform numbers [n, B, 1, 1, 1] in [0, 1), n)
    "color": ((brightness, 1), (saturation, 1), (contrast, 1)),
    "translation": ((translation, 2),),
    "cutout": ((cutout, 2),),
}


def check_policy(policy: Sequence[str]) -> tuple[str, ...]:
    """The names of `policy`, or UserError with those that exist."""
    unknown = [name for name in policy if name not in OPERATIONS]
    if unknown:
        raise UserError(f"config.model.augment.policy has no {unknown[0]!r}; choose from {', '.join(OPERATIONS)}")
    return tuple(policy)


def augment(images: jax.Array, key: jax.Array, policy: Sequence[str], p: jax.Array | float = 1.0) -> jax.Array:
    """Each operation of `policy`, in its order, on each image with probability `p` (which may be traced)."""
    operations = [operation for name in policy for operation in OPERATIONS[name]]
    u = jax.random.uniform(key, (sum(1 + n for _, n in operations), len(images), 1, 1, 1))  # one draw: many take long to compile
    for operation, n in operations:
        images, u = jnp.where(u[0] < p, operation(images, u[1 : 1 + n]), images), u[1 + n :]
    return images


def adapt(p: jax.Array, certainty: jax.Array, images: int, target: float = 0.6, horizon: int = 500_000) -> jax.Array:
    """The next probability, in [0, 1]: a step up where the discriminator is surer than `target`, else a step down.

    Karras et al. 2020b, section 3.1. `certainty` is the mean sign of the logits of real images, over the `images` images since the last
    step; p goes from 0 to 1 in `horizon` images. (The published code has no upper bound.)
    """
    return jnp.clip(p + jnp.sign(certainty - target) * images / horizon, 0, 1)

"""Images in several orientations, for rotation prediction."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from ssl_jax.errors import UserError


def rotations(images: jax.Array, turns: Sequence[int] = (0, 1, 2, 3)) -> tuple[jax.Array, jax.Array]:
    """Square images [B, H, H, C] -> (images [B, V, H, H, C], labels int32 [B, V]), each by all V numbers of quarter turns.

    Gidaris et al. 2018, arXiv:1803.07728. Turns are counterclockwise, as in `numpy.rot90`; a label is a place in `turns`. Mirror
    images before this function, never after: mirroring turns 90 degrees into 270, so accuracy could not exceed 75 %. Raises
    UserError for images that are not square, whose shape would tell the answer.
    """
    height, width = images.shape[1:3]
    if height != width:
        raise UserError(
            f"rotations need square images, not {height} x {width} pixels; let config.views end in one size, as with "
            f"('random_resized_crop', {{'size': {min(height, width)}}})"
        )
    rotated = jnp.stack([jnp.rot90(images, k, axes=(1, 2)) for k in turns], axis=1)
    return rotated, jnp.broadcast_to(jnp.arange(len(turns), dtype=jnp.int32), rotated.shape[:2])

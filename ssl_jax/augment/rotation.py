"""Images in four orientations, for rotation prediction."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rotations(images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Square images [N, H, H, C] -> ([4 N, H, H, C], labels int32 [4 N]), by 0, 1, 2, then 3 quarter turns.

    Gidaris et al. 2018, arXiv:1803.07728. Turns are counterclockwise, as in `numpy.rot90`.
    """
    turned = [jnp.rot90(images, turns, axes=(1, 2)) for turns in range(4)]
    return jnp.concatenate(turned), jnp.repeat(jnp.arange(4, dtype=jnp.int32), len(images))

"""Known motions of a camera: two windows of one image, a motion apart, that show no border.

For methods that predict the motion between two views (Agrawal et al. 2015, arXiv:1505.01596) or its effect on features (Jayaraman
and Grauman 2015, arXiv:1505.02206), on any images. A motion is float32 [4]: dx, dy (pixels, to the right and down), rotation
(radians, clockwise on the screen), log zoom. It takes a point p of the first view to

    q = c + exp(log_zoom) R(rotation) (p - c) + (dx, dy)        R(t) = [[cos t, -sin t], [sin t, cos t]]

of the second, with c the center of both. The second views of the embedded scenes have the same convention
(`ssl_jax.data.render.motion_matrix`). A window of a larger picture is a view, too: its motion is from the middle of the picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax.augment.pixels import to_float
from ssl_jax.errors import UserError


def _turn(x, y, angle, log_zoom):
    """exp(log_zoom) R(angle) (x, y)"""
    cos, sin, scale = jnp.cos(angle), jnp.sin(angle), jnp.exp(log_zoom)
    return scale * (cos * x - sin * y), scale * (sin * x + cos * y)


def compose(first: jax.Array, then: jax.Array) -> jax.Array:
    """Motions [..., 4] of which `then` follows `first` -> one motion [..., 4]."""
    x, y = _turn(first[..., 0], first[..., 1], then[..., 2], then[..., 3])
    return jnp.stack([x + then[..., 0], y + then[..., 1], first[..., 2] + then[..., 2], first[..., 3] + then[..., 3]], -1)


def invert(motion: jax.Array) -> jax.Array:
    """The motion [..., 4] from the second view back to the first: that of the swapped pair."""
    x, y = _turn(-motion[..., 0], -motion[..., 1], -motion[..., 2], -motion[..., 3])
    return jnp.stack([x, y, -motion[..., 2], -motion[..., 3]], -1)


def relative(first: jax.Array, second: jax.Array) -> jax.Array:
    """The motion [..., 4] between two views, each given by its motion from the same picture."""
    return compose(invert(first), second)


def relative_pose(rotation1, translation1, rotation2, translation2):
    """(R1' R2 [..., D, D], R1' (t2 - t1) [..., D]): the pose of camera 2 in the frame of camera 1, from two poses in the world.

    rotations [..., D, D] and translations [..., D] take points of a camera to the world. The result is the same in any world frame,
    unlike t2 - t1. NumPy, in the precision of the inputs.
    """
    back = np.swapaxes(rotation1, -1, -2)
    return back @ rotation2, (back @ (np.asarray(translation2) - translation1)[..., None])[..., 0]


def draw_motions(key: jax.Array, count: int, limits: Sequence[float], whole_pixels: bool = False) -> jax.Array:
    """float32 [count, 4]: motions, uniform in [-limit, limit] for `limits` [4] of dx, dy, rotation, and log zoom.

    With `whole_pixels` dx and dy are whole numbers, all equally likely; then their limits must be, too. Example i draws with
    fold_in(key, i).
    """
    limits = jnp.asarray(limits, jnp.float32)
    keys = jax.vmap(lambda example: jax.random.fold_in(key, example))(jnp.arange(count))
    u = jax.vmap(lambda k: jax.random.uniform(k, (4,)))(keys)
    motion = (2 * u - 1) * limits
    if not whole_pixels:
        return motion
    whole = jnp.minimum(jnp.floor(u * (2 * limits + 1)), 2 * limits) - limits
    return jnp.where(jnp.arange(4) < 2, whole, motion)


def bin_motions(motions: jax.Array, limits: Sequence[float], bins: Sequence[int]) -> jax.Array:
    """motions [..., D] -> int32 [..., D]: their bins, equally wide from -limit to limit, for each of the D numbers.

    Numbers beyond a limit are in the first or last bin, so none is without a label; with limits below those of the data these two
    are the bins for all that is larger. No motion is in the middle of an odd number of bins. The opposite number -x is in the
    mirrored bin, bins - 1 - b, unless x lies on the edge of two bins. Whole pixels from -3 to 3 have a bin each with limit 3.5 and
    7 bins.
    """
    limits, bins = jnp.asarray(limits, jnp.float32), jnp.asarray(bins, jnp.int32)
    place = jnp.floor((motions / limits + 1) / 2 * bins).astype(jnp.int32)
    return jnp.clip(place, 0, bins - 1)


def composed_limits(first: Sequence[float], then: Sequence[float]) -> tuple[float, ...]:
    """Limits [4] of `compose` of motions within two limits."""
    moved = math.exp(then[3]) * math.hypot(first[0], first[1])
    return (moved + then[0], moved + then[1], first[2] + then[2], first[3] + then[3])


def most_reach(size: int, limits: Sequence[float]) -> float:
    """How far from the center, in pixels along an axis, `warp` reads for a window of `size` and motions within `limits` [4]."""
    x, y = ((size - 1) / 2 + limits[axis] for axis in (0, 1))

    def largest(a, b):  # of a cos t + b sin t for t within the limit of the rotation
        t = min(abs(limits[2]), math.atan2(b, a))
        return a * math.cos(t) + b * math.sin(t)

    return math.exp(abs(limits[3])) * max(largest(x, y), largest(y, x))


def check_interior(image_hw: tuple[int, int], size: int, limits: Sequence[float]) -> None:
    """Raises UserError if a window of `size`, moved within `limits` [4], would read pixels outside of images of image_hw = (H, W).

    A border that shows would tell the motion.
    """
    if len(limits) != 4 or min(limits) < 0:
        raise UserError(f"limits={tuple(limits)} of a motion are not 4 positive numbers: dx, dy (pixels), rotation (radians), log zoom")
    reach, height, width = most_reach(size, limits), *image_hw
    if size < 1 or reach > (min(image_hw) - 1) / 2 + 1e-6:
        needed = math.ceil(2 * reach + 1 - 1e-6)
        raise UserError(
            f"windows of {size} pixels with motions within {tuple(limits)} need images of {needed} x {needed} pixels, not {height} x "
            f"{width}, so that no border shows; use smaller windows or motions, or larger images"
        )


def warp(images: jax.Array, motions: jax.Array, size: int) -> jax.Array:
    """Images [B, H, W, C] -> float32 [B, size, size, C]: the windows in the middle after motions [B, 4], by bilinear interpolation.

    uint8, or float in [0, 1]. Motion 0 is the middle of the picture. Points outside of the image repeat its border, so check the
    limits with `check_interior`. Interpolation blurs slightly: give both views of a pair a motion (`relative` is their label), or
    the sharpness tells which has none.
    """
    height, width = images.shape[1:3]
    offsets = jnp.arange(size, dtype=jnp.float32) - (size - 1) / 2
    y, x = jnp.meshgrid(offsets, offsets, indexing="ij")

    def window(image, motion):
        source_x, source_y = _turn(x - motion[0], y - motion[1], -motion[2], -motion[3])
        places = jnp.stack([source_y + (height - 1) / 2, source_x + (width - 1) / 2])
        return jax.vmap(lambda plane: jax.scipy.ndimage.map_coordinates(plane, places, order=1, mode="nearest"), -1, -1)(image)

    return jax.vmap(window)(to_float(images), motions)


def two_windows(images: jax.Array, start: jax.Array, motion: jax.Array, size: int) -> jax.Array:
    """Images [B, H, W, C] -> float32 [B, 2, size, size, C] in [0, 1]: windows after motions `start` [B, 4], and after `motion` more.

    So `motion` is `relative` of the two. With a random `start` of parts of pixels interpolation blurs both alike.
    """
    return jnp.stack([warp(images, start, size), warp(images, compose(start, motion), size)], 1)

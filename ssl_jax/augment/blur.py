"""Gaussian blur of one image as two banded matrix products."""

import jax
import jax.numpy as jnp

from ssl_jax.augment.geometry import apply_separable

PADDINGS = ("zero", "edge")


def blur_radius(height):
    """Taps on each side of the center: the kernel has height // 10 taps, made odd (224 pixels: 23 taps)."""
    return height // 10 // 2


def blur_weights(length, sigma, radius):
    """Band matrix [length, length + 2 * radius] of the truncated Gaussian, for a line padded by `radius`. sigma in pixels.

    Every row holds the same 2 * radius + 1 taps, which sum to 1.
    """
    taps = jnp.sum(jnp.exp(-0.5 * jnp.square(jnp.arange(-radius, radius + 1) / sigma)))
    offsets = jnp.arange(length + 2 * radius)[None, :] - radius - jnp.arange(length)[:, None]
    return jnp.where(jnp.abs(offsets) <= radius, jnp.exp(-0.5 * jnp.square(offsets / sigma)), 0.0) / taps


def gaussian_blur(image, sigma, padding="zero"):
    """Image [H, W, 3] convolved with a Gaussian of `sigma` pixels, 2 * blur_radius(H) + 1 taps along each side.

    With padding 'zero' pixels outside are black, so borders darken (TensorFlow's SAME; SimCLR, BYOL). 'edge' repeats the
    border.
    """
    height, width = image.shape[:2]
    radius = blur_radius(height)
    rows, columns = blur_weights(height, sigma, radius), blur_weights(width, sigma, radius)
    if padding == "edge":
        image = jnp.pad(image, ((radius, radius), (radius, radius), (0, 0)), mode="edge")
    else:
        rows, columns = rows[:, radius : radius + height], columns[:, radius : radius + width]
    return jnp.clip(apply_separable(image, rows, columns), 0.0, 1.0)


def blur(image, key, p=0.5, sigma=(0.1, 2.0), padding="zero"):
    """With probability p, a Gaussian blur with sigma uniform in the range (pixels). Images below 20 pixels stay unchanged.

    The reference SimCLR samples one sigma for all images of a device and view. Here every image has its own, so that the
    result does not depend on the number of devices.
    """
    if blur_radius(image.shape[0]) == 0:
        return image
    u = jax.random.uniform(key, (2,))
    sampled_sigma = sigma[0] + (sigma[1] - sigma[0]) * u[1]
    return jnp.where(u[0] < p, gaussian_blur(image, sampled_sigma, padding), image)

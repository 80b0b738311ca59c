"""Crops, resizes and flips of one image, as small matrix products.

Every function takes one float32 image [H, W, 3] in [0, 1] and returns one in [0, 1]; use `jax.vmap` for batches.
Resampling is separable, so a crop with a resize is `rows @ image @ columns.T` with two small weight matrices per image.
This avoids gathers, which are slow under vmap on accelerators and CPUs.
"""

import jax
import jax.numpy as jnp

INTERPOLATIONS = ("bicubic", "bilinear")
SAMPLINGS = ("torchvision", "simclr", "clamp")
SIMCLR_MIN_COVERED = 0.1  # min_object_covered in SimCLR, where the "object" is the whole image
_TRIES = 10
_PRECISION = jax.lax.Precision.HIGH  # three bfloat16 passes on TPU; one pass errs by half a gray level


def size_pair(size):
    """(height, width) in pixels of a `size` argument: an int is a square."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _kernel(distance, interpolation):
    """Interpolation weight at a distance in pixels: Keys' cubic with a = -1/2 (as in PIL, JAX and TF2), or the triangle."""
    x = jnp.abs(distance)
    if interpolation == "bilinear":
        return jnp.maximum(1.0 - x, 0.0)
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return jnp.where(x < 1.0, near, jnp.where(x < 2.0, far, 0.0))


def resize_weights(start, extent, size_in, size_out, interpolation, antialias):
    """Weights [size_out, size_in] that resample the pixels [start, start + extent) of a line to size_out pixels.

    Pixels outside the interval have weight 0 and every row sums to 1: the crop comes first and the resize second, as in PIL
    and torchvision. Pixel centers lie at half integers (no corner alignment). `antialias` widens the kernel by the
    shrinking factor; otherwise the kernel keeps its width of one or two source pixels.
    """
    scale = extent / size_out
    centers = (jnp.arange(size_out, dtype=jnp.float32)[:, None] + 0.5) * scale + start
    pixels = jnp.arange(size_in, dtype=jnp.float32)[None, :]
    distance = pixels + 0.5 - centers
    if antialias:
        distance = distance / jnp.maximum(scale, 1.0)
    inside = (pixels >= start) & (pixels < start + extent)
    weights = jnp.where(inside, _kernel(distance, interpolation), 0.0)
    return weights / jnp.sum(weights, axis=1, keepdims=True)


def apply_separable(image, rows, columns):
    """rows [h, H] and columns [w, W] applied to image [H, W, C] -> [h, w, C]."""
    narrow = jnp.einsum("hwc,tw->hct", image, columns, precision=_PRECISION)
    return jnp.einsum("sh,hct->stc", rows, narrow, precision=_PRECISION)


def crop_and_resize(image, box, size, interpolation="bicubic", antialias=True):
    """Resamples the box (top, left, height, width; whole pixels) of image [H, W, 3] to `size`, clipped to [0, 1].

    The clip matters for bicubic weights, which overshoot at edges. An 8-bit pipeline clips there, too.
    """
    top, left, height, width = box
    rows = resize_weights(top, height, image.shape[0], size_pair(size)[0], interpolation, antialias)
    columns = resize_weights(left, width, image.shape[1], size_pair(size)[1], interpolation, antialias)
    return jnp.clip(apply_separable(image, rows, columns), 0.0, 1.0)


def _first_valid(valid, heights, widths, fallback):
    """(height, width, found) of the first valid try, or of the fallback."""
    first = jnp.argmax(valid) == jnp.arange(_TRIES)
    found = jnp.any(valid)
    height = jnp.where(found, jnp.sum(jnp.where(first, heights, 0.0)), fallback[0])
    width = jnp.where(found, jnp.sum(jnp.where(first, widths, 0.0)), fallback[1])
    return height, width, found


def _extents_torchvision(u, image_hw, area, ratio):
    """RandomResizedCrop: area uniform, aspect log-uniform, ten tries, then the largest center crop of a valid aspect."""
    image_h, image_w = image_hw
    u_area, u_ratio = u
    target = (area[0] + (area[1] - area[0]) * u_area) * image_h * image_w
    aspect = jnp.exp(jnp.log(ratio[0]) + (jnp.log(ratio[1]) - jnp.log(ratio[0])) * u_ratio)
    widths, heights = jnp.round(jnp.sqrt(target * aspect)), jnp.round(jnp.sqrt(target / aspect))
    valid = (widths > 0) & (widths <= image_w) & (heights > 0) & (heights <= image_h)
    if image_w < ratio[0] * image_h:
        fallback = (round(image_w / ratio[0]), image_w)
    elif image_w > ratio[1] * image_h:
        fallback = (image_h, round(image_h * ratio[1]))
    else:
        fallback = (image_h, image_w)
    return _first_valid(valid, heights, widths, fallback)


def _extents_simclr(u, image_hw, area, ratio):
    """TensorFlow's sample_distorted_bounding_box: aspect uniform, height uniform, tries rejected, then the whole image.

    The bounding box is the whole image, of which a tenth must be covered. So crops below a tenth of the area are rejected,
    although `area` starts at 0.08.
    """
    image_h, image_w = image_hw
    u_height, u_ratio = u
    aspect = ratio[0] + (ratio[1] - ratio[0]) * u_ratio
    least, most = area[0] * image_h * image_w, area[1] * image_h * image_w
    shortest, tallest = jnp.round(jnp.sqrt(least / aspect)), jnp.round(jnp.sqrt(most / aspect))
    # The tallest crop whose rounded width still fits.
    too_wide = jnp.round(tallest * aspect) > image_w
    tallest = jnp.where(too_wide, jnp.floor((image_w + 0.5 - 1e-4) / aspect), tallest)
    tallest = jnp.minimum(tallest, image_h)
    shortest = jnp.minimum(shortest, tallest)
    heights = jnp.minimum(shortest + jnp.floor(u_height * (tallest - shortest + 1.0)), tallest)
    # Rounding may leave the range of areas: change the height by one pixel before rejecting the try.
    heights = jnp.where(heights * jnp.round(heights * aspect) < least, heights + 1.0, heights)
    heights = jnp.where(heights * jnp.round(heights * aspect) > most, heights - 1.0, heights)
    widths = jnp.round(heights * aspect)
    covered = heights * widths
    valid = (covered >= max(least, SIMCLR_MIN_COVERED * image_h * image_w)) & (covered <= most)
    valid &= (widths > 0) & (widths <= image_w) & (heights > 0) & (heights <= image_h)
    return _first_valid(valid, heights, widths, (image_h, image_w))


def _extents_clamp(u, image_hw, area, ratio):
    """BYOL and MAE's linear probe: torchvision's first try, with sides clamped to the image."""
    image_h, image_w = image_hw
    u_area, u_ratio = u[:, 0]
    target = (area[0] + (area[1] - area[0]) * u_area) * image_h * image_w
    aspect = jnp.exp(jnp.log(ratio[0]) + (jnp.log(ratio[1]) - jnp.log(ratio[0])) * u_ratio)
    height = jnp.clip(jnp.round(jnp.sqrt(target / aspect)), 1.0, image_h)
    width = jnp.clip(jnp.round(jnp.sqrt(target * aspect)), 1.0, image_w)
    return height, width, jnp.bool_(True)


def sample_crop(key, image_hw, area=(0.08, 1.0), ratio=(3 / 4, 4 / 3), sampling="torchvision"):
    """One crop (top, left, height, width), float32 whole numbers of pixels, inside an image of `image_hw` = (H, W).

    area: range of the crop's share of the image; ratio: range of width / height. The three published samplers have
    different distributions (mean area on 400 x 500 pixels with the default ranges): 'torchvision' (0.453; MoCo, SimSiam,
    Barlow Twins, DINO), 'simclr' (0.409; SimCLR's TensorFlow operator, never the last row or column), and 'clamp' (0.523;
    BYOL, MAE's linear probe).
    """
    u = jax.random.uniform(key, (2, _TRIES + 1))  # the last column positions the crop
    extents = {"torchvision": _extents_torchvision, "simclr": _extents_simclr, "clamp": _extents_clamp}[sampling]
    height, width, found = extents(u[:, :_TRIES], image_hw, area, ratio)
    slack = jnp.stack([image_hw[0] - height, image_hw[1] - width])
    # TensorFlow samples the offset from [0, slack), the others from [0, slack].
    num_offsets = jnp.maximum(slack, 1.0) if sampling == "simclr" else slack + 1.0
    offset = jnp.minimum(jnp.floor(u[:, _TRIES] * num_offsets), num_offsets - 1.0)
    offset = jnp.where(found, offset, jnp.floor(slack / 2))
    return offset[0], offset[1], height, width


def random_resized_crop(
    image,
    key,
    size,
    area=(0.08, 1.0),
    ratio=(3 / 4, 4 / 3),
    interpolation="bicubic",
    sampling="torchvision",
    antialias=True,
):
    """A random crop of image [H, W, 3] resized to `size` (int or (h, w), pixels) -> [h, w, 3]; see `sample_crop`.

    antialias=True is PIL and torchvision on uint8; False is TensorFlow 2 (BYOL). TensorFlow 1's legacy bicubic kernel
    (original SimCLR, without antialiasing) has other coefficients and pixel centers and is not available.
    """
    box = sample_crop(key, image.shape[:2], area, ratio, sampling)
    return crop_and_resize(image, box, size, interpolation, antialias)


def shift_crop(image, top, left, size):
    """The window of `size` at (top, left) of image [H, W, 3]. Pixels outside of the image are 0."""
    height, width = size_pair(size)
    rows = jnp.arange(height)[:, None] + top == jnp.arange(image.shape[0])[None, :]
    columns = jnp.arange(width)[:, None] + left == jnp.arange(image.shape[1])[None, :]
    return apply_separable(image, rows.astype(image.dtype), columns.astype(image.dtype))


def random_crop(image, key, size, pad=0):
    """A random window of `size` pixels, not resized, of the image with `pad` zero pixels on each side -> [h, w, 3]."""
    height, width = size_pair(size)
    num_offsets = jnp.array([image.shape[0] + 2 * pad - height + 1, image.shape[1] + 2 * pad - width + 1])
    top, left = jax.random.randint(key, (2,), 0, num_offsets) - pad
    return shift_crop(image, top, left, size)


def flip(image, key, p=0.5):
    """Mirrors image [H, W, 3] left to right with probability p."""
    return jnp.where(jax.random.uniform(key) < p, image[:, ::-1], image)

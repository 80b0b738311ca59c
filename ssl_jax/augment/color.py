"""Color operations on one float32 image [H, W, 3] in [0, 1]; all return values in [0, 1]."""

import jax
import jax.numpy as jnp

STYLES = ("simclr_v2", "simclr_v1", "torchvision")
LUMA = (0.2989, 0.5870, 0.1140)  # as in TensorFlow, torchvision and PIL; the sum is 0.9999
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # values in `order`
_CHROMA_SIGN, _CHROMA_CENTER, _CHROMA_OFFSET = (1.0, -1.0, -1.0), (3.0, 2.0, 4.0), (-1.0, 2.0, 2.0)


def _per_channel(values):
    return jnp.array(values, jnp.float32)[:, None, None]


def _luma(planes):
    return LUMA[0] * planes[0] + LUMA[1] * planes[1] + LUMA[2] * planes[2]


def adjust_colors(image, order, brightness, contrast, saturation, hue, style="simclr_v2"):
    """Apply the four jitters to image [H, W, 3] in the given order, and clip to [0, 1] after each.

    order: int [4], a permutation of (BRIGHTNESS, CONTRAST, SATURATION, HUE); it may be traced.
    brightness: factor (1 changes nothing), or in 'simclr_v1' an addend (0 changes nothing).
    contrast: factor around the spatial mean of each channel, or in 'torchvision' around the mean luma.
    saturation: factor on the S of HSV (clipped to 1), or in 'torchvision' on the distance from the luma.
    hue: added to the H of HSV, in turns; equal in every style.

    Under vmap a `switch` over operations computes all four and selects one. Here one formula covers three of them:
    factor * x + (1 - factor) * base + addend, with a base for each operation. (Scaling S in HSV moves a pixel along the
    line to its largest channel.) Hue is the fourth; all share the pixel's maximum and minimum. The loop over positions is
    a scan, because XLA would otherwise recompute earlier positions inside the fusions of later ones (25 times slower on a
    CPU).
    """
    image_planes = jnp.moveaxis(image, -1, 0)  # contiguous planes suit vector instructions

    def adjust(planes, operation):
        is_contrast, is_saturation = operation == CONTRAST, operation == SATURATION
        r, g, b = planes
        high = jnp.maximum(jnp.maximum(r, g), b)
        low = jnp.minimum(jnp.minimum(r, g), b)
        chroma = high - low
        inverse = 1.0 / jnp.where(chroma > 0, chroma, 1.0)

        factor = jnp.where(is_contrast, contrast, jnp.where(is_saturation, saturation, 1.0))
        addend = 0.0
        if style == "simclr_v1":
            addend = jnp.where(operation == BRIGHTNESS, brightness, 0.0)
        else:
            factor = jnp.where(operation == BRIGHTNESS, brightness, factor)
        if style == "torchvision":
            luma = _luma(planes)
            base = jnp.where(is_contrast, jnp.mean(luma), jnp.where(is_saturation, luma, 0.0))
        else:
            mean = jnp.mean(planes, axis=(1, 2), keepdims=True)
            base = jnp.where(is_contrast, mean, jnp.where(is_saturation, high, 0.0))
            # The new S = factor * chroma / high stays at or below 1.
            factor = jnp.where(is_saturation, jnp.minimum(factor, high * inverse), factor)
        blended = factor * planes + (1.0 - factor) * base + addend

        # Hue in sixths of a turn. Compare channels, not `high`, which XLA may round differently.
        sector = jnp.where(
            (r >= g) & (r >= b),
            (g - b) * inverse,
            jnp.where(g >= b, 2.0 + (b - r) * inverse, 4.0 + (r - g) * inverse),
        )
        sector = sector + 6.0 * hue
        sector = sector - 6.0 * jnp.floor(sector / 6.0)
        tent = _per_channel(_CHROMA_SIGN) * jnp.abs(sector - _per_channel(_CHROMA_CENTER))
        turned = low + chroma * jnp.clip(tent + _per_channel(_CHROMA_OFFSET), 0.0, 1.0)

        return jnp.clip(jnp.where(operation == HUE, turned, blended), 0.0, 1.0), None

    planes, _ = jax.lax.scan(adjust, image_planes, jnp.asarray(order))
    return jnp.moveaxis(planes, 0, -1)


def sample_jitter(key, brightness, contrast, saturation, hue, style):
    """Random (order, brightness, contrast, saturation, hue) for `adjust_colors`; the arguments are strengths.

    The order is uniform over all 24. Factors are uniform in [max(0, 1 - strength), 1 + strength], the hue in [-hue, hue]
    turns, and the addend of 'simclr_v1' in [-brightness, brightness].
    """
    u = jax.random.uniform(key, (8,))  # one call, because hashing keys dominates for small images

    def factor(strength, u):
        low, high = max(0.0, 1.0 - strength), 1.0 + strength
        return low + (high - low) * u

    bright = brightness * (2.0 * u[0] - 1.0) if style == "simclr_v1" else factor(brightness, u[0])
    return jnp.argsort(u[4:]), bright, factor(contrast, u[1]), factor(saturation, u[2]), hue * (2.0 * u[3] - 1.0)


def color_jitter(image, key, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, p=0.8, style="simclr_v2"):
    """With probability p, the four jitters of `adjust_colors` in random order (SimCLR appendix A; BYOL appendix B).

    The defaults are SimCLR's at strength 1. style 'simclr_v2' scales the brightness; 'simclr_v1', also BYOL's, adds to it;
    'torchvision' is ColorJitter on float tensors.
    """
    apply_key, value_key = jax.random.split(key)
    values = sample_jitter(value_key, brightness, contrast, saturation, hue, style)
    return jnp.where(jax.random.uniform(apply_key) < p, adjust_colors(image, *values, style), image)


def to_grayscale(image):
    """The luma of image [H, W, 3] in all three channels."""
    luma = _luma(jnp.moveaxis(image, -1, 0))
    return jnp.broadcast_to(luma[..., None], image.shape)


def grayscale(image, key, p=0.2):
    """With probability p, all three channels become the luma."""
    return jnp.where(jax.random.uniform(key) < p, to_grayscale(image), image)


def invert_above(image, threshold):
    """x where x < threshold, else 1 - x."""
    return jnp.where(image < threshold, image, 1.0 - image)


def solarize(image, key, p=0.2, threshold=0.5):
    """With probability p, inverts values at or above the threshold (0.5 is PIL's 128)."""
    return jnp.where(jax.random.uniform(key) < p, invert_above(image, threshold), image)


def drop_colors(image, key, p=1.0):
    """With probability p, keeps one random channel and fills the others with faint noise around its mean.

    Color dropping of Doersch et al. 2015, section 3.1, against chromatic aberration, which tells where in a photograph a patch lies.
    The noise is Gaussian, with a hundredth of the standard deviation of the channel that stays. Unlike `project_colors` it hides
    the aberration of every lens.
    """
    apply_key, channel_key, noise_key = jax.random.split(key, 3)
    keep = jnp.arange(3) == jax.random.randint(channel_key, (), 0, 3)
    kept = jnp.sum(jnp.where(keep, image, 0.0), axis=-1, keepdims=True)
    mean, deviation = jnp.mean(kept), jnp.std(kept)
    noise = mean + 0.01 * deviation * jax.random.normal(noise_key, image.shape)
    dropped = jnp.clip(jnp.where(keep, image, noise), 0.0, 1.0)
    return jnp.where(jax.random.uniform(apply_key) < p, dropped, image)


# I - a a' / (a' a) for a = (-1, 2, -1), the axis from green to magenta.
PROJECTION = ((5 / 6, 1 / 3, -1 / 6), (1 / 3, 1 / 3, 1 / 3), (-1 / 6, 1 / 3, 5 / 6))


def project_colors(image, key, p=1.0):
    """With probability p, removes the axis from green to magenta from the colors, and clips to [0, 1].

    Projection of Doersch et al. 2015, section 3.1, against chromatic aberration. Grays stay. It leaves an aberration between red and
    blue, which `drop_colors` or `grayscale` removes.
    """
    projected = jnp.stack([sum(w * image[..., c] for c, w in enumerate(row)) for row in PROJECTION], axis=-1)
    return jnp.where(jax.random.uniform(key) < p, jnp.clip(projected, 0.0, 1.0), image)

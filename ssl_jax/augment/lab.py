"""CIE Lab colors, and the quantized ab plane of colorization.

The conversion is that of sRGB (IEC 61966-2-1) with white point D65 and the formulas of CIE 1976, with the constants of
scikit-image. L lies in [0, 100]; colors of sRGB have a in [-86.2, 98.3] and b in [-107.9, 94.5].

Colorization as classification: Zhang et al. 2016, "Colorful image colorization" (arXiv:1603.08511), section 2.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax.augment.pixels import to_float
from ssl_jax.errors import UserError

# Linear RGB -> XYZ: the primaries of Rec. 709 and white point D65.
XYZ = np.array([[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]])
RGB = np.linalg.inv(XYZ)
WHITE = np.array([0.95047, 1.0, 1.08883])
_EXACT = jax.lax.Precision.HIGHEST


def _product(x, matrix, xp):
    if xp is np:
        return x @ matrix.T
    return jnp.einsum("...c,dc->...d", x, jnp.asarray(matrix, x.dtype), precision=_EXACT)


def _power(x, exponent, above, xp):
    """x ** exponent where x > above, and 1 elsewhere, without infinite gradients there."""
    return xp.where(x > above, x, 1.0) ** exponent


def _to_lab(rgb, xp):
    linear = xp.where(rgb > 0.04045, _power((rgb + 0.055) / 1.055, 2.4, 0.0, xp), rgb / 12.92)
    t = _product(linear, XYZ, xp) / xp.asarray(WHITE, rgb.dtype)
    f = xp.where(t > 0.008856, _power(t, 1 / 3, 0.008856, xp), 7.787 * t + 16 / 116)
    x, y, z = f[..., 0], f[..., 1], f[..., 2]
    return xp.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def rgb_to_lab(rgb: jax.Array) -> jax.Array:
    """sRGB, uint8 or float in [0, 1], [..., 3] -> Lab, float32 [..., 3]. A gray color has |a|, |b| < 0.01."""
    return _to_lab(to_float(rgb), jnp)


def lab_to_rgb(lab: jax.Array) -> jax.Array:
    """Lab [..., 3] -> sRGB [..., 3], clipped to [0, 1]."""
    y = (lab[..., 0] + 16) / 116
    f = jnp.stack([y + lab[..., 1] / 500, y, y - lab[..., 2] / 200], -1)
    t = jnp.where(f > 0.2068966, f**3, (f - 16 / 116) / 7.787)
    linear = _product(jnp.maximum(t, 0) * jnp.asarray(WHITE, lab.dtype), RGB, jnp)
    rgb = jnp.where(linear > 0.0031308, 1.055 * _power(linear, 1 / 2.4, 0.0031308, jnp) - 0.055, 12.92 * linear)
    return jnp.clip(rgb, 0, 1)


@functools.lru_cache(maxsize=4)
def ab_bins(grid: float = 10) -> np.ndarray:
    """float32 [Q, 2]: the multiples of `grid` nearest to a color of sRGB, by a, then b. 261 bins for a grid of 10, 77 for 20.

    The 313 bins of the paper are a file of its authors; no rule that is known gives them. The colors are the six faces of the cube
    of RGB with 256 levels: a color inside has the a and b of some color of the surface, where its line of equal a and b leaves.
    Raises UserError for a grid that is too fine or leaves less than two bins.
    """
    if not 2 <= grid <= 100:
        raise UserError(f"a grid of {grid} for the bins of a and b is not allowed; give 2 to 100, as 10 of the paper")
    u, v = (face.ravel() for face in np.meshgrid(*[np.arange(256) / 255] * 2))
    faces = [np.insert(np.stack([u, v], 1), channel, level, axis=1) for channel in range(3) for level in (0.0, 1.0)]
    ab = _to_lab(np.concatenate(faces), np)[:, 1:]
    codes = np.unique(np.round(ab / grid).astype(int) @ [1024, 1])  # one number per bin, since unique rows are slow
    b = (codes + 512) % 1024 - 512
    return (np.stack([(codes - b) // 1024, b], 1) * grid).astype(np.float32)


def _squared_distances(ab, bins):
    bins = jnp.asarray(bins, ab.dtype)
    return (ab[..., :1] - bins[:, 0]) ** 2 + (ab[..., 1:] - bins[:, 1]) ** 2


def nearest_bin(ab: jax.Array, bins: jax.Array) -> jax.Array:
    """ab [..., 2] -> int32 [...]: the index of the nearest of the bins [Q, 2]."""
    return jnp.argmin(_squared_distances(ab, bins), axis=-1).astype(jnp.int32)


def soft_encode(ab: jax.Array, bins: jax.Array, neighbors: int = 5, sigma: float = 5.0) -> jax.Array:
    """ab [..., 2] -> probabilities [..., Q]: Gaussian weights of the nearest of the bins [Q, 2], and 0 for the others.

    Zhang et al. 2016, section 2.2. The published code takes 10 neighbors. Bins as far as the last neighbor count, too.
    """
    distances = _squared_distances(ab, bins)
    reach = nearest = jnp.min(distances, axis=-1, keepdims=True)
    for _ in range(neighbors - 1):  # XLA would gather the whole batch on each device for `lax.top_k`
        enough = jnp.sum(distances <= reach, axis=-1, keepdims=True) >= neighbors
        reach = jnp.where(enough, reach, jnp.min(jnp.where(distances > reach, distances, jnp.inf), axis=-1, keepdims=True))
    # Relative to the nearest bin, so that colors far from all bins do not underflow.
    weights = jnp.where(distances <= reach, jnp.exp((nearest - distances) / (2 * sigma**2)), 0)
    return weights / jnp.sum(weights, axis=-1, keepdims=True)


def rebalancing_weights(frequencies: jax.Array, mixture: float = 0.5) -> jax.Array:
    """Frequencies of bins p [Q] (their sum is 1) -> weights w [Q], larger for rare bins, with sum(p w) = 1.

    Zhang et al. 2016, equation 4: the inverse of (1 - mixture) p + mixture / (bins that occur). mixture = 1 gives equal weights.
    A bin that does not occur has the weight of the rarest that does.
    """
    occurs = frequencies > 0
    mixed = (1 - mixture) * frequencies + mixture / jnp.maximum(jnp.sum(occurs), 1)
    mixed = jnp.where(occurs, mixed, jnp.min(jnp.where(occurs, mixed, jnp.inf)))
    return (1 / mixed) / jnp.sum(frequencies / mixed)


def annealed_mean(logits: jax.Array, bins: jax.Array, temperature: float = 0.38) -> jax.Array:
    """Logits [..., Q] -> ab [..., 2], the mean of the bins [Q, 2] under softmax(logits / temperature).

    Zhang et al. 2016, section 2.3. Temperature 1 is the mean, with pale colors; towards 0 it is the likeliest bin.
    """
    probabilities = jax.nn.softmax(logits / temperature, axis=-1)
    return jnp.einsum("...q,qc->...c", probabilities, jnp.asarray(bins, logits.dtype), precision=_EXACT)


def has_color(ab: jax.Array, threshold: float = 5.0) -> jax.Array:
    """ab [B, H, W, 2] -> bool [B]: whether any |a| or |b| exceeds the threshold. Gray images teach a colorization nothing."""
    return jnp.any(jnp.abs(ab) > threshold, axis=(1, 2, 3))

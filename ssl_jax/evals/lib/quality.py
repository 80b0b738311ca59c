"""How alike pictures are, one number for each, in float64 on the host."""

from __future__ import annotations

import numpy as np
import scipy.ndimage

from ssl_jax.evals.lib.features import chunks

WINDOW = 11  # pixels of the side of a window of `ssim`
LEAST_ERROR = 1e-10  # so that equal pictures have 100 dB


def squared_error(real: np.ndarray, again: np.ndarray) -> np.ndarray:
    """[N]: the sum over everything but the first axis of squared differences."""
    parts = []
    for start, stop in chunks(len(real), 64):  # float64 copies of some and not of all
        x, y = (np.asarray(a[start:stop], np.float64).reshape(stop - start, -1) for a in (real, again))
        parts.append(np.sum((x - y) ** 2, 1))
    return np.concatenate(parts)


def psnr(real: np.ndarray, again: np.ndarray) -> np.ndarray:
    """[N]: -10 log10 of the mean squared difference of pictures in [0, 1], in dB; 100 where they are equal."""
    return -10 * np.log10(np.maximum(squared_error(real, again) / real[0].size, LEAST_ERROR))


def ssim(real: np.ndarray, again: np.ndarray) -> np.ndarray:
    """[N]: structural similarity of pictures [N, H, W, C] in [0, 1], at least 11 pixels each way (Wang et al. 2004, equation 13).

    Gaussian windows of 11 x 11 pixels and deviation 1.5 with moments divided by their whole weight, those that lie inside only;
    K1 = 0.01, K2 = 0.03; the mean over windows and channels.
    """
    values = []
    for start, stop in chunks(len(real), 64):
        x, y = (np.asarray(a[start:stop], np.float64) for a in (real, again))
        mean_x, mean_y, xx, yy, xy = (_windows(a) for a in (x, y, x * x, y * y, x * y))
        luminance = (2 * mean_x * mean_y + 0.01**2) / (mean_x**2 + mean_y**2 + 0.01**2)
        structure = (2 * (xy - mean_x * mean_y) + 0.03**2) / (xx - mean_x**2 + yy - mean_y**2 + 0.03**2)
        values.append(np.mean(luminance * structure, (1, 2, 3)))
    return np.concatenate(values)


def _windows(x):
    """Weighted means of all windows inside of x [N, H, W, C]."""
    edge = WINDOW // 2
    return scipy.ndimage.gaussian_filter(x, 1.5, radius=edge, axes=(1, 2))[:, edge:-edge, edge:-edge]

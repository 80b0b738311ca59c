"""Similarity of two batches of images, one value per image, in float64 on the host."""

from __future__ import annotations

import numpy as np
import scipy.ndimage

from ssl_jax.evals.lib.features import chunks

WINDOW = 11  # side of the windows of `ssim` in pixels
LEAST_ERROR = 1e-10  # equal images have 100 dB


def squared_error(real: np.ndarray, reconstructed: np.ndarray) -> np.ndarray:
    """Squared differences, summed over all axes but the first: [N]."""
    parts = []
    for start, stop in chunks(len(real), 64):  # chunks, because float64 copies of all images take too much memory
        x, y = (np.asarray(a[start:stop], np.float64).reshape(stop - start, -1) for a in (real, reconstructed))
        parts.append(np.sum((x - y) ** 2, 1))
    return np.concatenate(parts)


def psnr(real: np.ndarray, reconstructed: np.ndarray) -> np.ndarray:
    """-10 log10 of the mean squared difference of images in [0, 1], in dB, at most 100: [N]."""
    return -10 * np.log10(np.maximum(squared_error(real, reconstructed) / real[0].size, LEAST_ERROR))


def ssim(real: np.ndarray, reconstructed: np.ndarray) -> np.ndarray:
    """Structural similarity [N] of images [N, H, W, C] in [0, 1] with at least 11 x 11 pixels (Wang et al. 2004, equation 13).

    Gaussian windows of 11 x 11 pixels with standard deviation 1.5, only those inside the image. K1 = 0.01, K2 = 0.03. Mean over
    windows and channels.
    """
    values = []
    for start, stop in chunks(len(real), 64):
        x, y = (np.asarray(a[start:stop], np.float64) for a in (real, reconstructed))
        mean_x, mean_y, xx, yy, xy = (_windows(a) for a in (x, y, x * x, y * y, x * y))
        luminance = (2 * mean_x * mean_y + 0.01**2) / (mean_x**2 + mean_y**2 + 0.01**2)
        structure = (2 * (xy - mean_x * mean_y) + 0.03**2) / (xx - mean_x**2 + yy - mean_y**2 + 0.03**2)
        values.append(np.mean(luminance * structure, (1, 2, 3)))
    return np.concatenate(values)


def _windows(x):
    """Weighted means over all windows inside x [N, H, W, C]."""
    edge = WINDOW // 2
    return scipy.ndimage.gaussian_filter(x, 1.5, radius=edge, axes=(1, 2))[:, edge:-edge, edge:-edge]

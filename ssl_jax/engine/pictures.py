"""Grids of images as PNG files."""

from __future__ import annotations

import io
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from ssl_jax import files
from ssl_jax.errors import not_written


def grid(images: np.ndarray, gap: int = 2) -> np.ndarray:
    """[rows, columns, h, w, 3] or [n, h, w, 3], uint8 or float in [0, 1] -> uint8 [H, W, 3] with white gaps of `gap` pixels."""
    images = np.asarray(images)
    if images.ndim == 4:
        columns = int(np.ceil(np.sqrt(len(images))))
        padding = -len(images) % columns
        images = np.concatenate([images, np.ones((padding, *images.shape[1:]), images.dtype)])
        images = images.reshape(-1, columns, *images.shape[1:])
    if images.dtype != np.uint8:
        images = np.round(np.clip(images, 0, 1) * 255).astype(np.uint8)
    rows, columns, h, w, c = images.shape
    canvas = np.full((rows * (h + gap) + gap, columns * (w + gap) + gap, c), 255, np.uint8)
    for r in range(rows):
        for k in range(columns):
            y, x = gap + r * (h + gap), gap + k * (w + gap)
            canvas[y : y + h, x : x + w] = images[r, k]
    return canvas


def save_grid(images: np.ndarray, path: Path) -> None:
    """Write `grid(images)` as PNG."""
    save_picture(grid(images), path)


def save_picture(pixels: np.ndarray, path: Path) -> None:
    """Write uint8 [H, W, 3] as PNG; small images are enlarged (nearest neighbor). Only process 0 writes.

    Raises:
        MachineFault: it cannot be written.
    """
    scale = max(1, min(4, 900 // max(pixels.shape[:2])))
    save_png(pixels.repeat(scale, 0).repeat(scale, 1), path)


def save_png(pixels: np.ndarray, path: Path, optimize: bool = False) -> None:
    """Write uint8 [H, W, 3] as PNG. Only process 0 writes. Raises MachineFault if it cannot be written."""
    if jax.process_index() != 0:
        return
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG", optimize=optimize)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise not_written(path, error) from error
    files.write(path, data.getvalue())

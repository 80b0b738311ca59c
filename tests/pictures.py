"""Test images as pixels and as encoded bytes."""

import io

import numpy as np
from PIL import Image


def photo(height, width, seed=0):
    """A smooth image uint8 [height, width, 3]; JPEG changes it little."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / 40.0
    waves = [np.sin(a * x + b * y + c) for a, b, c in rng.uniform(0.3, 2.5, (3, 3))]
    return np.uint8(127.5 + 100 * np.stack(waves, -1))


def encode(pixels, kind="JPEG", mode=None, **options):
    image = Image.fromarray(pixels)
    file = io.BytesIO()
    (image.convert(mode) if mode else image).save(file, kind, **options)
    return file.getvalue()

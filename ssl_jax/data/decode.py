"""Encoded bytes to uint8 RGB, for images from anywhere.

Images are data from strangers: the decoded size is bounded, only raster formats are tried (nothing that starts another
program), and everything that cannot be shown is one exception, `CorruptImage`, with the reason.

What is kept simple on purpose: EXIF orientation is not applied (torchvision's loader does not either); transparent
images are laid on white, as a viewer shows them; of an animation the first frame is taken; 16-bit gray is scaled to 8
bits, not clipped.
"""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import simplejpeg
from PIL import Image

MAX_PIXELS = 178_956_970  # decoded pixels an image may have: 512 MiB as RGB; Pillow itself refuses more
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "MPO")
MAGIC_BYTES = 16  # as many leading bytes as `sniff` looks at

# What Pillow's decoders may raise on damaged bytes in memory (no file is touched here).
_PILLOW_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    TypeError,
    LookupError,
    OverflowError,
    NotImplementedError,  # a kind of BMP, TIFF or WebP that Pillow knows and cannot decode
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class CorruptImage(Exception):
    """The bytes are no image that can be decoded within bounds; the message is the reason."""


def sniff(head: bytes) -> str | None:
    """Why a file with these first bytes is no image, or None when it may be one. Looks at `MAGIC_BYTES` bytes."""
    if not head:
        return "empty file"
    known = (
        head.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"BM", b"II*\x00", b"MM\x00*"))
        or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")
        or (head[:1] == b"P" and head[1:2] in b"123456" and head[2:3] in b" \t\r\n#")
    )
    return None if known and len(head) > 3 else "not an image"


class Picture:
    """An image whose size is known before its pixels are decoded, so that a crop can choose how much to decode.

    Attributes:
      height, width: full size in pixels.
    """

    def __init__(self, data: bytes | np.ndarray, max_pixels: int = MAX_PIXELS):
        """From encoded bytes, or from pixels that are decoded already (uint8 [H, W, 3]).

        Raises:
          CorruptImage: no image, or more than `max_pixels` pixels.
        """
        self._data, self._array, self._image, self._max_pixels = data, None, None, max_pixels
        if isinstance(data, np.ndarray):
            self._array = data
            self.height, self.width = data.shape[:2]
            return
        if reason := sniff(data[:MAGIC_BYTES]):
            raise CorruptImage(reason)
        if data[:2] == b"\xff\xd8":
            try:  # not strict: a warning about the header is no damage; the body is decoded strictly
                self.height, self.width, colors, _ = simplejpeg.decode_jpeg_header(data, strict=False)
            except (ValueError, KeyError):  # KeyError: a color space it does not know, or none
                colors = None
            if colors in ("YCbCr", "RGB", "Gray"):
                self._check_size()
                return
        self._image = self._open()

    def pixels(self) -> np.ndarray:
        """RGB uint8 [H, W, 3]; raises CorruptImage where the body is truncated or damaged."""
        return self.pixels_and_factor(1.0)[0]

    def pixels_and_factor(self, shrink: float) -> tuple[np.ndarray, int]:
        """RGB uint8 [ceil(H / f), ceil(W / f), 3], each pixel the mean of f x f, and f, at most `shrink` (>= 1).

        A JPEG is decoded at 1/2, 1/4 or 1/8 of its size straight from the transform coefficients, which saves work;
        other formats come at full size.
        """
        if self._array is not None:
            return self._array, 1
        if self._image is not None:
            return self._decode_with_pillow(self._image), 1
        factor = next((factor for factor in (8, 4, 2) if factor <= shrink), 1)
        height, width = -(-self.height // factor), -(-self.width // factor)
        try:
            pixels = simplejpeg.decode_jpeg(self._data, "RGB", min_height=height, min_width=width)
        except (ValueError, KeyError):
            # The strict decoder refuses harmless oddities too (stray bytes between markers). Pillow accepts those and
            # refuses what is truncated, so it has the last word.
            return self._decode_with_pillow(self._open()), 1
        if pixels.shape[:2] != (height, width):  # a header that the decoder reads in two ways
            raise CorruptImage("not the size its header says")
        return pixels, factor

    def _check_size(self):
        if self.height * self.width > self._max_pixels:
            raise CorruptImage(f"{self.width}x{self.height} pixels decoded, more than the bound of {self._max_pixels}")

    def _open(self) -> Image.Image:
        try:
            image = Image.open(io.BytesIO(self._data), formats=FORMATS)
        except _PILLOW_ERRORS as error:
            raise CorruptImage(_reason(error)) from error
        self.width, self.height = image.size
        self._check_size()
        return image

    def _decode_with_pillow(self, image: Image.Image) -> np.ndarray:
        try:
            return _to_rgb(image)
        except _PILLOW_ERRORS as error:
            raise CorruptImage(_reason(error)) from error


def mask_pixels(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """uint8 [H, W, 1] of an encoded mask: its values as they are stored, of a palette the indices.

    Raises:
      CorruptImage: no image of one channel of 8 bits.
    """
    picture = Picture(data, max_pixels)
    image = picture._image or picture._open()
    if image.mode not in ("L", "P", "1"):
        raise CorruptImage(f"a mask has one channel of 8 bits, and this image is {image.mode}")
    try:
        return np.array(image, np.uint8)[:, :, None]
    except _PILLOW_ERRORS as error:
        raise CorruptImage(_reason(error)) from error


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image"
    return " ".join(str(error).split()) or type(error).__name__


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):
        gray = np.asarray(image)
        if gray.min() < 0 or gray.max() > 65535:
            raise ValueError("32-bit integer image with no defined range")
        gray = ((gray.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
        return np.repeat(gray[:, :, None], 3, axis=2)
    if image.mode == "F":
        raise ValueError("floating-point image with no defined range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return np.array(image.convert("RGB"))

"""Encoded bytes to uint8 RGB, for images from anywhere.

Image files are untrusted. The decoder bounds the decoded size and tries raster formats only, none of which starts another
program. Every image that cannot be decoded raises one exception, `CorruptImage`, with the reason.

Simplifications: EXIF orientation is not applied (nor in torchvision's loader). Transparent images get a white background.
Animations give their first frame. 16-bit gray is scaled to 8 bits, not clipped.
"""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import simplejpeg
from PIL import Image

MAX_PIXELS = 178_956_970  # bound of a decoded image: 512 MiB as RGB; Pillow itself refuses more
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "MPO")
MAGIC_BYTES = 16  # leading bytes that `sniff` reads

# What Pillow's decoders may raise on damaged bytes in memory. No file access happens here.
_PILLOW_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    TypeError,
    LookupError,
    OverflowError,
    NotImplementedError,  # a variant of BMP, TIFF or WebP that Pillow recognizes but cannot decode
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class CorruptImage(Exception):
    """The bytes cannot be decoded to an image within the bounds; the message is the reason."""


def sniff(head: bytes) -> str | None:
    """Why a file with these first `MAGIC_BYTES` bytes is not an image, or None if it may be one."""
    if not head:
        return "empty file"
    recognized = (
        head.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"BM", b"II*\x00", b"MM\x00*"))
        or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")
        or (head[:1] == b"P" and head[1:2] in b"123456" and head[2:3] in b" \t\r\n#")
    )
    return None if recognized and len(head) > 3 else "not an image"


class Picture:
    """An image whose size is known before decoding, so that a crop can choose how much to decode.

    Attributes:
      height, width: full size in pixels.
    """

    def __init__(self, data: bytes | np.ndarray, max_pixels: int = MAX_PIXELS):
        """From encoded bytes, or from decoded pixels (uint8 [H, W, 3]).

        Raises:
          CorruptImage: not an image, or more than `max_pixels` pixels.
        """
        self._data, self._array, self._image, self._max_pixels = data, None, None, max_pixels
        if isinstance(data, np.ndarray):
            self._array = data
            self.height, self.width = data.shape[:2]
            return
        if reason := sniff(data[:MAGIC_BYTES]):
            raise CorruptImage(reason)
        if data[:2] == b"\xff\xd8":
            try:  # not strict: header warnings are harmless; the body is decoded strictly
                self.height, self.width, colors, _ = simplejpeg.decode_jpeg_header(data, strict=False)
            except (ValueError, KeyError):  # KeyError: unknown or missing color space
                colors = None
            if colors in ("YCbCr", "RGB", "Gray"):
                self._check_size()
                return
        self._image = self._open()

    def pixels(self) -> np.ndarray:
        """RGB uint8 [H, W, 3]. Raises CorruptImage if the body is truncated or damaged."""
        return self.pixels_and_factor(1.0)[0]

    def pixels_and_factor(self, shrink: float) -> tuple[np.ndarray, int]:
        """(RGB uint8 [ceil(H / f), ceil(W / f), 3], f): each pixel is the mean of f x f pixels, and f <= `shrink` (>= 1).

        A JPEG is decoded at 1/2, 1/4 or 1/8 of its size from the transform coefficients, which saves work. Other formats
        are decoded at full size.
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
            # The strict decoder also refuses harmless oddities (stray bytes between markers). Pillow accepts those and
            # refuses truncated files, so Pillow decides.
            return self._decode_with_pillow(self._open()), 1
        if pixels.shape[:2] != (height, width):  # the decoder read the header in two ways
            raise CorruptImage("the decoded size differs from the header")
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
    """uint8 [H, W, 1] of an encoded mask: the stored values, or the palette indices.

    Raises:
      CorruptImage: not an image with one 8-bit channel.
    """
    picture = Picture(data, max_pixels)
    image = picture._image or picture._open()
    if image.mode not in ("L", "P", "1"):
        raise CorruptImage(f"a mask has one channel of 8 bits, but this image is {image.mode}")
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

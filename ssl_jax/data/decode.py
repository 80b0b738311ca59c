"""Encoded bytes to uint8 RGB, for images from anywhere.

Image files are untrusted. The decoder bounds the size of a file, its pixels, and the memory of all decoders that run at the
same time. It tries raster formats only, none of which starts another program. Every image that cannot be decoded raises one
exception, `CorruptImage`, with the reason.

Images are upright: the orientation of EXIF is applied, as viewers do. Transparent images get a white background. Animations
give their first frame. 16-bit gray is scaled to 8 bits, not clipped. Color profiles are not applied.
"""

from __future__ import annotations

import contextlib
import io
import re
import threading
from collections.abc import Callable, Iterator

import numpy as np
import simplejpeg
from PIL import Image, features

from ssl_jax.data.containers import PNG, read_header, without_texts

MAX_PIXELS = 178_956_970  # bound of a decoded image: 512 MiB as RGB; Pillow itself refuses more
MAX_FILE_BYTES = 256 << 20
DECODED_BYTES = 1 << 30  # bound of what all threads of a process decode at the same time
# A large image has at least one byte per so many pixels. A bomb needs 48 bytes for seconds of work.
MAX_PIXELS_PER_BYTE, LARGE = 1000, 1 << 24
MAGIC_BYTES = 16  # leading bytes that `sniff` reads

_OPTIONAL = {"JPEG2000": "jpg_2000", "AVIF": "avif", "WEBP": "webp"}  # {format of Pillow: feature of its build}
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "AVIF", "JPEG2000")
READABLE = tuple(name for name in FORMATS if name not in _OPTIONAL or features.check(_OPTIONAL[name]))
# Bytes that a decoder needs per pixel, with Pillow's copy and the result; measured upper bounds.
_BYTES_PER_PIXEL = {"WEBP": 18, "AVIF": 16, "JPEG2000": 24}
_STRIP = 1 << 20  # pixels that are converted at once
# {orientation of EXIF: (transpose, then flip top to bottom, then flip left to right)}
_UPRIGHT = {
    1: (False, False, False),
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}
_RAW = re.compile(rb"P6\n([1-9]\d{0,4}) ([1-9]\d{0,4})\n255\n")  # as `raw_image` writes it


class CorruptImage(Exception):
    """The bytes cannot be decoded to an image within the bounds; the message is the reason."""


def sniff(head: bytes) -> str | None:
    """Why a file with these first `MAGIC_BYTES` bytes is not an image, or None if it may be one."""
    if not head:
        return "empty file"
    if head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"hevc", b"mif1", b"msf1"):
        return "HEIC, which is not read; convert it to JPEG"
    recognized = (
        head.startswith((b"\xff\xd8\xff", PNG, b"GIF87a", b"GIF89a", b"BM", b"II*\x00", b"MM\x00*"))
        or head.startswith((b"\x00\x00\x00\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51"))  # JPEG 2000: a file, a codestream
        or (head[4:8] == b"ftyp" and head[8:12] in (b"avif", b"avis"))
        or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")
        or (head[:1] == b"P" and head[1:2] in b"123456" and head[2:3] in b" \t\r\n#")
    )
    return None if recognized and len(head) > 3 else "not an image"


class _Budget:
    """Threads wait in `taking(n)` until n more bytes are within DECODED_BYTES. A thread must not take twice."""

    def __init__(self):
        self._taken, self._changed = 0, threading.Condition()

    @contextlib.contextmanager
    def taking(self, count: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: self._taken + count <= DECODED_BYTES)
            self._taken += count
        try:
            yield
        finally:
            with self._changed:
                self._taken -= count
                self._changed.notify_all()


_budget = _Budget()


class Picture:
    """An image whose size is known before decoding, so that a crop can choose how much to decode.

    Attributes:
      height, width: full size in pixels, upright.
      transposed: whether rows are stored as columns.
    """

    def __init__(self, data: bytes | np.ndarray, max_pixels: int = MAX_PIXELS):
        """From encoded bytes, or from decoded pixels (uint8 [H, W, 3]).

        Raises:
          CorruptImage: not an image, or more than `max_pixels` pixels.
        """
        self._data, self._array, self._max_pixels = data, None, max_pixels
        self._jpeg, self._progressive, self._upright, self.transposed = False, False, _UPRIGHT[1], False
        if isinstance(data, np.ndarray):
            self._array = data
            self.height, self.width = data.shape[:2]
            return
        if reason := sniff(data[:MAGIC_BYTES]):
            raise CorruptImage(reason)
        if raw := _RAW.match(data):
            self.width, self.height = map(int, raw.groups())
            self._check_size(self.height, self.width)
            if len(data) == raw.end() + 3 * self.height * self.width:  # else Pillow says what is wrong
                self._array = np.frombuffer(data, np.uint8, offset=raw.end()).reshape(self.height, self.width, 3)
                return
        header = read_header(data)
        self._upright, self._progressive = _UPRIGHT[header.orientation], header.progressive
        if data[:2] == b"\xff\xd8":
            try:  # not strict: header warnings are harmless; the body is decoded strictly
                height, width, colors, _ = simplejpeg.decode_jpeg_header(data, strict=False)
                self._jpeg = colors in ("YCbCr", "RGB", "Gray")
            except (ValueError, KeyError):  # KeyError: unknown or missing color space
                pass
        if self._jpeg:
            self._check_size(height, width)
        else:
            image = self.open()
            width, height = image.size
            if image.format == "AVIF":  # Pillow reads its transformations as EXIF
                self._upright = _UPRIGHT.get(image.getexif().get(0x0112), _UPRIGHT[1])
        self.transposed = self._upright[0]
        self.height, self.width = (width, height) if self.transposed else (height, width)

    def pixels(self) -> np.ndarray:
        """RGB uint8 [H, W, 3]. Raises CorruptImage if the body is truncated or damaged."""
        with self.decoded() as (pixels, _):
            return np.ascontiguousarray(self.upright(pixels))

    @contextlib.contextmanager
    def decoded(self, shrink: float = 1.0) -> Iterator[tuple[np.ndarray, int]]:
        """(RGB uint8 [ceil(H / f), ceil(W / f), 3], f): each pixel is the mean of f x f pixels, and f <= `shrink` (>= 1).

        H and W are as stored, see `stored` and `upright`. A JPEG is decoded at 1/2, 1/4 or 1/8 of its size from the transform
        coefficients, which saves work. Other formats are decoded at full size. The memory of the pixels counts until the end
        of the block, so do not open two of them at once.

        Raises:
          CorruptImage: the body is truncated or damaged.
        """
        if self._array is not None:
            yield self._array, 1
            return
        factor = next((factor for factor in (8, 4, 2) if factor <= shrink), 1) if self._jpeg else 1
        height, width = (self.width, self.height) if self.transposed else (self.height, self.width)
        if self._jpeg:
            height, width = -(-height // factor), -(-width // factor)
            with _budget.taking(self._checked(3 * height * width + 6 * self.height * self.width * self._progressive)):
                pixels = self._decode_jpeg(height, width)
                if pixels is not None:
                    yield pixels, factor
                    return
        image = self.open()
        channels = 1 if image.mode in ("1", "L", "P") else 4
        each = _BYTES_PER_PIXEL.get(image.format, channels + 3) + 6 * self._progressive
        with _budget.taking(self._checked(each * self.height * self.width)):
            yield guarded(_to_rgb, image), 1

    def upright(self, pixels: np.ndarray) -> np.ndarray:
        """Stored pixels [H, W, C], or a part of them, as a viewer shows them. A view."""
        transpose, top_down, mirror = self._upright
        pixels = pixels.swapaxes(0, 1) if transpose else pixels
        return pixels[:: -1 if top_down else 1, :: -1 if mirror else 1]

    def stored(self, area: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
        """(top, left, height, width) as stored of an area of the upright image."""
        transpose, top_down, mirror = self._upright
        top, left, height, width = area
        top = self.height - top - height if top_down else top
        left = self.width - left - width if mirror else left
        return (left, top, width, height) if transpose else (top, left, height, width)

    def open(self) -> Image.Image:
        """The image as Pillow opens it, not loaded. Raises CorruptImage."""
        data = without_texts(self._data) if self._data.startswith(PNG) else self._data
        image = guarded(lambda: Image.open(io.BytesIO(data), formats=READABLE))
        self._check_size(image.size[1], image.size[0])
        return image

    def _decode_jpeg(self, height: int, width: int) -> np.ndarray | None:
        """Pixels at this size. None if the decoder refuses: it also refuses harmless oddities (stray bytes between markers).
        Pillow accepts those and refuses truncated files, so Pillow decides."""
        try:
            pixels = simplejpeg.decode_jpeg(self._data, "RGB", min_height=height, min_width=width)
        except (ValueError, KeyError):
            return None
        if pixels.shape[:2] != (height, width):  # the decoder read the header in two ways
            raise CorruptImage("the decoded size differs from the header")
        return pixels

    def _check_size(self, height: int, width: int) -> None:
        pixels, size = height * width, f"{width}x{height} pixels"
        if pixels > self._max_pixels:
            raise CorruptImage(f"{size} decoded, more than the bound of {self._max_pixels}")
        if pixels > max(LARGE, MAX_PIXELS_PER_BYTE * len(self._data)):
            raise CorruptImage(
                f"{size} in a file of {len(self._data)} bytes, more than the bound of {MAX_PIXELS_PER_BYTE} pixels per byte"
            )

    def _checked(self, count: int) -> int:
        if count > DECODED_BYTES:
            raise CorruptImage(
                f"{self.width}x{self.height} pixels take {count >> 20} MiB decoded, more than the bound of {DECODED_BYTES >> 20}"
            )
        return count


def raw_image(pixels: np.ndarray) -> bytes:
    """uint8 [H, W, 3] as a PPM file, which `Picture` reads without a copy."""
    return b"P6\n%d %d\n255\n" % pixels.shape[1::-1] + pixels.tobytes()


def mask_pixels(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """uint8 [H, W, 1] of an encoded mask: the stored values, or the palette indices.

    Raises:
      CorruptImage: not an image with one 8-bit channel.
    """
    picture = Picture(data, max_pixels)
    image = picture.open()
    if image.mode not in ("L", "P", "1"):
        raise CorruptImage(f"a mask has one channel of 8 bits, but this image is {image.mode}")
    with _budget.taking(picture._checked(2 * picture.height * picture.width)):
        return np.ascontiguousarray(picture.upright(guarded(np.array, image, np.uint8)[:, :, None]))


def guarded(function: Callable, *args):
    """The result of a function that decodes bytes in memory.

    Raises:
      CorruptImage: whatever it raises. There is no file access, so any error is due to the bytes; the libraries raise many kinds.
    """
    try:
        return function(*args)
    except Exception as error:  # see Raises
        if isinstance(error, Image.UnidentifiedImageError):
            raise CorruptImage("not an image") from error
        raise CorruptImage(" ".join(str(error).split()) or type(error).__name__) from error


def _to_rgb(image: Image.Image) -> np.ndarray:
    """uint8 [H, W, 3]. Converted in strips, since each step of a conversion is a copy in Pillow."""
    image.load()
    if image.mode == "F":
        raise ValueError("floating-point image with no defined range")
    out = np.empty((image.height, image.width, 3), np.uint8)
    rows = max(1, _STRIP // image.width)
    for top in range(0, image.height, rows):
        strip = image if rows >= image.height else image.crop((0, top, image.width, min(top + rows, image.height)))
        out[top : top + rows] = _strip_to_rgb(strip)
    return out


def _strip_to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):
        gray = np.asarray(image)
        if gray.min() < 0 or gray.max() > 65535:
            raise ValueError("32-bit integer image with no defined range")
        gray = ((gray.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
        return np.repeat(gray[:, :, None], 3, axis=2)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return np.asarray(image.convert("RGB"))

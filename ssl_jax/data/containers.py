"""What the bytes around a picture say, read without decoding it: its orientation, a JPEG's coding, and a PNG's texts.

Nothing here raises on damaged bytes. A header that ends early says nothing, and the decoder then says what is wrong.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

PNG = b"\x89PNG\r\n\x1a\n"
_ORIENTATION = 0x0112
_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")  # chunks that decoding does not need
_ALONE = (0x01, *range(0xD0, 0xD9))  # JPEG markers without a body
_PROGRESSIVE = (0xC2, 0xC6, 0xCA, 0xCE)


class Header(NamedTuple):
    """What was found."""

    orientation: int = 1  # of EXIF: 1 (as stored) to 8
    progressive: bool = False  # a JPEG whose coefficients are all kept in memory


def read_header(data: bytes) -> Header:
    """The header of a JPEG, PNG or WebP file; the default for other formats."""
    if data[:2] == b"\xff\xd8":
        return _of_jpeg(data)
    if data.startswith(PNG):
        exif = next((data[start : start + size] for name, start, size in _png_chunks(data) if name == b"eXIf"), b"")
        return Header(_orientation(exif))
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return Header(_orientation(_webp_exif(data)))
    return Header()


def without_texts(data: bytes) -> bytes:
    """A PNG file without texts and color profile, whose size says nothing about the picture. Pillow inflates them, or refuses
    the file if they are larger than 1 MB."""
    found = list(_png_chunks(data))
    if not any(name in _TEXTS for name, _, _ in found):
        return data
    end = found[-1][1] + found[-1][2] + 4
    kept = [data[start - 8 : start + size + 4] for name, start, size in found if name not in _TEXTS]
    return b"".join([PNG, *kept, data[end:]])


def _of_jpeg(data: bytes) -> Header:
    orientation, at = 1, 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # padding
            at += 1
        elif marker in _ALONE:
            at += 2
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # the frame, after which no EXIF comes
            return Header(orientation, marker in _PROGRESSIVE)
        else:
            size = int.from_bytes(data[at + 2 : at + 4], "big")
            if marker == 0xE1 and data[at + 4 : at + 10] == b"Exif\x00\x00":
                orientation = _orientation(data[at + 10 : at + 2 + size])
            at += 2 + max(size, 2)
    return Header(orientation)


def _png_chunks(data: bytes):
    """(name, start of the body, its size) of each whole chunk."""
    at = len(PNG)
    while at + 12 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        if at + 12 + size > len(data):
            return
        yield data[at + 4 : at + 8], at + 8, size
        at += 12 + size


def _webp_exif(data: bytes) -> bytes:
    at = 12
    while at + 8 <= len(data):
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        if data[at : at + 4] == b"EXIF":
            return data[at + 8 : at + 8 + size].removeprefix(b"Exif\x00\x00")
        at += 8 + size + size % 2
    return b""


def _orientation(tiff: bytes) -> int:
    """The orientation in the first directory of EXIF data; 1 if there is none or it is damaged, as viewers do."""
    order = {b"II*\x00": "<", b"MM\x00*": ">"}.get(tiff[:4])
    if order is None or len(tiff) < 8:
        return 1
    (at,) = struct.unpack_from(order + "I", tiff, 4)
    if at + 2 > len(tiff):
        return 1
    (entries,) = struct.unpack_from(order + "H", tiff, at)
    for entry in range(at + 2, min(at + 2 + 12 * entries, len(tiff) - 11), 12):
        tag, kind = struct.unpack_from(order + "HH", tiff, entry)
        if tag == _ORIENTATION:
            (value,) = struct.unpack_from(order + ("I" if kind == 4 else "H"), tiff, entry + 8)
            return value if 1 <= value <= 8 else 1
    return 1

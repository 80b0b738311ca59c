"""Pictures that people have: scaled, thin, rotated, with long texts, of new formats, and bombs."""

import io
import subprocess
import sys
import threading
import zlib

import numpy as np
import pytest
from pictures import encode, photo
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ssl_jax.data import decode
from ssl_jax.data.decode import CorruptImage, Picture, mask_pixels
from ssl_jax.data.geometry import apply_host_ops, resize_area

TURNS = {
    1: [], 2: [Image.Transpose.FLIP_LEFT_RIGHT], 3: [Image.Transpose.ROTATE_180], 4: [Image.Transpose.FLIP_TOP_BOTTOM],
    5: [Image.Transpose.TRANSPOSE], 6: [Image.Transpose.ROTATE_90], 7: [Image.Transpose.TRANSVERSE], 8: [Image.Transpose.ROTATE_270],
}  # fmt: skip


def square(side):
    return [("resize_crop", {"resize": side, "crop": side})]


def pillow_square(pixels, side):
    """torchvision's evaluation transform of a whole decode."""
    height, width = (side * n // min(pixels.shape[:2]) for n in pixels.shape[:2])
    top, left = round((height - side) / 2), round((width - side) / 2)
    image = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image.crop((left, top, left + side, top + side)), float)


# ------------------------------------------------------------------------------------------------- scaled decoding


@pytest.mark.parametrize("side", [32, 64, 128])
@pytest.mark.parametrize("shape", [(375, 500), (333, 501), (499, 301)])
def test_scaled_decoding_does_not_shift(side, shape):
    """A shift changes a ramp and the falling ramp by opposite values; rounding changes both alike."""
    y, x = np.mgrid[: shape[0], : shape[1]] * 255.0 / max(shape)
    errors, noise = [], np.random.default_rng(0).uniform(-8, 8, (*shape, 3))  # makes the rounding of the ramp random
    for ramp in (np.stack([y, x, 0 * x], -1), 255 - np.stack([y, x, 0 * x], -1)):
        data = encode((ramp * 0.9 + 12 + noise).round().astype(np.uint8), quality=100, subsampling=0)
        expected = pillow_square(np.array(Image.open(io.BytesIO(data))), side)
        errors.append((apply_host_ops(square(side), Picture(data), None) - expected)[2:-2, 2:-2, :2].mean((0, 1)))
    per_pixel = 0.9 * 255.0 / max(shape) * min(shape) / side  # of the ramp, in the result
    shift = np.abs(errors[0] - errors[1]) / 2 / per_pixel
    assert shift.max() < 0.02, shift


@pytest.mark.parametrize("side", [32, 64, 128])
def test_scaled_decoding_is_as_close_to_pillow_as_a_whole_decode(side):
    errors = {"scaled": [], "whole": []}
    for height, width in ((375, 500), (333, 499), (500, 377), (281, 421)):
        data = encode(photo(height, width), quality=90)
        pixels = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
        expected = pillow_square(pixels, side)
        errors["scaled"].append(np.abs(apply_host_ops(square(side), Picture(data), None) - expected).mean())
        errors["whole"].append(np.abs(apply_host_ops(square(side), Picture(pixels), None) - expected).mean())
    assert np.mean(errors["scaled"]) <= 1.05 * np.mean(errors["whole"]) + 0.25, errors


def test_area_between_pixels_shows_its_bounds():
    ramp = np.repeat(np.arange(200, dtype=np.uint8)[None, :, None], 60, 0).repeat(3, 2)
    for start, extent in ((0.0, 180.0), (0.5, 100.25), (3.125, 96.5), (40.375, 33.3), (150.25, 40.0)):
        got = resize_area(ramp, (3.5, start, 41.0, extent), (32, 32), "bilinear")[5, 2:-2, 0]
        expected = start + (np.arange(32) + 0.5) * extent / 32 - 0.5
        assert np.abs(got - expected[2:-2]).mean() < 0.5, (start, extent)


# ------------------------------------------------------------------------------------------------- thin


CROP_THIN = """
import io, resource, sys, time
import numpy as np
from PIL import Image
from ssl_jax.data.decode import CorruptImage, Picture
from ssl_jax.data.geometry import apply_host_ops
Image.MAX_IMAGE_PIXELS = None
base, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
for shape, kind in (((4, 40000), "JPEG"), ((40000, 4), "JPEG"), ((1, 300000), "PNG"), ((300000, 1), "PNG")):
    file = io.BytesIO()
    Image.fromarray(np.full((*shape, 3), 90, np.uint8)).save(file, kind)
    rng = np.random.default_rng(0)
    for ops in (
        [("resize_crop", dict(resize=256, crop=224))],
        [("random_resized_crops", dict(size=224, sampling="simclr"))],
        [("random_resized_crops", dict(size=224, sampling="torchvision"))],
        [("random_resized_crops", dict(size=224, sampling="clamp", ratio=(1e-6, 1e6)))],
    ):
        out = apply_host_ops(ops, Picture(file.getvalue()), rng)
        assert abs(int(out.min()) - 90) <= 2 and abs(int(out.max()) - 90) <= 2
peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) / 1024
print(round(peak), round(time.process_time() - start, 2))
"""


def test_thin_pictures_take_little_memory():
    run = subprocess.run([sys.executable, "-c", CROP_THIN], capture_output=True, text=True, check=True)
    peak, seconds = map(float, run.stdout.split())
    assert peak < 100, f"{peak} MB"  # it was 2.2 GB
    assert seconds < 5


def test_what_opencv_raises_is_a_corrupt_picture(monkeypatch):
    import cv2

    def fail(*_args, **_named):
        raise cv2.error("Insufficient memory")

    monkeypatch.setattr("ssl_jax.data.geometry.cv2.resize", fail)
    with pytest.raises(CorruptImage, match="Insufficient memory"):
        apply_host_ops(square(16), Picture(encode(photo(40, 50))), None)


# ------------------------------------------------------------------------------------------------- orientation


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("tag", TURNS)
def test_every_orientation_is_upright(kind, tag):
    if kind not in decode.READABLE:
        pytest.skip(f"this Pillow has no {kind}")
    pixels = np.zeros((202, 302, 3), np.uint8)  # sizes that leave parts of blocks at the ends
    pixels[:, :150], pixels[:, 150:], pixels[:50] = (220, 30, 30), (30, 30, 220), (30, 220, 30)
    image, exif = Image.fromarray(pixels), Image.Exif()
    for turn in TURNS[tag]:
        image = image.transpose(turn)
    exif[0x0112] = tag
    file = io.BytesIO()
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind in ("JPEG", "AVIF") else {}
    image.save(file, kind, exif=exif, **options)
    picture = Picture(file.getvalue())
    assert (picture.height, picture.width) == (202, 302)
    assert np.abs(picture.pixels().astype(int) - pixels).mean() < 3
    crops = [("random_resized_crops", {"size": 32, "flip": 0.5})]
    for ops in (square(32), crops):  # a JPEG is decoded at a quarter of its size
        expected = apply_host_ops(ops, Picture(pixels), np.random.default_rng(1)).astype(int)
        assert np.abs(apply_host_ops(ops, picture, np.random.default_rng(1)) - expected).mean() < 4


def test_masks_are_upright_and_damaged_exif_says_nothing():
    mask, exif = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3)), Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    mask.transpose(Image.Transpose.ROTATE_90).save(file, "PNG", exif=exif)
    np.testing.assert_array_equal(mask_pixels(file.getvalue())[:, :, 0], np.arange(6).reshape(2, 3))
    for damaged in (b"", b"II*\x00", b"II*\x00\xff\xff\xff\xff", b"II*\x00\x08\x00\x00\x00\xff\xff" + b"\x12\x01" * 9, b"II*\x00" * 4):
        file = io.BytesIO()
        Image.fromarray(photo(9, 12)).save(file, "JPEG", exif=b"Exif\x00\x00" + damaged)
        assert Picture(file.getvalue()).pixels().shape == (9, 12, 3)


# ------------------------------------------------------------------------------------------------- formats and texts


@pytest.mark.parametrize("place", ["before", "after"])
def test_png_with_long_texts_is_a_good_picture(place):
    pixels, info = photo(30, 40), PngInfo()
    info.add_text("XML:com.adobe.xmp", "<x>" + "history " * 200_000 + "</x>", zip=True)
    info.add_itxt("Description", "x" * 3_000_000, zip=False)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", pnginfo=info)
    data = file.getvalue()
    if place == "after":
        plain, texts = encode(pixels, "PNG"), data[33 : data.index(b"IDAT") - 4]
        data = plain[:-12] + texts + plain[-12:]
    np.testing.assert_array_equal(Picture(data).pixels(), pixels)


@pytest.mark.parametrize("kind", ["AVIF", "JPEG2000"])
def test_formats_that_pillow_reads(kind):
    if kind not in decode.READABLE:
        pytest.skip(f"this Pillow has no {kind}")
    pixels = photo(40, 56)
    decoded = Picture(encode(pixels, kind)).pixels()
    assert np.abs(decoded.astype(int) - pixels).mean() < 6
    assert apply_host_ops(square(16), Picture(encode(pixels, kind)), None).shape == (16, 16, 3)


def test_unknown_images_have_a_reason():
    for data, reason in (
        (b"BM" + b"\xff" * 60, "^(?!.*MPO)"),
        (b"II*\x00" + b"\xff" * 60, "^(?!.*MPO)"),
        (b"\x00\x00\x00\x18ftypheic" + b"\x00" * 40, "HEIC, which is not read; convert it to JPEG"),
    ):
        with pytest.raises(CorruptImage, match=reason):
            Picture(data).pixels()


# ------------------------------------------------------------------------------------------------- bombs


def gif(width, height):
    return b"GIF89a" + width.to_bytes(2, "little") + height.to_bytes(2, "little") + bytes.fromhex("800000000000ffffff") \
        + b"\x2c" + bytes(4) + width.to_bytes(2, "little") + height.to_bytes(2, "little") + bytes.fromhex("0002024401003b")  # fmt: skip


def png(width, height, color_type=6):
    """A PNG of zeros."""
    channels = {0: 1, 2: 3, 6: 4}[color_type]
    packer, row = zlib.compressobj(9), bytes(1 + width * channels)
    body = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()

    def chunk(name, data):
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes((8, color_type, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def test_bombs_are_refused_before_decoding():
    with pytest.raises(CorruptImage, match="13000x13000 pixels in a file of 35 bytes, more than the bound of 1000 pixels per byte"):
        Picture(gif(13000, 13000)).pixels()
    assert Picture(gif(3000, 3000)).height == 3000
    large = png(13000, 1)  # claims more rows than it has, in a file that is not small
    head = large[:20] + (13000).to_bytes(4, "big") + large[24:29]
    large = head + zlib.crc32(head[12:29]).to_bytes(4, "big") + large[33:] + bytes(400_000)
    with pytest.raises(CorruptImage, match="13000x13000 pixels take 1128 MiB decoded, more than the bound of 1024"):
        Picture(large).pixels()


def test_memory_of_all_threads_is_bounded(monkeypatch):
    """Eight threads decode; the bound lets two run at once."""
    data, running, most, lock = png(500, 400), [0], [0], threading.Lock()
    monkeypatch.setattr(decode, "DECODED_BYTES", 2 * 7 * 500 * 400)
    plain, started = decode._to_rgb, threading.Barrier(2, timeout=20)

    def counted(image):
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        started.wait()  # two at once, never three
        pixels = plain(image)
        with lock:
            running[0] -= 1
        return pixels

    monkeypatch.setattr(decode, "_to_rgb", counted)
    threads = [threading.Thread(target=lambda: Picture(data).pixels()) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most[0] == 2
    with pytest.raises(CorruptImage, match="more than the bound"):
        Picture(png(1000, 900)).pixels()


def test_transparent_picture_takes_seven_bytes_per_pixel():
    code = f"""
import resource, sys
sys.path.insert(0, {str(__file__).rsplit("/", 1)[0]!r})
from test_odd_images import png
from ssl_jax.data.decode import Picture
data = png(2500, 2000)
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
Picture(data).pixels()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) * 1024 / 2500 / 2000)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(run.stdout) < 9  # it was 22

"""Image decoding and host geometry: parity with Pillow and torchvision, and one-line errors."""

import io
import zlib

import cv2
import numpy as np
import pytest
from pictures import encode, photo
from PIL import Image

from ssl_jax.data.decode import CorruptImage, Picture
from ssl_jax.data.geometry import SAMPLINGS, apply_host_ops, check_host_ops, output_shape, resize
from ssl_jax.errors import UserError

CROPS = [("random_resized_crops", {"size": 16})]


# ------------------------------------------------------------------------------------------------- decoding


def test_jpeg_equals_pillow():
    for pixels in (photo(45, 61), photo(45, 61)[:, :, 0]):
        data = encode(pixels, quality=90)
        expected = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
        assert np.abs(Picture(data).pixels().astype(int) - expected).max() <= 1


def test_cmyk_jpeg_is_close_to_its_rgb():
    pixels = photo(40, 50)
    decoded = Picture(encode(pixels, mode="CMYK", quality=95)).pixels()
    assert decoded.shape == pixels.shape
    assert np.abs(decoded.astype(int) - pixels).mean() < 3


def test_16_bit_png_is_scaled_and_not_clipped():
    values = np.array([[0, 128, 129, 257, 32768, 65407, 65535]], np.uint16)
    decoded = Picture(encode(values, "PNG")).pixels()
    np.testing.assert_array_equal(decoded[:, :, 0], np.round(values / 257))
    assert decoded.shape == (1, 7, 3)


def test_transparent_images_get_a_white_background():
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 0], rgba[0, :, 3] = 200, (0, 128, 255)  # red 200, from transparent to opaque
    decoded = Picture(encode(rgba, "PNG")).pixels()
    expected = [[255, 255, 255], [227, 127, 127], [200, 0, 0]]
    assert np.abs(decoded[0].astype(int) - expected).max() <= 1
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    file = io.BytesIO()
    palette.save(file, "PNG", transparency=0)
    np.testing.assert_array_equal(Picture(file.getvalue()).pixels()[0], [[255, 255, 255], [40, 50, 60]])


def test_animation_gives_its_first_frame_and_images_of_one_pixel_decode():
    frames = [Image.new("RGB", (5, 4), color) for color in ((255, 0, 0), (0, 0, 255))]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(Picture(file.getvalue()).pixels(), np.full((4, 5, 3), (255, 0, 0)))
    for kind in ("JPEG", "PNG", "BMP", "WEBP", "TIFF"):
        assert Picture(encode(np.full((1, 1, 3), 90, np.uint8), kind)).pixels().shape == (1, 1, 3)
    assert (
        apply_host_ops(CROPS, Picture(encode(np.full((1, 1, 3), 90, np.uint8), "PNG")), np.random.default_rng(0)).max()
        == 90
    )


def png_header(width, height):
    chunk = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\x00\x00\x00"
    body = b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    return body + b"\x00\x00\x00\x00IDAT" + zlib.crc32(b"IDAT").to_bytes(4, "big")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"hello, this is text", "not an image"),
        (encode(photo(60, 80))[:700], "truncated"),
        (encode(photo(60, 80))[:40], "Truncated File"),
        (encode(photo(60, 80), "PNG")[:300], "truncated"),
        (png_header(60000, 60000), "bomb"),
        (png_header(13000, 13000), "more than the bound|truncated"),
        (encode(np.ones((4, 4), np.float32), "TIFF"), "floating"),
    ],
    ids=["empty", "text", "half a JPEG", "JPEG header", "half a PNG", "bomb", "large", "float"],
)
def test_undecodable_bytes_raise_corrupt_image_with_a_reason(data, reason):
    with pytest.raises(CorruptImage, match=reason):
        Picture(data).pixels()


def test_decoded_size_is_bounded_for_every_decoder():
    for kind in ("JPEG", "PNG"):
        data = encode(photo(30, 40), kind)
        assert Picture(data, max_pixels=1200).pixels().shape == (30, 40, 3)
        with pytest.raises(CorruptImage, match="40x30 pixels decoded, more than the bound of 1199"):
            Picture(data, max_pixels=1199).pixels()


def test_random_damage_decodes_or_raises_corrupt_image():
    rng = np.random.default_rng(0)
    rgba = np.dstack([photo(33, 47), photo(33, 47)[:, :, 0]])
    originals = [encode(photo(33, 47), kind) for kind in ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM")]
    originals += [encode(rgba, "PNG"), encode(rgba, "TIFF", compression="tiff_lzw"), encode(photo(33, 47), mode="CMYK")]
    outcomes = {"decoded": 0, "corrupt": 0}
    for original in originals:
        for _ in range(60):
            data = bytearray(original)
            for position in rng.integers(0, len(data), rng.integers(1, 12)):
                data[position if rng.random() < 0.5 else position % 200] = rng.integers(256)
            try:
                assert Picture(bytes(data), max_pixels=10**6).pixels().dtype == np.uint8
                outcomes["decoded"] += 1
            except CorruptImage:
                outcomes["corrupt"] += 1
    assert min(outcomes.values()) > 50, outcomes


def test_scaled_jpeg_decode_equals_block_means():
    pixels = photo(201, 303)
    picture = Picture(encode(pixels, quality=95))
    for shrink, factor in ((1.9, 1), (2.0, 2), (7.5, 4), (100, 8)):
        with picture.decoded(shrink) as (small, used):
            pass
        height, width = -(-201 // factor), -(-303 // factor)
        assert (used, small.shape) == (factor, (height, width, 3))
        padded = np.pad(pixels, ((0, height * factor - 201), (0, width * factor - 303), (0, 0)), "edge")
        expected = padded.reshape(height, factor, width, factor, 3).mean((1, 3))
        assert np.abs(small - expected)[:-1, :-1].mean() < 1.5


# ------------------------------------------------------------------------------------------------- geometry


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("height", "width"), [(64, 64), (65, 80), (100, 100), (119, 127), (200, 150), (401, 333), (20, 30)]
)
def test_resize_matches_antialiased_pillow(height, width, interpolation):
    """On stripes and noise, where aliasing shows: as close to Pillow as area interpolation, closer than linear."""
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3))
    pixels = np.uint8(0.5 * noise + 0.5 * 255 * (np.mgrid[:height, :width].sum(0) // 7 % 2)[:, :, None])
    flag = getattr(Image.Resampling, interpolation.upper())
    expected = np.asarray(Image.fromarray(pixels).resize((64, 64), flag), float)
    error = np.abs(resize(pixels, 64, 64, interpolation) - expected).mean()
    assert error <= 1.35 * np.abs(cv2.resize(pixels, (64, 64), interpolation=cv2.INTER_AREA) - expected).mean() + 0.2
    if min(height, width) >= 100:
        plain = cv2.resize(pixels, (64, 64), interpolation=cv2.INTER_LINEAR)
        assert error < 0.5 * np.abs(plain - expected).mean()


def test_resize_crop_equals_torchvisions_evaluation_transform():
    for shape in ((200, 310), (310, 200), (75, 75)):
        pixels = photo(*shape)
        height, width = (80 * side // min(shape) for side in shape)
        image = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
        top, left = round((height - 64) / 2), round((width - 64) / 2)
        expected = np.asarray(image.crop((left, top, left + 64, top + 64)), int)
        ops = [("resize_crop", {"resize": 80, "crop": 64})]
        got = apply_host_ops(ops, Picture(encode(pixels, "PNG")), None)
        assert got.shape == output_shape(ops) == (64, 64, 3)
        assert np.abs(got - expected).mean() < 1
        scaled = apply_host_ops(ops, Picture(encode(pixels, quality=95)), None)  # decoded at half size
        assert np.abs(scaled - expected).mean() < 2


@pytest.mark.parametrize(
    ("name", "mean_area", "narrow"), [("simclr", 0.409, 0.426), ("torchvision", 0.453, 0.5), ("clamp", 0.523, 0.5)]
)
def test_crop_distributions_match_the_published_implementations(name, mean_area, narrow):
    """Mean areas measured with TensorFlow, torchvision and BYOL's code on 400 x 500 pixels; fraction of narrow crops."""
    rng = np.random.default_rng(0)
    boxes = np.array([SAMPLINGS[name](rng, 400, 500, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(6000)])
    top, left, height, width = boxes.T
    assert top.min() >= 0
    assert left.min() >= 0
    assert (top + height).max() <= 400
    assert (left + width).max() <= 500
    area = height * width / (400 * 500)
    np.testing.assert_allclose(area.mean(), mean_area, atol=0.012)
    boxes = np.array([SAMPLINGS[name](rng, 400, 400, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(6000)])
    height, width = boxes.T[2:]
    np.testing.assert_allclose((width < height).mean() + 0.5 * (width == height).mean(), narrow, atol=0.02)
    assert (area.min() >= 0.0995) == (name == "simclr")


def test_crops_show_their_boxes():
    """On a ramp the pixel values are the coordinates, so a crop shows its origin for every decoder."""
    y, x = np.mgrid[:256, :256]
    ramp = np.uint8(np.stack([y, x, 0 * x], -1))
    ops = [("random_resized_crops", {"size": 32, "crops": 3, "interpolation": "bilinear"})]
    for data in (encode(ramp, "PNG"), encode(ramp, quality=100, subsampling=0)):
        crops = apply_host_ops(ops, Picture(data), np.random.default_rng(5)).astype(int)
        rng = np.random.default_rng(5)
        for crop in crops:
            top, left, height, width = SAMPLINGS["torchvision"](rng, 256, 256, (0.08, 1.0), (3 / 4, 4 / 3))
            rows = top + (np.arange(32) + 0.5) * height / 32 - 0.5
            columns = left + (np.arange(32) + 0.5) * width / 32 - 0.5
            assert np.abs(crop[:, 16, 0] - rows).max() <= 4  # half a pixel of an image decoded at 1/8
            assert np.abs(crop[16, :, 1] - columns).max() <= 4
            assert np.abs(crop[:, 16, 0] - rows).mean() <= 2.2
    one = apply_host_ops([("random_resized_crop", {"size": 32})], Picture(ramp), np.random.default_rng(5))
    two = apply_host_ops([("random_resized_crops", {"size": 32})], Picture(ramp), np.random.default_rng(5))
    np.testing.assert_array_equal(one, two[0])


@pytest.mark.parametrize(
    ("ops", "message"),
    [
        ([("rotate", {})], "unknown host op 'rotate'; valid: random_resized_crops, random_resized_crop, resize_crop"),
        ([("resize_crop", {"resize": 8})], "'crop' is missing; valid: resize, crop, interpolation"),
        ([("resize_crop", {"resize": 8, "crop": 9})], "crop=9 > resize=8"),
        (
            [("random_resized_crops", {"size": 8, "scale": (0.1, 1)})],
            "unknown argument 'scale'; valid: size, crops, area",
        ),
        ([("random_resized_crops", {"size": 8, "area": (0, 1)})], "0 < low <= high <= 1"),
        ([("random_resized_crops", {"size": 8, "area": (0.5, 2)})], "0 < low <= high <= 1"),
        ([("random_resized_crops", {"size": 8, "ratio": 1})], r"pair \(low, high\)"),
        ([("random_resized_crops", {"size": 8.0})], "positive whole number"),
        ([("random_resized_crops", {"size": 8, "interpolation": "nearest"})], "one of bilinear, bicubic"),
        ([("random_resized_crops", {"size": 8, "sampling": "tf"})], "one of torchvision, simclr, clamp"),
        ([("resize_crop", {"resize": 8, "crop": 8})] * 2, "at most one"),
        (["resize_crop"], "not a pair"),
    ],
)
def test_invalid_host_op_is_a_user_error(ops, message):
    with pytest.raises(UserError, match=message):
        check_host_ops(ops)

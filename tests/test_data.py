"""The data floor: files of every sort, exact order for any division of the work, exact counts, errors in one line."""

import io
import os
import pickle
import shutil
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from ssl_jax.data.decode import CorruptImage, Picture, decode_image
from ssl_jax.data.geometry import DISTRIBUTIONS, apply_host_ops, check_host_ops, output_shape, resize
from ssl_jax.data.pipeline import EvalBatches, TrainBatches, element_spec, eval_batches, iterate
from ssl_jax.data.sources import open_source
from ssl_jax.errors import UserError

CROPS = [("random_resized_crops", {"size": 16})]


def photo(height, width, seed=0):
    """A smooth picture uint8 [height, width, 3]; JPEG changes it little."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / 40.0
    waves = [np.sin(a * x + b * y + c) for a, b, c in rng.uniform(0.3, 2.5, (3, 3))]
    return np.uint8(127.5 + 100 * np.stack(waves, -1))


def encode(pixels, kind="JPEG", mode=None, **options):
    image = Image.fromarray(pixels)
    file = io.BytesIO()
    (image.convert(mode) if mode else image).save(file, kind, **options)
    return file.getvalue()


def images_folder(root, count, classes=("a", "b"), shape=(24, 32), kind="PNG"):
    """`count` images, the class by turns; the red value of all pixels of image i is i. Returns the root as text."""
    for i in range(count):
        pixels = np.full((*shape, 3), i, np.uint8)
        path = root / classes[i % len(classes)] / f"{i:03d}.{kind.lower()}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(pixels, kind))
    return str(root)


# ------------------------------------------------------------------------------------------------- decoding


def test_jpeg_equals_pillow():
    for pixels in (photo(45, 61), photo(45, 61)[:, :, 0]):
        data = encode(pixels, quality=90)
        expected = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
        assert np.abs(decode_image(data).astype(int) - expected).max() <= 1


def test_cmyk_jpeg_is_close_to_its_rgb():
    pixels = photo(40, 50)
    decoded = decode_image(encode(pixels, mode="CMYK", quality=95))
    assert decoded.shape == pixels.shape
    assert np.abs(decoded.astype(int) - pixels).mean() < 3


def test_16_bit_png_is_scaled_and_not_clipped():
    values = np.array([[0, 128, 129, 257, 32768, 65407, 65535]], np.uint16)
    decoded = decode_image(encode(values, "PNG"))
    np.testing.assert_array_equal(decoded[:, :, 0], np.round(values / 257))
    assert decoded.shape == (1, 7, 3)


def test_transparency_is_laid_on_white():
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 0], rgba[0, :, 3] = 200, (0, 128, 255)  # red 200, from transparent to opaque
    decoded = decode_image(encode(rgba, "PNG"))
    expected = [[255, 255, 255], [227, 127, 127], [200, 0, 0]]
    assert np.abs(decoded[0].astype(int) - expected).max() <= 1
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    file = io.BytesIO()
    palette.save(file, "PNG", transparency=0)
    np.testing.assert_array_equal(decode_image(file.getvalue())[0], [[255, 255, 255], [40, 50, 60]])


def test_animation_gives_its_first_frame_and_one_pixel_is_an_image():
    frames = [Image.new("RGB", (5, 4), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(decode_image(file.getvalue()), np.full((4, 5, 3), (255, 0, 0)))
    for kind in ("JPEG", "PNG", "BMP", "WEBP", "TIFF"):
        assert decode_image(encode(np.full((1, 1, 3), 90, np.uint8), kind)).shape == (1, 1, 3)
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
def test_what_cannot_be_decoded_says_why(data, reason):
    with pytest.raises(CorruptImage, match=reason):
        decode_image(data)


def test_decoded_size_is_bounded_for_every_decoder():
    for kind in ("JPEG", "PNG"):
        data = encode(photo(30, 40), kind)
        assert decode_image(data, max_pixels=1200).shape == (30, 40, 3)
        with pytest.raises(CorruptImage, match="40x30 pixels decoded, more than the bound of 1199"):
            decode_image(data, max_pixels=1199)


def test_damaged_bytes_give_an_image_or_the_one_exception():
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
                assert decode_image(bytes(data), max_pixels=10**6).dtype == np.uint8
                outcomes["decoded"] += 1
            except CorruptImage:
                outcomes["corrupt"] += 1
    assert min(outcomes.values()) > 50, outcomes


def test_scaled_decode_is_the_picture_made_smaller():
    pixels = photo(201, 303)
    picture = Picture(encode(pixels, quality=95))
    for shrink, factor in ((1.9, 1), (2.0, 2), (7.5, 4), (100, 8)):
        small, used = picture.pixels_and_factor(shrink)
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
def test_resize_is_as_good_as_pillows(height, width, interpolation):
    """Stripes and noise, where aliasing shows: as close to Pillow as area interpolation, closer than a plain one."""
    import cv2

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
    ("name", "mean_area", "narrow"), [("simclr", 0.409, 0.426), ("torchvision", 0.453, 0.5), ("byol", 0.523, 0.5)]
)
def test_crop_distributions_match_the_published_implementations(name, mean_area, narrow):
    """Mean areas measured with TensorFlow, torchvision and BYOL's code on 400 x 500 pixels; share of narrow crops."""
    rng = np.random.default_rng(0)
    boxes = np.array([DISTRIBUTIONS[name](rng, 400, 500, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(6000)])
    top, left, height, width = boxes.T
    assert top.min() >= 0
    assert left.min() >= 0
    assert (top + height).max() <= 400
    assert (left + width).max() <= 500
    area = height * width / (400 * 500)
    np.testing.assert_allclose(area.mean(), mean_area, atol=0.012)
    boxes = np.array([DISTRIBUTIONS[name](rng, 400, 400, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(6000)])
    height, width = boxes.T[2:]
    np.testing.assert_allclose((width < height).mean() + 0.5 * (width == height).mean(), narrow, atol=0.02)
    assert (area.min() >= 0.0995) == (name == "simclr")


def test_crops_show_the_part_of_the_image_they_say():
    """On a ramp the pixel values are the coordinates, so a crop tells where it came from, whatever decoded it."""
    y, x = np.mgrid[:256, :256]
    ramp = np.uint8(np.stack([y, x, 0 * x], -1))
    ops = [("random_resized_crops", {"size": 32, "crops": 3, "interpolation": "bilinear"})]
    for data in (encode(ramp, "PNG"), encode(ramp, quality=100, subsampling=0)):
        crops = apply_host_ops(ops, Picture(data), np.random.default_rng(5)).astype(int)
        rng = np.random.default_rng(5)
        for crop in crops:
            top, left, height, width = DISTRIBUTIONS["torchvision"](rng, 256, 256, (0.08, 1.0), (3 / 4, 4 / 3))
            rows = top + (np.arange(32) + 0.5) * height / 32 - 0.5
            columns = left + (np.arange(32) + 0.5) * width / 32 - 0.5
            assert np.abs(crop[:, 16, 0] - rows).max() <= 4  # half a pixel of a picture decoded at 1/8
            assert np.abs(crop[16, :, 1] - columns).max() <= 4
            assert np.abs(crop[:, 16, 0] - rows).mean() <= 2.2
    one = apply_host_ops([("random_resized_crop", {"size": 32})], Picture(ramp), np.random.default_rng(5))
    two = apply_host_ops([("random_resized_crops", {"size": 32})], Picture(ramp), np.random.default_rng(5))
    np.testing.assert_array_equal(one, two[0])


@pytest.mark.parametrize(
    ("ops", "message"),
    [
        ([("resize", {})], "unknown host op 'resize'; valid: random_resized_crops, random_resized_crop, resize_crop"),
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
        ([("random_resized_crops", {"size": 8, "distribution": "tf"})], "one of torchvision, simclr, byol"),
        ([("resize_crop", {"resize": 8, "crop": 8})] * 2, "at most one"),
        (["resize_crop"], "no pair"),
    ],
)
def test_wrong_recipes_are_named(ops, message):
    with pytest.raises(UserError, match=message):
        check_host_ops(ops)


# ------------------------------------------------------------------------------------------------- folders


def test_folder_in_the_wild(tmp_path, caplog):
    root = tmp_path / "images"
    images_folder(root, 6)
    (root / "a" / "deep").mkdir()
    (root / "a" / "deep" / "photo.jpeg").write_bytes(encode(photo(20, 30)))
    (root / "a" / ".hidden.png").write_bytes(encode(photo(9, 9), "PNG"))
    (root / ".cache").mkdir()
    (root / ".cache" / "x.png").write_bytes(encode(photo(9, 9), "PNG"))
    (root / "a" / "zero.jpg").write_bytes(b"")
    (root / "b" / "notes.txt").write_text("PS: not a picture")
    (root / "b" / "text.png").write_text("not a picture either")
    outside = tmp_path / "outside.png"
    outside.write_bytes(encode(photo(9, 9), "PNG"))
    (root / "b" / "away.png").symlink_to(outside)
    (root / "b" / "inside.png").symlink_to(root / "a" / "000.png")
    (root / "loop").symlink_to(root)
    with caplog.at_level("WARNING"):
        source = open_source(str(root), "all")
    assert source.paths == ["a/000.png", "a/002.png", "a/004.png", "a/deep/photo.jpeg", "b/001.png", "b/003.png",
                            "b/005.png", "b/inside.png"]  # fmt: skip
    assert source.label_names == ("a", "b")
    assert source.num_classes == 2
    assert [int(source[i]["label"]) for i in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert source.rejected == {"a/zero.jpg": "empty file", "b/notes.txt": "not an image", "b/text.png": "not an image",
                               "b/away.png": "link out of the folder", "loop": "link to a folder"}  # fmt: skip
    assert len(caplog.records) == 1
    assert "5 files left out" in caplog.text
    again = open_source(str(root), "all")
    assert again.fingerprint == source.fingerprint
    (root / "a" / "000.png").write_bytes(encode(photo(25, 32), "PNG"))
    assert open_source(str(root), "all").fingerprint != source.fingerprint


def test_folder_splits(tmp_path):
    root = images_folder(tmp_path / "one", 40)
    parts = {split: set(open_source(root, split).paths) for split in ("all", "train", "test")}
    assert parts["train"] | parts["test"] == parts["all"]
    assert not parts["train"] & parts["test"]
    assert 1 <= len(parts["test"]) <= 12
    images_folder(tmp_path / "one", 60)  # twenty more: nobody moves
    assert parts["test"] <= set(open_source(root, "test").paths)
    assert parts["train"] <= set(open_source(root, "train").paths)
    with pytest.raises(UserError, match="no split 'validation'; it has all, train, test"):
        open_source(root, "validation")

    images_folder(tmp_path / "two" / "train", 6)
    images_folder(tmp_path / "two" / "val", 3, classes=("b",))
    (tmp_path / "two" / "logo.png").write_bytes(encode(photo(9, 9), "PNG"))
    root = str(tmp_path / "two")
    assert len(open_source(root, "train")) == 6
    assert len(open_source(root, "all")) == 9
    test = open_source(root, "test")
    assert test.paths == [f"val/b/{i:03d}.png" for i in range(3)]
    assert test.label_names == ("a", "b")
    assert {int(test[i]["label"]) for i in range(3)} == {1}
    with pytest.raises(UserError, match="it has all, train, val"):
        open_source(root, "validation")

    flat = tmp_path / "flat"
    flat.mkdir()
    for i in range(3):
        (flat / f"{i}.png").write_bytes(encode(photo(8, 8), "PNG"))
    source = open_source(str(flat), "train")
    assert source.num_classes is None
    assert source.features == ("image",)
    assert len(source) == 2
    assert "label" not in TrainBatches(source, [], 2, seed=0)[0]
    with pytest.raises(UserError, match="has no feature 'pose'; it has image"):
        TrainBatches(source, [], 2, seed=0, keys=("image", "pose"))


def test_errors_of_missing_data_are_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("hello, this is not an image")
    (tmp_path / "tfds" / "broken" / "1.0.0").mkdir(parents=True)
    (tmp_path / "tfds" / "half" / "1.0.0.incompleteABC").mkdir(parents=True)
    for name, message in (
        (str(tmp_path / "empty"), "has no image; give one"),
        (str(tmp_path / "text"), r"has no image \(1 files are no images\)"),
        (str(tmp_path / "nowhere"), "no such folder"),
        ("imagenet9", rf"not prepared in data_dir '{tmp_path}/tfds' \(there: broken, half\); prepare .* --data_dir"),
        ("broken", "not prepared to the end .'1.0.0'"),
        ("half", "not prepared to the end"),
        ("half:2.0.0", "no such version"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            open_source(name, "all", str(tmp_path / "tfds"))
        assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------- TFDS


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    """A TFDS data directory prepared by a real builder, in ArrayRecord and without TensorFlow."""
    import tensorflow_datasets as tfds

    class Dots(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.2.0")
        url_infos = {}  # noqa: RUF012

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(12, 10, 3), encoding_format="png"),
                "label": tfds.features.ClassLabel(names=["even", "odd"]),
                "mask": tfds.features.Image(shape=(12, 10, 1), encoding_format="png"),
                "point": tfds.features.Tensor(shape=(2,), dtype=np.float64),
                "name": tfds.features.Text(),
                "boxes": tfds.features.Sequence({"bbox": tfds.features.BBoxFeature()}),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(40), "test": self._generate_examples(9)}

        def _generate_examples(self, count):
            for i in range(count):
                pixels = np.full((12, 10, 3), i, np.uint8)
                mask = io.BytesIO(encode(pixels[:, :, 0], "PNG"))
                box = [{"bbox": tfds.features.BBox(0.0, 0.0, 1.0, 1.0)}] * (i % 3)
                example = {"label": i % 2, "mask": mask, "point": [i, -i], "name": str(i), "boxes": box}
                yield i, {"image": io.BytesIO(encode(pixels, "PNG")), **example}

    root = tmp_path_factory.mktemp("tfds")
    Dots(data_dir=root, file_format="array_record").download_and_prepare()
    return root


def test_tfds_by_name_by_path_and_in_splits(tfds_dir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tfds_dir))
    source = open_source("dots", "train")
    assert (len(source), source.num_classes, source.label_names) == (40, 2, ("even", "odd"))
    assert source.image_shape == (12, 10, 3)
    assert source[5]["image"][:4] == b"\x89PNG"
    fingerprints = {source.fingerprint}
    for path in (tfds_dir / "dots" / "1.2.0", tfds_dir / "dots"):
        by_path = open_source(str(path), "train", data_dir="/nonexistent")
        assert by_path[5]["image"] == source[5]["image"]
        fingerprints.add(by_path.fingerprint)
    assert len(fingerprints) == 1
    for split, length in (("train[:25%]", 10), ("train[10:]+test", 39), ("test", 9)):
        part = open_source("dots:1.2.0", split)
        assert len(part) == length
        assert part.fingerprint not in fingerprints
    assert len(pickle.loads(pickle.dumps(source))) == 40
    with pytest.raises(UserError, match="no split 'valid'; it has t"):
        open_source("dots", "valid")


def test_tfds_other_features_reach_the_batch(tfds_dir):
    source = open_source("dots", "test", str(tfds_dir))
    keys = {"image": "image", "label": "label", "segments": "mask", "point": "point", "name": "name"}
    spec = element_spec(source, [], keys)
    assert spec == {
        "image": ((12, 10, 3), np.uint8), "label": ((), np.int32), "segments": ((12, 10, 1), np.uint8),
        "point": ((2,), np.float32), "name": ((), np.dtype(object)),
    }  # fmt: skip
    (batch,) = eval_batches(source, [], 9, keys=keys)
    order = [int(name) for name in batch["name"]]
    assert sorted(order) == list(range(9))
    for key, value in batch.items():
        if key in spec:
            assert (value.shape[1:], value.dtype) == spec[key]
    np.testing.assert_array_equal(batch["image"][:, 3, 4, 1], order)
    np.testing.assert_array_equal(batch["segments"][:, 3, 4, 0], order)
    np.testing.assert_array_equal(batch["point"], np.stack([order, np.negative(order)], -1))
    np.testing.assert_array_equal(batch["label"], np.mod(order, 2))
    with pytest.raises(UserError, match="feature 'mask' needs another name"):
        element_spec(source, [], ("image", "mask"))
    with pytest.raises(UserError, match="'boxes' is no array"):
        element_spec(source, [], ("image", "boxes"))


def test_tfds_damage_is_a_user_error(tfds_dir, tmp_path):
    shard = "dots-train.array_record-00000-of-00001"
    for case, message in (("missing", "is missing; prepare"), ("short", "is damaged"), ("info", "no readable TFDS")):
        root = tmp_path / case
        shutil.copytree(tfds_dir / "dots", root / "dots")
        folder = root / "dots" / "1.2.0"
        if case == "missing":
            (folder / shard).unlink()
        elif case == "short":
            (folder / shard).write_bytes((folder / shard).read_bytes()[:1000])
        else:
            (folder / "features.json").unlink()
        with pytest.raises(UserError, match=message):
            open_source("dots", "train", str(root))


def test_no_tensorflow_and_no_threads_of_opencv(tfds_dir):
    code = (
        "import sys; from ssl_jax.data.sources import open_source;"
        "from ssl_jax.data.pipeline import TrainBatches, iterate;"
        f"source = open_source('dots', 'train', {str(tfds_dir)!r});"
        "assert len(list(iterate(TrainBatches(source, [], 8, seed=0), 0, 3))) == 3;"
        "assert 'tensorflow' not in sys.modules; import cv2; assert cv2.getNumThreads() == 1"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.getcwd()})


# ------------------------------------------------------------------------------------------------- batches


def numbers(batch):
    """Which image each row is: `images_folder` writes the number into the pixels."""
    return batch["image"].reshape(len(batch["image"]), -1)[:, 0].tolist()


def equal(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return images_folder(tmp_path_factory.mktemp("folder"), 21)


def test_every_example_once_an_epoch_whatever_divides_it(folder):
    source = open_source(folder, "all")
    batches = TrainBatches(source, [], 6, seed=3)
    sequence = [n for batch in iterate(batches, 0, 14) for n in numbers(batch)]  # 84 places = 4 epochs of 21
    epochs = [sequence[i : i + 21] for i in range(0, 84, 21)]
    assert all(sorted(epoch) == list(range(21)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4  # shuffled anew
    assert epochs[0] != list(range(21))
    assert sequence != [n for batch in iterate(TrainBatches(source, [], 6, seed=4), 0, 14) for n in numbers(batch)]
    # Processes: consecutive rows of the same global batch. Another batch size: the same sequence.
    for count in (2, 3, 6):
        parts = [TrainBatches(source, [], 6, 3, index, count)[5] for index in range(count)]
        assert [n for part in parts for n in numbers(part)] == sequence[30:36]
    assert [n for batch in iterate(TrainBatches(source, [], 14, 3), 0, 6) for n in numbers(batch)] == sequence
    for row in (0, 9, 17):  # labels belong to their images
        batch = batches[row]
        assert [n % 2 for n in numbers(batch)] == batch["label"].tolist()


def test_resume_equals_the_tail(folder):
    batches = TrainBatches(open_source(folder, "all"), CROPS, 6, seed=3)
    whole = list(iterate(batches, 0, 9))
    equal(whole[4:], list(iterate(TrainBatches(open_source(folder, "all"), CROPS, 6, seed=3), 4, 9)))
    assert whole[0]["image"].shape == (6, 2, 16, 16, 3)
    assert next(iterate(batches, 10**12, 10**12 + 1))["label"].shape == (6,)  # any step at once


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """JPEGs of many sizes, three of them damaged behind an intact header."""
    root = tmp_path_factory.mktemp("photos")
    for i in range(12):
        data = encode(photo(40 + 7 * i, 90 - 5 * i, seed=i), quality=92)
        (root / f"{i:02d}.jpg").write_bytes(data[: len(data) // 2] if i in (3, 4, 8) else data)
    return str(root)


def test_workers_threads_and_processes_give_the_same_bits(photos, caplog):
    def make(index=0, count=1):
        return TrainBatches(open_source(photos, "all"), CROPS, 6, 1, index, count)

    plain = list(iterate(make(), 0, 5, threads=0))
    equal(plain, list(iterate(make(), 0, 5, threads=4, prefetch=1)))
    caplog.clear()
    with caplog.at_level("WARNING"):
        batches = make()
        worked = list(iterate(batches, 0, 5, workers=2))
    equal(plain, worked)
    del worked  # its arrays are the workers' shared memory
    assert sorted(batches.skipped) == [3, 4, 8]  # reported by the main process, each once
    assert all("truncated" in reason.lower() for reason in batches.skipped.values())
    assert sum("is left out" in record.message for record in caplog.records) == 3
    halves = [list(iterate(make(index, 2), 0, 5)) for index in range(2)]
    joined = [{key: np.concatenate([a[key], b[key]]) for key in a} for a, b in zip(*halves, strict=True)]
    equal(plain, joined)


def test_a_damaged_record_is_replaced_by_its_next_readable_neighbour(tmp_path):
    root = tmp_path / "images"
    images_folder(root, 10, classes=("a",))
    for bad in (4, 5, 9):
        path = root / "a" / f"{bad:03d}.png"
        path.write_bytes(path.read_bytes()[:50])
    batches = TrainBatches(open_source(str(root), "all"), [], 5, seed=0)
    counts = np.bincount([n for batch in iterate(batches, 0, 2) for n in numbers(batch)], minlength=10)
    assert counts.tolist() == [2, 1, 1, 1, 0, 0, 3, 1, 1, 0]
    assert sorted(batches.skipped) == [4, 5, 9]
    for i in range(10):
        path = root / "a" / f"{i:03d}.png"
        path.write_bytes(path.read_bytes()[:50])
    source = open_source(str(root), "all")
    for ops in ([], CROPS):
        with pytest.raises(UserError, match=r"10 images in a row cannot be read \(first: number \d, .*truncated"):
            next(iterate(TrainBatches(source, ops, 5, seed=0), 0, 1))


def test_evaluation_counts_exactly(photos, folder):
    source = open_source(folder, "all")
    for count in (1, 2, 4):
        seen, labels = [], []
        for index in range(count):
            batches = eval_batches(source, [], 8, index, count)
            assert len(batches) == 3
            for batch in batches:
                assert batch["image"].shape == (8 // count, 24, 32, 3)
                assert batch["mask"].shape == batch["index"].shape == batch["label"].shape == (8 // count,)
                assert (batch["image"][~batch["mask"]] == 0).all()
                seen += batch["index"][batch["mask"]].tolist()
                labels += batch["label"][batch["mask"]].tolist()
        assert sorted(seen) == list(range(21))
        assert labels == [int(source[i]["label"]) for i in seen]
    batches = EvalBatches(open_source(photos, "all"), [("resize_crop", {"resize": 20, "crop": 16})], 5)
    mask, index = (np.concatenate([batch[key] for batch in batches]) for key in ("mask", "index"))
    assert index[mask].tolist() == [0, 1, 2, 5, 6, 7, 9, 10, 11]
    assert sorted(batches.skipped) == [3, 4, 8]
    spaced = eval_batches(source, [], 4, limit=6)
    assert np.concatenate([b["index"][b["mask"]] for b in spaced]).tolist() == [0, 3, 7, 10, 14, 17]
    assert len(eval_batches(source, [], 4, limit=100)) == 6


def test_element_spec_and_mixed_sizes(photos, folder):
    assert element_spec(open_source(folder, "all"), []) == {"image": ((24, 32, 3), np.uint8), "label": ((), np.int32)}
    source = open_source(photos, "all")
    assert element_spec(source, CROPS) == {"image": ((2, 16, 16, 3), np.uint8)}
    with pytest.raises(
        UserError, match=r"example \d+ has shape \(\d+, \d+, 3\), others \(40, 90, 3\); give config.data.ops"
    ):
        list(iterate(TrainBatches(source, [], 4, seed=0), 0, 3))


def test_batch_sizes_that_cannot_be(folder):
    source = open_source(folder, "all")
    with pytest.raises(UserError, match=r"batch size 22 is larger than .* \(21 examples\)"):
        TrainBatches(source, [], 22, seed=0)
    for build in (lambda: TrainBatches(source, [], 6, 0, 0, 4), lambda: eval_batches(source, [], 6, 0, 4)):
        with pytest.raises(UserError, match="batch size 6 is not divisible by 4 processes"):
            build()


def test_small_images_stay_decoded_and_are_not_changed_by_it(folder, monkeypatch):
    source = open_source(folder, "all")
    batches = TrainBatches(source, [], 7, seed=0)
    first = list(iterate(batches, 0, 3))
    assert batches.reader.cache.ready.all()
    first[0]["image"][:] = 77  # what a caller does to its batch stays there
    monkeypatch.setattr("ssl_jax.data.pipeline.Picture", None)  # nothing is decoded again
    again = list(iterate(batches, 0, 3))
    equal(first[1:], again[1:])
    assert not (again[0]["image"] == 77).all()
    monkeypatch.undo()
    monkeypatch.setattr("ssl_jax.data.pipeline.CACHE_BYTES", 0)
    uncached = TrainBatches(open_source(folder, "all"), [], 7, seed=0)
    assert uncached.reader.cache is None
    equal(again, list(iterate(uncached, 0, 3)))


def test_cifar10():
    root = os.environ.get("TFDS_DATA_DIR", "")
    if not os.path.isdir(os.path.join(root, "cifar10")):
        pytest.skip("needs cifar10 below $TFDS_DATA_DIR")
    source = open_source("cifar10", "test[:1000]")
    assert source.label_names[3] == "cat"
    batches = TrainBatches(source, [], 250, seed=0)
    assert batches.spec == {"image": ((32, 32, 3), np.uint8), "label": ((), np.int32)}
    labels = np.concatenate([batch["label"] for batch in iterate(batches, 0, 4)])
    expected = [int(source[i]["label"]) for i in range(1000)]
    np.testing.assert_array_equal(np.bincount(labels), np.bincount(expected))
    (step,) = iterate(batches, 2, 3)
    index = batches.order[2 * 250]
    np.testing.assert_array_equal(step["image"][0], np.array(Image.open(io.BytesIO(source[index]["image"]))))

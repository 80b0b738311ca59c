"""Smaller copies of datasets: `launch.py prepare`."""

import hashlib
import io

import numpy as np
import pytest
from pictures import encode, photo
from PIL import Image

import launch
from ssl_jax.data import preparation
from ssl_jax.data.decode import CorruptImage, Picture, raw_image
from ssl_jax.data.preparation import prepare, shrink
from ssl_jax.data.reader import Reader
from ssl_jax.data.sources import open_source
from ssl_jax.errors import UserError

SHAPES = [(90, 131), (131, 90), (33, 47), (64, 64), (201, 77)]


@pytest.fixture
def photos(tmp_path):
    """A folder of two classes in two splits."""
    for split in ("train", "test"):
        for i, shape in enumerate(SHAPES):
            folder = tmp_path / "photos" / split / ("even", "odd")[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{i}.jpg").write_bytes(encode(photo(*shape), quality=95))
    return tmp_path / "photos"


def contents(folder):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def decibel(a, b):
    return 10 * np.log10(255**2 / (1e-9 + np.mean((a.astype(float) - b) ** 2)))


@pytest.mark.parametrize("form", ["jpeg", "raw"])
def test_a_copy_has_the_order_and_labels_and_pillows_resized_pixels(photos, tmp_path, form, monkeypatch):
    monkeypatch.setattr(preparation, "SHARD_BYTES", 1000)  # several shards and chunks
    monkeypatch.setattr(preparation, "CHUNK", 2)
    written = prepare(str(photos), ["train", "test"], tmp_path / "copy", side=40, form=form)
    assert [(each.split, each.examples, each.left_out) for each in written] == [("train", 5, 0), ("test", 5, 0)]
    if form == "raw":
        assert len(list((tmp_path / "copy" / "1.0.0").glob("*train*of-00005"))) == 5
    for each in written:
        before, after = open_source(str(photos), each.split), open_source(str(tmp_path / "copy"), each.split)
        assert after.label_names == before.label_names == ("even", "odd")
        assert len(after) == 5
        assert each.bytes == sum(len(after[i]["image"]) for i in range(5))
        assert each.bytes_before == sum(len(before[i]["image"]) for i in range(5))
        for i in range(5):
            assert after[i]["label"] == before[i]["label"]
            image = Image.open(io.BytesIO(before[i]["image"]))
            short = min(image.size)
            if short > 40:
                image = image.resize([40 * side // short for side in image.size], Image.Resampling.BICUBIC)
            got = Picture(after[i]["image"]).pixels()
            assert got.shape[1::-1] == image.size
            assert decibel(got, np.asarray(image)) > (30 if form == "raw" else 25)


def test_a_copy_is_the_same_at_every_time_and_batches_read_it(photos, tmp_path):
    for name in ("a/copy", "b/copy"):
        prepare(str(photos), ["train"], tmp_path / name, side=40)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    source = open_source(str(tmp_path / "a" / "copy"), "train")
    reader = Reader(source, [("random_resized_crops", {"size": 16})], ("image", "label"))
    first, second = (reader.batch([3, 1, 4], [(0, i) for i in range(3)])[0] for _ in range(2))
    assert first["image"].shape == (3, 2, 16, 16, 3)
    np.testing.assert_array_equal(first["image"], second["image"])
    np.testing.assert_array_equal(first["label"], [source[i]["label"] for i in (3, 1, 4)])


@pytest.mark.parametrize("kind", ["gray", "cmyk", "progressive", "png", "rotated"])
def test_odd_images_are_upright_rgb_in_a_copy(kind):
    pixels, exif = photo(91, 133), Image.Exif()
    exif[0x0112] = 6  # the top is stored at the right
    data = {
        "gray": lambda: encode(pixels[:, :, 0], quality=95),
        "cmyk": lambda: encode(pixels, mode="CMYK", quality=95),
        "progressive": lambda: encode(pixels, quality=95, progressive=True),
        "png": lambda: encode(pixels, "PNG"),
        "rotated": lambda: encode(pixels, quality=95, exif=exif),
    }[kind]()
    whole = Picture(data).pixels()
    size = (40, 58) if kind != "rotated" else (58, 40)
    expected = np.asarray(Image.fromarray(whole).resize(size[::-1], Image.Resampling.BICUBIC))
    raw, jpeg = (Picture(shrink(data, 40, form, 95)).pixels() for form in ("raw", "jpeg"))
    assert raw.shape == jpeg.shape == (*size, 3)
    assert decibel(raw, expected) > 30
    assert decibel(jpeg, raw) > 27
    kept = Picture(shrink(data, 91, "raw", 95)).pixels()  # not larger than asked: not resized
    np.testing.assert_array_equal(kept, whole)
    assert (shrink(data, 91, "jpeg", 95) == data) == (kind != "png")


def test_raw_images_are_those_of_pillow():
    pixels = photo(7, 11)
    data = raw_image(pixels)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), pixels)
    np.testing.assert_array_equal(Picture(data).pixels(), pixels)
    np.testing.assert_array_equal(Picture(data + b"more").pixels(), pixels)
    np.testing.assert_array_equal(Picture(encode(pixels, "PPM")).pixels(), pixels)
    with pytest.raises(CorruptImage, match="truncated"):
        Picture(data[:-1]).pixels()
    with pytest.raises(CorruptImage):
        Picture(b"P6\n0 5\n255\n").pixels()
    with pytest.raises(CorruptImage, match="more than the bound"):
        Picture(data, max_pixels=76)


def test_unreadable_images_are_left_out(photos, tmp_path):
    for path in (photos / "train").rglob("*.jpg"):
        if path.stem in "13":
            path.write_bytes(path.read_bytes()[:400])
    (written,) = prepare(str(photos), ["train"], tmp_path / "copy", side=40)
    assert (written.examples, written.left_out) == (3, 2)
    source = open_source(str(tmp_path / "copy"), "train")
    assert [source[i]["label"] for i in range(3)] == [0, 0, 0]


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        (["train[:2]"], "give names such as train,test"),
        (["train", "train"], "give names such as train,test"),
        (["none"], "none"),
        (["train", "test"], "split 'test' has other classes than 'train'"),
        (["test"], "no image of split 'test' can be read"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(photos, tmp_path, splits, message):
    for path in list((photos / "test").rglob("*.jpg")):  # no classes, and damaged
        path.unlink()
        (photos / "test" / path.name).write_bytes(b"\xff\xd8\xff and nothing else")
    with pytest.raises(UserError, match=message.replace("[", r"\[")) as caught:
        prepare(str(photos), splits, tmp_path / "copy", side=40)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "copy").rglob("*"))


def test_the_verb_prints_sizes_and_never_writes_over_a_copy(photos, tmp_path, capsys):
    flags = ["prepare", f"--data={photos}", "--splits=train,test", f"--output={tmp_path / 'copy'}", "--side=40"]
    assert launch.main(flags) == 0
    printed = capsys.readouterr().out
    assert "train: 5 examples" in printed
    assert f"--config.data.name={tmp_path / 'copy'}" in printed
    before = contents(tmp_path / "copy")
    assert launch.main(flags) == 2
    assert "is there already; remove it, or choose another --output" in capsys.readouterr().err
    assert contents(tmp_path / "copy") == before
    assert launch.main([*flags, "--form=bmp"]) == 2

"""Folders of images and masks: which files belong together, their splits, and what is one line."""

import os
import pathlib

import numpy as np
import pytest
from PIL import Image

from ssl_jax.data.reader import Reader
from ssl_jax.data.sources import MaskFolder, open_source
from ssl_jax.errors import UserError
from ssl_jax.methods.segmentation import wrong_ids

CAMVID = pathlib.Path(os.environ.get("TFDS_DATA_DIR", "/nowhere")) / "camvid"


def save_pair(root, image, mask, size=(20, 30), mask_size=None, value=1):
    for path, pixels in ((image, np.zeros((*size, 3), np.uint8)), (mask, np.full(mask_size or size, value, np.uint8))):
        if path:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(root / path)


LAYOUTS = {
    "plain": ("images/{split}_{i}.jpg", "masks/{split}_{i}.png"),
    "splits above": ("{split}/images/{i}.jpg", "{split}/masks/{i}.png"),
    "splits below": ("images/{split}/{i}.jpg", "annotations/{split}/{i}.png"),
    "folders below": ("images/{split}/town/{i}.png", "labels/{split}/town/{i}.png"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_folders_of_images_and_masks_are_paired_by_stem(tmp_path, layout):
    for split, count in (("training", 6), ("validation", 4)):
        for i in range(count):
            save_pair(tmp_path, *(name.format(split=split, i=i) for name in LAYOUTS[layout]), size=(20 + i, 30), value=i)
    train, test, whole = (open_source(str(tmp_path), split) for split in ("train", "test", "all"))
    assert isinstance(train, MaskFolder) and len(whole) == 10 == len(train) + len(test)
    assert not {*train.paths} & {*test.paths}
    if layout != "plain":
        assert (len(train), len(test)) == (6, 4)
        assert open_source(str(tmp_path), "validation").fingerprint == test.fingerprint != train.fingerprint
    values = Reader(whole, (("resize_crop", dict(resize=16, crop=16)),), ("image", "mask")).read(3, (0, 0))
    assert values["image"].shape == (16, 16, 3) and values["mask"].shape == (16, 16, 1)
    assert whole.called(3) == f"example 3 ({whole.paths[3]})"
    assert set(np.unique(values["mask"])) == {int(pathlib.Path(whole.paths[3]).stem[-1])}


def test_a_folder_without_masks_stays_a_folder_of_classes(tmp_path):
    for name in ("images", "annotations"):
        (tmp_path / name).mkdir()
    save_pair(tmp_path, "images/a/1.png", "images/b/2.png")
    (tmp_path / "annotations" / "instances.json").write_text("{}")
    assert not isinstance(open_source(str(tmp_path), "all"), MaskFolder)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ((("images/a.jpg", "masks/a.png"), ("images/b.jpg", "")), r"'images/b.jpg' has no mask of the same name \(1 of 2"),
        ((("images/a.jpg", "masks/a.png"), ("", "masks/c.png")), r"'masks/c.png' has no image of the same name \(1 of 2"),
        ((("images/a.jpg", "masks/a.png"), ("images/a.png", "")), "'images/a.png' and 'images/a.jpg' have one name"),
        ((("images/a.jpg", "masks/a.jpg"),), "the mask 'masks/a.jpg' is a JPEG, which changes class ids; save masks as PNG"),
    ],
)
def test_a_missing_partner_is_one_line(tmp_path, files, message):
    for image, mask in files:
        save_pair(tmp_path, image, mask)
    with pytest.raises(UserError, match=message) as error:
        open_source(str(tmp_path), "all")
    assert "\n" not in str(error.value)


def test_a_mask_of_another_size_than_its_image_is_one_line(tmp_path):
    save_pair(tmp_path, "images/a.jpg", "masks/a.png")
    save_pair(tmp_path, "images/b.jpg", "masks/b.png", mask_size=(10, 15))
    reader = Reader(open_source(str(tmp_path), "all"), (("resize_crop", dict(resize=8, crop=8)),), ("image", "mask"))
    with pytest.raises(UserError, match=r"'mask' of example 1 \(images/b.jpg\) has \(10, 15\) pixels and 'image' \(20, 30\)"):
        reader.read(1, (0, 0))


def test_resize_brings_images_and_masks_to_any_shape(tmp_path):
    save_pair(tmp_path, "images/a.jpg", "masks/a.png")
    reader = Reader(open_source(str(tmp_path), "all"), (("resize", dict(height=9, width=24)),), ("image", "mask"))
    assert reader.spec == {"image": ((9, 24, 3), np.dtype(np.uint8)), "mask": ((9, 24, 1), np.dtype(np.uint8))}
    assert reader.read(0, (0, 0))["mask"].shape == (9, 24, 1)


# --- real data


@pytest.mark.full
@pytest.mark.skipif(not CAMVID.is_dir(), reason="needs camvid below $TFDS_DATA_DIR")
def test_camvid_has_eleven_classes_with_void_and_the_known_frequencies():
    source = open_source("camvid", "train", "", {"mask": "segmentation_mask"})
    reader = Reader(source, (("resize", dict(height=90, width=120)),), ("image", "mask"))
    masks = np.stack([reader.read(i, (0, 0))["mask"] for i in range(len(source))])
    assert len(source) == 367 and wrong_ids(masks, 11, 11) == ""
    shares = np.bincount(masks.ravel(), minlength=12) / masks.size
    valid = shares[:11] / shares[:11].sum()
    assert 0.03 < shares[11] < 0.05
    np.testing.assert_allclose(valid, [0.168, 0.233, 0.010, 0.317, 0.045, 0.097, 0.012, 0.011, 0.059, 0.006, 0.003], atol=0.015)

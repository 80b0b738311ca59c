"""Folders with annotations in COCO's JSON: where files and pictures are found, what boxes become, and what is refused."""

import json
import logging
import os

import numpy as np
import pytest
from PIL import Image

from ssl_jax.data.catalog import facts
from ssl_jax.data.reader import Reader
from ssl_jax.data.sources import FolderSource, open_source
from ssl_jax.engine.method import Spec
from ssl_jax.errors import UserError

NAMES = {"boxes": "objects/bbox", "box_label": "objects/label", "crowd": "objects/is_crowd", "area": "objects/area"}
CATEGORIES = [dict(id=7, name="dog"), dict(id=3, name="traffic light")]


def content(count=3, **changes):
    """Pictures of 20 x 40 pixels (height x width), called 0.png, ...; the second has no object."""
    annotations = [
        dict(id=11, image_id=100, category_id=7, bbox=[4, 2, 8, 10], area=50.0, iscrowd=0),
        dict(id=12, image_id=100, category_id=3, bbox=[0, 0, 40, 20], iscrowd=1),
        dict(id=13, image_id=102, category_id=3, bbox=[10.5, 5, 29.5, 15.4]),  # 0.4 pixels below the picture
    ]
    images = [dict(id=100 + i, file_name=f"{i}.png", height=20, width=40) for i in range(count)]
    return {"images": images, "annotations": annotations, "categories": CATEGORIES, **changes}


def write(root, path="annotations/instances_train2017.json", pictures="train2017", data=None, count=3):
    for folder in (root / path).parent, root / pictures:
        folder.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(json.dumps(content(count) if data is None else data))
    for i in range(count):
        Image.new("RGB", (40, 20), (i, 0, 0)).save(root / pictures / f"{i}.png")
    return str(root)


def opened(root, split="train", names=NAMES):
    return open_source(str(root), split, names=names)


def test_boxes_labels_crowds_and_areas_of_the_annotations(tmp_path):
    source = opened(write(tmp_path))
    assert len(source) == 3
    assert source.class_names["box_label"] == ("traffic light", "dog")  # in the order of the ids
    first, second, third = (source[i] for i in range(3))
    np.testing.assert_allclose(first["boxes"], [[0.1, 0.1, 0.6, 0.3], [0, 0, 1, 1]], rtol=1e-6)
    assert (first["box_label"].tolist(), first["crowd"].tolist(), first["area"].tolist()) == ([1, 0], [False, True], [50, 800])
    assert second["boxes"].shape == (0, 4) and second["box_label"].shape == (0,)
    np.testing.assert_allclose(third["boxes"], [[0.25, 0.2625, 1, 1]], rtol=1e-6)  # clipped to the picture


def test_a_reader_crops_pads_and_stacks_them(tmp_path):
    inputs = {"image": Spec((10, 10, 3)), "boxes": Spec((4, 4), "float32"), "boxes_valid": Spec((4,), "bool"),
              "box_label": Spec((4,), "int32")}  # fmt: skip
    batch, skipped = Reader(opened(write(tmp_path)), [("resize", dict(height=10, width=30))], inputs).batch([0, 1], [(0, 0)] * 2)
    assert batch["image"].shape == (2, 10, 30, 3) and not skipped
    np.testing.assert_allclose(batch["boxes"][0], [[0.1, 0.1, 0.6, 0.3], [0, 0, 1, 1], [0] * 4, [0] * 4], rtol=1e-6)
    assert batch["boxes_valid"].tolist() == [[True, True, False, False], [False] * 4]
    mirrored, _ = Reader(opened(tmp_path), [("resize", dict(height=10, width=30, flip=1.0))], inputs).batch([0], [(0, 0)])
    np.testing.assert_allclose(mirrored["boxes"][0, 0], [0.1, 0.7, 0.6, 0.9], rtol=1e-6)


@pytest.mark.parametrize(
    ("path", "pictures", "split"),
    [
        ("annotations/instances_train2017.json", "train2017", "train"),
        ("annotations/instances_train2017.json", "train2017", "train2017"),
        ("annotations/instances_train.json", "images", "train"),
        ("annotations/instances_val2017.json", "images/val2017", "validation"),
        ("annotations/instances_val2017.json", "val2017", "test"),
        ("valid/_annotations.coco.json", "valid", "validation"),
        ("_annotations.coco.json", ".", "all"),
        ("annotations.json", "images", "all"),
        ("annotations/instances_default.json", "images", "all"),
    ],
)
def test_places_of_files_and_pictures(tmp_path, path, pictures, split):
    source = opened(write(tmp_path, path, pictures), split)
    assert [source[i]["image"] for i in range(3)] == [(tmp_path / pictures / f"{i}.png").read_bytes() for i in range(3)]


def test_a_single_file_is_divided_by_a_hash_of_the_names(tmp_path):
    data = content(200)
    data["annotations"] = [dict(id=i, image_id=100 + i, category_id=3, bbox=[0, 0, 9, 9]) for i in range(200)]
    root = write(tmp_path, "annotations.json", "images", data, 200)
    train, test, both = (opened(root, split) for split in ("train", "test", "all"))
    assert len(train) + len(test) == len(both) == 200 and 8 < len(test) < 35
    assert train.fingerprint != test.fingerprint != both.fingerprint
    assert {train.called(i).split("(")[1] for i in range(len(train))}.isdisjoint(test.called(i).split("(")[1] for i in range(len(test)))


def test_without_features_of_the_annotations_the_folder_is_one_of_pictures(tmp_path):
    assert isinstance(opened(write(tmp_path), "all", {}), FolderSource)


def test_facts_have_the_number_of_classes_of_any_feature(tmp_path):
    from configs import detection

    data = detection.get_config("folder").data
    data.name = write(tmp_path)
    assert facts(data).class_counts["box_label"] == 2
    scenes = detection.get_config().data
    assert facts(scenes).class_counts["box_label"] == 13


def changed(part, index, **changes):
    data = content()
    data[part][index] = {**data[part][index], **changes}
    return data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (changed("annotations", 0, bbox=[30, 2, 15, 10]), "annotation 11 of image '0.png' has a box from (30, 2) to (45, 12), outside"),
        (changed("annotations", 2, bbox=[-3, 0, 9, 9]), "annotation 13 of image '2.png' has a box from (-3, 0) to (6, 9), outside"),
        (changed("annotations", 2, bbox=[9, 9, -4, 4]), "annotation 13 of image '2.png' has an inverted box, -4 x 4 pixels"),
        (changed("annotations", 0, bbox=[1, 2, 3]), "annotation 11 of image '0.png' has the box [1, 2, 3]; it must be 4 numbers"),
        (changed("annotations", 0, bbox=[float("nan"), 2, 3, 4]), "annotation 11 of image '0.png' has the box [nan, 2, 3, 4]"),
        (changed("annotations", 0, category_id=5), "annotation 11 of image '0.png' has category 5, which 'categories' lack"),
        (changed("images", 0, file_name="x.png"), "image 'x.png' is in none of 'annotations', '.', 'train2017', 'images'"),
        (content(annotations=[]), "split 'train' has no object in 3 images; choose another split"),
        (content(images=[]), "has no images"),
        (content(categories=[]), "has no categories"),
        ({"images": []}, "has no list 'annotations', so it is not in COCO's format"),
        ([], "has no list 'images'"),
        (content(images=[dict(id=1)]), "entry 1 of 'images' has no 'file_name'"),
    ],
)
def test_bad_annotations_are_one_line(tmp_path, data, message):
    with pytest.raises(UserError) as raised:
        opened(write(tmp_path, data=data))
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_a_file_that_is_no_json_and_an_unknown_split_are_one_line(tmp_path):
    write(tmp_path)
    with pytest.raises(UserError, match="has no split 'test' with annotations; it has train2017"):
        opened(tmp_path, "test")
    (tmp_path / "annotations" / "instances_train2017.json").write_text("{")
    with pytest.raises(UserError, match="is no JSON"):
        opened(tmp_path)


def test_a_picture_of_another_size_is_one_line(tmp_path):
    write(tmp_path)
    Image.new("RGB", (20, 40)).save(tmp_path / "train2017" / "1.png")
    with pytest.raises(UserError, match=r"example 1 \(1.png\): the picture has 40 x 20 pixels and the annotations are of 20 x 40"):
        opened(tmp_path)[1]


def test_boxes_without_an_area_are_left_out_with_a_warning(tmp_path, caplog):
    write(tmp_path, data=changed("annotations", 1, bbox=[3, 3, 0, 5]))
    with caplog.at_level(logging.WARNING, "ssl_jax.data"):
        assert len(opened(tmp_path)[0]["boxes"]) == 1
    assert "1 boxes without width or height are left out, such as annotation 12" in caplog.text


def test_selected_features_need_no_picture(tmp_path):
    write(tmp_path)
    (tmp_path / "train2017" / "0.png").rename(tmp_path / "train2017" / "gone.png")
    (tmp_path / "train2017" / "0.png").write_bytes(b"")
    assert set(opened(tmp_path).select(("box_label",))[0]) == {"box_label"}


def test_cells_of_bccd_are_boxes_of_three_classes():
    from configs import detection

    if not os.path.isdir(os.path.join(os.environ.get("TFDS_DATA_DIR", ""), "bccd")):
        pytest.skip("needs bccd below $TFDS_DATA_DIR")
    config = detection.get_config("bccd")
    source = open_source("bccd", "train", names=config.data.features)
    assert source.class_names["box_label"] == ("RBC", "WBC", "Platelets")
    count = config.model.objects
    inputs = {"image": None, "boxes": Spec((count, 4), "float32"), "boxes_valid": Spec((count,), "bool"),
              "box_label": Spec((count,), "int32")}  # fmt: skip
    batch, skipped = Reader(source, config.data.eval_ops, inputs).batch(range(len(source)), [(0, 0)] * len(source))
    assert batch["image"].shape == (205, 240, 320, 3) and not skipped
    own = batch["box_label"][batch["boxes_valid"]]
    assert np.bincount(own).tolist() == [2381, 214, 209]
    sides = (batch["boxes"][..., 2:] - batch["boxes"][..., :2])[batch["boxes_valid"]]
    assert (sides > 0).all()
    assert 45 < np.median(np.sqrt((sides * (240, 320)).prod(-1))) < 57  # the median cell has 102 of 480 x 640 pixels

"""Folders of pictures with a JSON file of annotations in COCO's format, as annotation tools write them.

They are read so if `config.data.features` names a feature of the annotations, as in dict(boxes="objects/bbox"); else `folders` does.
The places where the file may be, for a folder with the split `train`:

    annotations/instances_train2017.json    beside train2017/ or images/ (COCO)
    train/_annotations.coco.json            beside the pictures (Roboflow)
    annotations.json, _annotations.coco.json or annotations/instances_default.json   one file for all: 'train' and 'test' divide
                                            the pictures 90 to 10, 'all' is every picture (CVAT, Label Studio)

Features of an example: image; objects/bbox, float32 [N, 4] as (ymin, xmin, ymax, xmax) in fractions of the image; objects/label, int32
[N], categories in the order of their ids; objects/is_crowd, bool [N]; objects/area, float32 [N] in pixels.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from ssl_jax.data.decode import Picture
from ssl_jax.data.features import Feature, rename_features
from ssl_jax.data.folders import read_picture, split_of
from ssl_jax.data.source import OWN_ERRORS, Source, digest, one_line, printable, unreadable
from ssl_jax.errors import UserError

log = logging.getLogger("ssl_jax.data")

ALL_IN_ONE = ("annotations.json", "_annotations.coco.json", "annotations/instances_default.json", "annotations/instances.json")
TOLERANCE = 1.0  # pixels by which a box may be outside of its image, such as by rounding
FEATURES = {
    "image": Feature((None, None, 3), "uint8", "image"),
    "objects/area": Feature((None,), "float32"),
    "objects/bbox": Feature((None, 4), "float32", "boxes"),
    "objects/is_crowd": Feature((None,), "bool"),
    "objects/label": Feature((None,), "int32"),
}


def annotation_files(root: str) -> dict[str, str]:
    """{name of the split, '' if one file has all: path relative to `root`}; empty for other folders."""
    for name in ALL_IN_ONE:
        if os.path.isfile(os.path.join(root, name)):
            return {"": name}
    found = {}
    for child in _names(root):
        path = f"{child}/_annotations.coco.json"
        if os.path.isfile(os.path.join(root, path)):
            found[child] = path
    for child in _names(os.path.join(root, "annotations")):
        if match := re.fullmatch(r"instances_(.+)\.json", child):
            found[match[1]] = f"annotations/{child}"
    return found


def _names(folder: str) -> list[str]:
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        if error.errno in OWN_ERRORS:
            return []
        raise unreadable(folder, error) from error


class CocoSource(Source):
    """A split of such a folder, in the order of the file. Pictures without an object are kept.

    Raises:
      UserError: no such split; a file that is no JSON of this format; a picture that is not there; a box outside of its image or
        inverted; a split without an object.
    """

    def __init__(self, root: str, split: str, names: Mapping[str, str] = {}, kinds: Mapping[str, str] = {}):
        super().__init__()
        self.root, self.split = os.path.abspath(root), split
        self.name, self.image_shape, self.num_classes, self.label_names = os.path.basename(self.root), None, None, None
        own, path = _choose(self.root, annotation_files(self.root), split)
        content = _read(os.path.join(self.root, path))
        where = f"'{printable(os.path.join(self.root, path))}'"
        if own == "" and split != "all":
            test = [zlib.crc32(str(image["file_name"]).encode()) % 10 == 0 for image in content["images"]]
            content["images"] = [image for image, held in zip(content["images"], test, strict=True) if held == (split == "test")]
        self._images = [(str(each["file_name"]), int(each["height"]), int(each["width"])) for each in content["images"]]
        self._base = _base(self.root, path, own, self._images, where)
        self._objects, left_out = _objects(content, where)
        if not any(len(each["objects/label"]) for each in self._objects):
            raise UserError(f"{where}: split '{split}' has no object in {len(self._images)} images; choose another split")
        if left_out:
            log.warning("%s: %d boxes without width or height are left out, such as annotation %s", where, len(left_out), left_out[0])
        paths, self.features = rename_features(FEATURES, names, kinds, self.name)
        self._paths = paths
        classes = tuple(str(each["name"]) for each in sorted(content["categories"], key=lambda each: each["id"]))
        self.class_names = {name: classes for name, path in paths.items() if path == "objects/label"}
        self.fingerprint = digest([self._images, [each["objects/bbox"].tolist() for each in self._objects]])
        count = sum(len(each["objects/label"]) for each in self._objects)
        log.info("data %s: split '%s', %d images, %d objects, %d classes", where, split, len(self._images), count, len(classes))

    def __len__(self):
        return len(self._images)

    def __getitem__(self, index):
        example = {**self._objects[index]}
        if "image" in (self._paths[name] for name in self.features):
            name, height, width = self._images[index]
            example["image"] = read_picture(os.path.join(self.root, self._base, name))
            picture = Picture(example["image"])
            if (picture.height, picture.width) != (height, width):
                raise UserError(
                    f"data '{self.name}', {self.called(index)}: the picture has {picture.height} x {picture.width} pixels and the "
                    f"annotations are of {height} x {width}; give the pictures that were annotated"
                )
        return {name: example[self._paths[name]] for name in self.features}

    def select(self, features):
        other = self.__class__.__new__(self.__class__)
        other.__dict__.update({**self.__getstate__(), "features": {name: self.features[name] for name in features}})
        return other

    def called(self, index):
        return f"example {index} ({printable(self._images[index][0])})"


def _choose(root: str, files: Mapping[str, str], asked: str) -> tuple[str, str]:
    """(name of the split, path of its file)."""
    where = f"folder '{printable(root)}'"
    if not files:
        raise UserError(
            f"{where} has no annotations (annotations/instances_SPLIT.json or SPLIT/_annotations.coco.json), and config.data.features "
            "asks for boxes; put them there, or give other data"
        )
    if "" in files:
        if asked not in ("all", "train", "test"):
            raise UserError(f"{where} has no split '{asked}'; {files['']} holds all, train, test")
        return "", files[""]
    if asked in files:
        return asked, files[asked]
    wanted = split_of(asked)
    for kind in (wanted, "validation") if wanted == "test" else (wanted,):
        found = [name for name in files if kind is not None and split_of(name) == kind]
        if len(found) == 1:
            return found[0], files[found[0]]
        if found:
            raise UserError(f"{where}: {', '.join(found)} are all a split '{asked}'; give the name of one")
    raise UserError(f"{where} has no split '{asked}' with annotations; it has {printable(', '.join(files))}")


def _read(path: str) -> dict[str, Any]:
    """A file in COCO's format, with the entries that are used checked."""
    try:
        with open(path, "rb") as file:
            content = json.load(file)
    except (ValueError, RecursionError) as error:
        raise UserError(f"'{printable(path)}' is no JSON ({one_line(error)}); export the annotations again") from error
    except OSError as error:
        if error.errno in OWN_ERRORS:
            raise UserError(f"'{printable(path)}' cannot be read: {error.strerror}") from error
        raise unreadable(path, error) from error
    needed = {"images": ("id", "file_name", "height", "width"), "annotations": ("id", "image_id", "category_id", "bbox"),
              "categories": ("id", "name")}  # fmt: skip
    for part, keys in needed.items():
        rows = content.get(part) if isinstance(content, dict) else None
        if not isinstance(rows, list):
            raise UserError(f"'{printable(path)}' has no list '{part}', so it is not in COCO's format; export the annotations as COCO")
        for row in rows:
            missing = [key for key in keys if not isinstance(row, dict) or key not in row]
            if missing:
                about = row.get("id", "without id") if isinstance(row, dict) else "of another type"
                raise UserError(f"'{printable(path)}': entry {about} of '{part}' has no '{missing[0]}'; export the annotations again")
    if not content["images"] or not content["categories"]:
        raise UserError(f"'{printable(path)}' has no {'images' if not content['images'] else 'categories'}; export it again")
    return content


def _base(root: str, path: str, split: str, images: list, where: str) -> str:
    """The folder with the pictures, relative to `root`: one that holds the first of them."""
    if not images:
        raise UserError(f"{where} has too few images to divide; give --config.data.train_split=all and --config.data.test_split=all")
    bases = dict.fromkeys((os.path.dirname(path), "", split, "images", f"images/{split}"))
    for base in bases:
        if os.path.isfile(os.path.join(root, base, images[0][0])):
            return base
    tried = ", ".join(f"'{base or '.'}'" for base in bases)
    raise UserError(f"{where}: image '{printable(images[0][0])}' is in none of {tried}; put the pictures there")


def _objects(content: Mapping[str, Any], where: str) -> tuple[list[dict[str, np.ndarray]], list]:
    """(the features of the objects of each image, ids of annotations without width or height)."""
    rows: dict = {image["id"]: [] for image in content["images"]}
    images = {image["id"]: image for image in content["images"]}
    number = {each: i for i, each in enumerate(sorted(category["id"] for category in content["categories"]))}
    left_out = []
    for annotation in content["annotations"]:
        if annotation["image_id"] not in rows:  # of another split, or of no image
            continue
        image, box = images[annotation["image_id"]], annotation["bbox"]
        about = f"{where}: annotation {annotation['id']} of image '{printable(str(image['file_name']))}'"
        if annotation["category_id"] not in number:
            raise UserError(f"{about} has category {annotation['category_id']}, which 'categories' lack; export the annotations again")
        if not (isinstance(box, list) and len(box) == 4 and all(isinstance(v, int | float) and math.isfinite(v) for v in box)):
            raise UserError(f"{about} has the box {printable(str(box))[:60]}; it must be 4 numbers, x, y, width and height")
        x, y, w, h = box
        if w < 0 or h < 0:
            raise UserError(f"{about} has an inverted box, {w:g} x {h:g} pixels; correct or remove it")
        if min(x, y) < -TOLERANCE or x + w > image["width"] + TOLERANCE or y + h > image["height"] + TOLERANCE:
            raise UserError(
                f"{about} has a box from ({x:g}, {y:g}) to ({x + w:g}, {y + h:g}), outside of the image of {image['width']} x "
                f"{image['height']} pixels; correct or remove it"
            )
        if w == 0 or h == 0:
            left_out.append(annotation["id"])
            continue
        sides = np.array([y / image["height"], x / image["width"], (y + h) / image["height"], (x + w) / image["width"]])
        area, crowd = annotation.get("area", w * h), bool(annotation.get("iscrowd", 0))
        rows[image["id"]].append((np.clip(sides, 0, 1), number[annotation["category_id"]], crowd, area))
    found = []
    for own in rows.values():
        boxes, labels, crowds, areas = zip(*own, strict=True) if own else ((), (), (), ())
        found.append({
            "objects/bbox": np.array(boxes, np.float32).reshape(-1, 4),
            "objects/label": np.array(labels, np.int32),
            "objects/is_crowd": np.array(crowds, bool),
            "objects/area": np.array(areas, np.float32),
        })  # fmt: skip
    return found, left_out

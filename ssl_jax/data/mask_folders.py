"""A folder of images with a mask for each: FOLDER/images/a.jpg and FOLDER/masks/a.png, with splits above or below these two."""

from __future__ import annotations

import logging
import os
import zlib
from collections.abc import Mapping
from functools import cached_property
from typing import NamedTuple

import numpy as np

from ssl_jax.data.features import Feature, rename_features
from ssl_jax.data.folders import REMEDY, are_splits, in_test, read_picture, split_of
from ssl_jax.data.scan import Tree
from ssl_jax.data.source import Source, digest, printable
from ssl_jax.errors import UserError

log = logging.getLogger("ssl_jax.data")

IMAGES = ("images", "image", "imgs", "img", "jpegimages")
MASKS = ("masks", "mask", "annotations", "annotation", "labels", "segmentations", "segmentationclass")
LOSSY = (".jpg", ".jpeg", ".jp2", ".j2k")


class Pairs(NamedTuple):
    """Pictures by key, the path without the folder of its side and without extension: 'train/a' of 'train/images/a.jpg'."""

    images: dict[str, str]  # {key: path relative to the root}
    masks: dict[str, str]


def find_pairs(tree: Tree) -> Pairs | None:
    """The pictures of a folder with a folder of images and one of masks, at its top or in folders of its top; else None."""
    sides = {tree.folders[i]: _side(tree.folders[i]) for i in np.unique(tree.folder_of)}  # of folders with pictures
    image_folders, mask_folders = ({rest for kind, rest in filter(None, sides.values()) if kind == side} for side in ("image", "mask"))
    return _pairs(tree, sides) if image_folders & mask_folders else None


def _side(folder: str) -> tuple[str, str] | None:
    """('image' or 'mask', the folder without the part that says so); None if neither of its first two parts does."""
    parts = folder.split("/")
    for place, part in enumerate(parts[:2]):
        for side, words in (("image", IMAGES), ("mask", MASKS)):
            if part.lower() in words:
                return side, "/".join(parts[:place] + parts[place + 1 :])
    return None


def _pairs(tree: Tree, sides: Mapping[str, tuple[str, str] | None]) -> Pairs:
    found: dict[str, dict[str, str]] = {"image": {}, "mask": {}}
    for path, number in zip(tree.paths, tree.folder_of.tolist(), strict=True):
        if side := sides[tree.folders[number]]:
            kind, folder = side
            stem = os.path.splitext(os.path.basename(path))[0]
            key = f"{folder}/{stem}" if folder else stem
            if key in found[kind]:
                raise UserError(f"'{printable(path)}' and '{printable(found[kind][key])}' have one name; keep one of them")
            found[kind][key] = path
    return Pairs(found["image"], found["mask"])


class MaskFolder(Source):
    """Images of any size with masks of the same size and stem, 8-bit values of a PNG (or its palette indices), in sorted order.

    Splits are the folders above or below the folders of images and masks, if their names are all of splits. Otherwise 'train' and
    'test' divide the images 90 to 10 by a hash of their path. 'all' is every image.

    Raises:
        UserError: an image without a mask or a mask without an image, a mask in a lossy format, or no such split.
    """

    def __init__(self, root: str, split: str, pairs: Pairs, names: Mapping[str, str] = {}, kinds: Mapping[str, str] = {}):
        super().__init__()
        self.root, self.split = os.path.abspath(root), split
        self.name, self.image_shape, self.num_classes, self.label_names = os.path.basename(self.root), None, None, None
        where = f"folder '{printable(self.root)}'"
        for one, other, kind in ((pairs.images, pairs.masks, "mask"), (pairs.masks, pairs.images, "image")):
            alone = sorted(one.keys() - other.keys())
            if alone:
                raise UserError(
                    f"{where}: '{printable(one[alone[0]])}' has no {kind} of the same name ({len(alone)} of {len(one)} have none); add "
                    "them, or remove these"
                )
        lossy = [path for path in pairs.masks.values() if path.lower().endswith(LOSSY)]
        if lossy:
            raise UserError(f"{where}: the mask '{printable(lossy[0])}' is a JPEG, which changes class ids; save masks as PNG")
        keys = self._choose(sorted(pairs.images), where)
        self.paths, self.masks = [pairs.images[key] for key in keys], [pairs.masks[key] for key in keys]
        own = {"image": Feature((None, None, 3), "uint8", "image"), "mask": Feature((None, None, 1), "uint8", "mask")}
        self._own, self.features = rename_features(own, names, kinds, self.name)

    def _choose(self, keys: list[str], where: str) -> list[str]:
        """The keys of the asked split; one line of the log says what was understood."""
        tops = {key: key.split("/")[0] for key in keys}
        folders = sorted({*tops.values()})
        if not all("/" in key for key in keys) or not are_splits(folders):
            log.info("data '%s': %d images with masks; no split folders, so 'test' is a tenth", printable(self.root), len(keys))
            if self.split not in ("all", "train", "test"):
                raise UserError(f"{where} has no split '{self.split}'; it has all, train, test")
            hashes = np.array([zlib.crc32(key.encode("utf-8", "surrogateescape")) for key in keys], np.uint32)
            test = in_test(hashes, np.ones(len(keys), bool))
            return [key for key, own in zip(keys, test, strict=True) if self.split == "all" or own == (self.split == "test")]
        counts = ", ".join(f"{folder} {sum(top == folder for top in tops.values())}" for folder in folders)
        log.info("data '%s': images with masks, splits %s", printable(self.root), printable(counts))
        if self.split == "all":
            return keys
        wanted = [self.split] if self.split in folders else [f for f in folders if split_of(f) == (split_of(self.split) or "")]
        if not wanted and split_of(self.split) == "test":
            wanted = [folder for folder in folders if split_of(folder) == "validation"]
        if len(wanted) != 1:
            there = printable(", ".join(wanted or folders))
            problem = f"has several splits '{self.split}': {there}" if wanted else f"has no split '{self.split}'; it has all, {there}"
            raise UserError(f"{where} {problem}: {REMEDY}")
        return [key for key in keys if tops[key] == wanted[0]]

    @cached_property
    def fingerprint(self) -> str:
        sizes = [os.path.getsize(os.path.join(self.root, path)) for path in (*self.paths, *self.masks)]
        return digest([self.paths, self.masks, sizes])

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        found = {"image": self.paths[index], "mask": self.masks[index]}
        return {name: read_picture(os.path.join(self.root, found[self._own[name]])) for name in self.features}

    def select(self, features):
        other = self.__class__.__new__(self.__class__)
        other.__dict__.update({**self.__getstate__(), "features": {name: self.features[name] for name in features}})
        return other

    def called(self, index):
        return f"example {index} ({printable(self.paths[index])})"

"""A folder of images: which of its subfolders are splits, and which are classes."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from typing import NamedTuple

import numpy as np

from ssl_jax.data.decode import MAX_FILE_BYTES, CorruptImage
from ssl_jax.data.features import Feature, rename_features
from ssl_jax.data.scan import NO_PERMISSION, UNFOLLOWED, Tree, scan
from ssl_jax.data.source import OWN_ERRORS, Source, digest, one_line, printable, unreadable
from ssl_jax.errors import UserError

log = logging.getLogger("ssl_jax.data")

# {split: words for it}. A folder is a split if these words, and words that say nothing, are its whole name.
SPLIT_WORDS = {
    "train": ("train", "training", "trn"),
    "validation": ("val", "valid", "validation", "validate", "dev", "devel", "development", "eval", "evaluation", "holdout"),
    "test": ("test", "tests", "testing", "tst"),
    "unlabeled": ("unlabeled", "unlabelled"),
    "labeled": ("labeled", "labelled"),
    "extra": ("extra",),
}
_FILLERS = "set|sets|data|dataset|split|folder|part|images?|imgs?|pictures?|pics?|photos?|samples?|seg"
_SPLITS = {word: split for split, words in SPLIT_WORDS.items() for word in words}
REMEDY = "--config.data.train_split=NAME and --config.data.test_split=NAME choose others"
FOLLOW = "--config.data.follow_links=True follows them"


def split_of(folder: str) -> str | None:
    """The split that a folder of this name holds: 'train' for Train, training_set, train2017, seg_train; None for other names."""
    words = [word for word in re.split(r"[^a-z]+", folder.lower()) if word and not re.fullmatch(_FILLERS, word)]
    if len(words) != 1:
        return None
    return _SPLITS.get(words[0]) or _SPLITS.get(re.sub(f"({_FILLERS})$", "", words[0]))


class Part(NamedTuple):
    """A split of the tree, or the whole tree."""

    folder: str  # its folder, relative; '' if the tree is not divided
    split: str | None
    classes: dict[str, str | None]  # {relative folder with pictures: class}


class FolderSource(Source):
    """A folder of images of any size and mode, read recursively in sorted order.

    Splits are the subfolders whose names are all of splits (`split_of`), or several of them beside other folders; 'test' also
    finds a validation split. A split may be named by the name of its folder, too, and so may any subfolder. Otherwise 'train'
    and 'test' divide the images 90 to 10 by a hash of their path, so that added images do not change the split of others.
    'all' is every image. Labels are the names of the subfolders, within the split's folder. Few images beside class folders
    are left out; many of them make the split unlabeled. What was understood is one line of the log.

    Hidden files are ignored. Without `follow_links` a link is followed only to a file inside the folder.

    Attributes:
      rejected: {path: reason} of files that are not images by their names or first bytes; logged once.
    """

    def __init__(
        self, root: str, split: str, names: Mapping[str, str] = {}, kinds: Mapping[str, str] = {}, follow_links: bool = False,
        tree: Tree | None = None,
    ):
        super().__init__()
        self.root, self.split = os.path.abspath(root), split
        self.name, self.image_shape = os.path.basename(self.root), None
        tree = tree or scan(self.root, follow_links)
        self.rejected = tree.rejected
        self._say_rejected()
        if not tree.paths:
            raise UserError(f"folder '{self.root}' has no image{self._why_none()}")
        parts = _divide(tree, split)
        chosen = self._choose(parts)
        counts = np.bincount(tree.folder_of, minlength=len(tree.folders))
        per_folder = dict(zip(tree.folders, counts.tolist(), strict=True))
        labeled = [part for part in parts if _is_labeled(part, per_folder)]
        self.label_names = tuple(sorted({name for part in labeled for name in part.classes.values() if name is not None})) or None
        understood = _describe(self.root, tree, parts, per_folder, self.label_names)
        log.info("%s", understood)
        classes = {folder: name for part in chosen for folder, name in part.classes.items()}
        if not all(part in labeled for part in chosen) and not _is_labeled(Part("", None, classes), per_folder):
            self.label_names = None
        self._say_strays(classes, per_folder)
        self.num_classes = None if self.label_names is None else len(self.label_names)

        number = {name: i for i, name in enumerate(self.label_names or ())}
        label_of = np.array([number.get(classes.get(folder), -1) for folder in tree.folders], np.int32)[tree.folder_of]
        taken = np.array([folder in classes for folder in tree.folders])[tree.folder_of]
        if self.label_names is not None:
            taken &= label_of >= 0
        if parts[0].split is None and split != "all":
            taken &= in_test(tree.hashes, taken) == (split == "test")
        indices = np.flatnonzero(taken)
        self.paths = [tree.paths[i] for i in indices.tolist()]
        if not self.paths:
            remedy = "--config.data.train_split=all and --config.data.test_split=all read every image"
            raise UserError(f"folder '{self.root}': split '{split}' has no image; {remedy}")
        self._sizes = tree.sizes[indices]
        own, self.labels = {"image": Feature((None, None, 3), "uint8", "image")}, None
        if self.label_names is not None:
            own["label"], self.labels = Feature((), "int32"), label_of[indices]
        self._own, self.features = rename_features(own, names, kinds, self.name)

    @cached_property
    def fingerprint(self) -> str:
        return digest([self.paths, self._sizes.tolist()])

    def _choose(self, parts: list[Part]) -> list[Part]:
        """The parts of the asked split."""
        asked, where = self.split, f"folder '{printable(self.root)}'"
        if parts[0].split is None:
            if asked not in ("all", "train", "test"):
                raise UserError(f"{where} has no split '{asked}'; it has all, train, test")
            return parts
        if asked == "all":
            return parts
        names = [os.path.basename(part.folder) for part in parts]
        if asked in names:
            return [parts[names.index(asked)]]
        wanted = split_of(asked)
        found = [part for part in parts if wanted is not None and part.split == wanted]
        if not found and wanted == "test":
            found = [part for part in parts if part.split == "validation"]
        listed = printable(", ".join(names))
        if not found:
            raise UserError(f"{where} has no split '{asked}'; it has all, {listed}: {REMEDY}")
        if len(found) > 1:
            several = printable(", ".join(os.path.basename(part.folder) for part in found))
            raise UserError(f"{where}: {several} are all a split '{asked}'; {REMEDY}")
        return found

    def _say_rejected(self) -> None:
        if not self.rejected:
            return
        reasons = ", ".join(f"{count} {reason}" for reason, count in Counter(self.rejected.values()).most_common())
        some = printable(", ".join(sorted(self.rejected, key=lambda path: (self.rejected[path] != NO_PERMISSION, path))[:5]))
        remedy = f"; {FOLLOW}" if set(self.rejected.values()) & {*UNFOLLOWED} else ""
        log.warning("%s: %d files left out (%s): %s%s", self.root, len(self.rejected), reasons, some, remedy)

    def _why_none(self) -> str:
        reasons = Counter(self.rejected.values())
        unfollowed = {reason: count for reason, count in reasons.items() if reason in UNFOLLOWED}
        if unfollowed:
            listed = ", ".join(f"{count} {reason}" for reason, count in unfollowed.items())
            return f" but links, which are not followed ({listed}); {FOLLOW}"
        if NO_PERMISSION in reasons:
            return f" that can be read ({reasons[NO_PERMISSION]} folders without permission); give permission to list them"
        why = f" ({len(self.rejected)} files are not images)" if self.rejected else ""
        return f"{why}; give one with JPEG, PNG, GIF, BMP, WebP, TIFF, AVIF or JPEG 2000 files"

    def _say_strays(self, classes: Mapping[str, str | None], per_folder: Mapping[str, int]) -> None:
        strays = sum(per_folder[folder] for folder, name in classes.items() if name is None)
        if strays and self.label_names is not None:
            log.warning("%s: %d images beside the class folders are left out, since they have no class", self.root, strays)
        elif strays and strays < sum(per_folder[folder] for folder in classes):
            text = "%s: %d images are beside the class folders, so no image has a class; move them to use the classes"
            log.warning(text, self.root, strays)

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        data = read_picture(os.path.join(self.root, self.paths[index]))
        return {name: data if self._own[name] == "image" else self.labels[index] for name in self.features}

    def select(self, features):
        other = self.__class__.__new__(self.__class__)
        other.__dict__.update({**self.__getstate__(), "features": {name: self.features[name] for name in features}})
        return other

    def key(self, index):
        return self.paths[index]

    def called(self, index):
        return f"example {index} ({printable(self.paths[index])})"


def read_picture(path: str) -> bytes:
    """The encoded picture. Raises CorruptImage for a file that cannot be read, MachineFault if its disk fails."""
    try:
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_FILE_BYTES:
                raise CorruptImage(f"file of {size >> 20} MiB, larger than the bound of {MAX_FILE_BYTES >> 20}")
            return file.readall()
    except OSError as error:
        if error.errno not in OWN_ERRORS or _is_gone(os.path.dirname(path)):
            raise unreadable(path, error) from error
        raise CorruptImage(f"file cannot be read: {one_line(error)}") from error


def _is_gone(folder: str) -> bool:
    """Whether a folder that had pictures is not there or empty, such as where a disk is not mounted."""
    try:
        with os.scandir(folder) as entries:
            return next(entries, None) is None
    except OSError:
        return True


def _divide(tree: Tree, asked: str) -> list[Part]:
    """The splits, or one part without a split. `asked` makes splits of the folders beside one of that name."""
    used = [tree.folders[i] for i in np.unique(tree.folder_of)]
    base, top = "", _children(used, "")
    if len(top) == 1 and "" not in used and split_of(top[0]) is None and are_splits(_children(used, top[0])):
        base = top[0]  # a folder around the splits
        top = _children(used, base)
    divided = are_splits(top)
    if not divided and not (asked in top and len(top) > 1 and asked not in ("all", "train", "test")):
        return [Part("", None, {folder: folder.split("/")[0] or None for folder in used})]
    parts = []
    for name in top:
        split = split_of(name) if divided else name
        folder = f"{base}/{name}" if base else name
        below = [each for each in used if each == folder or each.startswith(folder + "/")]
        inner = _children(below, folder)
        start = folder
        if split is not None and folder not in below and len(inner) == 1 and split_of(inner[0]) == split:
            start = f"{folder}/{inner[0]}"  # training_set/training_set/cat
        classes = {each: each[len(start) + 1 :].split("/")[0] or None for each in below}
        if split is not None:
            parts.append(Part(folder, split, dict.fromkeys(classes) if split == "unlabeled" else classes))
    order = [*SPLIT_WORDS]
    return sorted(parts, key=lambda part: (order.index(part.split) if part.split in order else -1, part.folder))


def are_splits(names: list[str]) -> bool:
    """'train' may also be a class. It is a split if no other folder, or another split's folder, is beside it."""
    found = [split_of(name) for name in names]
    return bool(found) and (None not in found or len({*found} - {None}) > 1)


def _children(folders: list[str], base: str) -> list[str]:
    start = base + "/" if base else ""
    return sorted({each[len(start) :].split("/")[0] for each in folders if each.startswith(start) and each != base})


def _is_labeled(part: Part, per_folder: Mapping[str, int]) -> bool:
    """Whether the images have classes. A few strays beside at least two classes are left out: fewer than a class has."""
    labeled = sum(per_folder[folder] for folder, name in part.classes.items() if name is not None)
    strays = sum(per_folder[folder] for folder, name in part.classes.items() if name is None)
    classes = len({*part.classes.values()} - {None})
    return labeled > 0 and (strays == 0 or (classes > 1 and strays * classes < labeled))


def in_test(hashes: np.ndarray, taken: np.ndarray) -> np.ndarray:
    """bool [N]: which of the `taken` images are the test split, of a folder without splits."""
    test = taken & (hashes % 10 == 0)
    if test.sum() in (0, taken.sum()):  # very few images: one of them is the test split
        chosen = np.flatnonzero(taken)
        test[:] = False
        test[chosen[np.argmin(hashes[chosen])]] = True
    return test


def _describe(root, tree: Tree, parts: list[Part], per_folder: Mapping[str, int], names: tuple[str, ...] | None) -> str:
    """The line of the log: splits, classes, counts."""
    listed = ""
    if names is not None:
        listed = f"{len(names)} classes: {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}"
    counts = [
        sum(per_folder[folder] for folder, name in part.classes.items() if name is not None or not _is_labeled(part, per_folder))
        for part in parts
    ]
    total = sum(counts)
    if parts[0].split is None:
        same = _same_below(tree)
        hint = f"; {same} have the same folders inside: if they are splits, {REMEDY}" if same else ""
        text = f"{total} images, {listed or 'no classes'}; no split folders, so 'test' is a tenth of the images{hint}"
        return printable(f"data '{root}': {text}")
    said = []
    for part, count in zip(parts, counts, strict=True):
        folder = part.folder if part.folder != part.split else ""
        notes = [folder, "" if names is None or _is_labeled(part, per_folder) else "no classes"]
        note = ", ".join(filter(None, notes))
        said.append(f"{part.split} {count}" + (f" ({note})" if note else ""))
    outside = len(tree.paths) - sum(per_folder[folder] for part in parts for folder in part.classes)
    left = f"; {outside} images outside of these folders are left out" if outside else ""
    return printable(f"data '{root}': splits {', '.join(said)}; {listed or 'no classes'}{left}")


def _same_below(tree: Tree) -> str:
    """'A and B' if these are the folders, and all have the same two or more folders inside."""
    inner: dict[str, set[str]] = {}
    for i in np.unique(tree.folder_of):
        top, _, below = tree.folders[i].partition("/")
        inner.setdefault(top, set()).add(below.split("/")[0])
    kinds = {frozenset(each) for each in inner.values()}
    return printable(" and ".join(list(inner)[:4])) if len(inner) > 1 and len(kinds) == 1 and len(kinds.pop()) > 1 else ""

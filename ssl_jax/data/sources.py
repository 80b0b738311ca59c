"""Sources of images: the embedded scenes, any prepared TFDS dataset, or a folder of images.

A source has random access and returns *encoded* images, so that the reader decides how much to decode. It can be pickled
(worker processes reopen their files). It never imports TensorFlow, because it reads TFDS through ArrayRecord.
"""

from __future__ import annotations

import abc
import hashlib
import json
import logging
import os
import re
import zlib
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ssl_jax.data.decode import MAGIC_BYTES, CorruptImage, sniff
from ssl_jax.data.features import Feature, from_tfds, rename_features
from ssl_jax.errors import UserError

log = logging.getLogger("ssl_jax.data")

EMBEDDED = "scenes"
SPLIT_FOLDERS = ("train", "val", "validation", "test")
_VERSION = re.compile(r"\d+\.\d+\.\d+$")


class Source(abc.ABC):
    """Random access to examples: `len(source)`, `source[i] -> {'image': encoded bytes, 'label': int, ...}`.

    Attributes:
      name, split: as given to `open_source`.
      features: {name: feature} of `source[i]`, see `ssl_jax.data.features`; nested ones by path, 'objects/bbox'.
      num_classes, label_names: of the feature 'label'; None without labels.
      image_shape: (H, W, 3) of decoded images if the dataset declares one shape for all, else None.
      fingerprint: 16 hex digits over files, sizes and split; equal on every machine with the same data.
      caches: decoded columns of small images, filled by the reader; not pickled.
    """

    name: str
    split: str
    features: dict[str, Feature]
    num_classes: int | None
    label_names: tuple[str, ...] | None
    image_shape: tuple[int, int, int] | None
    fingerprint: str

    def __init__(self):
        self.caches = {}

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def __getitem__(self, index: int) -> dict:
        """Raises CorruptImage if the record cannot be read."""

    @abc.abstractmethod
    def select(self, features) -> Source:
        """The same source with only these features; others are not parsed."""

    def __getstate__(self):
        return {**self.__dict__, "caches": {}}


def open_source(
    name: str, split: str, data_dir: str = "", names: Mapping[str, str] = {}, kinds: Mapping[str, str] = {}
) -> Source:
    """Open a split of a dataset.

    Args:
      name: 'scenes' (embedded, prepared on first use; 'scenes/tiny' for tests), a TFDS name ('cifar10', 'ds/config',
        'ds:1.2.0') that is prepared below `data_dir`, the path of a prepared TFDS directory, or the path of a folder of
        images.
      split: TFDS syntax ('train', 'train[:90%]', 'train+test') for TFDS; 'all', 'train' or 'test' for folders.
      data_dir: TFDS data directory; '' is $TFDS_DATA_DIR, else TFDS's own default (for 'scenes': a cache directory).
      names: {name in the batch: feature of the dataset}; other features keep their own names.
      kinds: {name in the batch: kind}, overriding the type of the feature; see `ssl_jax.data.features`.

    Raises:
      UserError: missing data, feature, split or image, or an interrupted preparation.
    """
    if name.partition("/")[0] == EMBEDDED:
        from ssl_jax.data import scenes  # imports a renderer that nothing else needs

        return TfdsSource(scenes.prepare(data_dir, name.partition("/")[2] or "full").data_dir, split, name, names, kinds)
    data_dir = os.path.expanduser(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")
    path_like = name.startswith(("/", ".", "~")) or "://" in name
    directory = None if path_like else _find_prepared(data_dir, name)
    if directory is None:
        directory = _prepared_directory(os.path.expanduser(name))
    if directory is not None:
        return TfdsSource(directory, split, name, names, kinds)
    if os.path.isdir(os.path.expanduser(name)):
        return FolderSource(os.path.expanduser(name), split, names, kinds)
    if path_like:
        raise UserError(f"data '{name}': no such folder; give a folder of images or a prepared TFDS directory")
    raise UserError(
        f"data '{name}' is not prepared in data_dir '{data_dir}' (there: {_listing(data_dir)}); prepare it once where "
        f"TensorFlow is installed: tfds build {name} --data_dir {data_dir} --file_format array_record, "
        f"or give data_dir, or name='{EMBEDDED}'"
    )


# ---------------------------------------------------------------------------------------------------- TFDS


def _epath(path):
    from etils import epath  # comes with TFDS; reads gs:// too

    return epath.Path(path)


def _children(path) -> list[str]:
    path = _epath(path)
    return sorted(child.name for child in path.iterdir()) if path.is_dir() else []


def _listing(path) -> str:
    names = [name for name in _children(path) if not name.startswith(".") and name != "downloads"]
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "") if names else "nothing"


def _prepared_directory(path):
    """The directory with dataset_info.json: `path` itself or its newest version, or None."""
    children = _children(path)
    if "dataset_info.json" in children:
        return _epath(path)
    versions = [child for child in children if _VERSION.match(child)]
    versions = [version for version in versions if "dataset_info.json" in _children(_epath(path) / version)]
    if versions:
        return _epath(path) / max(versions, key=lambda version: tuple(map(int, version.split("."))))
    unfinished = [c for c in children if ".incomplete" in c or ".array_record-" in c or _VERSION.match(c)]
    if unfinished:
        raise UserError(
            f"'{path}' was not prepared to the end ('{unfinished[0]}', no dataset_info.json); remove it and prepare it again"
        )
    return None


def _find_prepared(data_dir, name):
    base, _, version = name.partition(":")
    if version:
        directory = _epath(data_dir) / base / version
        if "dataset_info.json" not in _children(directory):
            raise UserError(f"data '{name}': no such version in data_dir '{data_dir}' (there: {_listing(directory.parent)})")
        return directory
    directory = _prepared_directory(_epath(data_dir) / base)
    if directory is None and "/" not in base:
        root = _epath(data_dir) / base
        configs = [child for child in _children(root) if _prepared_directory(root / child)]
        if len(configs) > 1:
            names = ", ".join(f"{base}/{config}" for config in configs)
            raise UserError(f"data '{name}' has several configs; choose one: {names}")
        directory = _prepared_directory(root / configs[0]) if configs else None
    return directory


class TfdsSource(Source):
    """A split of a prepared TFDS directory in ArrayRecord.

    Images and masks are encoded bytes; lists of images, masks that are not uint8, and other features are as TFDS decodes them.
    """

    def __init__(
        self, directory, split: str, name: str = "", names: Mapping[str, str] = {}, kinds: Mapping[str, str] = {}
    ):
        super().__init__()
        self.directory, self.split, self.name = os.fspath(directory), split, name or os.fspath(directory)
        self._keys = None
        builder = self._open()
        own = from_tfds(builder.info.features)
        by_path = {"/".join(path): path for path in own}
        paths, features = rename_features({"/".join(path): each for path, each in own.items()}, names, kinds, self.name)
        self.features = features  # sorted, since the order in TFDS differs between processes
        self._paths = {name: by_path[path] for name, path in paths.items()}
        shape = features["image"].shape
        self.image_shape = None if None in shape else shape
        label = _at(builder.info.features, self._paths["label"]) if "label" in features else None
        self.num_classes = getattr(label, "num_classes", None)
        self.label_names = tuple(label.names) if self.num_classes is not None else None
        files = [(i.basename(), i.skip, i.take, i.examples_in_shard) for i in self._instructions]
        self.fingerprint = _digest([builder.info.name, str(builder.info.version), builder.info.dataset_size, files])

    def _open(self):
        """Open the files; raises UserError for setup problems. Called again in every worker process."""
        import tensorflow_datasets as tfds

        try:
            builder = tfds.builder_from_directory(self.directory)
        except (ValueError, OSError, AttributeError, KeyError) as error:
            raise UserError(
                f"'{self.directory}' is not a readable TFDS dataset ({_one_line(error)}); prepare it again"
            ) from error
        splits = builder.info.splits
        try:
            self._instructions = splits[self.split].file_instructions
        except (ValueError, KeyError) as error:
            raise UserError(
                f"data '{self.name}' has no split '{self.split}'; it has {', '.join(sorted(splits))}"
            ) from error
        for instruction in self._instructions:
            if not _epath(instruction.filename).exists():
                raise UserError(
                    f"data '{self.name}': shard '{instruction.filename}' is missing; prepare the data again"
                )
        if not self._instructions:
            raise UserError(f"data '{self.name}': split '{self.split}' is empty; it has {', '.join(sorted(splits))}")
        try:
            self._records = builder.as_data_source(self.split).data_source
            for index in (0, len(self._records) - 1):  # a truncated shard fails on every record
                self._records[index]
        except NotImplementedError as error:  # TFDS has random access to ArrayRecord only
            raise UserError(
                f"data '{self.name}' in '{self.directory}' is not stored as array_record; prepare it again with "
                "--file_format array_record"
            ) from error
        except (RuntimeError, ValueError, OSError) as error:
            raise UserError(f"data '{self.name}': a shard is damaged ({_one_line(error)}); prepare it again") from error
        available = builder.info.features
        chosen = {key: available[key] for key in self._keys or available}
        self._features = tfds.features.FeaturesDict(chosen)
        images = {key: feature for key, feature in chosen.items() if isinstance(feature, tfds.features.Image)}
        encoded = [key for key, feature in images.items() if np.dtype(feature.np_dtype) == np.uint8]
        self._decoders = {key: tfds.decode.SkipDecoding() for key in encoded}
        return builder

    def __len__(self):
        return len(self._records)

    def __getitem__(self, index):
        try:
            record = self._records[index]
            example = self._features.deserialize_example_np(record, decoders=self._decoders)
        except (RuntimeError, ValueError, KeyError, OSError) as error:
            raise CorruptImage(f"record cannot be read: {_one_line(error)}") from error
        return {name: _at(example, self._paths[name]) for name in self.features}

    def select(self, features):
        other = self.__class__.__new__(self.__class__)
        keys = tuple(dict.fromkeys(self._paths[name][0] for name in features))
        other.__setstate__({**self.__getstate__(), "features": {n: self.features[n] for n in features}, "_keys": keys})
        return other

    def __getstate__(self):
        opened = ("_instructions", "_records", "_features", "_decoders")
        return {key: value for key, value in super().__getstate__().items() if key not in opened}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._open()


def _at(tree, path):
    for key in path:
        tree = tree[key]
    return tree


# ---------------------------------------------------------------------------------------------------- folders


class FolderSource(Source):
    """A folder of images of any size and mode, read recursively in sorted order.

    Labels are the names of the subfolders (within the split's folder). Images beside subfolders make the folder unlabeled.
    Splits are the subfolders train, val, validation and test if there is a train; 'test' also finds val or validation.
    Otherwise 'train' and 'test' divide the images 90 to 10 by a hash of their path, so that added images do not change the
    split of others. 'all' is every image. Hidden files are ignored. A link is followed only to a file inside the folder.

    Attributes:
      rejected: {path: reason} of files that are not images by their first bytes; logged once, when the folder is opened.
    """

    def __init__(self, root: str, split: str, names: Mapping[str, str] = {}, kinds: Mapping[str, str] = {}):
        super().__init__()
        self.root, self.split = os.path.abspath(root), split
        self.name, self.image_shape = os.path.basename(self.root), None
        paths, self.rejected = _scan(self.root)
        if self.rejected:
            reasons = ", ".join(f"{count} {reason}" for reason, count in Counter(self.rejected.values()).most_common())
            some = ", ".join(sorted(self.rejected)[:5])
            log.warning("%s: %d files left out (%s): %s", self.root, len(self.rejected), reasons, some)
        if not paths:
            why = f" ({len(self.rejected)} files are not images)" if self.rejected else ""
            raise UserError(f"folder '{self.root}' has no image{why}; give one with JPEG, PNG, GIF, BMP, WebP or TIFF files")
        top = {path.split("/", 1)[0] for path in paths if "/" in path}
        # 'train' may also be a class. It is a split if no other folder, or another split's folder, is beside it.
        divided = "train" in top and (top <= {*SPLIT_FOLDERS} or len(top & {*SPLIT_FOLDERS}) > 1)
        depth = 1 if divided else 0  # of the class folder
        if divided:
            kept = [path for path in paths if path.split("/", 1)[0] in SPLIT_FOLDERS and "/" in path]
            if len(kept) < len(paths):
                log.warning("%s: %d images outside of %s left out", self.root, len(paths) - len(kept), ", ".join(SPLIT_FOLDERS))
            paths = kept
        self.paths = self._paths_of_split(paths, top, divided)
        if not self.paths:
            raise UserError(f"folder '{self.root}': split '{split}' has no image; use split 'all'")
        classes = [path.split("/")[depth] if path.count("/") > depth else None for path in paths]
        self.label_names = None if None in classes else tuple(sorted(set(classes)))
        self.num_classes = None if self.label_names is None else len(self.label_names)
        own, self.labels = {"image": Feature((None, None, 3), "uint8", "image")}, None
        if self.label_names is not None:
            own["label"] = Feature((), "int32")
            number = {label: i for i, label in enumerate(self.label_names)}
            self.labels = np.array([number[path.split("/")[depth]] for path in self.paths], np.int32)
        self._own, self.features = rename_features(own, names, kinds, self.name)
        sizes = [os.path.getsize(os.path.join(self.root, path)) for path in self.paths]
        self.fingerprint = _digest([self.paths, sizes])

    def _paths_of_split(self, paths, top, divided):
        if divided:
            present = [name for name in SPLIT_FOLDERS if name in top]
            folder = self.split
            if folder == "test" and "test" not in top:
                folder = next((name for name in present if name in ("val", "validation")), folder)
            if folder != "all" and folder not in present:
                raise UserError(f"folder '{self.root}' has no split '{self.split}'; it has all, {', '.join(present)}")
            return [path for path in paths if path.split("/", 1)[0] in (present if folder == "all" else [folder])]
        if self.split not in ("all", "train", "test"):
            raise UserError(f"folder '{self.root}' has no split '{self.split}'; it has all, train, test")
        if self.split == "all":
            return paths
        hashes = {path: zlib.crc32(path.encode("utf-8", "surrogateescape")) for path in paths}
        test = {path for path in paths if hashes[path] % 10 == 0}
        if len(test) in (0, len(paths)):  # very few images: one of them is the test split
            test = {min(paths, key=hashes.get)}
        return [path for path in paths if (path in test) == (self.split == "test")]

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        try:
            data = Path(self.root, self.paths[index]).read_bytes()
        except (FileNotFoundError, PermissionError) as error:
            raise CorruptImage(f"file cannot be read: {_one_line(error)}") from error
        return {name: data if self._own[name] == "image" else self.labels[index] for name in self.features}

    def select(self, features):
        other = self.__class__.__new__(self.__class__)
        other.__dict__.update({**self.__getstate__(), "features": {name: self.features[name] for name in features}})
        return other


def _scan(root: str) -> tuple[list[str], dict[str, str]]:
    """(sorted relative paths of files that begin like an image, {relative path: reason} of the others)."""
    found = []
    inside = os.path.realpath(root) + os.sep
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        relative = os.path.relpath(folder, root)
        names = [name for name in files if not name.startswith(".")]
        names += [name for name in folders if os.path.islink(os.path.join(folder, name))]  # rejected below
        found += [os.path.normpath(os.path.join(relative, name)).replace(os.sep, "/") for name in names]

    def reason(path):
        full = os.path.join(root, path)
        if os.path.islink(full):
            if os.path.isdir(full):
                return "link to a folder"
            if not os.path.realpath(full).startswith(inside):
                return "link out of the folder"
        if not os.path.isfile(full):
            return "not a file"
        try:
            with open(full, "rb") as file:
                return sniff(file.read(MAGIC_BYTES))
        except PermissionError:
            return "no permission"

    found.sort()
    with ThreadPoolExecutor(16) as pool:  # on network disks the latency per file dominates
        reasons = list(pool.map(reason, found, chunksize=256))
    good = [path for path, why in zip(found, reasons, strict=True) if why is None]
    return good, {path: why for path, why in zip(found, reasons, strict=True) if why is not None}


def _digest(content) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__

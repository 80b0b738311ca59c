"""Prepared TFDS directories in ArrayRecord, read without TensorFlow."""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Mapping

import numpy as np

from ssl_jax.data.decode import CorruptImage
from ssl_jax.data.features import from_tfds, rename_features
from ssl_jax.data.source import OWN_ERRORS, Source, digest, one_line, printable, unreadable
from ssl_jax.errors import UserError

log = logging.getLogger("ssl_jax.data")

MAX_JSON = 64 << 20  # bytes
MAX_CLASSES = 10_000_000
MAX_VALUES = 1 << 30  # of one feature of one example
_TFDS_FEATURES = re.compile(r"tensorflow_datasets\.core\.features(\.\w+)+")
_INNER = ("TopLevelFeature", "Dataset")  # classes of TFDS that are not in tfds.features
_VERSION = re.compile(r"\d+\.\d+\.\d+$")


def _children(path: str) -> list[str]:
    """Names in a folder; none if there is no such folder. Raises MachineFault."""
    try:
        return os.listdir(path)
    except OSError as error:
        if error.errno not in OWN_ERRORS:
            raise unreadable(path, error) from error
        return []


def contents(path: str) -> str:
    """What is in a data directory, for messages."""
    names = [name for name in sorted(_children(path)) if not name.startswith(".") and name != "downloads"]
    return printable(", ".join(names[:20]) + (", ..." if len(names) > 20 else "")) if names else "nothing"


def prepared_directory(path: str) -> str | None:
    """The directory with dataset_info.json: `path` itself or its newest version, or None."""
    children = _children(path)
    if "dataset_info.json" in children:
        return path
    versions = sorted(child for child in children if _VERSION.match(child))
    versions = [version for version in versions if "dataset_info.json" in _children(os.path.join(path, version))]
    if versions:
        return os.path.join(path, max(versions, key=lambda version: tuple(map(int, version.split(".")))))
    unfinished = [c for c in children if ".incomplete" in c or ".array_record-" in c or _VERSION.match(c)]
    if unfinished:
        raise UserError(
            f"'{path}' was not prepared to the end ('{printable(min(unfinished))}', no dataset_info.json); remove it and prepare it "
            "again"
        )
    return None


def find_prepared(data_dir: str, name: str) -> str | None:
    """The directory of a dataset by its name ('ds', 'ds/config', 'ds:1.2.0') in `data_dir`, or None.

    Raises:
      UserError: no such version, several configs, or an interrupted preparation.
    """
    base, _, version = name.partition(":")
    root = os.path.join(data_dir, base)
    if version:
        directory = os.path.join(root, version)
        if "dataset_info.json" not in _children(directory):
            raise UserError(f"data '{name}': no such version in data_dir '{data_dir}' (there: {contents(root)})")
        return directory
    directory = prepared_directory(root)
    if directory is None and "/" not in base:
        configs = [child for child in sorted(_children(root)) if prepared_directory(os.path.join(root, child))]
        if len(configs) > 1:
            names = ", ".join(f"{base}/{config}" for config in configs)
            raise UserError(f"data '{name}' has several configs; choose one: {names}")
        directory = prepared_directory(os.path.join(root, configs[0])) if configs else None
    return directory


def _read_json(directory: str, name: str):
    """A file of the dataset that must hold a JSON object."""
    path = os.path.join(directory, name)
    try:
        with open(path, "rb") as file:
            content = json.loads(file.read(MAX_JSON + 1))
    except (ValueError, RecursionError) as error:
        raise _damaged(directory, f"{name} is empty, cut or no JSON") from error
    except OSError as error:
        if error.errno in OWN_ERRORS:
            raise _damaged(directory, f"{name}: {error.strerror}") from error
        raise unreadable(path, error) from error
    if not isinstance(content, dict):
        raise _damaged(directory, f"{name} holds no JSON object")
    return content


def _damaged(directory: str, reason: str) -> UserError:
    return UserError(f"'{directory}' is not a readable TFDS dataset ({reason}); prepare it again")


def _check_features(directory: str, node, where: str = "the dataset") -> None:
    """Check a part of features.json, whose classes TFDS would import from any module.

    Raises:
      UserError: a class that is not of TFDS itself, or an impossible shape.
    """
    if isinstance(node, list):
        for child in node:
            _check_features(directory, child, where)
    if not isinstance(node, dict):
        return
    for key in ("pythonClassName", "python_class_name", "type"):  # 'type' is the key of older versions, and may be a feature
        name = node.get(key)
        if isinstance(name, str) and not _is_of_tfds(name):
            raise UserError(
                f"'{directory}': features.json names the class '{printable(name)[:80]}', and data must not choose code; only features "
                "of TFDS itself are read, so prepare the data with those"
            )
    shape = node.get("shape")
    sizes = shape.get("dimensions") if isinstance(shape, dict) else shape
    if isinstance(sizes, list) and not _is_possible(sizes):
        raise _damaged(directory, f"features.json: {where} has the shape {printable(str(sizes))[:80]}")
    for key, most in (("numClasses", MAX_CLASSES), ("num_classes", MAX_CLASSES), ("length", MAX_VALUES)):
        number = node.get(key)
        if isinstance(number, int | str) and not (_is_possible([number]) and int(number) <= most):
            raise _damaged(directory, f"features.json: {where} has {key} {printable(str(number))[:40]}")
    for key, child in node.items():
        _check_features(directory, child, f"'{printable(key)[:40]}'" if where == "features" else where if key != "features" else key)


def _is_of_tfds(name: str) -> bool:
    import tensorflow_datasets as tfds

    module, _, kind = name.rpartition(".")
    return bool(_TFDS_FEATURES.fullmatch(module)) and (hasattr(tfds.features, kind) or kind in _INNER)


def _is_possible(sizes: list) -> bool:
    """Whether a shape has whole numbers, of a product within bounds; -1 and null are unknown ones."""
    numbers = [size for size in sizes if size is not None]
    if not all(isinstance(n, int | str) and not isinstance(n, bool) and re.fullmatch(r"-1|\d{1,9}", str(n)) for n in numbers):
        return False
    return math.prod(max(1, int(n)) for n in numbers) <= MAX_VALUES


class TfdsSource(Source):
    """A split of a prepared TFDS directory in ArrayRecord.

    Images and masks are encoded bytes; lists of images, masks that are not uint8, and other features are as TFDS decodes them.
    """

    def __init__(
        self, directory, split: str, name: str = "", names: Mapping[str, str] = {}, kinds: Mapping[str, str] = {}
    ):
        super().__init__()
        self.directory, self.split, self.name = os.path.abspath(directory), split, name or os.fspath(directory)
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
        self.class_names = _class_names(builder.info.features, self._paths)
        counts = ", ".join(f"{name} {info.num_examples}" for name, info in sorted(builder.info.splits.items()))
        classes = f"{self.num_classes} classes" if self.num_classes is not None else "no classes"
        log.info("data '%s': splits %s; %s", self.name, counts, classes)
        files = [(i.basename(), i.skip, i.take, i.examples_in_shard) for i in self._instructions]
        self.fingerprint = digest([builder.info.name, str(builder.info.version), builder.info.dataset_size, files])

    def _open(self):
        """Open the files; raises UserError for setup problems. Called again in every worker process."""
        import tensorflow_datasets as tfds
        from tensorflow_datasets.core import dataset_info, read_only_builder

        info = _read_json(self.directory, "dataset_info.json")
        for key in ("name", "version", "splits"):
            if not info.get(key):
                raise _damaged(self.directory, f"dataset_info.json has no {key}")
        if os.path.exists(os.path.join(self.directory, "features.json")):
            try:
                _check_features(self.directory, _read_json(self.directory, "features.json"))
            except RecursionError as error:
                raise _damaged(self.directory, "features.json is nested too deeply") from error
        try:
            proto = dataset_info.read_proto_from_builder_dir(self.directory)
            proto.ClearField("module_name")  # the code that made the data has no say in how they are read
            builder = read_only_builder.ReadOnlyBuilder(self.directory, info_proto=proto)
        except Exception as error:  # TFDS raises many kinds, and it reads nothing but these files here
            if isinstance(error, OSError) and error.errno not in (None, *OWN_ERRORS):
                raise unreadable(self.directory, error) from error
            raise _damaged(self.directory, one_line(error)) from error
        splits = builder.info.splits
        names = ", ".join(sorted(splits))
        try:
            ranges = tfds.core.ReadInstruction.from_spec(self.split).to_absolute(splits)
            self._instructions = splits[self.split].file_instructions
        except (ValueError, KeyError, AssertionError, TypeError) as error:
            base = self.split.partition("[")[0]
            if base in splits and "[" in self.split:
                count = f"it has {splits[base].num_examples:,} examples"
                raise UserError(f"data '{self.name}': '{self.split}' is no part of split '{base}'; {count}") from error
            raise UserError(f"data '{self.name}' has no split '{self.split}'; it has {names}") from error
        for each in ranges:
            if None not in (each.from_, each.to) and each.to < each.from_:  # of which TFDS would make any number of examples
                raise UserError(f"data '{self.name}': split '{self.split}' ends before it begins; it has {names}")
        if not sum(instruction.take for instruction in self._instructions):
            raise UserError(f"data '{self.name}': split '{self.split}' is empty; it has {names}")
        for instruction in self._instructions:
            if not os.path.exists(instruction.filename):
                raise UserError(
                    f"data '{self.name}': shard '{instruction.filename}' is missing; prepare the data again"
                )
        try:
            self._records = builder.as_data_source(self.split).data_source
            for index in (0, len(self._records) - 1):  # a truncated shard fails on every record
                self._records[index]
        except NotImplementedError as error:  # TFDS has random access to ArrayRecord only
            raise UserError(
                f"data '{self.name}' in '{self.directory}' is not stored as array_record; prepare it again with "
                "--file_format array_record"
            ) from error
        except (RuntimeError, ValueError, OSError, IndexError) as error:
            self._check_disk(error)
            raise UserError(f"data '{self.name}': a shard is damaged ({one_line(error)}); prepare it again") from error
        available = builder.info.features
        chosen = {key: available[key] for key in self._keys or available}
        self._features = tfds.features.FeaturesDict(chosen)
        images = {key: feature for key, feature in chosen.items() if isinstance(feature, tfds.features.Image)}
        encoded = [key for key, feature in images.items() if np.dtype(feature.np_dtype) == np.uint8]
        self._decoders = {key: tfds.decode.SkipDecoding() for key in encoded}
        return builder

    def _check_disk(self, error: Exception) -> None:
        """Raises MachineFault if the disk is at fault, and not the record. ArrayRecord says neither, so the shards are looked at."""
        if isinstance(error, OSError) and error.errno not in (None, *OWN_ERRORS):
            raise unreadable(self.directory, error) from error
        for instruction in self._instructions:
            try:
                with open(instruction.filename, "rb") as file:
                    file.read(1)
            except OSError as failure:
                raise unreadable(instruction.filename, failure) from error

    def __len__(self):
        return len(self._records)

    def __getitem__(self, index):
        try:
            record = self._records[index]
            example = self._features.deserialize_example_np(record, decoders=self._decoders)
        except Exception as error:  # decoders raise many kinds on damaged bytes
            self._check_disk(error)
            raise CorruptImage(f"record cannot be read: {one_line(error)}") from error
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


def _class_names(features, paths: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Those of labels, also in lists, which pass on the fields of what they hold."""
    found = {name: _at(features, path) for name, path in paths.items()}
    return {name: tuple(each.names) for name, each in found.items() if getattr(each, "num_classes", None)}


def _at(tree, path):
    for key in path:
        tree = tree[key]
    return tree

"""What ssl_jax knows about datasets without their files, so that a machine without the data can describe a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ssl_jax.data.features import Feature, after_host_ops, rename_features
from ssl_jax.data.geometry import check_host_ops, output_shape
from ssl_jax.data.reader import describe
from ssl_jax.data.source import Source
from ssl_jax.data.sources import open_source
from ssl_jax.data.vocabulary import Vocabulary, build_vocabulary
from ssl_jax.errors import UserError


class DatasetEntry(NamedTuple):
    """What the catalog knows about one dataset."""

    features: Mapping[str, Feature]  # of one example, as the dataset names them
    classes: int | None  # None without labels
    splits: Mapping[str, int]  # {name: examples}
    vocabulary: Mapping[str, int] = {}  # {text feature: tokens in its vocabulary}
    class_counts: Mapping[str, int] = {}  # {feature: number of its classes}, of the features that declare them


class DatasetFacts(NamedTuple):
    """What a run needs to know about its training split, read with its host recipe."""

    features: dict[str, Feature]  # {name in a batch: feature of one example}
    num_classes: int | None
    examples: int
    vocabulary: dict[str, int]  # {text feature: tokens in its vocabulary}
    class_counts: Mapping[str, int] = {}  # {name in a batch: number of classes}, of the features that declare them


def _labeled(size: int | None, classes: int, splits: dict[str, int]) -> DatasetEntry:
    features = {"image": Feature((size, size, 3), "uint8", "image"), "label": Feature((), "int32")}
    return DatasetEntry(features, classes, splits, class_counts={"label": classes})


SCENES = {
    "answer": Feature((), "int32"),
    "image": Feature((48, 48, 3), "uint8", "image"),
    "image2": Feature((48, 48, 3), "uint8", "image"),
    "label": Feature((), "int32"),
    "mask": Feature((48, 48, 1), "uint8", "mask"),
    "motion": Feature((4,), "float32", "pose"),
    "objects/bbox": Feature((None, 4), "float32", "boxes"),
    "objects/label": Feature((None,), "int32"),
    "pose": Feature((4,), "float32", "pose"),
    "question": Feature((), "object", "text"),
}

SCENES_CLASSES = {"answer": 24, "label": 12, "objects/label": 13}

NORB_PAIRS = {
    "image": Feature((96, 96, 3), "uint8", "image"),
    "image2": Feature((96, 96, 3), "uint8", "image"),
    "label": Feature((), "int32"),
    "motion": Feature((2,), "float32", "pose"),
}

CLEVR_QUESTIONS = {
    "answer": Feature((), "object", "phrase"),
    "image": Feature((320, 480, 3), "uint8", "image"),
    "question": Feature((), "object", "text"),
}

# Sizes from TFDS's catalog. mnist_t10k splits MNIST's 10,000 test digits.
CATALOG = {
    "scenes": DatasetEntry(SCENES, 12, {"train": 7200, "test": 1800}, {"answer": 24, "question": 26}, SCENES_CLASSES),
    "cifar10": _labeled(32, 10, {"train": 50_000, "test": 10_000}),
    "cifar100": _labeled(32, 100, {"train": 50_000, "test": 10_000}),
    "mnist": _labeled(28, 10, {"train": 60_000, "test": 10_000}),
    "mnist_t10k": _labeled(28, 10, {"train": 8000, "test": 2000}),
    "smallnorb/pairs": DatasetEntry(NORB_PAIRS, 5, {"train": 24_300, "test": 24_300}),
    "clevr/questions": DatasetEntry(
        CLEVR_QUESTIONS, None, {"train": 700_000, "validation": 150_000, "test": 150_000}, {"answer": 28}
    ),
    "imagenet2012": _labeled(None, 1000, {"train": 1_281_167, "validation": 50_000}),
    "imagenet2012_subset/1pct": _labeled(None, 1000, {"train": 12_811, "validation": 50_000}),
    "imagenet2012_subset/10pct": _labeled(None, 1000, {"train": 128_116, "validation": 50_000}),
}


def open_data(data, split: str) -> Source:
    """Open a split of `config.data`; features have their names in a batch."""
    return open_source(data.name, split, data.data_dir, *_feature_options(data), data.get("follow_links", False))


def read_facts(data, source: Source, vocabulary: Mapping[str, Vocabulary]) -> DatasetFacts:
    """Facts about an opened training split."""
    sizes = {name: len(each.tokens) for name, each in vocabulary.items()}
    counts = {name: len(names) for name, names in source.class_names.items()}
    return DatasetFacts(describe(source, data.ops, vocabulary), source.num_classes, len(source), sizes, counts)


def facts(data) -> DatasetFacts:
    """Facts about the training split of `config.data`: from the config, else from this catalog, else from the files.

    The config must give what neither knows: `data.image_shape`, `num_classes`, `examples` (`--config.data.examples=70000`), and
    features other than image and label (`--config.data.specs.motion="((4,), 'float32')"`).

    Raises:
        UserError: a fact is unknown, or the split or feature does not exist.
    """
    check_host_ops(data.ops)
    entry, given = CATALOG.get(data.name), tuple(data.image_shape)
    if entry is None and data.examples:  # unlabeled unless data.num_classes is set
        entry = DatasetEntry({"image": Feature((None, None, 3), "uint8", "image")}, None, {data.train_split: data.examples})
    if entry is None:
        return _facts_from_files(data)
    classes, features = data.num_classes or entry.classes, dict(entry.features)
    for name, (shape, dtype) in data.get("specs", {}).items():
        features[name] = Feature(tuple(shape), dtype, "pose" if dtype == "float32" else "plain")
    if classes:
        features.setdefault("label", Feature((), "int32"))
    paths, features = rename_features(features, *_feature_options(data), data.name)
    shape = output_shape(data.ops) or given or features["image"].shape
    if None in shape:
        raise UserError(
            f"data '{data.name}' has images of many sizes; give config.data.ops an op that makes one size, "
            "or --config.data.image_shape='(H,W,3)'"
        )
    sizes = {name: size or entry.vocabulary.get(name) for name, size in data.get("vocabulary", {}).items()}
    for name, size in sizes.items():
        if size is None:
            raise UserError(f"data '{data.name}': unknown vocabulary size of '{name}'; give --config.data.vocabulary.{name}=N")
    features = after_host_ops(features, data.ops, sizes)
    features["image"] = features["image"]._replace(shape=shape)
    counts = {name: entry.class_counts[path] for name, path in paths.items() if path in entry.class_counts}
    return DatasetFacts(features, classes, data.examples or _count(data, entry.splits), sizes, counts)


def _feature_options(data) -> tuple[dict, dict]:
    return dict(data.get("features", {})), dict(data.get("kinds", {}))  # configs of older runs lack these


def _facts_from_files(data) -> DatasetFacts:
    try:
        source = open_data(data, data.train_split)
    except UserError as error:
        raise UserError(f"{error}; or say what is in it: --config.data.examples=N (and --config.data.num_classes=K)") from error
    found = read_facts(data, source, build_vocabulary(source, list(data.get("vocabulary", {}))))
    return found._replace(num_classes=data.num_classes or found.num_classes)


def _count(data, splits: dict[str, int]) -> int:
    """Number of examples in `data.train_split`, in TFDS syntax: 'train[:10%]+test'."""
    if data.train_split in splits:
        return splits[data.train_split]
    import tensorflow_datasets as tfds

    template = tfds.core.ShardedFileTemplate(dataset_name="none", data_dir="none", filetype_suffix="array_record")
    infos = [
        tfds.core.SplitInfo(name=name, shard_lengths=[count], num_bytes=0, filename_template=template)
        for name, count in splits.items()
    ]
    try:
        return tfds.core.splits.SplitDict(infos)[data.train_split].num_examples
    except (ValueError, KeyError) as error:
        raise UserError(f"data '{data.name}' has no split '{data.train_split}'; it has {', '.join(splits)}") from error

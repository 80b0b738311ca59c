"""What is known of datasets without their files: enough to describe a run on a machine that does not have them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ssl_jax.data.features import Feature, after_host, named
from ssl_jax.data.geometry import check_host_ops, output_shape
from ssl_jax.data.reader import describe
from ssl_jax.data.sources import Source, open_source
from ssl_jax.data.vocabulary import Vocabulary, build_vocabulary
from ssl_jax.errors import UserError


class DatasetEntry(NamedTuple):
    """`features`: of one example, as the dataset names them; `classes`: None without labels; `splits`: {name: examples};
    `vocabulary`: {text: tokens of its vocabulary}.
    """

    features: Mapping[str, Feature]
    classes: int | None
    splits: Mapping[str, int]
    vocabulary: Mapping[str, int] = {}


class DatasetFacts(NamedTuple):
    """Of a split and a host recipe: {name in a batch: feature} of one example, numbers of classes, examples and tokens of texts."""

    features: dict[str, Feature]
    num_classes: int | None
    examples: int
    vocabulary: dict[str, int]


def _labeled(size: int | None, classes: int, splits: dict[str, int]) -> DatasetEntry:
    return DatasetEntry({"image": Feature((size, size, 3), "uint8", "image"), "label": Feature((), "int32")}, classes, splits)


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

# Sizes of TFDS's catalog; mnist_t10k divides the 10,000 test digits.
CATALOG = {
    "scenes": DatasetEntry(SCENES, 12, {"train": 7200, "test": 1800}, {"question": 26}),
    "cifar10": _labeled(32, 10, {"train": 50_000, "test": 10_000}),
    "cifar100": _labeled(32, 100, {"train": 50_000, "test": 10_000}),
    "mnist": _labeled(28, 10, {"train": 60_000, "test": 10_000}),
    "mnist_t10k": _labeled(28, 10, {"train": 8000, "test": 2000}),
    "imagenet2012": _labeled(None, 1000, {"train": 1_281_167, "validation": 50_000}),
    "imagenet2012_subset/1pct": _labeled(None, 1000, {"train": 12_811, "validation": 50_000}),
    "imagenet2012_subset/10pct": _labeled(None, 1000, {"train": 128_116, "validation": 50_000}),
}


def open_data(data, split: str) -> Source:
    """A split of `config.data`, its features under the names that they have in a batch."""
    return open_source(data.name, split, data.data_dir, *_renamed(data))


def read_facts(data, source: Source, vocabulary: Mapping[str, Vocabulary]) -> DatasetFacts:
    """Facts of an opened training split."""
    sizes = {name: len(each.tokens) for name, each in vocabulary.items()}
    return DatasetFacts(describe(source, data.ops, vocabulary), source.num_classes, len(source), sizes)


def facts(data) -> DatasetFacts:
    """Facts of `config.data` and its training split: what the config says, else this catalog, else the files.

    `data.image_shape`, `num_classes` and `examples` need to be given (`--config.data.examples=70000`) where neither knows them; and
    features beside image and label as `--config.data.specs.motion="((4,), 'float32')"`.

    Raises:
        UserError: nobody knows, or there is no such split or feature.
    """
    check_host_ops(data.ops)
    entry, given = CATALOG.get(data.name), tuple(data.image_shape)
    if entry is None and data.examples:  # unlabeled unless told otherwise
        entry = DatasetEntry({"image": Feature((None, None, 3), "uint8", "image")}, None, {data.train_split: data.examples})
    if entry is None:
        return _of_files(data)
    classes, features = data.num_classes or entry.classes, dict(entry.features)
    for name, (shape, dtype) in data.get("specs", {}).items():
        features[name] = Feature(tuple(shape), dtype, "pose" if dtype == "float32" else "plain")
    if classes:
        features.setdefault("label", Feature((), "int32"))
    _, features = named(features, *_renamed(data), data.name)
    shape = output_shape(data.ops) or given or features["image"].shape
    if None in shape:
        raise UserError(
            f"data '{data.name}' has images of many sizes; give config.data.ops an op that makes one, "
            "or --config.data.image_shape='(H,W,3)'"
        )
    sizes = {name: size or entry.vocabulary.get(name) for name, size in data.get("vocabulary", {}).items()}
    for name, size in sizes.items():
        if size is None:
            raise UserError(f"how many words '{name}' of data '{data.name}' has is not known; give --config.data.vocabulary.{name}=N")
    features = after_host(features, data.ops, sizes)
    features["image"] = features["image"]._replace(shape=shape)
    return DatasetFacts(features, classes, data.examples or _count(data, entry.splits), sizes)


def _renamed(data) -> tuple[dict, dict]:
    return dict(data.get("features", {})), dict(data.get("kinds", {}))  # configs of before have none


def _of_files(data) -> DatasetFacts:
    try:
        source = open_data(data, data.train_split)
    except UserError as error:
        raise UserError(f"{error}; or say what is in it: --config.data.examples=N (and --config.data.num_classes=K)") from error
    found = read_facts(data, source, build_vocabulary(source, list(data.get("vocabulary", {}))))
    return found._replace(num_classes=data.num_classes or found.num_classes)


def _count(data, splits: dict[str, int]) -> int:
    """Examples in `data.train_split`, which is TFDS syntax: 'train[:10%]+test'."""
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

"""What is known of datasets without their files: enough to describe a run on a machine that does not have them."""

from __future__ import annotations

from typing import NamedTuple

from ssl_jax.data.geometry import check_host_ops, output_shape
from ssl_jax.data.sources import open_source
from ssl_jax.errors import UserError


class DatasetEntry(NamedTuple):
    """`shape`: (H, W, 3) in pixels where all images have one; `classes`: None without labels; `splits`: {name: examples}."""

    shape: tuple[int, int, int] | None
    classes: int | None
    splits: dict[str, int]


class DatasetFacts(NamedTuple):
    """Of a split and a host recipe: {feature: shape of one example}, the number of classes, the number of examples."""

    shapes: dict[str, tuple[int, ...]]
    num_classes: int | None
    examples: int


# Sizes of TFDS's catalog; mnist_t10k divides the 10,000 test digits.
CATALOG = {
    "scenes": DatasetEntry((48, 48, 3), 12, {"train": 7200, "test": 1800}),
    "cifar10": DatasetEntry((32, 32, 3), 10, {"train": 50_000, "test": 10_000}),
    "cifar100": DatasetEntry((32, 32, 3), 100, {"train": 50_000, "test": 10_000}),
    "mnist": DatasetEntry((28, 28, 3), 10, {"train": 60_000, "test": 10_000}),
    "mnist_t10k": DatasetEntry((28, 28, 3), 10, {"train": 8000, "test": 2000}),
    "imagenet2012": DatasetEntry(None, 1000, {"train": 1_281_167, "validation": 50_000}),
    "imagenet2012_subset/1pct": DatasetEntry(None, 1000, {"train": 12_811, "validation": 50_000}),
    "imagenet2012_subset/10pct": DatasetEntry(None, 1000, {"train": 128_116, "validation": 50_000}),
}


def facts(data) -> DatasetFacts:
    """Facts of `config.data` and its training split: what the config says, else this catalog, else the files.

    `data.image_shape`, `num_classes` and `examples` need to be given (`--config.data.examples=70000`) where neither knows them.

    Raises:
        UserError: nobody knows, or there is no such split.
    """
    check_host_ops(data.ops)
    entry, given = CATALOG.get(data.name), tuple(data.image_shape)
    if entry is None and data.examples:  # unlabeled unless told otherwise
        entry = DatasetEntry(None, None, {data.train_split: data.examples})
    if entry is None:
        entry = _of_files(data)
    shape = output_shape(data.ops) or given or entry.shape
    if shape is None:
        raise UserError(
            f"data '{data.name}' has images of many sizes; give config.data.ops an op that makes one, "
            "or --config.data.image_shape='(H,W,3)'"
        )
    classes = data.num_classes or entry.classes
    return DatasetFacts({"image": shape, **({"label": ()} if classes else {})}, classes, data.examples or _count(data, entry.splits))


def _of_files(data) -> DatasetEntry:
    try:
        source = open_source(data.name, data.train_split, data.data_dir)
    except UserError as error:
        raise UserError(f"{error}; or say what is in it: --config.data.examples=N (and --config.data.num_classes=K)") from error
    return DatasetEntry(source.image_shape, source.num_classes, {data.train_split: len(source)})


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

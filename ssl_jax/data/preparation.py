"""Smaller copies of datasets, for faster input: a TFDS directory in ArrayRecord that `ssl_jax.data.prepared` reads as any other.

Reading a photograph costs mostly the entropy decoding of its JPEG, and no crop or scale saves that. So images are resized once, to a
short side that is enough for training, and stored as

    jpeg   baseline JPEG with 4:2:0 colors
    raw    uint8 RGB behind a PPM header, which needs no decoding and most space

as FFCV does (Leclerc et al. 2023, section 4.1).
"""

from __future__ import annotations

import io
import logging
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import simplejpeg

from ssl_jax.data.decode import CorruptImage, Picture, guarded, raw_image
from ssl_jax.data.geometry import Window, crop_image
from ssl_jax.data.source import Source, printable
from ssl_jax.data.sources import open_source
from ssl_jax.errors import UserError

log = logging.getLogger("ssl_jax.data")

FORMS = ("jpeg", "raw")
VERSION = "1.0.0"
SHARD_BYTES = 512 << 20
CHUNK = 256  # images that threads work on before they are written


class Prepared(NamedTuple):
    """One split that was written."""

    split: str
    examples: int
    left_out: int  # records that cannot be read
    bytes: int  # of all images
    bytes_before: int


def prepare(
    name: str,
    splits: Sequence[str],
    output: Path,
    *,
    data_dir: str = "",
    side: int = 256,
    form: str = "jpeg",
    quality: int = 90,
) -> list[Prepared]:
    """Write `output`/1.0.0 with the features image and label of `splits`, in their order. No directory is left after a failure.

    Args:
      name, data_dir: as of `open_source`.
      output: a directory that has no such version yet.
      side: the short side in pixels; images below it keep their size.
      form: 'jpeg' or 'raw'.
      quality: of JPEG, 1 to 100.

    Raises:
      UserError: no such data, splits with other classes, or `output` holds a dataset.
    """
    import tensorflow_datasets as tfds

    for split in splits:
        if not re.fullmatch(r"\w+", split) or splits.count(split) > 1:
            raise UserError(f"'{printable(split)}' cannot be the name of one split; give names such as train,test")
    target, folder = output / VERSION, output / f"{VERSION}.incomplete"
    for path in (target, folder):
        if path.exists():
            raise UserError(f"'{path}' is there already; remove it, or choose another --output")
    sources = [open_source(name, split, data_dir) for split in splits]
    features = _features(sources)
    title = re.sub(r"\W", "_", output.absolute().name).lower()
    done, infos = [], []
    folder.mkdir(parents=True)
    try:
        for split, source in zip(splits, sources, strict=True):
            template = tfds.core.ShardedFileTemplate(
                data_dir=folder, dataset_name=title, split=split, filetype_suffix="array_record"
            )
            found, lengths = _write_split(source.select(tuple(features)), features, template, (side, form, quality))
            infos.append(
                tfds.core.SplitInfo(
                    name=split, shard_lengths=lengths, num_bytes=found.bytes, filename_template=template
                )
            )
            done.append(found)
        description = (
            f"Images of {name}, short side {side} at most, {form}{f' of quality {quality}' if form == 'jpeg' else ''}."
        )
        tfds.folder_dataset.write_metadata(
            data_dir=folder, features=features, split_infos=infos, version=VERSION, filename_template=template, check_data=False,
            description=description,
        )  # fmt: skip
        folder.rename(target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return done


def shrink(data: bytes, side: int, form: str, quality: int) -> bytes:
    """An encoded image, upright and resized to a short side of at most `side` pixels. A smaller JPEG is kept as it is.

    Raises:
      CorruptImage: the image cannot be decoded.
    """
    picture = Picture(data)
    short = min(picture.height, picture.width)
    size = (picture.height, picture.width)
    if short > side:
        size = side * picture.height // short, side * picture.width // short  # as the host op `resize_crop`
    pixels = crop_image(picture, [Window(None, size, (0, 0, *size), False, "bicubic")])[0]
    if form == "raw":
        return raw_image(pixels)
    if short <= side and data.startswith(b"\xff\xd8"):
        return data
    return guarded(lambda: simplejpeg.encode_jpeg(pixels, quality, "RGB", "420"))


def _features(sources: Sequence[Source]):
    """The FeaturesDict of the copy. Raises UserError if splits have other classes."""
    import tensorflow_datasets as tfds

    first = sources[0]
    for source in sources:
        if (source.label_names, "label" in source.features) != (first.label_names, "label" in first.features):
            raise UserError(
                f"data '{first.name}': split '{source.split}' has other classes than '{first.split}'; prepare each alone"
            )
    found = {"image": tfds.features.Image(shape=(None, None, 3))}
    label = first.features.get("label")
    if first.num_classes is not None:
        names = first.label_names
        found["label"] = (
            tfds.features.ClassLabel(names=names) if names else tfds.features.ClassLabel(num_classes=first.num_classes)
        )
    elif label is not None and label.dtype != "object" and None not in label.shape:
        found["label"] = tfds.features.Tensor(shape=label.shape, dtype=np.dtype(label.dtype))
    if left_out := sorted(set(first.features) - set(found)):
        log.warning("data '%s': %s left out; a copy has image and label", first.name, ", ".join(left_out))
    return tfds.features.FeaturesDict(found)


def _write_split(source: Source, features, template, choices) -> tuple[Prepared, list[int]]:
    """Write the shards of a split. Returns what was written, and the number of examples in each shard."""
    from array_record.python.array_record_module import ArrayRecordWriter

    writer, written, lengths, left_out, total, before = None, 0, [], 0, 0, 0
    for index, example, size in _shrunk(source, choices):
        if isinstance(example, CorruptImage):
            left_out += 1
            log.warning("data '%s': %s left out (%s)", source.name, source.called(index), example)
            continue
        if writer is None or written > SHARD_BYTES:
            if writer is not None:
                writer.close()
            # No compression: it takes longer than the reading of what it saves.
            writer, written = ArrayRecordWriter(_part(template, len(lengths)), "group_size:1,uncompressed"), 0
            lengths.append(0)
        count = len(example["image"])
        writer.write(features.serialize_example({**example, "image": io.BytesIO(example["image"])}))
        written, total, before = written + count, total + count, before + size
        lengths[-1] += 1
    if writer is None:
        raise UserError(f"data '{source.name}': no image of split '{source.split}' can be read; check the files")
    writer.close()
    for shard in range(len(lengths)):
        path = template.sharded_filepath(shard_index=shard, num_shards=len(lengths))
        os.rename(_part(template, shard), path)
    return Prepared(template.split, sum(lengths), left_out, total, before), lengths


def _part(template, shard: int) -> str:
    """A shard until their number is known."""
    return os.path.join(template.data_dir, f"{template.split}.{shard}")


def _shrunk(source: Source, choices) -> Iterator[tuple[int, dict | CorruptImage, int]]:
    """(index, example with a smaller image or what is wrong with it, bytes of the image before), in order."""

    def one(index):
        try:
            example = source[index]
            return index, {**example, "image": shrink(example["image"], *choices)}, len(example["image"])
        except CorruptImage as error:
            return index, error, 0

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(source), CHUNK):
            yield from pool.map(one, range(start, min(start + CHUNK, len(source))))

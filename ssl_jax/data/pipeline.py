"""From a source to batches. The position in the data is a function of the step alone; there is no iterator state.

Step s of a run with global batch B reads places [s B, (s + 1) B) of one endless sequence: epoch after epoch, each a
seeded permutation of the source, computed place by place without memory. Processes and workers only divide that range,
so any number of them, any restart and any resume sees the same examples. A record that cannot be read is replaced by
its next readable neighbor, which is the same one everywhere; each is named once.

Small images are kept decoded: when the images have one shape and fit in `CACHE_BYTES`, every image is decoded at its
first use and from then on a batch is a NumPy gather.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence

import grain.python as grain
import numpy as np
from absl import flags

from ssl_jax.data.decode import CorruptImage, Picture
from ssl_jax.data.geometry import Recipe, apply_host_ops, check_host_ops, output_shape
from ssl_jax.data.sources import Source
from ssl_jax.errors import UserError

log = logging.getLogger("ssl_jax.data")

CACHE_BYTES = 1 << 30  # decoded images kept per source and process
MAX_WALK = 1000  # unreadable records in a row after which the data, not the record, is at fault
Spec = dict[str, tuple[tuple[int, ...], np.dtype]]
Skipped = list[tuple[int, str]]  # (index in the source, reason)
Keys = Sequence[str] | Mapping[str, str]  # features to read, or {name in the batch: feature}
RESERVED = ("mask", "index", "skipped")  # names in a batch that are ours


def element_spec(source: Source, ops: Recipe, keys: Keys = ("image", "label")) -> Spec:
    """{name: (shape, dtype)} of one example; decodes at most the first readable image, and seldom that."""
    return _Reader(source, ops, keys).spec


def _check_keys(source: Source, keys: Keys) -> dict[str, str]:
    """{name in the batch: feature}; 'label' is left out where the source has none."""
    keys = dict(keys) if isinstance(keys, Mapping) else {key: key for key in keys}
    assert keys.get("image") == "image", "a batch is made around its images"
    for key, feature in list(keys.items()):
        if key in RESERVED:
            raise UserError(
                f"feature '{feature}' needs another name in a batch; give keys={{'the_{key}': '{feature}'}}"
            )
        if feature not in source.features and key == "label":
            del keys[key]
        elif feature not in source.features:
            raise UserError(f"data '{source.name}' has no feature '{feature}'; it has {', '.join(source.features)}")
    return keys


def check_size(batch_size: int, name: str, split: str, examples: int) -> None:
    """Raises UserError for a batch of training that is larger than its data."""
    if batch_size > examples:
        raise UserError(
            f"batch size {batch_size} is larger than data '{name}' split '{split}' ({examples} examples); choose a smaller batch size"
        )


class _Cache:
    """Decoded columns of a source, filled at first use. Two threads may fill the same row: with the same content."""

    def __init__(self, size: int, spec: Spec):
        self.columns = {key: np.empty((size, *shape), dtype) for key, (shape, dtype) in spec.items()}
        self.ready = np.zeros(size, bool)


class _Reader:
    """Reads examples by index: decoding, geometry, replacement of unreadable ones."""

    def __init__(self, source: Source, ops: Recipe, keys: Keys):
        check_host_ops(ops)
        self.ops = tuple((name, dict(arguments)) for name, arguments in ops)
        self.keys = _check_keys(source, keys)
        self.source = source.select(tuple(self.keys.values()))
        self.bad: dict[int, str] = {}  # index -> reason
        shape, shapes, first = source.image_shape, {}, None
        if len(self.keys) > 1 or not (self.ops or shape):
            first = self._first(decode=not (self.ops or shape))
            shapes = self._others(first)
            shape = shape or (first["image"].shape if not self.ops else None)
        spec = {key: (value.shape, value.dtype) for key, value in shapes.items()}
        self.raw_spec = {"image": (shape, np.dtype(np.uint8)), **spec} if shape else None
        self.spec = {"image": (output_shape(self.ops) or shape, np.dtype(np.uint8)), **spec}
        self.cache = self._find_cache(source)

    def _find_cache(self, source) -> _Cache | None:
        if self.raw_spec is None or any(dtype.hasobject for _, dtype in self.raw_spec.values()):
            return None
        bytes_each = sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in self.raw_spec.values())
        if bytes_each * len(source) > CACHE_BYTES:
            return None
        return source.caches.setdefault(tuple(self.keys.items()), _Cache(len(source), self.raw_spec))

    def _first(self, decode: bool) -> dict:
        """The first readable example, with its image decoded if `decode`."""
        for index in range(min(len(self.source), MAX_WALK)):
            try:
                example = self.source[index]
                if decode:
                    example["image"] = Picture(example["image"]).pixels()
            except CorruptImage as error:
                self.bad[index] = str(error)
            else:
                return example
        raise self._all_bad(0)

    def _others(self, example: dict) -> dict:
        return {key: _convert(key, example[feature]) for key, feature in self.keys.items() if key != "image"}

    def _all_bad(self, index):
        count = min(len(self.source), MAX_WALK)
        return UserError(
            f"data '{self.source.name}': {count} images in a row cannot be read (first: number {index}, "
            f"{self.bad[index]}); check the files, or prepare the dataset again"
        )

    def _decode(self, index: int) -> dict:
        """The example with its image decoded and its shape checked: numpy values of `raw_spec`."""
        example = self.source[index]
        values = self._others(example)
        values["image"] = Picture(example["image"]).pixels()
        self._check_shapes(index, values, self.raw_spec)
        return values

    def _check_shapes(self, index, values, spec):
        for key, value in values.items():
            if value.shape != spec[key][0]:
                remedy = (
                    "give config.data.ops an op that makes one size, e.g. [('resize_crop', dict(resize=256, crop=224))]"
                    if key == "image"
                    else "leave it out of keys and read it from the source"
                )
                raise UserError(
                    f"data '{self.source.name}': '{key}' of example {index} has shape {value.shape}, others "
                    f"{spec[key][0]}; {remedy}"
                )

    def _fill(self, index: int):
        for key, value in self._decode(index).items():
            self.cache.columns[key][index] = value
        self.cache.ready[index] = True

    def read(self, index: int, seed: tuple[int, int]) -> dict:
        """One example of `spec`, its random numbers drawn from `seed`; raises CorruptImage, the same way each time."""
        if index in self.bad:
            raise CorruptImage(self.bad[index])
        try:
            if self.cache is not None:
                if not self.cache.ready[index]:
                    self._fill(index)
                values = {key: column[index] for key, column in self.cache.columns.items()}
                picture = Picture(values["image"])
            else:
                example = self.source[index]
                values = self._others(example)
                picture = Picture(example["image"])
            rng = np.random.default_rng(seed) if self.ops else None
            values["image"] = apply_host_ops(self.ops, picture, rng)
        except CorruptImage as error:
            self.bad[index] = str(error)
            raise
        self._check_shapes(index, values, self.spec)
        return values

    def read_or_next(self, index: int, seed: tuple[int, int], skipped: Skipped) -> dict:
        """The example, or the next readable one after it; what was passed over is appended to `skipped`."""
        for offset in range(min(len(self.source), MAX_WALK)):
            candidate = (index + offset) % len(self.source)
            try:
                return self.read(candidate, seed)
            except CorruptImage as error:
                skipped.append((candidate, str(error)))
        raise self._all_bad(index)

    def batch(self, indices: Sequence[int], seeds: Sequence[tuple[int, int]]) -> tuple[dict, Skipped]:
        """Examples stacked [len(indices), ...]; `seeds` are what each example's random generator starts from."""
        skipped: Skipped = []
        indices = np.asarray(indices, np.int64)
        if self.cache is not None and not self.ops:
            for index in indices[~self.cache.ready[indices]].tolist():
                if index not in self.bad and not self.cache.ready[index]:
                    try:
                        self._fill(index)
                    except CorruptImage as error:
                        self.bad[index] = str(error)
            if self.cache.ready[indices].all():
                return {key: self.cache.columns[key][indices] for key in self.keys}, skipped
        out = {key: np.empty((len(indices), *shape), dtype) for key, (shape, dtype) in self.spec.items()}
        for row, (index, seed) in enumerate(zip(indices.tolist(), seeds, strict=True)):
            values = self.read_or_next(index, seed, skipped)
            for key in self.keys:
                out[key][row] = values[key]
        return out, skipped


def _convert(key: str, value) -> np.ndarray:
    """Feature values as the device takes them: int32, float32, bool; text stays an object."""
    if isinstance(value, dict):
        raise UserError(f"feature '{key}' is no array; leave it out of keys and read it from the source")
    value = np.asarray(value)
    if value.dtype.kind in "SUO":
        return np.asarray(value, object)
    if value.dtype.kind in "iu" and value.dtype.itemsize > 2:
        return value.astype(np.int32)
    return value.astype(np.float32) if value.dtype.kind == "f" else value


class _Batches:
    def __init__(self, source, ops, batch_size, parts, of, keys):
        if batch_size < 1 or batch_size % of:
            raise UserError(f"batch size {batch_size} is not divisible by {of}, the parts of a batch; choose a multiple")
        size, own = batch_size // of, (parts,) if isinstance(parts, int) else parts
        assert all(0 <= part < of for part in own)
        self.batch_size = batch_size
        self.rows = [part * size + row for part in own for row in range(size)]  # of each batch, in order
        self.source, self.skipped = source, {}
        self.reader = _Reader(source, ops, keys)
        self.spec = self.reader.spec

    def __getstate__(self):  # the reader's files are reopened and its cache stays behind
        return {key: value for key, value in self.__dict__.items() if key not in ("reader", "order")} | {
            "recipe": (self.reader.ops, self.reader.keys)
        }

    def __setstate__(self, state):
        recipe = state.pop("recipe")
        self.__dict__.update(state)
        self.reader = _Reader(self.source, *recipe)


class TrainBatches(_Batches):
    """`batches[step]` -> this process's parts of the global batch of that step, for any step >= 0, in any order.

    A dict of numpy arrays, [rows of the parts, ...] each, plus 'skipped', a list of (index, reason) of the
    records that were replaced. `iterate` takes that entry out.

    Attributes:
      spec: {name: (shape, dtype)} of one example.
      skipped: {index: reason}, what `iterate` has met so far.
    """

    def __init__(
        self,
        source: Source,
        ops: Recipe,
        batch_size: int,
        seed: int,
        parts: int | Sequence[int] = 0,
        of: int = 1,
        keys: Keys = ("image", "label"),
    ):
        """
        Args:
          batch_size: of all processes together.
          parts: which of the `of` equal parts of a batch this process takes, in ascending order; part p has rows [p b, (p + 1) b),
            b = batch_size / of. Several processes may take the same.
          seed: of the order and of the crops; 0 <= seed < 2**32.
          keys: features of a batch, or {name: feature}; 'label' is left out where the source has none.
        """
        check_size(batch_size, source.name, source.split, len(source))
        if not 0 <= seed < 2**32:
            raise UserError(f"seed {seed} is not within 0 ... 2**32 - 1; choose another")
        super().__init__(source, ops, batch_size, parts, of, keys)
        self.seed = seed
        self.order = self._order()

    def _order(self):
        return grain.MapDataset.range(len(self.source)).seed(self.seed).shuffle().repeat()

    def __setstate__(self, state):
        super().__setstate__(state)
        self.order = self._order()

    def __getitem__(self, step: int) -> dict:
        places = [step * self.batch_size + row for row in self.rows]
        seeds = [(self.seed, place) for place in places]
        batch, skipped = self.reader.batch([self.order[place] for place in places], seeds)
        return {**batch, "skipped": skipped}


class EvalBatches(_Batches):
    """Every example once, in order: `len(batches)` batches, the last one padded. Iterating runs `iterate` over all.

    A batch has the `parts` of this process, as in `TrainBatches`, and 'mask', bool [b]: False for padding and for images that
    cannot be read; and 'index', int32 [b], the place in the source. Padding and unreadable rows are zeros. `skipped` holds the
    unreadable images met so far.
    """

    def __init__(self, source, ops, batch_size, parts=0, of=1, limit=None, keys=("image", "label")):
        super().__init__(source, ops, batch_size, parts, of, keys)
        size = len(source) if limit is None else min(limit, len(source))
        # Evenly spaced, not the first ones: folders are sorted by class.
        self.indices = np.arange(size, dtype=np.int64) * len(source) // size
        self.num_examples = size

    def __len__(self):
        return -(-self.num_examples // self.batch_size)

    def __getitem__(self, number: int) -> dict:
        places = [number * self.batch_size + row for row in self.rows]
        indices = self.indices[[place for place in places if place < self.num_examples]].tolist()
        batch, skipped, mask = self._read(indices)
        missing = len(places) - len(indices)
        batch |= {"mask": mask, "index": np.asarray(indices, np.int32)}
        if missing:
            batch = {key: _pad(value, missing) for key, value in batch.items()}
        return {**batch, "skipped": skipped}

    def _read(self, indices):
        out = {key: np.zeros((len(indices), *shape), dtype) for key, (shape, dtype) in self.spec.items()}
        mask, skipped = np.zeros(len(indices), bool), []
        for row, index in enumerate(indices):
            try:
                values = self.reader.read(index, (0, index))
            except CorruptImage as error:
                skipped.append((index, str(error)))
                continue
            mask[row] = True
            for key, value in values.items():
                out[key][row] = value
        return out, skipped, mask

    def __iter__(self):
        return iterate(self, 0, len(self))


def _pad(value, rows):
    return np.concatenate([value, np.zeros((rows, *value.shape[1:]), value.dtype)])


def eval_batches(
    source: Source,
    ops: Recipe,
    batch_size: int,
    parts: int | Sequence[int] = 0,
    of: int = 1,
    limit: int | None = None,
    keys: Keys = ("image", "label"),
) -> EvalBatches:
    """Finite, exact evaluation batches; see `EvalBatches`. `limit` takes that many examples, evenly spaced."""
    return EvalBatches(source, ops, batch_size, parts, of, limit, keys)


def iterate(
    batches: TrainBatches | EvalBatches,
    start: int,
    stop: int,
    workers: int = 0,
    threads: int | None = None,
    prefetch: int = 2,
) -> Iterator[dict]:
    """Batches [start, stop) in order, prepared ahead. Content and order do not depend on the other arguments.

    Args:
      workers: processes; 0 prepares in threads of this one, which is enough while OpenCV and the JPEG decoder do the
        work. Sources that are kept decoded always use threads: a worker would fill a cache of its own.
      threads: how many batches are in the making at once without workers; None is one per core, at most 16.
      prefetch: finished batches to keep ready, per worker if there are any. Batches are the unit: mind the memory.

    Unreadable records are collected in `batches.skipped` and each is logged once.
    """
    threads = min(os.cpu_count() or 1, 16) if threads is None else threads
    dataset = grain.MapDataset.range(start, stop).map(batches.__getitem__)
    if workers and batches.reader.cache is None:
        if not flags.FLAGS.is_parsed():  # outside absl.app; Grain hands the flags to its workers
            flags.FLAGS(sys.argv[:1])
        dataset = dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1))
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=prefetch)
        dataset = dataset.mp_prefetch(options)
    else:
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + prefetch)
        dataset = dataset.to_iter_dataset(options)
    for batch in dataset:
        for index, reason in batch.pop("skipped"):
            if index not in batches.skipped:
                batches.skipped[index] = reason
                log.warning("data '%s': example %d is left out: %s", batches.source.name, index, reason)
        yield batch

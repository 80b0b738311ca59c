"""From a source to batches. The position in the data is a function of the step alone; there is no iterator state.

Step s of a run with global batch B reads positions [s B, (s + 1) B) of one endless sequence. The sequence is epoch after
epoch, each a seeded permutation of the source that is computed position by position. Processes and workers only divide that
range, so their number, restarts and resumes do not change the examples. The next readable record replaces an unreadable
one, in every process alike, and each unreadable record is logged once.

Small images stay decoded. If the images have one shape and fit in `CACHE_BYTES`, every image is decoded at its first use;
after that a batch is a NumPy gather.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence

import grain.python as grain
import numpy as np
from absl import flags
from grain.experimental import WithOptionsIterDataset

from ssl_jax.data.decode import CorruptImage
from ssl_jax.data.geometry import Recipe
from ssl_jax.data.reader import DEFAULT, Inputs, Reader
from ssl_jax.data.source import Source
from ssl_jax.data.vocabulary import Vocabulary
from ssl_jax.errors import MachineFault, UserError

log = logging.getLogger("ssl_jax.data")

SHARED_MEMORY = "/dev/shm"  # where Grain's workers put batches
ROWS, INDEX, SKIPPED = "_valid", "_index", "_skipped"  # entries of a batch beside features, whose names never begin with _


def check_size(batch_size: int, name: str, split: str, examples: int) -> None:
    """Raises UserError if a training batch is larger than its data."""
    if batch_size > examples:
        raise UserError(
            f"batch size {batch_size} is larger than data '{name}' split '{split}' ({examples} examples); choose a smaller one"
        )


class _Batches:
    def __init__(self, source, ops, batch_size, parts, num_parts, inputs, vocabulary):
        if batch_size < 1 or batch_size % num_parts:
            raise UserError(f"batch size {batch_size} is not divisible by {num_parts}, the parts of a batch; choose a multiple")
        size, own = batch_size // num_parts, (parts,) if isinstance(parts, int) else parts
        assert all(0 <= part < num_parts for part in own)
        self.batch_size = batch_size
        self.rows = [part * size + row for part in own for row in range(size)]  # of the global batch, in order
        self.source, self.skipped = source, {}
        self.reader = Reader(source, ops, inputs, vocabulary)
        self.spec = self.reader.spec

    def __getstate__(self):  # without open files and the cache: a worker builds its own reader
        return {key: value for key, value in self.__dict__.items() if key not in ("reader", "order")} | {
            "recipe": (self.reader.ops, self.reader.inputs, self.reader.vocabulary)
        }

    def __setstate__(self, state):
        recipe = state.pop("recipe")
        self.__dict__.update(state)
        self.reader = Reader(self.source, *recipe)


class TrainBatches(_Batches):
    """`batches[step]` -> this process's parts of the global batch of that step, for any step >= 0, in any order.

    A batch is a dict of NumPy arrays [rows of the parts, ...], plus '_skipped': a list of (index, reason) of the replaced
    records. `iterate` removes that entry.

    Attributes:
      spec: {name: (shape, dtype)} of one example.
      skipped: {index: reason} of the records that `iterate` has skipped so far.
    """

    def __init__(
        self,
        source: Source,
        ops: Recipe,
        batch_size: int,
        seed: int,
        parts: int | Sequence[int] = 0,
        num_parts: int = 1,
        inputs: Inputs = DEFAULT,
        vocabulary: Mapping[str, Vocabulary] = {},
    ):
        """
        Args:
          batch_size: of all processes together.
          seed: of the order and of the crops; 0 <= seed < 2**32.
          parts: parts of the batch that this process reads, in ascending order. Part p of the `num_parts` equal parts has rows
            [p b, (p + 1) b), b = batch_size / num_parts. Several processes may read the same part.
          inputs: names of features, or {name: Spec}, where the Spec sets the lengths of lists. Without a Spec, 'label' is left
            out if the source has no labels.
          vocabulary: {name: vocabulary} of the texts that become token ids.
        """
        check_size(batch_size, source.name, source.split, len(source))
        if not 0 <= seed < 2**32:
            raise UserError(f"seed {seed} is not within 0 ... 2**32 - 1; choose another")
        super().__init__(source, ops, batch_size, parts, num_parts, inputs, vocabulary)
        self.seed = seed
        self.order = self._order()

    def _order(self):
        return grain.MapDataset.range(len(self.source)).seed(self.seed).shuffle().repeat()

    def __setstate__(self, state):
        super().__setstate__(state)
        self.order = self._order()

    def __getitem__(self, step: int) -> dict:
        positions = [step * self.batch_size + row for row in self.rows]
        seeds = [(self.seed, position) for position in positions]
        batch, skipped = self.reader.batch([self.order[position] for position in positions], seeds)
        return {**batch, SKIPPED: skipped}


class EvalBatches(_Batches):
    """Every example once, in order: `len(batches)` batches, the last one padded. Iterating runs `iterate` over all.

    A batch has the `parts` of this process, as in `TrainBatches`. '_valid', bool [b], is False for padding and for unreadable
    images, whose rows are zeros. '_index', int32 [b], is the index in the source. `skipped` holds the unreadable images so far.
    """

    def __init__(self, source, ops, batch_size, parts=0, num_parts=1, limit=None, inputs=DEFAULT, vocabulary=None):
        super().__init__(source, ops, batch_size, parts, num_parts, inputs, vocabulary or {})
        size = len(source) if limit is None else min(limit, len(source))
        # Evenly spaced, because folders are sorted by class.
        self.indices = np.arange(size, dtype=np.int64) * len(source) // size
        self.num_examples = size

    def __len__(self):
        return -(-self.num_examples // self.batch_size)

    def __getitem__(self, number: int) -> dict:
        positions = [number * self.batch_size + row for row in self.rows]
        indices = self.indices[[position for position in positions if position < self.num_examples]].tolist()
        batch, skipped, valid = self._read(indices)
        missing = len(positions) - len(indices)
        batch |= {ROWS: valid, INDEX: np.asarray(indices, np.int32)}
        if missing:
            batch = {key: _pad(value, missing) for key, value in batch.items()}
        return {**batch, SKIPPED: skipped}

    def _read(self, indices):
        out = {key: np.zeros((len(indices), *shape), dtype) for key, (shape, dtype) in self.spec.items()}
        valid, skipped = np.zeros(len(indices), bool), []
        for row, index in enumerate(indices):
            try:
                values = self.reader.read(index, (0, index))
            except CorruptImage as error:
                skipped.append((index, str(error)))
                continue
            valid[row] = True
            for key, value in values.items():
                out[key][row] = value
        return out, skipped, valid

    def __iter__(self):
        return iterate(self, 0, len(self))


def _pad(value, rows):
    return np.concatenate([value, np.zeros((rows, *value.shape[1:]), value.dtype)])


def eval_batches(
    source: Source,
    ops: Recipe,
    batch_size: int,
    parts: int | Sequence[int] = 0,
    num_parts: int = 1,
    limit: int | None = None,
    inputs: Inputs = DEFAULT,
    vocabulary: Mapping[str, Vocabulary] = {},
) -> EvalBatches:
    """Evaluation batches with every example once; see `EvalBatches`. `limit` takes that many examples, evenly spaced."""
    return EvalBatches(source, ops, batch_size, parts, num_parts, limit, inputs, vocabulary)


def iterate(
    batches: TrainBatches | EvalBatches,
    start: int,
    stop: int,
    workers: int = 0,
    threads: int | None = None,
    prefetch: int = 2,
) -> Iterator[dict]:
    """Batches [start, stop) in order, prefetched. The other arguments change neither content nor order.

    Args:
      workers: processes. 0 uses threads of this process, which is enough while OpenCV and the JPEG decoder do the work.
        Sources that stay decoded always use threads, because a worker would fill a cache of its own.
      threads: batches prepared at the same time without workers; None is one per core, at most 16.
      prefetch: finished batches to keep ready, per worker if there are any. Each takes memory of a whole batch.

    Unreadable records are collected in `batches.skipped`, and each is logged once.

    Raises:
      MachineFault: a worker was killed, or the disk of the data fails.
    """
    threads = min(os.cpu_count() or 1, 16) if threads is None else threads
    dataset = grain.MapDataset.range(start, stop).map(batches.__getitem__)
    if workers and batches.reader.cache is None:
        if not flags.FLAGS.is_parsed():  # outside absl.app; Grain passes the flags to its workers
            flags.FLAGS(sys.argv[:1])
        dataset = dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1))
        if _lacks_shared_memory(batches, workers, prefetch):
            dataset = WithOptionsIterDataset(dataset, grain.experimental.DatasetOptions(min_shm_size=sys.maxsize))
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=prefetch)
        dataset = dataset.mp_prefetch(options)
    else:
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + prefetch)
        dataset = dataset.to_iter_dataset(options)
    iterator = iter(dataset)
    while True:
        try:
            batch = next(iterator)
        except StopIteration:
            return
        except RuntimeError as error:
            if workers and (killed := re.search(r"terminated unexpectedly with exit code -(\d+)", str(error))):
                raise _killed(int(killed[1])) from error
            raise
        for index, reason in batch.pop(SKIPPED):
            if index not in batches.skipped:
                batches.skipped[index] = reason
                log.warning("data '%s': %s is left out: %s", batches.source.name, batches.source.called(index), reason)
        yield batch


def _lacks_shared_memory(batches: _Batches, workers: int, prefetch: int) -> bool:
    """Whether the batches of all workers do not fit in shared memory. A worker that fills it is killed."""
    if not os.path.isdir(SHARED_MEMORY):
        return False
    each = len(batches.rows) * sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in batches.spec.values())
    needed = each * (workers * (prefetch + 1) + 2)  # buffered and being made, and those that the device copies
    status = os.statvfs(SHARED_MEMORY)
    free = status.f_bavail * status.f_frsize
    if needed <= free:
        return False
    log.warning(
        "%s has %d MB free, and batches of %d workers need %d MB there, so they go through pipes, which is slower; give the "
        "container more (docker run --shm-size=%dm), or choose fewer --config.data.workers (0 needs none)",
        SHARED_MEMORY, free >> 20, workers, needed >> 20, 2 * needed >> 20,
    )  # fmt: skip
    return True


def _killed(number: int) -> MachineFault:
    likely = {signal.SIGKILL: ", as when memory runs out", signal.SIGBUS: f", as when {SHARED_MEMORY} is full"}
    name = signal.Signals(number).name if number in {*signal.Signals} else f"signal {number}"
    return MachineFault(
        f"a data worker was ended by {name}{likely.get(number, '')}; choose fewer --config.data.workers if it happens again, and "
        "run the same command again"
    )

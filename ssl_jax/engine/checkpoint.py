"""Orbax checkpoints: asynchronous, atomic, verified leaf by leaf on restore.

A corrupt one is moved aside and the one before is used.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as policies

from ssl_jax.engine.method import State
from ssl_jax.engine.renamed_keys import MODULES, old_names_in, rename
from ssl_jax.engine.sharding import leaf_names
from ssl_jax.errors import MachineFault, UserError, not_written

log = logging.getLogger(__name__)
STALE = 70  # seconds after which every host sees a directory as it is: NFS caches listings for up to a minute
# Faults of a device, of memory or of a disk: the checkpoint itself may be intact. (A missing file means that it is not.)
MACHINE_ERRORS = (jax.errors.JaxRuntimeError, MemoryError, OSError)


def _checksum(x: jax.Array) -> jax.Array:
    """uint32 sum over elements of bits x odd weight of the index: any single flipped bit changes it.

    Integer sums are exact in any order, so the value does not depend on the sharding.
    """
    width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bits = x if x.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(x, width)
    index, stride = jnp.zeros(x.shape, jnp.uint32), 1
    for d in reversed(range(x.ndim)):
        index += jax.lax.broadcasted_iota(jnp.uint32, x.shape, d) * jnp.uint32(stride % 2**32)
        stride *= x.shape[d]
    return jnp.sum(bits.astype(jnp.uint32) * (2 * index + 1), dtype=jnp.uint32)


_checksum_tree = jax.jit(lambda tree: jax.tree.map(_checksum, tree))


def checksums(tree) -> dict[str, int]:
    """{leaf name: checksum} of a tree of arrays, computed on their devices."""
    values = jax.device_get(jax.tree.leaves(_checksum_tree(tree)))
    return {name: int(value) for name, value in zip(leaf_names(tree), values, strict=True)}


def saved_part(state: State) -> dict:
    """The part of a state that a checkpoint holds: everything but `frozen`."""
    return {"step": state.step, "params": state.params, "opt": state.opt, "mutable": state.mutable}


class _Manager(ocp.CheckpointManager):
    """Orbax's manager without its own check for SIGTERM: it counts steps differently from `engine.loop.Signals`."""

    def reached_preemption(self, step: int) -> bool:
        return False


class Checkpoints:
    """The checkpoints of one run in `directory`: the last `keep`, and the best one by `best_metric`.

    The best checkpoint has the largest value, or the smallest if the name starts with '-'. A checkpoint without the metric is the
    worst. Each holds the state, the resolved config, and a checksum per leaf. The position in the data follows from the step.

    Raises:
        UserError: `read_only`, and the directory does not exist.
    """

    def __init__(self, directory: Path | str, keep: int = 2, best_metric: str = "", read_only: bool = False):
        self.directory = Path(directory).absolute()
        preserve, score = [policies.LatestN(keep)], None
        if best_metric:
            name, sign = best_metric.removeprefix("-"), -1 if best_metric.startswith("-") else 1

            def score(metrics) -> float:
                value = sign * metrics.get(name, math.nan)  # an earlier start may have had other evaluations
                return -math.inf if math.isnan(value) else value

            preserve.append(policies.BestN(get_metric_fn=score, n=1, keep_checkpoints_without_metrics=False))
        if read_only and not self.directory.is_dir():
            raise UserError(f"no checkpoints in {self.directory}; give the --workdir of a run that has saved one")
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(preserve),
            best_fn=score,  # without it Orbax writes no metrics, and a restart would not know the best checkpoint
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
            create=not read_only,
        )
        self._handlers = {
            "state": ocp.StandardCheckpointHandler(),
            "config": ocp.JsonCheckpointHandler(),
            "checksums": ocp.JsonCheckpointHandler(),
        }
        try:
            self._manager = _Manager(self.directory, options=options, item_handlers=self._handlers)
        except (TypeError, ValueError, AttributeError, LookupError, RecursionError) as error:  # read for every step
            raise UserError(
                f"{self.directory} cannot be opened ({_first_line(error)}); a checkpoint there has a damaged _CHECKPOINT_METADATA: "
                "move it away"
            ) from error

    def steps(self) -> list[int]:
        """Saved steps, oldest first, as this process lists them."""
        return sorted(self._manager.all_steps())

    def agreed_steps(self) -> list[int]:
        """Saved steps, oldest first, on which all processes agree. Every process must call it; it waits up to STALE seconds.

        Raises:
            MachineFault: in every process, if they still list different checkpoints.
        """
        for waited in range(STALE + 1):  # counted rather than timed, so that all processes stop together
            seen = _gather_lists(self.steps())
            differing = [i for i, steps in enumerate(seen) if steps != seen[0]]
            if not differing:
                return seen[0]
            message = f"process {differing[0]} sees checkpoints {seen[differing[0]]} in {self.directory}, process 0 {seen[0]}"
            if waited == 0:
                log.warning("%s; waiting up to %d s for them to see the same", message, STALE)
            if waited < STALE:
                time.sleep(1.0)
                self._manager.reload()
        raise MachineFault(f"{message}; see that all hosts mount the same directory, and start again")

    def save(self, state: State, config: Mapping, metrics: Mapping[str, float] | None = None) -> None:
        """Start saving. The arrays are copied before this returns; the files are written in the background.

        A deleted directory is created again, since the running process holds the only copy of the state.

        Raises:
            MachineFault: this save failed (disk full); older checkpoints are untouched.
        """
        step, tree = int(state.step), saved_part(state)
        try:
            self._manager.wait_until_finished()
        except jax.errors.JaxRuntimeError:  # another process has gone; nothing is wrong with the disk
            raise
        except (OSError, ValueError, RuntimeError) as error:
            log.error("the checkpoint before step %d could not be saved (%s); trying again with this step", step, _first_line(error))
        try:
            if not all(gather(self.directory.is_dir())):
                log.error("%s was deleted during this run; creating it again and saving step %d into it", self.directory, step)
                self.directory.mkdir(parents=True, exist_ok=True)
                self._manager.reload()
            self._check_space(tree)
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(tree),
                    config=ocp.args.JsonSave(dict(config)),
                    checksums=ocp.args.JsonSave(checksums(tree)),
                ),
                metrics=dict(metrics) if metrics else None,
                force=True,
            )
        except jax.errors.JaxRuntimeError:  # another process has gone; nothing is wrong with the disk
            raise
        except (OSError, ValueError, RuntimeError) as error:
            raise self._save_failed(error) from error

    def rate(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add metrics that were measured after checkpoint `step` was saved. Every process must call it.

        Raises:
            MachineFault: the metrics cannot be written.
        """
        if jax.process_index() == 0:
            path = self.directory / str(step) / "metrics" / "metrics"  # the path that Orbax uses
            try:
                path.parent.mkdir(exist_ok=True)
            except OSError as error:
                raise not_written(path, error) from error
            write_json(path, dict(metrics))
        _barrier("rated")
        self._manager.reload()

    def wait(self) -> None:
        """Wait until everything is on disk. Raises MachineFault if the save in flight failed."""
        try:
            self._manager.wait_until_finished()
        except jax.errors.JaxRuntimeError:  # another process has gone; nothing is wrong with the disk
            raise
        except (OSError, ValueError, RuntimeError) as error:
            raise self._save_failed(error) from error

    def _check_space(self, tree) -> None:
        """Raises OSError, in every process, if a disk has less free space than the arrays need.

        Cheaper than a save that fails halfway.
        """
        arrays = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
        shards = [shard for array in arrays for shard in array.addressable_shards if shard.replica_id == 0]
        needed = sum(gather(sum(shard.data.nbytes for shard in shards) / 2**20))
        free = min(gather(shutil.disk_usage(self.directory).free / 2**20))
        if free < needed:
            raise OSError(f"no space left on the disk: {needed:.1f} MiB are needed and {free:.1f} MiB free")

    def _save_failed(self, error: Exception) -> MachineFault:
        saved = self.steps()
        return MachineFault(
            f"could not save a checkpoint under {self.directory} ({_first_line(error)}); free space or repair the directory and run "
            f"the same command again: it resumes from " + (f"step {saved[-1]}" if saved else "the start, nothing is saved yet")
        )

    def config(self, step: int) -> dict:
        """The resolved config that is stored in checkpoint `step`."""
        return dict(self._manager.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore())).config)

    def restore(self, step: int, target: State) -> State:
        """Checkpoint `step` as arrays with the shardings of `target` (a state of shapes); `frozen` comes from `target`.

        Raises:
            UserError: it belongs to another config (names, shapes or dtypes differ).
            Corrupt: in every process, if one cannot read it, a leaf has another checksum than saved, or it holds another step than
                its directory name.
        """
        wanted = saved_part(target)
        tree = _read_together(lambda: self._manager.item_metadata(step)["state"].tree, "its metadata cannot be read")
        trees = (rename(tree, MODULES), wanted)
        saved, here = ({name: (tuple(leaf.shape), np.dtype(leaf.dtype)) for name, leaf in _named(x)} for x in trees)
        self._check_structure(step, saved, here)
        state, expected = _read_together(lambda: self._read(step, rename(wanted, old_names_in(tree))), "it cannot be read")
        verify(state, expected)
        state = rename(state, MODULES)
        if int(state["step"]) != step:
            raise Corrupt(f"it holds step {int(state['step'])}")
        return target._replace(**state)

    def _read(self, step: int, wanted) -> tuple[dict, dict[str, int]]:
        """(state, checksums), read by this process alone. Orbax's manager would wait for other processes, which may have failed."""
        folder = self._manager.directory / str(step)
        state = self._handlers["state"].restore(folder / "state", args=ocp.args.StandardRestore(wanted))
        return state, self._handlers["checksums"].restore(folder / "checksums", args=ocp.args.JsonRestore())

    def _check_structure(self, step: int, saved: Mapping, wanted: Mapping) -> None:
        for name in [*wanted, *saved]:
            there, here = saved.get(name, (None, None)), wanted.get(name, (None, None))
            what, i = ("shape", 0) if there[0] != here[0] else ("dtype", 1)
            if there[i] != here[i]:
                raise UserError(
                    f"checkpoint {step} in {self.directory} belongs to another config: {name} has {what} {there[i]} there and "
                    f"{here[i]} here; use the config of that run or another --workdir"
                )

    def restore_latest(self, target: State) -> State | None:
        """The newest intact checkpoint, or None if there are no checkpoints. All processes take the same one.

        A corrupt checkpoint is reported and moved to `<directory>_corrupt/`; then the one before is tried.

        Raises:
            UserError: there were checkpoints, and every one is corrupt.
            MachineFault: the processes do not list the same checkpoints.
        """
        found = self.agreed_steps()
        for step in reversed(found):
            try:
                state, corrupt = self.restore(step, target), None
            except Corrupt as error:
                state, corrupt = None, error
            if not any(gather(corrupt is not None)):
                return state
            target_path = self._set_aside(step)
            log.error(
                "checkpoint %d is corrupt: %s; moved to %s, falling back to the one before",
                step, corrupt or "another process cannot read it", target_path,
            )  # fmt: skip
        if found:
            raise UserError(
                f"every checkpoint in {self.directory} is corrupt (moved to {self.directory}_corrupt); "
                "restore one from a backup, or delete the workdir to start again"
            )
        return None

    def _set_aside(self, step: int) -> Path:
        folder = Path(f"{self.directory}_corrupt")
        folder.mkdir(exist_ok=True)
        target = folder / f"{step}-{len(list(folder.iterdir()))}"
        _barrier("corrupt")  # every process has counted before process 0 moves
        if jax.process_index() == 0:
            os.replace(self.directory / str(step), target)
        _barrier("moved")
        self._manager.reload()
        return target

    def read(self, step: int, parts: tuple[str, ...] = ("params", "mutable")) -> dict:
        """`parts` of checkpoint `step` as nested dicts of arrays on the first local device, verified. Needs no config.

        Raises:
            UserError: there is no such checkpoint, or it is corrupt.
        """
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        try:
            tree = self._manager.item_metadata(step)["state"].tree
            target = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=device), tree)
            state, expected = self._read(step, target)
            verify(state, expected)
        except Exception as error:  # Orbax, TensorStore, JSON and zstd raise types of their own; all mean unreadable
            raise UserError(
                f"checkpoint {step} in {self.directory} cannot be read ({_first_line(error)}); there are {self.steps()}"
            ) from error
        return {part: rename(state[part], MODULES) for part in parts}

    def close(self) -> None:
        self._manager.close()


def gather(value: float) -> list[float]:
    """`value` of every process, in order, so that all processes decide alike."""
    return np.atleast_1d(multihost_utils.process_allgather(np.float64(value))).tolist() if jax.process_count() > 1 else [value]


def _gather_lists(values: list[int]) -> list[list[int]]:
    """`values` of every process, in order. They must not be negative: -1 is the padding."""
    longest = int(max(gather(len(values))))
    if jax.process_count() == 1 or longest == 0:
        return [values] * jax.process_count()
    padded = np.array(values + [-1] * (longest - len(values)), np.int32)
    return [[int(value) for value in row if value >= 0] for row in multihost_utils.process_allgather(padded)]


def _read_together(read: Callable, message: str):
    """`read()` in every process. If it fails in one, all raise Corrupt; otherwise the others would wait for that one forever.

    Raises:
        Corrupt: with `message` in the process that failed.
        MACHINE_ERRORS: a device, memory or disk failed, which says nothing about the checkpoint.
    """
    value = failure = None
    try:
        value = read()
    except Exception as error:  # Orbax, TensorStore, JSON and zstd raise types of their own; nearly all mean unreadable
        if isinstance(error, MACHINE_ERRORS) and not isinstance(error, FileNotFoundError):
            raise
        failure = error
    failed = [process for process, has_failed in enumerate(gather(failure is not None)) if has_failed]
    if failed:
        raise Corrupt(f"{message} ({_first_line(failure)})" if failure else f"process {failed[0]} cannot read it") from failure
    return value


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


class Corrupt(Exception):
    """A checkpoint cannot be trusted; the message says why."""


def verify(tree, expected: Mapping[str, int]) -> None:
    """Raises Corrupt unless every leaf of `tree` has the checksum in `expected`, {leaf name: checksum}."""
    bad = [name for name, value in checksums(tree).items() if expected.get(name) != value]
    if bad:
        raise Corrupt(f"{len(bad)} of {len(expected)} leaves differ from their checksums, first {bad[0]!r}")


def _named(tree) -> list[tuple[str, object]]:
    return list(zip(leaf_names(tree), jax.tree.leaves(tree), strict=True))


def _first_line(error: BaseException) -> str:
    """Type and first line of an error. A long line loses its middle, since TensorStore names the cause at the end."""
    line = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: " + (line if len(line) <= 200 else f"{line[:90]} ... {line[-90:]}")


def write_json(path: Path, value) -> None:
    """Write `value` as JSON, atomically: a killed process leaves the old file or the new one. Only process 0 writes.

    Raises:
        MachineFault: the disk is full, or the directory is gone.
    """
    if jax.process_index() != 0:
        return
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")  # unique: `evaluate` may write the same file as `train`
    try:
        temporary.write_text(json.dumps(value, indent=1, sort_keys=False) + "\n")
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise not_written(path, error) from error

"""Orbax checkpoints that can be trusted: asynchronous, atomic, verified leaf by leaf on restore, falling back loudly."""

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
from ssl_jax.engine.renamed_keys import MODULES, names_of, rename
from ssl_jax.engine.sharding import leaf_names
from ssl_jax.errors import MachineFault, UserError, not_written

log = logging.getLogger(__name__)
STALE = 70  # seconds after which every host lists a directory as it is: NFS may remember one for a minute
# Of a device, of memory, of a disk that does not answer: the same checkpoint may be read tomorrow. Not so of a file that is missing.
NOT_OF_THE_FILE = (jax.errors.JaxRuntimeError, MemoryError, OSError)


def _checksum(x: jax.Array) -> jax.Array:
    """uint32 sum of the bits of each element times an odd weight of its index: any single flipped bit changes it.

    Integer sums are exact in any order, so the value does not depend on how the array lies on devices.
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
    """{leaf name: checksum} of a tree of arrays, computed where the arrays are."""
    values = jax.device_get(jax.tree.leaves(_checksum_tree(tree)))
    return {name: int(value) for name, value in zip(leaf_names(tree), values, strict=True)}


def saved_part(state: State) -> dict:
    """What a checkpoint holds of a state: everything but `frozen`."""
    return {"step": state.step, "params": state.params, "opt": state.opt, "mutable": state.mutable}


class _Manager(ocp.CheckpointManager):
    """Without a question of its own for SIGTERM, which would be in other numbers than those of `engine.loop.Signals`."""

    def reached_preemption(self, step: int) -> bool:
        return False


class Checkpoints:
    """The checkpoints of one run, in `directory`: the last `keep` and the best one by `best_metric` (the largest value; with '-' before
    the name the smallest; one without that metric is the worst).

    Each holds the state, the resolved config, and a checksum per leaf. The position in the data is the step.
    """

    def __init__(self, directory: Path | str, keep: int = 2, best_metric: str = "", read_only: bool = False):
        self.directory = Path(directory).absolute()
        preserve, score = [policies.LatestN(keep)], None
        if best_metric:
            name, sign = best_metric.removeprefix("-"), -1 if best_metric.startswith("-") else 1

            def score(metrics) -> float:
                value = sign * metrics.get(name, math.nan)  # the evaluations of an earlier start may have been others
                return -math.inf if math.isnan(value) else value

            preserve.append(policies.BestN(get_metric_fn=score, n=1, keep_checkpoints_without_metrics=False))
        if read_only and not self.directory.is_dir():
            raise UserError(f"no checkpoints in {self.directory}; give the --workdir of a run that has saved one")
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(preserve),
            best_fn=score,  # without it Orbax writes no metrics, and another start would not know of a best one
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
            create=not read_only,
        )
        self._handlers = {
            "state": ocp.StandardCheckpointHandler(),
            "config": ocp.JsonCheckpointHandler(),
            "checksums": ocp.JsonCheckpointHandler(),
        }
        self._manager = _Manager(self.directory, options=options, item_handlers=self._handlers)

    def steps(self) -> list[int]:
        """Saved steps, oldest first, as this process sees them."""
        return sorted(self._manager.all_steps())

    def agreed_steps(self) -> list[int]:
        """The same in every process, of which each lists the directory for itself; to be called by all of them.

        Raises:
            MachineFault: in every process, where they do not come to see the same ones.
        """
        for waited in range(STALE + 1):  # counted and not timed, so that all stop alike
            seen = _lists_of_each_process(self.steps())
            differing = [i for i, steps in enumerate(seen) if steps != seen[0]]
            if not differing:
                return seen[0]
            told = f"process {differing[0]} sees checkpoints {seen[differing[0]]} in {self.directory}, process 0 {seen[0]}"
            if waited == 0:
                log.warning("%s; waiting up to %d s for them to see the same", told, STALE)
            if waited < STALE:
                time.sleep(1.0)
                self._manager.reload()
        raise MachineFault(f"{told}; see that all hosts mount the same directory, and start again")

    def save(self, state: State, config: Mapping, metrics: Mapping[str, float] | None = None) -> None:
        """Start saving; the arrays are copied before this returns, the files are written in the background. A directory that has been
        deleted is made again: the run is the only place left where the state is.

        Raises:
            MachineFault: this save failed (disk full); older checkpoints stay as they are.
        """
        step, tree = int(state.step), saved_part(state)
        try:
            self._manager.wait_until_finished()
        except jax.errors.JaxRuntimeError:  # another process has gone; nothing is wrong with the disk
            raise
        except (OSError, ValueError, RuntimeError) as error:
            log.error("the checkpoint before step %d could not be saved (%s); trying again with this step", step, _first_line(error))
        try:
            if not all(of_each_process(self.directory.is_dir())):
                log.error("%s has been deleted under this run; it is made again, and step %d is saved into it", self.directory, step)
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
        """Add the metrics of a checkpoint that was saved before they were measured; to be called by every process.

        Raises:
            MachineFault: they cannot be written.
        """
        if jax.process_index() == 0:
            path = self.directory / str(step) / "metrics" / "metrics"  # where Orbax has them
            try:
                path.parent.mkdir(exist_ok=True)
            except OSError as error:
                raise not_written(path, error) from error
            write_json(path, dict(metrics))
        _meet("rated")
        self._manager.reload()

    def wait(self) -> None:
        """Return when everything is on disk. Raises MachineFault if the save in flight failed."""
        try:
            self._manager.wait_until_finished()
        except jax.errors.JaxRuntimeError:  # another process has gone; nothing is wrong with the disk
            raise
        except (OSError, ValueError, RuntimeError) as error:
            raise self._save_failed(error) from error

    def _check_space(self, tree) -> None:
        """Raises OSError, in every process, where a disk has less room than the arrays take: better before half of them are written."""
        arrays = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
        shards = [shard for array in arrays for shard in array.addressable_shards if shard.replica_id == 0]
        needed = sum(of_each_process(sum(shard.data.nbytes for shard in shards) / 2**20))
        free = min(of_each_process(shutil.disk_usage(self.directory).free / 2**20))
        if free < needed:
            raise OSError(f"no space left on the disk: {needed:.1f} MiB are needed and {free:.1f} MiB free")

    def _save_failed(self, error: Exception) -> MachineFault:
        done = self.steps()
        return MachineFault(
            f"could not save a checkpoint under {self.directory} ({_first_line(error)}); free space or mend the directory and run "
            f"the same command again: it resumes from " + (f"step {done[-1]}" if done else "the start, nothing is saved yet")
        )

    def config(self, step: int) -> dict:
        """The resolved config that checkpoint `step` was written with."""
        return dict(self._manager.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore())).config)

    def restore(self, step: int, target: State) -> State:
        """Checkpoint `step` as arrays placed like `target` (shapes with shardings); `frozen` is taken from `target`.

        Raises:
            UserError: it is of another config (names, shapes or dtypes differ).
            Corrupt: in every process, where one of them cannot read it, or a leaf does not have the checksum it was saved with, or it
                holds another step than its name says.
        """
        wanted = saved_part(target)
        tree = _together(lambda: self._manager.item_metadata(step)["state"].tree, "its metadata cannot be read")
        trees = (rename(tree, MODULES), wanted)
        saved, here = ({name: (tuple(leaf.shape), np.dtype(leaf.dtype)) for name, leaf in _named(x)} for x in trees)
        self._check_structure(step, saved, here)
        state, expected = _together(lambda: self._read(step, rename(wanted, names_of(tree))), "it cannot be read")
        verify(state, expected)
        state = rename(state, MODULES)
        if int(state["step"]) != step:
            raise Corrupt(f"it holds step {int(state['step'])}")
        return target._replace(**state)

    def _read(self, step: int, wanted) -> tuple[dict, dict[str, int]]:
        """(state, checksums) as this process reads them. The manager would wait for the others, which may have failed."""
        folder = self._manager.directory / str(step)
        state = self._handlers["state"].restore(folder / "state", args=ocp.args.StandardRestore(wanted))
        return state, self._handlers["checksums"].restore(folder / "checksums", args=ocp.args.JsonRestore())

    def _check_structure(self, step: int, saved: Mapping, wanted: Mapping) -> None:
        for name in [*wanted, *saved]:
            there, here = saved.get(name, (None, None)), wanted.get(name, (None, None))
            what, i = ("shape", 0) if there[0] != here[0] else ("dtype", 1)
            if there[i] != here[i]:
                raise UserError(
                    f"checkpoint {step} in {self.directory} is of another config: {name} has {what} {there[i]} there and "
                    f"{here[i]} here; use the config of that run or another --workdir"
                )

    def restore_latest(self, target: State) -> State | None:
        """The newest checkpoint that can be trusted, or None if there is none at all.

        A corrupt one is reported, moved aside to `<directory>_corrupt/` and the one before is tried; all processes take the same one.

        Raises:
            UserError: there were checkpoints and every one is corrupt.
            MachineFault: the processes do not see the same checkpoints.
        """
        found = self.agreed_steps()
        for step in reversed(found):
            try:
                state, corrupt = self.restore(step, target), None
            except Corrupt as error:
                state, corrupt = None, error
            if not any(of_each_process(corrupt is not None)):
                return state
            moved = self._set_aside(step)
            log.error(
                "checkpoint %d is corrupt: %s; moved to %s, falling back to the one before",
                step, corrupt or "another process cannot read it", moved,
            )  # fmt: skip
        if found:
            raise UserError(
                f"every checkpoint in {self.directory} is corrupt (moved to {self.directory}_corrupt); "
                "restore one from a backup, or delete the workdir to start again"
            )
        return None

    def _set_aside(self, step: int) -> Path:
        graveyard = Path(f"{self.directory}_corrupt")
        graveyard.mkdir(exist_ok=True)
        target = graveyard / f"{step}-{len(list(graveyard.iterdir()))}"
        _meet("corrupt")  # all have looked at what is there
        if jax.process_index() == 0:
            os.replace(self.directory / str(step), target)
        _meet("moved")
        self._manager.reload()
        return target

    def read(self, step: int, parts: tuple[str, ...] = ("params", "mutable")) -> dict:
        """`parts` of checkpoint `step` as a plain nested dict on the first local device, verified; needs no config.

        Raises:
            UserError: there is no such checkpoint, or it is corrupt.
        """
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        try:
            tree = self._manager.item_metadata(step)["state"].tree
            target = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=device), tree)
            state, expected = self._read(step, target)
            verify(state, expected)
        except Exception as error:  # Orbax, TensorStore, JSON and zstd each raise their own: all mean not readable
            raise UserError(
                f"checkpoint {step} in {self.directory} cannot be read ({_first_line(error)}); there are {self.steps()}"
            ) from error
        return {part: rename(state[part], MODULES) for part in parts}

    def close(self) -> None:
        self._manager.close()


def of_each_process(value: float) -> list[float]:
    """`value` of every process, so that all decide alike."""
    return np.atleast_1d(multihost_utils.process_allgather(np.float64(value))).tolist() if jax.process_count() > 1 else [value]


def _lists_of_each_process(values: list[int]) -> list[list[int]]:
    """`values`, none of which is negative, of every process."""
    longest = int(max(of_each_process(len(values))))
    if jax.process_count() == 1 or longest == 0:
        return [values] * jax.process_count()
    padded = np.array(values + [-1] * (longest - len(values)), np.int32)
    return [[int(value) for value in row if value >= 0] for row in multihost_utils.process_allgather(padded)]


def _together(read: Callable, told: str):
    """`read()` in every process. Raises Corrupt in all of them where it fails in one: that one would miss what they do next."""
    value = failure = None
    try:
        value = read()
    except Exception as error:  # Orbax, TensorStore, JSON and zstd each raise their own: all but a few mean not readable
        if isinstance(error, NOT_OF_THE_FILE) and not isinstance(error, FileNotFoundError):
            raise
        failure = error
    failed = [i for i, each in enumerate(of_each_process(failure is not None)) if each]
    if failed:
        raise Corrupt(f"{told} ({_first_line(failure)})" if failure else f"process {failed[0]} cannot read it") from failure
    return value


def _meet(where: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


class Corrupt(Exception):
    """A checkpoint that cannot be trusted, and why."""


def verify(tree, expected: Mapping[str, int]) -> None:
    """Raises Corrupt unless every leaf of `tree` has the checksum in `expected`."""
    bad = [name for name, value in checksums(tree).items() if expected.get(name) != value]
    if bad:
        raise Corrupt(f"{len(bad)} of {len(expected)} leaves differ from their checksums, first {bad[0]!r}")


def _named(tree) -> list[tuple[str, object]]:
    return list(zip(leaf_names(tree), jax.tree.leaves(tree), strict=True))


def _first_line(error: BaseException) -> str:
    """Type and first line; of a long one the two ends, since TensorStore says what happened last."""
    line = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: " + (line if len(line) <= 200 else f"{line[:90]} ... {line[-90:]}")


def write_json(path: Path, value) -> None:
    """Write atomically, so that a killed process leaves the old file or the new one; of several processes the first one writes.

    Raises:
        MachineFault: the disk is full, or the directory gone.
    """
    if jax.process_index() != 0:
        return
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")  # `evaluate` writes what `train` does
    try:
        temporary.write_text(json.dumps(value, indent=1, sort_keys=False) + "\n")
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise not_written(path, error) from error

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
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from ssl_jax import files
from ssl_jax.engine.checksums import Corrupt, checksums, nonfinite, verify
from ssl_jax.engine.method import State
from ssl_jax.engine.orbax_paths import openable
from ssl_jax.engine.processes import barrier, gather, gather_lists
from ssl_jax.engine.reading import check_step, first_line, raise_fault, read_back, read_together
from ssl_jax.engine.renamed_keys import MODULES, old_names_in, rename
from ssl_jax.engine.sharding import leaf_names
from ssl_jax.errors import MachineFault, NotFinite, UserError, not_written

log = logging.getLogger(__name__)
REMOVALS, REMOVAL_PAUSE = 20, 0.1  # looks at what a failed save left, and seconds between them
STALE = 70  # seconds after which every host sees a directory as it is: NFS caches listings for up to a minute


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
    `<directory>.json` says which one is the newest, so that a directory that is not mounted is no run without checkpoints.

    Raises:
        UserError: `read_only`, and the directory does not exist; it is no directory, or its name is no text.
        MachineFault: its disk fails.
    """

    def __init__(self, directory: Path | str, keep: int = 2, best_metric: str = "", read_only: bool = False):
        self.directory = Path(directory).absolute()
        self.record = Path(f"{self.directory}.json")
        self._checked = False  # whether a save of this process has been read back
        preserve, score = [policies.LatestN(keep)], None
        if best_metric:
            name, sign = best_metric.removeprefix("-"), -1 if best_metric.startswith("-") else 1

            def score(metrics) -> float:
                value = sign * metrics.get(name, math.nan)  # an earlier start may have had other evaluations
                return -math.inf if math.isnan(value) else value

            preserve.append(policies.BestN(get_metric_fn=score, n=1, keep_checkpoints_without_metrics=False))
        if os.path.lexists(self.directory) and not self.directory.is_dir():
            what = "a link to what is not there; mount its disk" if self.directory.is_symlink() else "no directory; move it away"
            raise UserError(f"{self.directory} is {what}, or choose another --workdir")
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
        self._opened = contextlib.ExitStack()
        try:
            if not read_only:
                self.directory.parent.mkdir(parents=True, exist_ok=True)
            opened = self._opened.enter_context(openable(self.directory))
            self._manager = _Manager(opened, options=options, item_handlers=self._handlers)
        except OSError as error:
            if read_only:
                raise MachineFault(f"{self.directory} cannot be read ({error.strerror}); repair its disk, and start again") from error
            raise not_written(self.directory, error) from error
        except (TypeError, ValueError, AttributeError, LookupError, RecursionError) as error:  # read for every step
            raise UserError(
                f"{self.directory} cannot be opened ({first_line(error)}); a checkpoint there has a damaged _CHECKPOINT_METADATA: "
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
            seen = gather_lists(self.steps())
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

        A deleted directory is created again, since the running process holds the only copy of the state. The first save is awaited
        and read back, so that a directory that loses what is written to it is noticed at once.

        Raises:
            NotFinite: the state has a NaN or an infinity; nothing was saved.
            MachineFault: this save failed (disk full), or the first one cannot be read back; older checkpoints are untouched.
        """
        step, tree = int(state.step), saved_part(state)
        if bad := nonfinite(tree):
            raise NotFinite(
                f"step {step}: the state is not finite ({len(bad)} leaves, first {bad[0]}), so it is not saved; the last checkpoint "
                "is kept. Lower the learning rate" + (", or set config.on_nonfinite='skip'" if _stops(config) else "")
            )
        sums = checksums(tree)
        try:
            self._manager.wait_until_finished()
            self._note()
        except jax.errors.JaxRuntimeError:  # another process has gone; nothing is wrong with the disk
            raise
        except (OSError, ValueError, RuntimeError) as error:
            log.error("the checkpoint before step %d could not be saved (%s); trying again with this step", step, first_line(error))
            self._remove_unfinished()
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
                    checksums=ocp.args.JsonSave(sums),
                ),
                metrics=dict(metrics) if metrics else None,
                force=True,
            )
        except jax.errors.JaxRuntimeError:  # another process has gone; nothing is wrong with the disk
            raise
        except (OSError, ValueError, RuntimeError) as error:
            raise self._save_failed(error) from error
        if not self._checked:
            self.wait()
            self._check_read_back(step, tree, sums)
            self._checked = True

    def _check_read_back(self, step: int, tree, sums: Mapping[str, int]) -> None:
        """Raises MachineFault unless checkpoint `step` can be read from the disk."""
        try:
            read_back(self._manager.directory / str(step), tree, sums)
        except jax.errors.JaxRuntimeError:  # another process has gone, or a device has no memory
            raise
        except Exception as error:  # Orbax, TensorStore, JSON and zstd raise types of their own; all mean unreadable
            raise MachineFault(
                f"checkpoint {step} was saved in {self.directory} and cannot be read back ({first_line(error)}); repair its disk, or "
                "choose another --workdir"
            ) from error

    def _note(self) -> None:
        """Write the newest saved step beside the directory, once it would outlive a power loss. Raises MachineFault."""
        newest = max(self.steps(), default=None)
        if newest is None or newest == self._noted():
            return
        if jax.process_index() == 0:
            try:
                files.flush_tree(self.directory / str(newest))  # Orbax flushes the arrays only
                files.flush(self.directory)
            except FileNotFoundError:  # someone has deleted it
                return
            except OSError as error:
                raise not_written(self.directory / str(newest), error) from error
        write_json(self.record, {"newest": newest})

    def _noted(self) -> int | None:
        """The newest step that was saved, by the file beside the directory; None without that file."""
        try:
            return int(json.loads(self.record.read_text())["newest"])
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError):
            log.warning("%s cannot be read and is ignored", self.record)
            return None

    def check_present(self, logged: int, least: int) -> None:
        """Check that no checkpoint has gone since it was saved. Every process calls it, before `restore_latest`.

        Args:
            logged: the last step with a metric or an evaluation.
            least: a run that has logged this step has saved a checkpoint, also where a version without the file wrote it.

        Raises:
            UserError: one has gone. Going on would begin earlier, and erase what was logged since.
        """
        noted = self._noted()
        for _ in range(STALE):  # NFS finds a new directory by its name before it lists it
            if noted is None or noted in self.steps() or not (self.directory / str(noted)).is_dir():
                break
            time.sleep(1.0)
            self._manager.reload()
        there = self.agreed_steps()
        newest = there[-1] if there else 0
        missing = logged >= least and not there if noted is None else noted > newest
        if any(gather(missing)):
            saved = f"logged step {logged}" if noted is None else f"saved step {noted}"
            with contextlib.suppress(OSError):  # made by this start; it would be in the way of what is moved back
                self.directory.rmdir()
            go_on = f", or delete {self.record} to go on at step {newest}" if there else ""
            raise UserError(
                f"this run has {saved}, and {self.directory} has {f'only {there}' if there else 'no checkpoint'}; mount or move back "
                f"its checkpoints{go_on}, or give --start_over to begin at step 0 again"
            )

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
        barrier("rated")
        self._manager.reload()

    def wait(self) -> None:
        """Wait until everything is on disk. Raises MachineFault if the save in flight failed."""
        try:
            self._manager.wait_until_finished()
        except jax.errors.JaxRuntimeError:  # another process has gone; nothing is wrong with the disk
            raise
        except (OSError, ValueError, RuntimeError) as error:
            raise self._save_failed(error) from error
        self._note()

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

    def _remove_unfinished(self) -> None:
        """Free the space of a save that failed. Its other threads may still write, so look until nothing has come back."""
        gone = 0
        for _ in range(REMOVALS if jax.process_index() == 0 else 0):
            left = list(self.directory.glob("*.orbax-checkpoint-tmp*"))
            for path in left:
                shutil.rmtree(path, ignore_errors=True)
            gone = 0 if left else gone + 1
            if gone == 2:
                break
            time.sleep(REMOVAL_PAUSE)

    def _save_failed(self, error: Exception) -> MachineFault:
        self._remove_unfinished()
        saved = self.steps()
        return MachineFault(
            f"could not save a checkpoint under {self.directory} ({first_line(error)}); free space or repair the directory and run "
            f"the same command again: it resumes from " + (f"step {saved[-1]}" if saved else "the start, nothing is saved yet")
        )

    def config(self, step: int) -> dict:
        """The resolved config that is stored in checkpoint `step`."""
        return dict(self._manager.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore())).config)

    def restore(self, step: int, target: State) -> State:
        """Checkpoint `step` as arrays with the shardings of `target` (a state of shapes); `frozen` comes from `target`.

        Raises:
            UserError: it belongs to another config (names, shapes or dtypes differ).
            Corrupt: in every process, if one cannot read it, a leaf has another checksum than saved or is not finite, or it holds
                another step than its directory name.
            MachineFault: the disk or the network cannot read it, which says nothing about the checkpoint.
        """
        wanted, folder = saved_part(target), self.directory / str(step)
        tree = read_together(folder, lambda: self._manager.item_metadata(step)["state"].tree, "its metadata cannot be read")
        trees = (rename(tree, MODULES), wanted)
        saved, here = ({name: (tuple(leaf.shape), np.dtype(leaf.dtype)) for name, leaf in _named(x)} for x in trees)
        self._check_structure(step, saved, here)
        state, expected = read_together(folder, lambda: self._read(step, rename(wanted, old_names_in(tree))), "it cannot be read")
        verify(state, expected)
        state = rename(state, MODULES)
        check_step(step, state)
        if bad := nonfinite(state):  # saved by an earlier version
            raise Corrupt(f"{bad[0]!r} is not finite")
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
                self._note()
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
        try:
            folder.mkdir(exist_ok=True)
            target = folder / f"{step}-{len(list(folder.iterdir()))}"
            barrier("corrupt")  # every process has counted before process 0 moves
            if jax.process_index() == 0:
                os.replace(self.directory / str(step), target)
        except (FileExistsError, NotADirectoryError):
            raise UserError(
                f"checkpoint {step} in {self.directory} is corrupt and cannot be moved to {folder}, which is no directory; move that "
                "file away"
            ) from None
        except OSError as error:
            raise not_written(target, error) from error
        barrier("moved")
        self._manager.reload()
        return target

    def read(self, step: int, parts: tuple[str, ...] = ("params", "mutable")) -> dict:
        """`parts` of checkpoint `step` as nested dicts of arrays on the first local device, verified. Needs no config.

        Raises:
            UserError: there is no such checkpoint, it is corrupt, or it holds another step than its directory name.
            MachineFault: the disk or the network cannot read it.
        """
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        try:
            tree = self._manager.item_metadata(step)["state"].tree
            target = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=device), tree)
            state, expected = self._read(step, target)
            verify(state, expected)
            check_step(step, state)
        except Exception as error:  # Orbax, TensorStore, JSON and zstd raise types of their own; all mean unreadable
            raise_fault(self.directory / str(step), error)
            raise UserError(
                f"checkpoint {step} in {self.directory} cannot be read ({first_line(error)}); there are {self.steps()}"
            ) from error
        return {part: rename(state[part], MODULES) for part in parts}

    def close(self) -> None:
        """Wait for a save in flight. That it failed is only logged, so that it does not hide the reason why the run ended."""
        try:
            self._manager.close()
        except jax.errors.JaxRuntimeError:
            raise
        except (OSError, ValueError, RuntimeError) as error:
            log.error("the last checkpoint in %s could not be saved (%s)", self.directory, first_line(error))
        self._opened.close()


def _named(tree) -> list[tuple[str, object]]:
    return list(zip(leaf_names(tree), jax.tree.leaves(tree), strict=True))


def _stops(config: Mapping) -> bool:
    return config.get("on_nonfinite", "stop") == "stop"


def write_json(path: Path, value) -> None:
    """Write `value` as JSON, atomically: a crash leaves the old file or the new one. Only process 0 writes.

    Raises:
        MachineFault: the disk is full, or the directory is gone.
    """
    if jax.process_index() == 0:
        files.write(path, json.dumps(value, indent=1, sort_keys=False) + "\n")

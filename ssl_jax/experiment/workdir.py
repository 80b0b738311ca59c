"""The directory of a run: one process at a time, one config, and a log beside the metrics."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import json
import logging
import os
import re
import sys
import time
import uuid
from pathlib import Path
from typing import IO

import jax
import numpy as np
from jax.experimental import multihost_utils

from ssl_jax import files
from ssl_jax.engine import durations
from ssl_jax.engine.checkpoint import write_json
from ssl_jax.engine.orbax_paths import check_text
from ssl_jax.engine.records import read_json, read_metrics
from ssl_jax.engine.renamed_keys import translate
from ssl_jax.errors import MachineFault, PrintableFormatter, UserError, not_written, workdir_not_made
from ssl_jax.experiment.config import differences, from_plain
from ssl_jax.experiment.config_values import check_values

PATIENCE = 100.0  # seconds that a restarted job waits for the lock; NFS keeps the locks of a dead host for 90
# What a config.json holds. The fields of a model or an optimizer are checked by what they build.
TYPES = {
    **dict.fromkeys(("batch_size", "seed", "accumulate", "log_every_steps", "keep_checkpoints", "eval_batch_size"), int),
    **dict.fromkeys(("method", "dtype", "xla", "convolutions", "on_nonfinite", "total"), str),
    **dict.fromkeys(("evaluate_every", "checkpoint_every", "best_metric"), str),
    **dict.fromkeys(("data", "model", "optim", "mesh", "stages", "warm_start", "evals", "references"), dict),
    **dict.fromkeys(("data.name", "data.data_dir", "data.train_split", "data.test_split"), str),
    **dict.fromkeys(("data.ops", "data.eval_ops", "data.image_shape", "sharding", "baselines"), list),
    **dict.fromkeys(("data.features", "data.kinds", "data.vocabulary", "data.specs"), dict),
    **dict.fromkeys(("data.workers", "data.num_classes", "data.examples", "data.image_shape.*", "mesh.*"), int),
    **dict.fromkeys(("model.encoder", "model.head", "optim.*", "stages.*", "evals.*", "references.*"), dict),
    **dict.fromkeys(("data.ops.*", "data.eval_ops.*", "sharding.*"), list),
    "baselines.*": str,
}
AT_LEAST_1 = ("batch_size", "accumulate", "eval_batch_size", "log_every_steps")
LOCK = ".lock"
OF_A_RUN = (  # what `train` writes and a later start reads or goes on with
    "config.json", "vocabulary.json", "provenance.json", "metrics.jsonl", "starts.jsonl", "evaluations.json", "checkpoints",
    "checkpoints.json", "checkpoints_corrupt", "tensorboard", "pictures", "profile", "report.html", "data.json",
    "stopped.json",
)  # fmt: skip
STOPPED = "stopped.json"  # there while the last start has ended at a loss that was not finite
NOTHING = r"(?!)"  # matches no key
LAG = 5.0  # seconds until a file that one host has created is visible on all

log = logging.getLogger(__name__)


class LogFile(logging.FileHandler):
    """log.txt. The first line that cannot be written is reported in one line; logging would print a traceback for each."""

    failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        if not self.failed:
            self.failed = True
            print(f"{self.baseFilename} cannot be written ({sys.exc_info()[1]})", file=sys.stderr)


class WorkdirLock:
    """The lock of process 0 on a workdir, until `close` or the end of the process. In other processes it does nothing.

    It is on the directory where the file system allows that, and on the file .lock in it. Someone may delete the file.
    """

    def __init__(self, workdir: Path, folder: int | None = None, file: IO | None = None):
        self.workdir, self._folder, self._file, self._due = workdir, folder, file, 0.0

    def check(self) -> None:
        """Check about once a second that the workdir is still there and ours.

        Raises:
            MachineFault: it was moved or deleted, or another process has locked it.
        """
        if self._file is None or time.monotonic() < self._due:
            return
        self._due = time.monotonic() + 1.0
        if not files.at(self.workdir, self._folder):
            raise MachineFault(
                f"--workdir={self.workdir} was moved or deleted during this run, which ends here; put it back, and run the same "
                "command again to go on from its last checkpoint"
            )
        path = self.workdir / LOCK
        if files.at(path, self._file.fileno()):
            return
        try:
            file = files.lock(path)
        except BlockingIOError:
            raise MachineFault(
                f"{path} was deleted, and another process now uses --workdir={self.workdir}; this run ends here"
            ) from None
        self._file.close()
        self._file = file
        log.warning("%s was deleted during this run; it is made again", path)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            os.close(self._folder)
            self._file = None

    def __enter__(self) -> WorkdirLock:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def lock_workdir(workdir: Path, patience: float = 0.0) -> WorkdirLock:
    """Create `workdir` and lock it. Only process 0 locks.

    Raises:
        UserError: it cannot be written or locked, or another process still holds it after `patience` seconds.
        MachineFault: its disk fails.
    """
    if jax.process_index() != 0:
        return WorkdirLock(workdir)
    check_text(workdir.absolute())
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        folder = os.open(workdir, os.O_RDONLY | os.O_DIRECTORY)
        (workdir / LOCK).touch()
        handler = LogFile(workdir / "log.txt")
    except OSError as error:
        raise workdir_not_made(workdir, error) from None
    file = _lock(workdir, folder, patience)
    handler.setFormatter(PrintableFormatter("%(asctime)s %(levelname)s %(message)s"))
    logging.getLogger("ssl_jax").addHandler(handler)
    return WorkdirLock(workdir, folder, file)


def _lock(workdir: Path, folder: int, patience: float) -> IO:
    deadline, warned = time.monotonic() + patience, False
    while True:
        try:
            _lock_folder(folder)
            return files.lock(workdir / LOCK)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise UserError(
                    f"--workdir={workdir} is in use by another process; wait for it or choose another directory"
                ) from None
        except OSError as error:
            failed = f"--workdir={workdir} cannot be locked ({error.strerror})"
            if error.errno in (errno.ENOSYS, errno.EOPNOTSUPP):
                raise UserError(f"{failed}: its file system has no locks; mount it with them or choose another directory") from None
            raise MachineFault(f"{failed}; see that its file system's locks work, and start again") from None
        if not warned:
            warned = True
            log.warning("--workdir=%s is in use by another process; waiting up to %.0f s for its end", workdir, patience)
        time.sleep(1.0)


def _lock_folder(folder: int) -> None:
    """Lock a directory where its file system can (NFS cannot). Raises BlockingIOError if another process holds it."""
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return


def begin_again(workdir: Path) -> None:
    """Move what a run has written to a new directory before-N in `workdir`, if there is anything. Only process 0 moves.

    Raises:
        MachineFault: it cannot be moved.
    """
    there = [workdir / name for name in OF_A_RUN if os.path.lexists(workdir / name)]
    if jax.process_index() != 0 or not there:
        return
    number = next(n for n in itertools.count(1) if not (workdir / f"before-{n}").exists())
    target = workdir / f"before-{number}"
    try:
        target.mkdir()
        for path in there:
            os.rename(path, target / path.name)
        files.flush(workdir)
    except OSError as error:
        raise not_written(target, error) from error
    log.warning("--start_over: the earlier files of this run are in %s; this run begins at step 0", target)


def last_logged(workdir: Path) -> int:
    """The last step of which `workdir` has metrics or an evaluation; 0 where there is none."""
    steps = [int(line["step"]) for line in read_metrics(workdir)]
    with contextlib.suppress(FileNotFoundError, ValueError, TypeError, KeyError):  # who reads the evaluations reports what is wrong
        steps += [int(entry["step"]) for entry in json.loads((workdir / "evaluations.json").read_text())]
    return max(steps, default=0)


def check_same_workdir(workdir: Path) -> None:
    """Check that all processes see the same directory. Every process calls this, after `lock_workdir`.

    Raises:
        UserError: in every process, where one sees another directory.
    """
    if jax.process_count() == 1:
        return
    nonce = multihost_utils.broadcast_one_to_all(np.frombuffer(uuid.uuid4().bytes, np.uint8))
    path = workdir / f".{bytes(nonce).hex()}"  # a new name, since hosts may cache that a file is absent
    if jax.process_index() == 0:
        path.touch()
    multihost_utils.sync_global_devices("workdir")
    deadline = time.monotonic() + LAG
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    seen = multihost_utils.process_allgather(np.array(path.exists()))
    if jax.process_index() == 0:
        path.unlink()
    blind = np.flatnonzero(~seen)
    if len(blind):
        names = ", ".join(map(str, blind))
        raise UserError(
            f"--workdir={workdir} of process {names} is not that of process 0; give a directory that all hosts share"
        )


def record_config(workdir: Path, config: dict, steps: int) -> None:
    """Write the resolved config, or check it against the one of this workdir.

    More than the keys of MAY_CHANGE may differ, with a line in the log: all keys if nothing was saved yet; `total` if the run is
    finished and becomes longer; learning rates and `on_nonfinite` if it ended because a loss was not finite.

    Args:
        steps: `config.total` in steps.

    Raises:
        UserError: the workdir has another config; the line names the differences.
    """
    path = workdir / "config.json"
    if path.exists():
        before = _read(path)
        allowed, changed = _unlocked(workdir, before, steps), []
        for line in differences(before, config):
            if re.match(allowed, line):
                log.info("another config than at the last start: %s", line)
            else:
                changed.append(line)
        if changed:
            stages = {f"stages.{name}.step": stage.get("step") for name, stage in before.get("stages", {}).items()}
            flags = "".join(f" (--config.{key}={step})" for key, step in stages.items() if any(key in line for line in changed))
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise UserError(
                f"--workdir={workdir} was started with another config ({'; '.join(changed[:3])}{more}); "
                "use another --workdir, or the config it was started with" + flags
            )
    write_json(path, config)


def _unlocked(workdir: Path, before: dict, steps: int) -> str:
    """A regular expression for the keys in which the config of a run may differ from `before`, the one it was started with."""
    folder = workdir / "checkpoints"
    saved = [int(path.name) for path in folder.glob("[0-9]*") if path.name.isdigit()]
    if not saved:
        # A version that notes the newest checkpoint has written this file beside them; they may be on a disk that is not mounted.
        gone = (workdir / "checkpoints.json").exists() or (workdir / "checkpoints_corrupt").exists()
        return NOTHING if gone else ""
    keys = [r"optim\.[^.]+\.lr: ", "on_nonfinite: "] if (workdir / STOPPED).exists() else []
    examples = before.get("data", {}).get("examples")
    if examples and steps > durations.to_steps(before["total"], "config.total", before["batch_size"], examples) == max(saved):
        keys.append("total: ")
    return "|".join(keys) or NOTHING


def note_stop(workdir: Path, reason: str | None) -> None:
    """Note that the run ended because a number was not finite; None: that it did not. Only process 0 writes.

    Raises:
        MachineFault: the disk fails.
    """
    path = workdir / STOPPED
    if reason is not None:
        write_json(path, {"not finite": reason})
    elif jax.process_index() == 0:
        path.unlink(missing_ok=True)


def read_config(workdir: Path):
    """The locked config of a run. Raises UserError where there is none."""
    path = workdir / "config.json"
    if not path.is_file():
        raise UserError(f"--workdir={workdir} holds no run (no config.json); give the directory of one")
    return from_plain(_read(path))


def _read(path: Path) -> dict:
    """The values of a config.json, with the keys of this version. Raises UserError unless it is the config of a run."""
    remedy = "restore it from a backup, or from log.txt's command in another --workdir"
    values = read_json(path, dict, {"method": str, "data": dict, "model": dict, "optim": dict, "batch_size": int, "seed": int}, remedy)
    try:
        values = translate(values)
        from_plain(values)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({str(error) or type(error).__name__}); {remedy}") from None
    for name, kind in TYPES.items():
        for at in _found(values, name.split(".")):
            if type(at) is not kind or (name in AT_LEAST_1 and at < 1):
                raise UserError(f"{path} is damaged ({name} is {json.dumps(at)[:40]}); {remedy}")
    try:
        check_values(from_plain(values))
    except UserError as error:
        raise UserError(f"{path} holds a value that no run has: {error}") from None
    return values


def _found(values, parts: list[str]) -> list:
    """The values at a dotted name, in which '*' is every key or index; without null, which is no value."""
    for i, part in enumerate(parts):
        if part == "*":
            children = values.values() if isinstance(values, dict) else values if isinstance(values, list) else ()
            return [value for child in children for value in _found(child, parts[i + 1 :])]
        values = values.get(part) if isinstance(values, dict) else None
    return [] if values is None else [values]

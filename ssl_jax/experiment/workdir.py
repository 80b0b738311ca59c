"""The directory of a run: one process at a time, one config, and a log beside the metrics."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import re
import time
import uuid
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from ssl_jax.engine import durations
from ssl_jax.engine.checkpoint import write_json
from ssl_jax.engine.renamed_keys import translate
from ssl_jax.errors import MachineFault, UserError
from ssl_jax.experiment.config import differences, from_plain

PATIENCE = 100.0  # seconds that a restarted job waits for the lock; NFS keeps the locks of a dead host for 90
BAD_PATH = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT, errno.EISDIR, errno.ENAMETOOLONG)
STOPPED = "stopped.json"  # there while the last start has ended at a loss that was not finite
NOTHING = r"(?!)"  # matches no key
LAG = 5.0  # seconds until a file that one host has created is visible on all

log = logging.getLogger(__name__)


def lock_workdir(workdir: Path, patience: float = 0.0):
    """Create `workdir` and lock it until the returned file is closed or the process ends. Only process 0 locks.

    Raises:
        UserError: it cannot be written or locked, or another process still holds it after `patience` seconds.
        MachineFault: its disk fails.
    """
    if jax.process_index() != 0:
        return contextlib.nullcontext()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = open(workdir / ".lock", "a")  # noqa: SIM115  held for the life of the process
        handler = logging.FileHandler(workdir / "log.txt")
    except OSError as error:
        if error.errno in BAD_PATH:
            raise UserError(f"--workdir={workdir} cannot be written ({error.strerror}); choose another directory") from None
        raise MachineFault(f"--workdir={workdir} cannot be written ({error.strerror}); repair its disk, and start again") from None
    _lock(lock, workdir, patience)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.getLogger("ssl_jax").addHandler(handler)
    return lock


def _lock(file, workdir: Path, patience: float) -> None:
    deadline, warned = time.monotonic() + patience, False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
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
        before = translate(json.loads(path.read_text()))
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
    return from_plain(json.loads(path.read_text()))

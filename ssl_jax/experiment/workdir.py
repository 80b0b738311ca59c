"""The directory of a run: one process at a time, one config, and a log beside the metrics."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import time
import uuid
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from ssl_jax.engine.checkpoint import write_json
from ssl_jax.engine.records import read_json
from ssl_jax.engine.renamed_keys import translate
from ssl_jax.errors import MachineFault, PrintableFormatter, UserError
from ssl_jax.experiment.config import differences, from_plain

PATIENCE = 100.0  # seconds that a restarted job waits for the lock; NFS keeps the locks of a dead host for 90
BAD_PATH = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT, errno.EISDIR, errno.ENAMETOOLONG)
# What a config.json holds. The fields of a model or an optimizer are checked by what they build.
TYPES = {
    **dict.fromkeys(("batch_size", "seed", "accumulate", "log_every_steps", "keep_checkpoints", "eval_batch_size"), int),
    **dict.fromkeys(("method", "dtype", "xla", "on_nonfinite", "total", "evaluate_every", "checkpoint_every", "best_metric"), str),
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
    handler.setFormatter(PrintableFormatter("%(asctime)s %(levelname)s %(message)s"))
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


def record_config(workdir: Path, config: dict) -> None:
    """Write the resolved config, or check it against the one of this workdir.

    Raises:
        UserError: the workdir has another config; the line names the differences.
    """
    path = workdir / "config.json"
    if path.exists():
        before = _read(path)
        changed = differences(before, config)
        if changed:
            steps = {f"stages.{name}.step": stage.get("step") for name, stage in before.get("stages", {}).items()}
            flags = "".join(f" (--config.{key}={step})" for key, step in steps.items() if any(key in line for line in changed))
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise UserError(
                f"--workdir={workdir} was started with another config ({'; '.join(changed[:3])}{more}); "
                "use another --workdir, or the config it was started with" + flags
            )
    write_json(path, config)


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
    return values


def _found(values, parts: list[str]) -> list:
    """The values at a dotted name, in which '*' is every key or index; without null, which is no value."""
    for i, part in enumerate(parts):
        if part == "*":
            children = values.values() if isinstance(values, dict) else values if isinstance(values, list) else ()
            return [value for child in children for value in _found(child, parts[i + 1 :])]
        values = values.get(part) if isinstance(values, dict) else None
    return [] if values is None else [values]

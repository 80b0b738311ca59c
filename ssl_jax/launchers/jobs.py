"""What was submitted from a workdir: WORKDIR/job.json, and what all engines need to send it and to ask for it."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from ssl_jax.engine.metrics import read_metrics
from ssl_jax.errors import UserError

ENGINES = {"slurm": "slurm", "gke": "gke", "tpu-vm": "tpu_vm", "local": "detached"}
SAVED = 75  # exit code of a training that SIGTERM ended: not done, to be started again


class JobRequest(NamedTuple):
    """What is to be submitted."""

    config: str
    flags: Sequence[str]  # of `train`: --config.KEY=VALUE and others
    workdir: Path
    max_restarts: int
    number: int  # of this submission from its workdir, from 1
    options: argparse.Namespace  # the flags of the engine
    rest: Sequence[str]  # what else was said, for an engine that passes it on

    def arguments(self, workdir: Path | None = None) -> list[str]:
        """Of `launch.py`; `workdir` is what the directory is called where it runs."""
        where = self.workdir if workdir is None else workdir
        return ["train", f"--config={self.config}", f"--workdir={where}", *self.flags, f"--saved_code={SAVED}"]


class JobState(NamedTuple):
    alive: bool  # waiting or running, so that nothing else may be submitted
    told: str


def engine(name: str) -> ModuleType:
    return importlib.import_module(f"ssl_jax.launchers.{ENGINES[name]}")


def earlier(workdir: Path) -> dict | None:
    """What was submitted last, if anything was."""
    path = workdir / "job.json"
    return json.loads(path.read_text()) if path.is_file() else None


def read(workdir: Path) -> tuple[dict, ModuleType]:
    """The last submission and its engine. Raises UserError if there is none."""
    job = earlier(workdir)
    if job is None:
        raise UserError(
            f"--workdir={workdir} has no job.json: nothing was submitted from it; see `launch.py submit --help`"
        )
    return job, engine(job["engine"])


def record(order: JobRequest, name: str, sent: str, told: dict) -> dict:
    """Write and return job.json."""
    when = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    command = ["launch.py", *order.arguments()]
    job = {"engine": name, **told, "number": order.number, "submitted": when, "command": command, "sent": sent}
    # Not by write_json, which asks JAX for devices: the job may want to have them.
    temporary = order.workdir / ".job.json.tmp"
    temporary.write_text(json.dumps(job, indent=1) + "\n")
    os.replace(temporary, order.workdir / "job.json")
    return job


def progress(workdir: Path) -> str:
    """'; step 12' of what has been logged, where the metrics can be seen from here."""
    last = max((line["step"] for line in read_metrics(workdir)), default=None)
    return "" if last is None else f"; step {last} is the last one logged"


def slug(workdir: Path) -> str:
    """The last part of the path as a name that every engine takes: a DNS label with room for a suffix."""
    name = re.sub(r"[^a-z0-9]+", "-", workdir.resolve().name.lower()).strip("-")[:36].strip("-")
    return name if name[:1].isalpha() else f"run-{name}".strip("-")


def need(program: str, why: str) -> None:
    """Raises UserError where `program` is not installed."""
    if shutil.which(program) is None:
        raise UserError(f"{program} is not installed here, and {why}; --dry_run prints what would be sent")


def call(argv: Sequence[str], stdin: str | None = None) -> str:
    """What a command of an engine prints.

    Raises:
        UserError: it failed, with the last line that it wrote to stderr.
    """
    done = subprocess.run(argv, input=stdin, capture_output=True, text=True)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise UserError(f"`{' '.join(argv[:4])} ...` failed: {lines[-1][:300]}")
    return done.stdout


def show(argv: Sequence[str]) -> None:
    """Run a command whose output is for the terminal. Raises UserError if it fails."""
    done = subprocess.run(argv)
    if done.returncode != 0:
        raise UserError(f"`{' '.join(argv[:4])} ...` failed with exit code {done.returncode}")


def tail(path: Path, lines: int, follow: bool, alive: Callable[[], bool]) -> None:
    """Print the last lines of a file and, with `follow`, what is added to it as long as the job is alive.

    Raises:
        UserError: there is no such file.
    """
    if not path.is_file():
        raise UserError(f"there is no {path} yet; `launch.py status --workdir=...` tells whether the job has begun")
    with path.open(errors="replace") as file:
        text = file.read().splitlines(keepends=True)
        print("".join(text[-lines:] if lines else []), end="", flush=True)
        while follow:
            last = not alive()  # asked before reading, so that nothing is missed
            print(file.read(), end="", flush=True)
            if last:
                return
            time.sleep(1.0)

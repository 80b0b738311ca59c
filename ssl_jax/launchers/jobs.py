"""WORKDIR/job.json, the job that was submitted from a workdir, and what all engines need to submit and query jobs."""

from __future__ import annotations

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
from typing import Any, NamedTuple

from ssl_jax.engine.records import read_json
from ssl_jax.errors import UserError, control_characters, printable

ENGINES = {"slurm": "slurm", "gke": "gke", "tpu-vm": "tpu_vm", "local": "detached"}
NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")  # of a job, a namespace, a TPU or a zone, as clouds have them
SAVED = 75  # exit code of a training that saved after SIGTERM: not done, to be restarted


class JobRequest(NamedTuple):
    """A training to submit."""

    config: str
    flags: Sequence[str]  # of `train`: --config.KEY=VALUE and others
    workdir: Path
    max_restarts: int
    number: int  # of the submission from this workdir, from 1
    options: Any  # the flags of the engine, as attributes
    rest: Sequence[str]  # other arguments, for an engine with PASSES_ON

    def arguments(self, workdir: Path | None = None) -> list[str]:
        """The arguments of `launch.py`; `workdir` is the path of the directory on the machine that runs it."""
        where = self.workdir if workdir is None else workdir
        return ["train", f"--config={self.config}", f"--workdir={where}", *self.flags, f"--saved_code={SAVED}"]


class JobState(NamedTuple):
    alive: bool  # waiting or running, so that nothing else may be submitted
    text: str


def engine(name: str) -> ModuleType:
    return importlib.import_module(f"ssl_jax.launchers.{ENGINES[name]}")


def earlier(workdir: Path) -> dict | None:
    """The last submission from `workdir`; None where there is none. Raises UserError if its record is damaged."""
    path = workdir / "job.json"
    if not path.exists():
        return None
    remedy = "restore it, or move it away if no job of this workdir runs"
    job = read_json(path, dict, {"engine": str, "number": int}, remedy)
    if job["engine"] not in ENGINES:
        raise UserError(f"{path} is damaged (it has engine {job['engine']!r}); {remedy}")
    for key, wanted in engine(job["engine"]).FIELDS.items():
        value = job.get(key)
        right = wanted.fullmatch(value) if isinstance(value, str) and wanted else type(value) is int and not wanted and value > 1
        if not right:  # programs of the engine get these as arguments
            raise UserError(f"{path} is damaged (it has {key} {json.dumps(value)[:60]}); {remedy}")
    return job


def read(workdir: Path) -> tuple[dict, ModuleType]:
    """The last submission and its engine. Raises UserError if there is none."""
    job = earlier(workdir)
    if job is None:
        raise UserError(
            f"--workdir={workdir} has no job.json: nothing was submitted from it; see `launch.py submit --help`"
        )
    return job, engine(job["engine"])


def record(request: JobRequest, name: str, sent: str, submitted: dict) -> dict:
    """Write and return job.json. `submitted` is what the `submit` of engine `name` returned."""
    when = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    command = ["launch.py", *request.arguments()]
    job = {"engine": name, **submitted, "number": request.number, "submitted": when, "command": command, "sent": sent}
    # Not by `write_json`, which opens the JAX devices that the job may need.
    temporary = request.workdir / ".job.json.tmp"
    temporary.write_text(json.dumps(job, indent=1) + "\n")
    os.replace(temporary, request.workdir / "job.json")
    return job


def slug(workdir: Path) -> str:
    """The last part of the path as a DNS label with room for a suffix, which every engine accepts as a name."""
    name = re.sub(r"[^a-z0-9]+", "-", workdir.resolve().name.lower()).strip("-")[:36].strip("-")
    return name if name[:1].isalpha() else f"run-{name}".strip("-")


def check_words(request: JobRequest) -> None:
    """Raises UserError for control characters: a new line would be one of a script. Overrides are quoted."""
    options = {name: value for name, value in vars(request.options).items() if isinstance(value, str) and name != "setup"}
    words = {"config": request.config, "workdir": str(request.workdir), **options}
    for text in [f"--{name}={value}" for name, value in words.items()] + [*request.flags, *request.rest]:
        if control_characters(text.replace("\n", "").replace("\t", "") if text.startswith("--config.") else text):
            raise UserError(f"argument {printable(text)} has a control character; leave it out")


def check_name(flag: str, value: str) -> str:
    """`value`. Raises UserError unless it is a name that gcloud and kubectl accept, and no option of theirs."""
    if not NAME.fullmatch(value):
        raise UserError(f"{flag}={value} is no name; give lowercase letters, digits and '-', as in my-name-1")
    return value


def need(program: str, why: str) -> None:
    """Raises UserError where `program` is not installed."""
    if shutil.which(program) is None:
        raise UserError(f"{program} is not installed here, and {why}; --dry_run prints what would be sent")


def call(argv: Sequence[str], stdin: str | None = None) -> str:
    """Run a program of an engine; returns its stdout.

    Raises:
        UserError: it failed; with the last line of its stderr.
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
    """Print the last lines of a file; with `follow` go on while the job is alive.

    Raises:
        UserError: there is no such file.
    """
    if not path.is_file():
        raise UserError(f"there is no {path} yet; `launch.py status --workdir=...` prints whether the job has started")
    with path.open(errors="replace") as file:
        text = file.read().splitlines(keepends=True)
        _show("".join(text[-lines:] if lines else []))
        while follow:
            last = not alive()  # before reading, so that nothing is missed
            _show(file.read())
            if last:
                return
            time.sleep(1.0)


def _show(text: str) -> None:
    """Print lines of a log, which may hold any names; a terminal must not take them for commands."""
    print(printable(text, keep="\n\t"), end="", flush=True)

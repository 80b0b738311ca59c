"""WORKDIR/job.json, the job that was submitted from a workdir, and what all engines need to submit and query jobs."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from ssl_jax import files
from ssl_jax.engine.records import read_json
from ssl_jax.errors import MachineFault, UserError, control_characters, not_written, printable

ENGINES = {"slurm": "slurm", "gke": "gke", "tpu-vm": "tpu_vm", "local": "detached"}
NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")  # of a job, a namespace, a TPU or a zone, as clouds have them
PENDING = "job.pending.json"  # job.json before the engine has answered
ROOM = 4096  # bytes kept for what the engine answers
SAVED = 75  # exit code of a training that saved after SIGTERM: not done, to be restarted


class JobRequest(NamedTuple):
    """A training to submit, or with `only` the runs of a sweep as one array of jobs."""

    config: str
    flags: Sequence[str]  # of `train`: --config.KEY=VALUE and others; of a sweep all that `sweep` needs for its plan
    workdir: Path
    max_restarts: int
    number: int  # of the submission from this workdir, from 1
    options: Any  # the flags of the engine, as attributes
    rest: Sequence[str]  # other arguments, for an engine with PASSES_ON
    only: Sequence[int] = ()  # of a sweep: the numbers of its runs, one for each job of the array

    def arguments(self, workdir: Path | None = None, only: int | str | None = None) -> list[str]:
        """The arguments of `launch.py`.

        Args:
            workdir: the path of the directory on the machine that runs it.
            only: the number of a run of a sweep, or a text that the engine replaces by it; None for the whole sweep.
        """
        where = self.workdir if workdir is None else workdir
        if self.only:
            return ["sweep", *self.flags, f"--workdir={where}", *([] if only is None else [f"--only={only}"])]
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


def check_ended(job: dict | None, workdir: Path) -> None:
    """Raises UserError while the last submission from `workdir` waits or runs."""
    state = None if job is None else engine(job["engine"]).state(job, workdir)
    if state is not None and state.alive:
        raise UserError(
            f"{job['engine']} job {job['id']} of --workdir={workdir} is {state.text}; wait for it, or "
            f"`python launch.py cancel --workdir={workdir}`"
        )


def read(workdir: Path) -> tuple[dict, ModuleType]:
    """The last submission and its engine. Raises UserError if there is none, or if it did not come to its end."""
    check_pending(workdir)
    job = earlier(workdir)
    if job is None:
        raise UserError(
            f"--workdir={workdir} has no job.json: nothing was submitted from it; see `launch.py submit --help`"
        )
    return job, engine(job["engine"])


def start(request: JobRequest, name: str, sent: str) -> dict:
    """Submit to engine `name`, and return job.json. What is needed to record the job is written before the job is started.

    Raises:
        UserError: the engine refuses it, or an earlier submission did not come to its end.
        MachineFault: the workdir cannot be written. If that is so only after the start, the job is canceled.
    """
    check_pending(request.workdir)
    pending = request.workdir / PENDING
    command = ["launch.py", *request.arguments()]
    about = {"number": request.number, "submitted": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "command": command, "sent": sent}
    text = json.dumps({"engine": name, "id": None, **about}, indent=1) + "\n"
    files.write(pending, text + " " * ROOM)  # so that the disk has room for the id
    try:
        submitted = engine(name).submit(request)
    except Exception:  # of any kind; after KeyboardInterrupt the file stays, since the job may have been sent
        pending.unlink(missing_ok=True)
        raise
    job = {"engine": name, **submitted, **about}
    try:
        with pending.open("r+") as file:
            file.write(json.dumps(job, indent=1) + "\n")
            file.truncate()
        files.put(pending, request.workdir / "job.json")
    except OSError as error:
        engine(name).cancel(job, request.workdir)
        pending.unlink(missing_ok=True)
        fault = not_written(request.workdir / "job.json", error)
        raise MachineFault(f"{name} job {job['id']} was started and is canceled again, since {fault}") from error
    return job


def check_pending(workdir: Path) -> None:
    """Raises UserError if a submission was interrupted after it had begun: its job may run, and its id is not known."""
    pending = workdir / PENDING
    if pending.exists():
        raise UserError(
            f"a submission from --workdir={workdir} did not come to its end ({pending} is left), and its job may run; look for it, "
            "cancel it there, and delete that file"
        )


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


def check_count(flag: str, value: int, most: int = 2**16) -> None:
    """Raises UserError unless `value` is from 1 to `most`."""
    if not 1 <= value <= most:
        raise UserError(f"{flag}={value} must be at least 1 and at most {most}")


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

"""`submit --to=local`: `launch.py train --processes=N` in a session of its own, which outlives this terminal."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

from ssl_jax.errors import UserError
from ssl_jax.launchers import jobs
from ssl_jax.launchers.supervise import launch_command
from ssl_jax.processes import born

# The shell ignores the SIGTERM that is meant for the training, and writes the exit code of the training to a file.
SCRIPT = 'trap : TERM; "$@"; echo $? > "$0"'
FIELDS = {"id": None, "host": re.compile(r".+"), "born": re.compile(r"\d+|alive")}
ENDS = {
    0: "finished",
    2: "refused as bad input",
    jobs.SAVED: "stopped by SIGTERM, and saved",
    143: "stopped by SIGTERM before the first step",
}


def add_arguments(group) -> None:
    group.add_argument("--processes", type=int, default=1, help="processes of the run (default: 1)")


def command(request: jobs.JobRequest) -> list[str]:
    """Raises UserError for an impossible number of processes."""
    jobs.check_count("--processes", request.options.processes, 1024)
    flags = [f"--processes={request.options.processes}", f"--max_restarts={request.max_restarts}"]
    exit_file = str(request.workdir / "job.exit")
    return ["sh", "-c", SCRIPT, exit_file, *launch_command(), *request.arguments(), *flags]


def describe(request: jobs.JobRequest) -> str:
    return f"setsid {shlex.join(command(request))} >> {shlex.quote(str(_log(request.workdir)))} 2>&1 < /dev/null &"


def submit(request: jobs.JobRequest) -> dict:
    (request.workdir / "job.exit").unlink(missing_ok=True)
    with _log(request.workdir).open("a") as log:
        shell = subprocess.Popen(
            command(request), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    return {"id": shell.pid, "host": os.uname().nodename, "born": born(shell.pid)}


def state(job: dict, workdir: Path) -> jobs.JobState:
    """Raises UserError on another machine than that of the process."""
    if job["host"] != os.uname().nodename:
        raise UserError(f"the job of --workdir={workdir} is a process of {job['host']}; ask there")
    if _is_ours(job, workdir):
        return jobs.JobState(True, "running")
    try:
        code = int((workdir / "job.exit").read_text())
    except (OSError, ValueError):
        return jobs.JobState(False, "gone, without an exit code (killed, or the machine was restarted)")
    return jobs.JobState(False, ENDS.get(code, f"failed with exit code {code}; see `launch.py logs`"))


def cancel(job: dict, workdir: Path) -> None:
    """Raises UserError unless the process is the one that `submit` started: job.json may be of another workdir, or changed by hand."""
    if not _is_ours(job, workdir):
        raise UserError(f"process {job['id']} is not the job of --workdir={workdir}; end the job by its own id")
    with contextlib.suppress(ProcessLookupError):  # it has ended since
        os.killpg(job["id"], signal.SIGTERM)


def logs(job: dict, workdir: Path, lines: int, follow: bool) -> None:
    jobs.tail(_log(workdir), lines, follow, lambda: state(job, workdir).alive)


def _log(workdir: Path) -> Path:
    return workdir / "job.log"


def _is_ours(job: dict, workdir: Path) -> bool:
    """Whether the process of `job` runs, began when `submit` recorded it, and has the command that `submit` starts for `workdir`."""
    pid = job["id"]
    if born(pid) != job["born"]:
        return False
    process = Path(f"/proc/{pid}")
    if not process.exists():  # no /proc on this system
        return True
    try:
        for _ in range(20):  # a program that begins or ends has no arguments for a moment
            if command := process.joinpath("cmdline").read_text(errors="surrogateescape"):
                break
            time.sleep(0.05)
        _, _, script, exit_file, *_ = command.split("\0")
        beside = (process.joinpath("cwd").resolve() / exit_file).parent
        return script == SCRIPT and os.getpgid(pid) == pid and beside.resolve() == workdir.resolve()
    except (OSError, ValueError):  # it has ended since, belongs to another user, or has fewer arguments
        return False

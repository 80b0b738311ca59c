"""`submit --to=local`: `launch.py train --processes=N` in a session of its own, which outlives this terminal."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
from pathlib import Path

from ssl_jax.errors import UserError
from ssl_jax.launchers import jobs
from ssl_jax.launchers.supervise import launch_command

# The shell ignores the SIGTERM that is meant for the training, and writes the exit code of the training to a file.
SCRIPT = 'trap : TERM; "$@"; echo $? > "$0"'
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
    if request.options.processes < 1:
        raise UserError(f"--processes={request.options.processes} must be at least 1")
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
    return {"id": shell.pid, "host": os.uname().nodename, "born": _born(shell.pid)}


def state(job: dict, workdir: Path) -> jobs.JobState:
    """Raises UserError on another machine than that of the process."""
    if job["host"] != os.uname().nodename:
        raise UserError(f"the job of --workdir={workdir} is a process of {job['host']}; ask there")
    if _born(job["id"]) == job["born"]:
        return jobs.JobState(True, "running")
    try:
        code = int((workdir / "job.exit").read_text())
    except (OSError, ValueError):
        return jobs.JobState(False, "gone, without an exit code (killed, or the machine was restarted)")
    return jobs.JobState(False, ENDS.get(code, f"failed with exit code {code}; see `launch.py logs`"))


def cancel(job: dict, workdir: Path) -> None:
    os.killpg(job["id"], signal.SIGTERM)


def logs(job: dict, workdir: Path, lines: int, follow: bool) -> None:
    jobs.tail(_log(workdir), lines, follow, lambda: state(job, workdir).alive)


def _log(workdir: Path) -> Path:
    return workdir / "job.log"


def _born(pid: int) -> str:
    """The start time of a process, which tells it from a later one with the same id; '' where there is none.

    Without /proc it is 'alive' for every process.
    """
    if Path("/proc/self/stat").exists():
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return ""
        return "" if fields[0] == "Z" else fields[19]
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    return "alive"

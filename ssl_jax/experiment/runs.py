"""Trains several runs, each by `launch.py train` in a process of its own, and says from files how far each one is.

A run is an ordinary workdir, so it resumes as any other. What it prints is appended to `output.txt` there; `attempt.json` holds its
last start: {"state": "running", "host", "pid", "born"}, or how that ended: {"state", "message"}, see `ENDS`.
Imports no JAX.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ssl_jax import files
from ssl_jax.engine import durations
from ssl_jax.engine.records import read_evaluations, read_json, read_metrics
from ssl_jax.errors import MachineFault, UserError, printable
from ssl_jax.processes import born

log = logging.getLogger(__name__)

SAVED = 75  # exit code of a training that saved after SIGTERM
INTERRUPTED = (SAVED, 129, 130, 143, -signal.SIGHUP, -signal.SIGINT, -signal.SIGTERM)
ENDS = ("failed", "interrupted", "stopped")  # states of a run that is not done; a stopped one was given up by a search
SILENT = 900.0  # seconds without a changed file after which a run on another host is no longer taken for running
POLL = 0.05  # seconds
EVERY = 2.0  # seconds between two looks at the files of a run
# The child takes its cores before it starts a thread, and saves when this process dies, however that comes: 1 is PR_SET_PDEATHSIG.
CHILD = """
import ctypes, os, sys
if sys.argv[2]: os.sched_setaffinity(0, {int(core) for core in sys.argv[2].split(",")})
try: ctypes.CDLL(None).prctl(1, 15)
except (OSError, AttributeError): pass
if os.getppid() != int(sys.argv[1]): sys.exit(143)
os.execvp(sys.argv[3], sys.argv[3:])
"""


class Run(NamedTuple):
    """One training."""

    name: str  # in messages
    config: str
    overrides: tuple[str, ...]
    workdir: Path

    def arguments(self) -> list[str]:
        """Of `launch.py`."""
        return ["train", f"--config={self.config}", f"--workdir={self.workdir}", *self.overrides, f"--saved_code={SAVED}"]


class Share(NamedTuple):
    """The part of this machine that one of several runs at once gets."""

    cores: tuple[int, ...] = ()  # (): all
    environment: Mapping[str, str] = {}


class Progress(NamedTuple):
    """How far a run is, by its files."""

    state: str  # 'waiting', 'running', 'done' or one of ENDS
    message: str = ""  # of a failed or stopped one
    step: int = 0  # the last one logged
    total: int | None = None  # steps of the whole run; None before its first start
    seconds_per_step: float | None = None  # median of the logged steps, without the first line, which holds the compilation
    metric: str = ""  # 'knn/top1 51.20', the best_metric at the last evaluation, or before one a loss


def finished(workdir: Path) -> bool:
    """Whether a run has come to its end: its last step is logged and evaluated, and its report, which comes last, is written."""
    if not (workdir / "report.html").is_file():
        return False
    if not (workdir / "config.json").is_file():
        return True
    try:
        total = total_steps(workdir)
        evaluated = any(entry["subject"] == "trained" and entry["step"] == total for entry in read_evaluations(workdir))
        return evaluated and max((line["step"] for line in read_metrics(workdir)), default=0) >= total
    except UserError:  # damaged; `train` names it
        return False


def total_steps(workdir: Path) -> int:
    """The steps of the whole run in `workdir`. Raises UserError if its config.json is damaged."""
    needs = {"total": str, "batch_size": int, "data": dict}
    config = read_json(workdir / "config.json", dict, needs)
    return durations.to_steps(config["total"], "config.total", config["batch_size"], config["data"].get("examples") or 1)


def progress(workdir: Path) -> Progress:
    """How far the run in `workdir` is. Files that are damaged count as not there."""
    step, total, seconds, metric = 0, None, None, ""
    with contextlib.suppress(UserError):
        if (workdir / "config.json").is_file():
            total = total_steps(workdir)
            lines = read_metrics(workdir)
            step = max((line["step"] for line in lines), default=0)
            times = [line["time/seconds_per_step"] for line in lines[1:] if "time/seconds_per_step" in line]
            seconds = statistics.median(times) if times else None
            metric = _metric(workdir, lines)
    if finished(workdir):
        return Progress("done", "", step, total, seconds, metric)
    state, message = _attempted(workdir)
    if state == "waiting" and (workdir / "config.json").is_file():
        state = "interrupted"
    return Progress(state, message, step, total, seconds, metric)


def _metric(workdir: Path, lines: Sequence[Mapping[str, float]]) -> str:
    best = read_json(workdir / "config.json", dict).get("best_metric", "").removeprefix("-")
    entries = [entry for entry in read_evaluations(workdir) if entry["subject"] == "trained" and entry["metrics"]]
    if entries:
        metrics = max(entries, key=lambda entry: entry["step"])["metrics"]
        name = best if best in metrics else next(iter(metrics))
        return f"{name} {metrics[name]:.4g}"
    losses = [name for name in (lines[-1] if lines else {}) if name.endswith("/loss")]
    return f"{losses[0]} {lines[-1][losses[0]]:.4g}" if losses else ""


def _attempted(workdir: Path) -> tuple[str, str]:
    """(state, message) by `attempt.json`."""
    try:
        attempt = json.loads((workdir / "attempt.json").read_text(encoding="utf-8"))
        state, message = attempt["state"], attempt.get("message", "")
        if state != "running":
            return (state, message) if state in ENDS else ("waiting", "")
        if attempt["host"] == os.uname().nodename:
            alive = born(int(attempt["pid"])) == attempt["born"]
        else:
            alive = time.time() - max(path.stat().st_mtime for path in workdir.iterdir()) < SILENT
        return "running" if alive else "interrupted", ""
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "waiting", ""


def last_line(workdir: Path) -> str:
    """The last line that a run has printed."""
    lines = (workdir / "output.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return printable(lines[-1].removeprefix("error: ")) if lines else "no output"


def note_start(workdir: Path, pid: int) -> None:
    """Write that process `pid` of this machine trains the run. Raises MachineFault if the disk fails."""
    attempt = {"state": "running", "host": os.uname().nodename, "pid": pid, "born": born(pid)}
    files.write(workdir / "attempt.json", json.dumps(attempt) + "\n")


def note_end(workdir: Path, code: int, done: bool) -> None:
    """Write how the run has ended, by the exit code of its process. Raises MachineFault if the disk fails."""
    if done:
        (workdir / "attempt.json").unlink(missing_ok=True)
        return
    state = "interrupted" if code in INTERRUPTED else "failed"
    _note(workdir, state, _cause(workdir, code) if state == "failed" else "")


def _note(workdir: Path, state: str, message: str) -> None:
    files.write(workdir / "attempt.json", json.dumps({"state": state, "message": message}) + "\n")


def _cause(workdir: Path, code: int) -> str:
    if code < 0:
        return f"ended by {signal.Signals(-code).name}" + (" (by hand, or for lack of memory)" if code == -signal.SIGKILL else "")
    return last_line(workdir)


def train_all(
    runs: Iterable[Run],
    command: Sequence[str],
    done: Callable[[Run], bool] = lambda run: finished(run.workdir),
    shares: Sequence[Share] = (Share(),),
    fail_fast: bool = False,
    on_event: Callable[[str, Run, str], None] = lambda kind, run, line: None,
    on_poll: Callable[[], None] = lambda: None,
    stopped: Callable[[Run], str] = lambda run: "",
) -> list[str]:
    """Train every run that is not finished, as many at once as there are `shares`; returns a line for each that failed.

    Args:
        runs: taken one by one, when there is a share for it.
        command: the program that takes `train`, `--config`, ...
        done: whether a run needs no training; asked before its start and after its end.
        fail_fast: end the others when one fails; they save.
        on_event: called with ('started' | 'finished' | 'failed' | 'stopped', run, line of the failure or reason of the stop, or '').
        on_poll: called some twenty times a second.
        stopped: why a running run is to be given up, asked as often; '' to go on. It saves.

    Raises:
        MachineFault: a run ended with a fault of the machine, which would end the others too. Those that ran have saved.
        KeyboardInterrupt: this process or a run was interrupted. All have saved.
        SystemExit: this process got SIGTERM. All have saved.
    """
    waiting = (run for run in runs if not done(run))
    running: dict[int, tuple[Run, subprocess.Popen]] = {}
    failed, given_up, more = [], {}, True
    with _signals() as received:
        try:
            while more or running:
                for place, share in enumerate(shares):
                    run = next(waiting, None) if more and place not in running else None
                    if run is not None:
                        running[place] = (run, _start(run, command, share))
                        on_event("started", run, "")
                    elif place not in running:
                        more = False
                time.sleep(POLL)
                on_poll()
                if received:
                    raise KeyboardInterrupt if received[0] == signal.SIGINT else SystemExit(128 + received[0])
                for place, (run, process) in list(running.items()):
                    code = process.poll()
                    if code is None:
                        if place not in given_up and (reason := stopped(run)):
                            given_up[place] = reason
                            process.terminate()
                        continue
                    del running[place]
                    reason = given_up.pop(place, "")
                    if reason and code in INTERRUPTED:
                        _note(run.workdir, "stopped", reason)
                        on_event("stopped", run, reason)
                        continue
                    note_end(run.workdir, code, code == 0 and done(run))
                    if code in INTERRUPTED:
                        raise KeyboardInterrupt
                    if code == MachineFault.code:
                        raise MachineFault(f"{run.workdir}: {last_line(run.workdir)}")
                    if code == 0 and done(run):
                        on_event("finished", run, "")
                        continue
                    line = _cause(run.workdir, code)
                    failed.append(f"{run.name}: {line} (see {run.workdir}/output.txt)")
                    on_event("failed", run, line)
                    if fail_fast:
                        return failed
        finally:
            _end(running)
    return failed


def _start(run: Run, command: Sequence[str], share: Share) -> subprocess.Popen:
    run.workdir.mkdir(parents=True, exist_ok=True)
    cores = ",".join(map(str, share.cores))
    child = [sys.executable, "-I", "-c", CHILD, str(os.getpid()), cores, *command, *run.arguments()]
    with open(run.workdir / "output.txt", "a", encoding="utf-8") as output:
        process = subprocess.Popen(
            child, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env={**os.environ, **share.environment}
        )
    note_start(run.workdir, process.pid)
    return process


def _end(running: Mapping[int, tuple[Run, subprocess.Popen]]) -> None:
    """Let all runs save, and wait for their ends."""
    for _, process in running.values():
        if process.poll() is None:
            process.terminate()
    for run, process in running.values():
        note_end(run.workdir, process.wait(), finished(run.workdir))


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Context that collects SIGINT and SIGTERM, after which the runs need time to save. Does nothing outside of the main thread."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {s: signal.signal(s, lambda signum, _: received.append(signum)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)

"""`launch.py train --processes=N`: the processes of a run on this machine, watched and restarted."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ssl_jax.errors import MachineFault, UserError
from ssl_jax.experiment.launch_environment import COORDINATOR, PROCESS, PROCESSES
from ssl_jax.where import LAUNCHER

log = logging.getLogger(__name__)

GRACE = 5.0  # seconds for the other processes to end by themselves once one has failed
LAST = 300.0  # the same once one has ended well: process 0 writes the report after the others have ended
KILL = 5.0  # seconds between SIGTERM and SIGKILL


def launch_command() -> list[str]:
    """The program and the first arguments of `launch.py`, or where there is none (installed as a package), of `python -m ssl_jax`."""
    return [sys.executable, *([str(LAUNCHER)] if LAUNCHER.is_file() else ["-P", "-m", "ssl_jax"])]  # -P: not the ssl_jax/ of a checkout


def supervise(
    arguments: list[str], processes: int, workdir: Path, max_restarts: int, saved_code: int = 0, first: Sequence[str] = ()
) -> int:
    """Run `launch.py ARGUMENTS` as `processes` processes of one run until all have ended well; returns the exit code.

    Process 0 writes to this terminal, process i to WORKDIR/processes/<i>.txt. If one fails, or ends before the others, the rest are
    ended too, and all are restarted, at most `max_restarts` times. Bad input (exit code 2) is not restarted.

    SIGTERM is passed on, all processes save, and the exit code is `saved_code`, also where one process got the SIGTERM from
    elsewhere. Ctrl-C and SIGHUP are passed on as SIGTERM, with exit codes 130 and 129. A second signal ends the processes that have
    not saved by then. SIGUSR1 is passed on, and the processes save and go on.

    Args:
        first: arguments of the first attempt only.

    Raises:
        UserError: `processes` is below 1 or `max_restarts` negative.
    """
    if processes < 1 or max_restarts < 0:
        raise UserError(f"--processes={processes} must be at least 1 and --max_restarts={max_restarts} not negative")
    signals: list[int] = []  # received
    hangup = [] if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else [signal.SIGHUP]  # ignored under nohup
    heeded = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, *hangup)
    before = {s: signal.signal(s, lambda signum, _: signals.append(signum)) for s in heeded}
    try:
        for attempt in range(max_restarts + 1):
            given = [*arguments, f"--saved_code={saved_code}", *(first if attempt == 0 else ())]
            code, causes = _run_once(given, processes, workdir, signals, (0, saved_code))
            if signals:
                return saved_code if code in (0, saved_code) and signals[0] == signal.SIGTERM else 128 + signals[0]
            if code in (0, saved_code, UserError.code):
                return code
            last = attempt == max_restarts
            log.error("%s; %s", causes, "giving up" if last else f"restarting all ({attempt + 1} of {max_restarts})")
        return code
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _run_once(arguments, processes, workdir, signals, well) -> tuple[int, str]:
    """(exit code, causes of a failure) of one start of all processes; exit codes in `well` are no failures."""
    with contextlib.ExitStack() as files:
        running = _start(arguments, processes, workdir, files)
        ended: dict[int, int] = {}  # {process: exit code}, in the order in which they ended
        deadline, passed_on = math.inf, False
        while len(ended) < processes:
            time.sleep(0.1)
            for i, process in enumerate(running):
                if i not in ended and process.poll() is not None:
                    ended[i] = process.returncode
                    deadline = min(deadline, time.monotonic() + (LAST if process.returncode in well else GRACE))
            while signal.SIGUSR1 in signals:
                signals.remove(signal.SIGUSR1)
                _signal(running, signal.SIGUSR1)
            if signals and not passed_on:
                passed_on = True
                _signal(running, signal.SIGTERM)
            if time.monotonic() > deadline or len(signals) > 1:
                break
        silent = [i for i in range(processes) if i not in ended]
        _end(running)
    if not silent and set(ended.values()) <= set(well):
        return next((code for code in ended.values() if code), 0), ""
    causes = [f"process {i} ended with {_named(code)}" for i, code in ended.items() if code not in (*well, -signal.SIGABRT)]
    causes += [f"process {i} did not answer and was killed" for i in silent]
    causes = causes or [f"process {i} ended with {_named(code)}" for i, code in ended.items()]
    unwell = {code for code in ended.values() if code not in well}
    # Killed or silent is the machine's doing, unless a process had a reason of its own. JAX aborts the others.
    killed = (silent or -signal.SIGKILL in unwell) and unwell <= {-signal.SIGKILL, -signal.SIGABRT}
    fault = MachineFault.code in unwell or killed
    code = UserError.code if UserError.code in unwell else MachineFault.code if fault else 1
    return code, ", ".join(causes)


def _start(arguments, processes, workdir, files) -> list[subprocess.Popen]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
    folder = workdir / "processes"
    folder.mkdir(parents=True, exist_ok=True)
    running = []
    for i in range(processes):
        environment = {**os.environ, COORDINATOR: coordinator, PROCESSES: str(processes), PROCESS: str(i)}
        output = None if i == 0 else files.enter_context((folder / f"{i}.txt").open("a"))
        running.append(
            subprocess.Popen(
                [*launch_command(), *arguments], env=environment, stdout=output, stderr=output, start_new_session=True
            )
        )
    return running


def _signal(running, signum) -> None:
    for process in running:
        if process.poll() is None:
            process.send_signal(signum)


def _end(running) -> None:
    """SIGTERM, then SIGKILL for those that do not end (a stopped process cannot)."""
    _signal(running, signal.SIGTERM)
    deadline = time.monotonic() + KILL
    while time.monotonic() < deadline and any(process.poll() is None for process in running):
        time.sleep(0.1)
    _signal(running, signal.SIGKILL)
    for process in running:
        process.wait()


def _named(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"

"""A watchdog for hanging steps: it dumps the stacks of all threads, names the process that is behind, and ends a stuck run."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import math
import os
import statistics
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

log = logging.getLogger(__name__)

SLOW_FACTOR = 10  # a step is slow at 10 x the median step, and a pause at 10 x the longest pause so far
REPORT_AFTER, END_AFTER = 5.0, 60.0  # seconds; a shorter step is not reported, or does not end the run, however slow it is
PAUSE = 7200.0  # seconds; a shorter pause is never slow, since some evaluations read all of ImageNet
MANY_PROCESSES = 16  # more processes write only every SLOW_INTERVAL seconds
SLOW_INTERVAL = 10.0  # seconds between two reads of all files by process 0
AVERAGING_TIME = 20.0  # time constant of the moving average of the wait for input, in seconds
EXIT = 70  # exit code of a stuck run; 75 is that of a run that saved after SIGTERM


class Position(NamedTuple):
    """Where this process is. The watchdog's thread reads it, so it is replaced as a whole and never modified."""

    step: int  # -1 before the first step
    pauses: int  # number of open (nested) pauses; 0 within a step
    since: float  # when the current stretch began: the pause, the step, or the rest of the step after a pause
    before: float  # seconds of the step before `since`, without pauses
    limit: float  # seconds after which it is slow; the first three steps have the limit of a pause, since they compile

    def seconds(self, now: float) -> float:
        """Seconds of the pause, or of the step without its pauses, until `now`."""
        return now - self.since + (0.0 if self.pauses else self.before)

    def __str__(self) -> str:
        if self.step < 0:
            return "the work before the first step"
        return f"the work after step {self.step}" if self.pauses else f"step {self.step}"


class Heartbeat(NamedTuple):
    """The file that a process writes for the others."""

    step: int
    paused: bool
    left: float  # seconds until this process would be stuck
    input_wait: float  # share of its time that it waits for input


class Watchdog:
    """Call `beat(step)` at the beginning of each step; use `paused()` around longer work (evaluating, saving). It begins paused.

    A thread of every process writes a Heartbeat to <folder>/<process>.json. If a step is slow, it writes the stacks of all threads
    to <folder>/<process>.stacks.txt. If the step is stuck, it names the process that is furthest behind and ends its own process
    with exit code 70; all processes do so. The launcher restarts them from the last checkpoint. They do not end while the process
    behind has time left by its own account, such as process 0 saving pictures while the others wait.

    Args:
        restarted: a launcher restarts the run, so a run of one process ends, too; otherwise it is only reported.
        least: seconds, as END_AFTER.
        pause: seconds, as PAUSE.
    """

    def __init__(
        self,
        folder: Path,
        process: int = 0,
        processes: int = 1,
        restarted: bool = False,
        least: float = END_AFTER,
        pause: float = PAUSE,
    ):
        self.folder, self.process, self.processes, self.least, self.pause = folder, process, processes, least, pause
        self.ends, self.report_after = restarted or processes > 1, min(REPORT_AFTER, least)
        self._input_wait = 0.0  # of this process
        self._slowest = (0.0, process)  # (largest input wait among the other processes, that process)
        self._longest = 0.0  # seconds of the longest pause
        self._durations: deque[float] = deque(maxlen=101)
        self._at = self._position(-1, 1, time.monotonic(), 0.0)
        # Only the watchdog's thread uses these:
        self._others: dict[int, tuple[Heartbeat, float]] = {}  # {process: (its heartbeat, when it changed by the clock here)}
        self._every = 1.0 if processes <= MANY_PROCESSES else SLOW_INTERVAL
        self._written = self._read = -math.inf
        self._reported: Position | None = None
        self._excused: tuple[Position | None, float] = (None, 0.0)  # (a slow position, the seconds until which it may go on)
        self._end = threading.Event()

    def __enter__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._end.set()
        self._thread.join()

    def beat(self, step: int) -> None:
        """Step `step` begins. The first call ends the initial pause."""
        now, at = time.monotonic(), self._at
        if at.step >= 0 and not at.pauses:
            self._durations.append(at.seconds(now))
        self._at = self._position(step, at.pauses - (at.step < 0), now, 0.0)

    def record_input_wait(self, input_wait: float, seconds: float) -> None:
        """Record the share of the last `seconds` that this process has waited for input.

        It goes into an exponential moving average, since with several readers one step waits for all of them and the next for none.
        """
        self._input_wait += (1 - math.exp(-seconds / AVERAGING_TIME)) * (input_wait - self._input_wait)

    def slowest_input(self) -> dict[str, float]:
        """Metrics: the process with the longest wait for input, and its share of time. {} except in process 0, which logs them.

        The values of other processes are up to SLOW_INTERVAL seconds old.
        """
        if self.process != 0:
            return {}
        wait, slowest = max((self._input_wait, self.process), self._slowest)
        return {"time/slowest_input_process": float(slowest), "time/slowest_input_wait": wait}

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Context of work that is not part of a step."""
        began, at = time.monotonic(), self._at
        self._at = self._position(at.step, at.pauses + 1, began, at.before if at.pauses else at.seconds(began))
        try:
            yield
        finally:
            now, at = time.monotonic(), self._at
            self._longest = max(self._longest, now - began)
            self._at = self._position(at.step, at.pauses - 1, now, at.before)

    def _position(self, step: int, pauses: int, since: float, before: float) -> Position:
        if pauses or len(self._durations) < 3:
            return Position(step, pauses, since, before, max(self.pause, SLOW_FACTOR * self._longest))
        return Position(step, pauses, since, before, SLOW_FACTOR * statistics.median(self._durations))

    def _watch(self) -> None:
        while True:
            now = time.monotonic()
            if now - self._written >= self._every:
                self._write()
                self._written = now
            if self.process == 0 and now - self._read >= SLOW_INTERVAL:
                self._read_others()
                self._slowest = max(((beat.input_wait, i) for i, (beat, _) in self._others.items()), default=self._slowest)
                self._read = now
            self._check()
            if self._end.wait(1.0):
                return

    def _check(self) -> None:
        now = time.monotonic()
        at = self._at  # read after the clock, so that a position that begins in between does not seem older than it is
        seconds = at.seconds(now)
        slow_after = max(self.report_after, at.limit)
        if seconds >= slow_after and at is not self._reported:
            self._reported = at
            path = self.folder / f"{self.process}.stacks.txt"
            with contextlib.suppress(OSError), path.open("a") as file:  # the disk may be full; the warning below still appears
                file.write(f"{at} after {seconds:.0f} s\n")
                faulthandler.dump_traceback(file, all_threads=True)
            log.warning("%s has taken %.0f s, longer than %.0f s; stacks are in %s", at, seconds, slow_after, path)
        excused, until = self._excused
        if not self.ends or seconds < max(self.least, at.limit, until if at is excused else 0.0):
            return
        message, left = self._find_behind(at)
        if left:
            # Checked again after twice the time, since each of perhaps thousands of processes reads the files of all.
            self._excused = (at, 2 * seconds)
            log.warning("%s goes on, since the process behind has %.0f s left: %s", at, left, message)
            return
        log.error("the run is stuck: %s; ending process %d", message, self.process)
        os._exit(EXIT)

    def _write(self) -> None:
        temporary, now = self.folder / f".{self.process}.tmp", time.monotonic()
        at = self._at
        beat = Heartbeat(at.step, at.pauses > 0, round(max(self.least, at.limit) - at.seconds(now), 1), self._input_wait)
        try:
            temporary.write_text(json.dumps(beat._asdict()))
            os.replace(temporary, self.folder / f"{self.process}.json")
        except OSError as error:
            log.warning("%s cannot be written (%s)", self.folder, error.strerror)

    def _read_others(self) -> None:
        """Read the heartbeats of the other processes. If a file is missing or being written, the last heartbeat stays."""
        for i in range(self.processes):
            if i == self.process:
                continue
            with contextlib.suppress(OSError, ValueError, TypeError):  # TypeError: a file of another version
                beat = Heartbeat(**json.loads((self.folder / f"{i}.json").read_text()))
                if i not in self._others or beat != self._others[i][0]:
                    self._others[i] = beat, time.monotonic()

    def _find_behind(self, at: Position) -> tuple[str, float]:
        """(message that names the processes furthest behind, seconds until they would be stuck, or 0 if they have no time left).

        A process that evaluates or saves after a step is ahead of one within that step. If a process stops writing, its remaining
        time decreases by the clock of this process.
        """
        self._read_others()
        places = {i: (beat.step, beat.paused) for i, (beat, _) in self._others.items()} | {self.process: (at.step, at.pauses > 0)}
        least, most = min(places.values()), max(places.values())
        behind = sorted(i for i, place in places.items() if place == least)
        names = ", ".join(f"process {i}" for i in behind)
        now = time.monotonic()
        seconds_left = [beat.left - (now - changed) for i, (beat, changed) in self._others.items() if i in behind]
        if at.pauses and self.process in behind:  # this process is behind and waits for no other
            seconds_left = []
        left = max(seconds_left, default=0.0)
        # Processes that wait for each other all become stuck within one write interval; that is no reason to wait.
        return f"{names} is {_where(*least)}, the furthest {_where(*most)}", left if left > 2 * self._every else 0.0


def _where(step: int, paused: bool) -> str:
    return "before the first step" if step < 0 else f"{'after' if paused else 'at'} step {step}"

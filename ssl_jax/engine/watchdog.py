"""Notices that a step does not end, says where every thread stands, and, among several processes, which of them is behind."""

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

TIMES, SOON, LEAST = 10, 5.0, 60.0  # 10 times the median of a step are told, if longer than 5 s, and end a run, if longer than a minute
PAUSE = 7200.0  # whatever else, after 10 times the longest so far, and never before two hours: some evaluations read all of ImageNet
MANY = 16  # of more processes each writes as seldom as process 0 reads
SELDOM = 10.0  # seconds
MEMORY = 20.0  # seconds after which two thirds of the mean wait for input are new
EXIT = 70  # of a process that gives up because the run is stuck; not 75, which is that of a job that was told to stop and saved


class At(NamedTuple):
    """Where this process is. Another thread reads it, so that it is replaced as a whole, and read once."""

    step: int  # -1 before the first one
    pauses: int  # how many are open; none within a step
    since: float  # when the pause began, or the step, which goes on behind a pause
    before: float  # seconds of the step until then, without its pauses
    usual: float  # TIMES what such a step takes (PAUSE for the first three, which compile), or what pauses take

    def seconds(self, now: float) -> float:
        """Of the step without its pauses, or of the pause."""
        return now - self.since + (0.0 if self.pauses else self.before)

    def __str__(self) -> str:
        if self.step < 0:
            return "what is done before the first step"
        return f"what is done behind step {self.step}" if self.pauses else f"step {self.step}"


class Told(NamedTuple):
    """What a process writes for the others."""

    step: int
    paused: bool
    left: float  # seconds until it is stuck, as it sees itself
    input_wait: float


class Watchdog:
    """`beat(step)` at the beginning of each step; `paused()` around whatever may take longer (evaluating, saving). It begins paused.

    Every process writes how far it is, and what share of its time it waits for input, to <folder>/<process>.json, from a thread of its
    own. When a step does not end, the stacks of all threads go to <folder>/<process>.stacks.txt. When it is stuck, the process that is
    furthest behind is named, and all end with exit code 70: whoever started them starts them again, and they go on from the last
    checkpoint. They do not end while the one behind has time left itself, as when it draws and the others wait for it.

    Args:
        restarted: a run of one process is ended, too, since somebody starts it again; else it is only told.
        least, pause: seconds, as LEAST and PAUSE.
    """

    def __init__(
        self, folder: Path, process: int = 0, processes: int = 1, restarted: bool = False, least: float = LEAST, pause: float = PAUSE
    ):
        self.folder, self.process, self.processes, self.least, self.pause = folder, process, processes, least, pause
        self.ends, self.soon = restarted or processes > 1, min(SOON, least)
        self._input_wait, self._slowest = 0.0, (0.0, process)  # of this process; (of the slowest other one, which it is)
        self._longest = 0.0
        self._durations: deque[float] = deque(maxlen=101)
        self._at = self._place(-1, 1, time.monotonic(), 0.0)
        # Of the watching thread only:
        self._others: dict[int, tuple[Told, float]] = {}  # {process: (what it has told, when that was new here)}
        self._every = 1.0 if processes <= MANY else SELDOM
        self._written = self._read = -math.inf
        self._noticed: At | None = None
        self._excused: tuple[At | None, float] = (None, 0.0)  # until so many seconds of it
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
        """The first one starts the clock, which the second step may spend on compiling, too."""
        now, at = time.monotonic(), self._at
        if at.step >= 0 and not at.pauses:
            self._durations.append(at.seconds(now))
        self._at = self._place(step, at.pauses - (at.step < 0), now, 0.0)

    def note(self, input_wait: float, seconds: float) -> None:
        """Of the last `seconds` this process has waited for input for this share. Kept is a mean that forgets: with several readers one
        step waits for all of them and the next for none."""
        self._input_wait += (1 - math.exp(-seconds / MEMORY)) * (input_wait - self._input_wait)

    def slowest_input(self) -> dict[str, float]:
        """Metrics of process 0, which writes them: who waits longest for its input, and for what share of its time (of the others, as
        they stood up to SELDOM seconds ago). The others wait."""
        if self.process != 0:
            return {}
        wait, slowest = max((self._input_wait, self.process), self._slowest)
        return {"time/slowest_input_process": float(slowest), "time/slowest_input_wait": wait}

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        began, at = time.monotonic(), self._at
        self._at = self._place(at.step, at.pauses + 1, began, at.before if at.pauses else at.seconds(began))
        try:
            yield
        finally:
            now, at = time.monotonic(), self._at
            self._longest = max(self._longest, now - began)
            self._at = self._place(at.step, at.pauses - 1, now, at.before)

    def _place(self, step: int, pauses: int, since: float, before: float) -> At:
        if pauses or len(self._durations) < 3:
            return At(step, pauses, since, before, max(self.pause, TIMES * self._longest))
        return At(step, pauses, since, before, TIMES * statistics.median(self._durations))

    def _watch(self) -> None:
        while True:
            now = time.monotonic()
            if now - self._written >= self._every:
                self._write()
                self._written = now
            if self.process == 0 and now - self._read >= SELDOM:
                self._ask()
                self._slowest = max(((told.input_wait, i) for i, (told, _) in self._others.items()), default=self._slowest)
                self._read = now
            self._check()
            if self._end.wait(1.0):
                return

    def _check(self) -> None:
        now = time.monotonic()
        at = self._at  # read behind the clock: what has begun since is not taken for older than it is
        seconds = at.seconds(now)
        if seconds >= max(self.soon, at.usual) and at is not self._noticed:
            self._noticed = at
            path = self.folder / f"{self.process}.stacks.txt"
            with contextlib.suppress(OSError), path.open("a") as file:  # a disk may be full, and the line below still be told
                file.write(f"{at} after {seconds:.0f} s\n")
                faulthandler.dump_traceback(file, all_threads=True)
            log.warning("%s has taken %.0f s, longer than %.0f s; stacks are in %s", at, seconds, max(self.soon, at.usual), path)
        noticed, until = self._excused
        if not self.ends or seconds < max(self.least, at.usual, until if at is noticed else 0.0):
            return
        told, excuse = self._behind(at)
        if excuse:
            # Asked again after twice as long: of thousands of processes each reads what all have written.
            self._excused = (at, 2 * seconds)
            log.warning("%s goes on, since the one behind has %.0f s left: %s", at, excuse, told)
            return
        log.error("the run is stuck: %s; ending process %d", told, self.process)
        os._exit(EXIT)

    def _write(self) -> None:
        temporary, now = self.folder / f".{self.process}.tmp", time.monotonic()
        at = self._at
        told = Told(at.step, at.pauses > 0, round(max(self.least, at.usual) - at.seconds(now), 1), self._input_wait)
        try:
            temporary.write_text(json.dumps(told._asdict()))
            os.replace(temporary, self.folder / f"{self.process}.json")
        except OSError as error:
            log.warning("%s cannot be written (%s)", self.folder, error.strerror)

    def _ask(self) -> None:
        """What the others have written; one that writes just now, or has not begun, keeps what it has told before."""
        for i in range(self.processes):
            if i == self.process:
                continue
            with contextlib.suppress(OSError, ValueError, TypeError):  # the last of a file that another version has left
                told = Told(**json.loads((self.folder / f"{i}.json").read_text()))
                if i not in self._others or told != self._others[i][0]:
                    self._others[i] = told, time.monotonic()

    def _behind(self, at: At) -> tuple[str, float]:
        """(Who has not come as far as the others, seconds that one of them has left before it is stuck itself, or 0.)

        One that evaluates or saves behind a step is further than one within it. Seconds are counted on, by the clock here, where a
        process writes nothing new.
        """
        self._ask()
        places = {i: (told.step, told.paused) for i, (told, _) in self._others.items()} | {self.process: (at.step, at.pauses > 0)}
        least, most = min(places.values()), max(places.values())
        behind = sorted(i for i, place in places.items() if place == least)
        names = ", ".join(f"process {i}" for i in behind)
        now = time.monotonic()
        left = [told.left - (now - new) for i, (told, new) in self._others.items() if i in behind]
        if at.pauses and self.process in behind:  # it works, and waits for nobody
            left = []
        # Where all wait for each other they are stuck within the time that one writes in.
        excuse = max(left, default=0.0)
        return f"{names} is {_where(*least)}, the furthest {_where(*most)}", excuse if excuse > 2 * self._every else 0.0


def _where(step: int, paused: bool) -> str:
    return "before the first step" if step < 0 else f"{'behind' if paused else 'at'} step {step}"

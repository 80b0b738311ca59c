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

log = logging.getLogger(__name__)

TIMES, LEAST = 10, 60.0  # a step is stuck after 10 times the median, and never before a minute
PAUSE = 7200.0  # and whatever else after 10 times the longest so far, and never before two hours: some evaluations read all of ImageNet
MANY = 16  # of more processes each writes every ten seconds only
MEMORY = 20.0  # seconds after which two thirds of the mean wait for input are new
EXIT = 70  # of a process that gives up because the run is stuck; not 75, which is that of a job that was told to stop and saved


class Watchdog:
    """`beat(step)` at the beginning of each step; `paused()` around whatever may take longer (evaluating, saving).

    Every process writes how far it is, and what share of its time it waits for input, to <folder>/<process>.json, from a thread of its
    own. When a step is stuck, the stacks of all threads go to <folder>/<process>.stacks.txt; with several processes the one that is
    furthest behind is named, and all end with exit code 70: whoever started them starts them again, and they go on from the last
    checkpoint.
    """

    def __init__(self, folder: Path, process: int = 0, processes: int = 1, least: float = LEAST, pause: float = PAUSE):
        self.folder, self.process, self.processes, self.least, self.pause = folder, process, processes, least, pause
        self._input_wait, self._longest = 0.0, 0.0
        self._durations: deque[float] = deque(maxlen=101)
        self._step, self._since, self._pauses, self._told = -1, time.monotonic(), 1, False  # paused until the first step
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
        now = time.monotonic()
        if self._step >= 0 and not self._pauses:
            self._durations.append(now - self._since)
        if self._step < 0:
            self._pauses -= 1
        self._step, self._since, self._told = step, now, False

    def note(self, input_wait: float, seconds: float) -> None:
        """Of the last `seconds` this process has waited for input for this share. Kept is a mean that forgets: with several readers one
        step waits for all of them and the next for none."""
        self._input_wait += (1 - math.exp(-seconds / MEMORY)) * (input_wait - self._input_wait)

    def slowest_input(self) -> dict[str, float]:
        """Metrics of process 0, which writes them: who waits longest for its input, and for what share of its time. The others wait."""
        if self.process != 0:
            return {}
        waits = {i: told["input_wait"] for i, told in self._read().items()} | {self.process: self._input_wait}
        slowest = max(waits, key=waits.__getitem__)
        return {"time/slowest_input_process": float(slowest), "time/slowest_input_wait": waits[slowest]}

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        began = time.monotonic()
        self._pauses, self._since, self._told = self._pauses + 1, began, False
        try:
            yield
        finally:
            now = time.monotonic()
            self._pauses, self._since, self._told, self._longest = self._pauses - 1, now, False, max(self._longest, now - began)

    def limit(self) -> float:
        """Seconds after which a step, or a pause, is stuck. The first three steps have as long as a pause, since they compile."""
        if self._pauses or len(self._durations) < 3:
            return max(self.pause, TIMES * self._longest)
        return max(self.least, TIMES * statistics.median(self._durations))

    def _watch(self) -> None:
        every, written = (1.0 if self.processes <= MANY else 10.0), -math.inf
        while not self._end.wait(1.0):
            if time.monotonic() - written >= every:
                self._write()
                written = time.monotonic()
            seconds, what = time.monotonic() - self._since, "what is done behind step" if self._pauses else "step"
            if seconds < self.limit():
                continue
            if not self._told:
                self._told = True
                path = self.folder / f"{self.process}.stacks.txt"
                with contextlib.suppress(OSError), path.open("a") as file:  # a disk may be full, and the line below still be told
                    file.write(f"{what} {self._step} after {seconds:.0f} s\n")
                    faulthandler.dump_traceback(file, all_threads=True)
                log.error("%s %d has taken %.0f s, longer than %.0f s; stacks are in %s", what, self._step, seconds, self.limit(), path)
            if self.processes > 1:
                log.error("the run is stuck: %s; ending process %d", self._behind(), self.process)
                os._exit(EXIT)

    def _write(self) -> None:
        temporary = self.folder / f".{self.process}.tmp"
        try:
            temporary.write_text(json.dumps({"step": self._step, "paused": self._pauses > 0, "input_wait": self._input_wait}))
            os.replace(temporary, self.folder / f"{self.process}.json")
        except OSError as error:
            log.warning("%s cannot be written (%s)", self.folder, error.strerror)

    def _read(self) -> dict[int, dict]:
        """What the processes have written; one that writes just now, or has not begun, is left out."""
        told = {}
        for i in range(self.processes):
            with contextlib.suppress(OSError, ValueError):
                told[i] = json.loads((self.folder / f"{i}.json").read_text())
        return told

    def _behind(self) -> str:
        """Who has not come as far as the others; one that evaluates or saves behind a step is further than one within it."""
        places = {i: (told["step"], told["paused"]) for i, told in self._read().items()}
        least, most = min(places.values(), default=(-1, False)), max(places.values(), default=(-1, False))
        slow = [f"process {i}" for i, place in places.items() if place == least]
        return f"{', '.join(slow)} is at step {least[0]}, the furthest {'behind' if most[1] else 'at'} step {most[0]}"

"""Where the time of a step goes, and traces of chosen steps."""

from __future__ import annotations

import contextlib
import itertools
import logging
import re
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from ssl_jax.errors import UserError

log = logging.getLogger(__name__)


RECENT = 5  # steps of before the last report whose times count for the next one, too


class Clock:
    """Splits the time between two reports: waiting for input, waiting for the devices, and the rest, which is the host's own work.

    Images per second are a median: of the times that two adjacent steps took together. The mean between two reports would jump where
    the state is saved, since two steps are reported there at once; single steps would, too, since where devices work on while the host
    goes on, both are waited for in one and none in the next.
    """

    def __init__(self, step: int, batch_size: int):
        self.step, self.batch_size, self.spent = step, batch_size, 0.0
        self._step_began, self._step_pause, self._recent = None, 0.0, []
        self._restart()

    def begin_step(self) -> None:
        """At the beginning of every step."""
        now = time.perf_counter()
        if self._step_began is not None:
            self._recent.append(now - self._step_began - self._step_pause)
        self._step_began, self._step_pause = now, 0.0

    def _restart(self) -> None:
        self.began, self.waits, self.pause = time.perf_counter(), {"input": 0.0, "device": 0.0}, 0.0

    @contextlib.contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Around a wait for the 'input' or the 'device'."""
        before = time.perf_counter()
        yield
        self.waits[what] += time.perf_counter() - before

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is no part of a step: evaluating, saving."""
        before = time.perf_counter()
        yield
        pause = time.perf_counter() - before
        self.pause += pause
        self._step_pause += pause

    def split(self, step: int) -> dict[str, float]:
        """Metrics of the steps since the last report, under 'time/'; `input_wait`, `device_wait` and `host` are shares of 1 (of the
        seconds that are then in `spent`)."""
        self.spent = spent = time.perf_counter() - self.began - self.pause
        seconds = spent / (step - self.step)
        pairs = [(a + b) / 2 for a, b in itertools.pairwise(self._recent)]
        median = statistics.median(pairs[1:] or pairs or self._recent or [seconds])  # the first pair of a run has compiled
        self._recent = self._recent[-RECENT:]
        waits = {f"time/{what}_wait": seconds_waited / spent for what, seconds_waited in self.waits.items()}
        self.step = step
        self._restart()
        return {
            "time/seconds_per_step": seconds,
            "time/images_per_second": self.batch_size / median,
            **waits,
            "time/host": 1.0 - sum(waits.values()),
            "time/clock": time.time(),
        }


class Trace:
    """`--profile=START:END`: what devices and threads do in steps START to END, in `folder`, for TensorBoard's profiler or Perfetto; of
    several processes each has a folder <folder>/<process> of its own, since JAX looks for a single trace in what it has written.

    Args:
        steps: 'START:END', 1 <= START <= END; '' for no trace.

    Raises:
        UserError: `steps` is not of that form.
    """

    def __init__(self, folder: Path, steps: str = ""):
        self.folder, self.first, self.last, self.begun, self.running = folder, 0, 0, not steps, False
        if not steps:
            return
        found = re.fullmatch(r"(\d+):(\d+)", steps)
        self.first, self.last = (int(n) for n in found.groups()) if found else (0, 0)
        if not 1 <= self.first <= self.last:
            raise UserError(f"--profile={steps} is no range of steps; give START:END with 1 <= START <= END, such as 20:24")

    def before(self, step: int, state) -> None:
        """`state` is what the devices are still at work on: a trace begins and ends when they have nothing to do."""
        if not self.begun and step > self.first:
            log.warning("--profile=%d:%d: nothing is traced, since the run goes on at step %d", self.first, self.last, step)
            self.begun = True
        if step == self.first:
            self.begun = True
            jax.block_until_ready(state)
            folder = self.folder if jax.process_count() == 1 else self.folder / str(jax.process_index())
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # its hook in every thread ended two runs of six with a segmentation fault
            jax.profiler.start_trace(str(folder), create_perfetto_trace=True, profiler_options=options)
            self.running = True

    def after(self, step: int, state) -> None:
        if self.running and step == self.last:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """Also where a run ends before END."""
        if self.running:
            self.running = False
            jax.profiler.stop_trace()

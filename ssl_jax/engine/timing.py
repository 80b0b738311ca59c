"""Timing of steps (input, devices, host) and profiler traces of chosen steps."""

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
RECENT = 5  # steps before the last report whose times also count for the next one


class Clock:
    """Splits the time between two reports into waiting for input, waiting for devices, and the rest, which is work of the host.

    Images per second come from the median time of two adjacent steps. The mean between two reports would jump at every save, where
    two steps are reported at once. The time of a single step would jump, too: with asynchronous dispatch the host waits for both
    steps in one and for neither in the next.
    """

    def __init__(self, step: int, batch_size: int):
        self.step, self.batch_size, self.spent = step, batch_size, 0.0
        self._step_began, self._step_pause, self._recent = None, 0.0, []
        self._restart()

    def begin_step(self) -> None:
        """Call it at the beginning of every step."""
        now = time.perf_counter()
        if self._step_began is not None:
            self._recent.append(now - self._step_began - self._step_pause)
        self._step_began, self._step_pause = now, 0.0

    def _restart(self) -> None:
        self.began, self.waits, self.pause = time.perf_counter(), {"input": 0.0, "device": 0.0}, 0.0

    @contextlib.contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Context of a wait for the 'input' or the 'device'."""
        before = time.perf_counter()
        yield
        self.waits[what] += time.perf_counter() - before

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Context of work that is not part of a step: evaluating, saving."""
        before = time.perf_counter()
        yield
        pause = time.perf_counter() - before
        self.pause += pause
        self._step_pause += pause

    def split(self, step: int) -> dict[str, float]:
        """Metrics 'time/...' of the steps since the last report.

        `input_wait`, `device_wait` and `host` are shares in [0, 1] of `spent`, the seconds between the reports without pauses.
        """
        self.spent = spent = time.perf_counter() - self.began - self.pause
        seconds = spent / (step - self.step)
        pairs = [(a + b) / 2 for a, b in itertools.pairwise(self._recent)]
        median = statistics.median(pairs[1:] or pairs or self._recent or [seconds])  # the first pair of a run includes compiling
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
    """`--profile=START:END`: a profiler trace of steps START to END in `folder`, for TensorBoard's profiler or Perfetto.

    With several processes each writes to its own folder <folder>/<process>, since JAX expects a single trace per folder.

    Args:
        steps: 'START:END', 1 <= START <= END; '' for no trace.

    Raises:
        UserError: `steps` does not have that form.
    """

    def __init__(self, folder: Path, steps: str = ""):
        self.folder, self.first, self.last, self.begun, self.running = folder, 0, 0, not steps, False
        if not steps:
            return
        found = re.fullmatch(r"(\d+):(\d+)", steps)
        self.first, self.last = (int(n) for n in found.groups()) if found else (0, 0)
        if not 1 <= self.first <= self.last:
            raise UserError(f"--profile={steps} is not a range of steps; give START:END with 1 <= START <= END, such as 20:24")

    def before(self, step: int, state) -> None:
        """Start the trace if `step` is START, once the devices have computed `state`."""
        if not self.begun and step > self.first:
            log.warning("--profile=%d:%d: nothing is traced, since the run resumes at step %d", self.first, self.last, step)
            self.begun = True
        if step == self.first:
            self.begun = True
            jax.block_until_ready(state)
            folder = self.folder if jax.process_count() == 1 else self.folder / str(jax.process_index())
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # the Python tracer crashed two runs of six with a segmentation fault
            jax.profiler.start_trace(str(folder), create_perfetto_trace=True, profiler_options=options)
            self.running = True

    def after(self, step: int, state) -> None:
        """Stop the trace if `step` is END, once the devices have computed `state`."""
        if self.running and step == self.last:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """Write a running trace, also if the run ends before END."""
        if self.running:
            self.running = False
            jax.profiler.stop_trace()

"""Metrics on disk: JSON lines are the source of truth, TensorBoard is a copy to look at."""

from __future__ import annotations

import bisect
import json
import logging
import math
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax

from ssl_jax.errors import not_written

log = logging.getLogger(__name__)

NEAR = 5  # logged lines on either side, whose median is the speed of a step
SPAN = "of the time from the first start to the last logged step"  # of which goodput is a share
REST = "starting, compiling, evaluating, saving, repeated steps and not running"  # what takes the rest

if "torch" in sys.modules:
    from tensorboardX import SummaryWriter
else:  # tensorboardX imports PyTorch where it is installed, for the name of a type: two seconds of every start
    sys.modules["torch"] = None
    from tensorboardX import SummaryWriter

    del sys.modules["torch"]


class MetricsWriter:
    """Appends one JSON object per logged step to `<workdir>/metrics.jsonl`.

    Everything that depends on the clock or the machine stands under keys that start with `time/`; the rest is the same in
    every run of the same config. After a restart the lines past the resumed step are cut, so that a file never tells two
    stories. Of several processes the first one writes.
    """

    def __init__(self, workdir: Path, start_step: int = 0, tensorboard: bool = True):
        self.path = Path(workdir) / "metrics.jsonl"
        self._file = self._board = None
        if jax.process_index() != 0:
            return
        self._begin([line for line in read_metrics(workdir) if line["step"] <= start_step])
        if tensorboard:
            purge = start_step + 1 if start_step else None
            # Its thread ends on a full disk, and then a short queue would fill up and stop the run.
            self._board = SummaryWriter(str(Path(workdir) / "tensorboard"), purge_step=purge, max_queue=1 << 15)

    def _begin(self, lines: Sequence[Mapping[str, float]]) -> None:
        """A file of these lines, to append to."""
        try:
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
            os.replace(temporary, self.path)
            self._file = open(self.path, "a", buffering=1)  # noqa: SIM115  closed in close()
        except OSError as error:
            raise not_written(self.path, error) from error

    def amend(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add what was measured later to the line of `step`, the last one; write it where there is none.

        Raises:
            MachineFault: the disk is full, or the directory gone.
        """
        if self._file is None:
            return
        *before, last = read_metrics(self.path.parent) or [{}]
        if last.get("step") != step:
            self.write(step, metrics)
            return
        told = _finite(metrics)
        self._file.close()
        self._begin([*before, {**last, **told}])
        self._draw(step, told)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write what has a value; JSON has none for NaN and inf, and the loop has dealt with them before.

        Raises:
            MachineFault: the disk is full, or the directory gone.
        """
        if self._file is None:
            return
        told = _finite(metrics)
        try:
            self._file.write(json.dumps({"step": step, **told}) + "\n")
        except OSError as error:
            raise not_written(self.path, error) from error
        self._draw(step, told)

    def _draw(self, step: int, told: Mapping[str, float]) -> None:
        if self._board is not None:
            for name, value in told.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        for opened in (self._file, self._board):
            if opened is not None:
                try:
                    opened.close()
                except OSError as error:  # what is told of the run's end must not be lost to it
                    log.warning("%s cannot be closed (%s)", self.path.parent, error.strerror)


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items() if math.isfinite(value)}


def record_start(workdir: Path, clock: float) -> None:
    """Append to `<workdir>/starts.jsonl` when (time.time) this start of the run began. Of several processes the first one writes."""
    if jax.process_index() != 0:
        return
    path = Path(workdir) / "starts.jsonl"
    try:
        with path.open("a") as file:
            file.write(json.dumps({"time/clock": clock}) + "\n")
    except OSError as error:
        raise not_written(path, error) from error


def goodput(lines: Sequence[Mapping[str, float]], starts: Sequence[Mapping[str, float]]) -> float | None:
    """The share of the time from the first start of a run to its last logged line that its steps have taken, each at its speed: the
    median of the lines around it of the same start, without that start's first one. As REST says, the rest is what was lost.

    Args:
        lines: of `read_metrics`; what was logged before the first of `starts` does not count.
        starts: of `read_starts`; also those that never came to a step.

    Returns:
        None before a line is logged, or where the clock went back.
    """
    began = sorted(start["time/clock"] for start in starts if "time/clock" in start)
    of_each_start: dict[int, list[tuple[int, float]]] = {}  # (steps that a line stands for, seconds of one)
    before, end = 0, 0.0
    for line in lines:
        if began and began[0] <= line.get("time/clock", 0.0) and "time/seconds_per_step" in line:
            end = line["time/clock"]
            of_each_start.setdefault(bisect.bisect(began, end), []).append((line["step"] - before, line["time/seconds_per_step"]))
        before = line["step"]
    useful = 0.0
    for timed in of_each_start.values():
        for i, (steps, _) in enumerate(timed):
            near = timed[max(1, i - NEAR) : max(1, i) + NEAR + 1] or timed
            useful += steps * statistics.median(seconds for _, seconds in near)
    return min(useful / (end - began[0]), 1.0) if useful and end > began[0] else None


def read_starts(workdir: Path | str) -> list[dict]:
    """What `record_start` has written."""
    return _read(Path(workdir) / "starts.jsonl")


def read_metrics(workdir: Path | str) -> list[dict]:
    """The logged steps of a run; a line that was cut off by a crash is left out."""
    return _read(Path(workdir) / "metrics.jsonl")


def _read(path: Path) -> list[dict]:
    lines = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:
                break  # only the last line of a killed process can be torn
    return lines

"""Reads metrics.jsonl and starts.jsonl of a workdir; imports no JAX, so that reports and launchers start at once."""

from __future__ import annotations

import bisect
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

NEAR = 5  # logged lines on either side, whose median is the speed of a step
SPAN = "of the time from the first start to the last logged step"  # of which goodput is a share
REST = "starting, compiling, evaluating, saving, repeated steps and not running"  # what takes the rest


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

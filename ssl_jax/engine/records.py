"""Reads metrics.jsonl and starts.jsonl of a workdir. It imports no JAX, so that reports and launchers start quickly."""

from __future__ import annotations

import bisect
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

NEAR = 5  # logged lines on either side whose median gives the seconds of a step
SPAN = "of the time from the first start to the last logged step"  # the denominator of goodput, for reports
REST = "starting, compiling, evaluating, saving, repeated steps and not running"  # the remaining time, for reports


def goodput(lines: Sequence[Mapping[str, float]], starts: Sequence[Mapping[str, float]]) -> float | None:
    """Goodput: the share of the time from the first start of a run to its last logged line that went into steps, in [0, 1].

    A step counts with the median time of the logged lines around it. Only lines of the same start count, without its first line,
    which includes compiling.

    Args:
        lines: from `read_metrics`; lines logged before the first of `starts` are ignored.
        starts: from `read_starts`, including those that never completed a step.

    Returns:
        None if no line has been logged, or if the clock went backwards.
    """
    began = sorted(start["time/clock"] for start in starts if "time/clock" in start)
    by_start: dict[int, list[tuple[int, float]]] = {}  # {start: [(steps that a line covers, seconds per step)]}
    before, end = 0, 0.0
    for line in lines:
        if began and began[0] <= line.get("time/clock", 0.0) and "time/seconds_per_step" in line:
            end = line["time/clock"]
            by_start.setdefault(bisect.bisect(began, end), []).append((line["step"] - before, line["time/seconds_per_step"]))
        before = line["step"]
    useful = 0.0
    for timed in by_start.values():
        for i, (steps, _) in enumerate(timed):
            near = timed[max(1, i - NEAR) : max(1, i) + NEAR + 1] or timed
            useful += steps * statistics.median(seconds for _, seconds in near)
    return min(useful / (end - began[0]), 1.0) if useful and end > began[0] else None


def read_starts(workdir: Path | str) -> list[dict]:
    """The starts of a run, as `metrics.record_start` wrote them."""
    return _read(Path(workdir) / "starts.jsonl")


def read_metrics(workdir: Path | str) -> list[dict]:
    """The logged steps of a run, without a line that a crash cut off."""
    return _read(Path(workdir) / "metrics.jsonl")


def _read(path: Path) -> list[dict]:
    lines = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:
                break  # only the last line of a killed process can be incomplete
    return lines

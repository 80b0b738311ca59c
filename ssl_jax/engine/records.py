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
    return parse(Path(workdir) / "starts.jsonl", "time/clock")[0]


def read_metrics(workdir: Path | str) -> list[dict]:
    """The logged steps of a run, without lines that cannot be read."""
    return parse(Path(workdir) / "metrics.jsonl", "step")[0]


def parse(path: Path, needed: str) -> tuple[list[dict], list[int]]:
    """(the lines of a file, the numbers of those that cannot be read, from 1). A file that is not there has none.

    A line is a JSON object of numbers with the number `needed`. The last one may have been cut off by a crash; it counts as
    unreadable only where it ends with a newline.
    """
    lines, bad = [], []
    data = path.read_bytes() if path.exists() else b""
    *whole, last = data.split(b"\n")
    for number, text in enumerate([*whole, last], 1):
        try:
            line = json.loads(text)
        except ValueError:  # not JSON, or no UTF-8
            line = None
        if isinstance(line, dict) and all(_is_number(value) for value in line.values()) and needed in line:
            lines.append(line)
        elif text.strip() and number <= len(whole):
            bad.append(number)
    return lines, bad


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)

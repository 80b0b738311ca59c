"""Reads the JSON files of a workdir, whatever they hold. It imports no JAX, so that reports and launchers start quickly."""

from __future__ import annotations

import bisect
import errno
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ssl_jax.errors import MachineFault, UserError

NEAR = 5  # logged lines on either side whose median gives the seconds of a step
SPAN = "of the time from the first start to the last logged step"  # the denominator of goodput, for reports
LARGE = 1e300  # greater numbers are damage: sums and axes of charts overflow
DEEPEST = 60  # levels of a JSON file of ours; stages in stages have some twenty
MOST = 1 << 28  # bytes of a JSON file of ours; the largest, a vocabulary, has a few MB
NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)  # the path itself is wrong, not the machine
REST = "starting, compiling, evaluating, saving, repeated steps and not running"  # the remaining time, for reports
# Parts of a protocol that depend on the features and not on the evaluation: hyperparameters chosen on validation, width, views,
# fits that did not converge.
FEATURE_PARTS = re.compile(r"(?:\S+=\S+ )+(?=chosen )|\bD=\d+ |\balignment alpha=.*$| \[[^\]]*\]$| \(\d+ of \d+ fits not converged\)")


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
        if began and {"time/clock", "time/seconds_per_step"} <= line.keys() and began[0] <= line["time/clock"]:
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
    """The starts of a run, as `metrics.record_start` wrote them, without lines that are damaged."""
    return parse(Path(workdir) / "starts.jsonl", "time/clock")[0]


def read_metrics(workdir: Path | str) -> list[dict]:
    """The logged steps of a run, without lines that are damaged."""
    return parse(Path(workdir) / "metrics.jsonl", "step")[0]


def parse(path: Path, needed: str) -> tuple[list[dict[str, float]], list[int]]:
    """(the lines of a file, the numbers of those that are damaged, from 1). A file that is not there has none.

    A line is a JSON object of numbers with the number `needed`; a step is an int of at least 0. Only finite numbers are kept. The
    last line may have been cut off by a crash; it counts as damaged only where it ends with a newline.

    Raises:
        MachineFault: the file cannot be read.
    """
    lines, bad = [], []
    *whole, last = (_bytes(path) if path.is_file() else b"").split(b"\n")
    for number, text in enumerate([*whole, last], 1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):  # not JSON, or no UTF-8
            line = None
        numbers = finite(line)
        wrong = isinstance(line, dict) and [key for key, value in line.items() if key not in numbers and not isinstance(value, float)]
        if isinstance(line, dict) and not wrong and needed in numbers and (needed != "step" or _is_step(numbers["step"])):
            lines.append(numbers)
        elif text.strip() and number <= len(whole):
            bad.append(number)
    return lines, bad


def finite(values: Any) -> dict[str, float]:
    """The items of a mapping that are finite numbers."""
    items = values.items() if isinstance(values, Mapping) else ()
    return {k: v for k, v in items if isinstance(v, int | float) and not isinstance(v, bool) and -LARGE < v < LARGE}


def read_json(path: Path, kind: type, needs: Mapping[str, type | tuple] | None = None, remedy: str = "restore it from a backup") -> Any:
    """The value of a JSON file of ours, a `kind` (dict or list).

    Args:
        needs: {key: type} that a dict must have, or every dict of a list.
        remedy: what the message tells the user to do.

    Raises:
        UserError: there is no such file, or it is no JSON, of another type or lacks a key.
        MachineFault: the file cannot be read.
    """
    if not path.is_file():
        raise UserError(f"{path} is no file; {remedy}")
    try:
        value = json.loads(_bytes(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({_why(path, error)}); {remedy}") from None
    problem = mistyped(value, kind) or ("it is nested too deeply" if _depth(value) > DEEPEST else "")
    for i, item in enumerate(value if isinstance(value, list) and needs else []):
        problem = problem or _problem(item, needs, f"entry {i} ")
    if isinstance(value, dict) and needs:
        problem = problem or _problem(value, needs, "it ")
    if problem:
        raise UserError(f"{path} is damaged ({problem}); {remedy}")
    return value


def _depth(value: Any) -> int:
    """Levels of lists and dicts in `value`, without recursion."""
    level, at = 0, [value]
    while at and level <= DEEPEST:
        at = [child for each in at if isinstance(each, dict | list) for child in (each.values() if isinstance(each, dict) else each)]
        level += 1
    return level


def mistyped(value: Any, kind: type) -> str:
    """'it holds a list where a dict should be', or ''."""
    return "" if isinstance(value, kind) else f"it holds {_a(value)} where {_NAMES[kind]} should be"


def _problem(value: Any, needs: Mapping[str, type | tuple], what: str) -> str:
    if not isinstance(value, dict):
        return f"{what}is {_a(value)} where {_NAMES[dict]} should be"
    for key, kind in needs.items():
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if key not in value and type(None) not in kinds:
            return f"{what}has no {key!r}"
        if not isinstance(value.get(key), kinds) or (isinstance(value.get(key), bool) and bool not in kinds):
            return f"{what}has {_a(value.get(key))} as {key!r}"
    return ""


def _a(value: Any) -> str:
    return _NAMES.get(type(value), f"a {type(value).__name__}")


_NAMES = {
    dict: "an object", list: "a list", str: "a text", int: "a number", float: "a number", bool: "true or false", type(None): "null",
}  # fmt: skip


def _why(path: Path, error: Exception) -> str:
    if path.stat().st_size == 0:
        return "it is empty"
    return "it is nested too deeply" if isinstance(error, RecursionError) else f"no JSON: {error}"


def _bytes(path: Path) -> bytes:
    try:
        if (size := path.stat().st_size) > MOST:
            raise UserError(f"{path} has {size / 2**20:,.0f} MiB, which no such file of ssl_jax has; restore it from a backup")
        return path.read_bytes()
    except OSError as error:
        if error.errno in NO_FILE:
            raise UserError(f"{path} cannot be read ({error.strerror}); restore it from a backup") from None
        raise MachineFault(f"{path} cannot be read ({error.strerror}); repair its disk or its permissions") from error


def _is_step(value: Any) -> bool:
    return isinstance(value, int) and value >= 0


def read_evaluations(workdir: Path | str) -> list[dict]:
    """The entries of evaluations.json; [] where there is none. Raises UserError if it is damaged, MachineFault if it cannot be read."""
    path = Path(workdir) / "evaluations.json"
    if not path.exists():
        return []
    needs = {"subject": str, "step": int, "metrics": dict, "protocols": (dict, type(None)), "evals": (dict, type(None))}
    remedy = "move it away, and evaluate again"
    entries = read_json(path, list, needs, remedy)
    for i, entry in enumerate(entries):
        entry["protocols"] = entry.get("protocols") or {}
        if entry.get("evals", {}) is None:
            del entry["evals"]
        numbers = all(
            isinstance(value, float) or (isinstance(value, int) and abs(value) < LARGE) for value in entry["metrics"].values()
        )
        if not numbers or not all(isinstance(text, str) for text in entry["protocols"].values()):
            raise UserError(f"{path} is damaged (entry {i} has {'protocols' if numbers else 'metrics'} of a wrong type); {remedy}")
    return entries


def comparable(entry: Mapping, other: Mapping, metric: str) -> bool:
    """Whether `metric` ('<label>/...') was measured under the same protocol in both entries."""
    label = metric.partition("/")[0]
    first, second = (FEATURE_PARTS.sub("", record["protocols"].get(label, "")) for record in (entry, other))
    return first == second

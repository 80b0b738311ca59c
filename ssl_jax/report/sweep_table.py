"""A sweep as a table of its runs: run, state, step, last metric, time left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ssl_jax.errors import printable
from ssl_jax.experiment.runs import Progress, progress

STATES = {"running": "cyan", "failed": "red", "interrupted": "yellow", "stopped": "", "waiting": "", "done": "green"}
COLUMNS = ("run", "state", "step", "last metric", "time left")


def read_progress(plan: Mapping[str, Any], workdir: Path) -> dict[str, Progress]:
    """{workdir of a run: how far it is}, from files alone."""
    return {run["workdir"]: progress(workdir / run["workdir"]) for run in plan["runs"]}


def rows(plan: Mapping[str, Any], found: Mapping[str, Progress]) -> list[tuple[str, ...]]:
    """The texts of COLUMNS for every run, then the line of a failed one."""
    return [_row(f"{run['name']} seed {run['seed']}", found[run["workdir"]]) for run in plan["runs"]]


def _row(name: str, run: Progress) -> tuple[str, ...]:
    step = f"{run.step}/{run.total}" if run.total else ""
    left = ""
    if run.state == "running" and run.total and run.seconds_per_step:
        left = duration((run.total - run.step) * run.seconds_per_step)
    return printable(name), run.state, step, printable(run.metric), left, printable(run.message)


def summary(found: Mapping[str, Progress]) -> str:
    """'12 runs: 3 done, 1 running, 8 waiting'"""
    counts = Counter(run.state for run in found.values())
    return f"{len(found)} runs: " + ", ".join(f"{counts[state]} {state}" for state in reversed(STATES) if counts[state])


def table(plan: Mapping[str, Any], found: Mapping[str, Progress], most: int | None = None) -> Table:
    """The table for a terminal.

    Args:
        most: rows at most, of one line each but for long names; runs that wait or are done are left out first.
    """
    made = Table(title=f"{printable(plan['name'])}: {summary(found)}", title_justify="left")
    for column in COLUMNS:
        cut = most is not None and column != "run"
        made.add_column(column, overflow="ellipsis" if cut else "fold", no_wrap=cut)
    all_rows = rows(plan, found)
    order = sorted(range(len(all_rows)), key=lambda number: list(STATES).index(all_rows[number][1]))
    for number in sorted(order[:most]):
        name, state, step, metric, left, message = all_rows[number]
        made.add_row(Text(name), Text(state, style=STATES[state]), step, Text(message or metric), left)
    if most is not None and len(all_rows) > most:
        made.caption = f"{len(all_rows) - most} more"
    return made


def show(plan: Mapping[str, Any], workdir: Path, console: Console) -> None:
    """Print the table, or where stdout is no terminal, a line for each run."""
    found = read_progress(plan, workdir)
    if console.is_terminal:
        console.print(table(plan, found))
        return
    print(f"{printable(plan['name'])}: {summary(found)}")
    for name, state, step, metric, left, message in rows(plan, found):
        details = [step and f"step {step}", metric, left and f"{left} left", message]
        print("; ".join([f"{name}: {state}", *filter(None, details)]))


class LiveTable:
    """A context manager: the table on a terminal, renewed every two seconds; nothing elsewhere."""

    def __init__(self, plan: Mapping[str, Any], workdir: Path, console: Console):
        self.plan, self.workdir, self.console = plan, workdir, console
        self._found = read_progress(plan, workdir)
        self._live = Live(get_renderable=self._table, console=console, refresh_per_second=0.5) if console.is_terminal else None

    def _table(self) -> Table:
        for run in self.plan["runs"]:  # files of runs that are done do not change, and a search adds runs
            if run["workdir"] not in self._found or self._found[run["workdir"]].state != "done":
                self._found[run["workdir"]] = progress(self.workdir / run["workdir"])
        return table(self.plan, self._found, max(3, self.console.height - 6))

    def __enter__(self) -> LiveTable:
        if self._live:
            self._live.__enter__()
        return self

    def __exit__(self, *error) -> None:
        if self._live:
            self._live.__exit__(*error)

    def say(self, line: str) -> None:
        """Print a line, above the table."""
        if self._live:
            self._live.console.print(Text(printable(line)))
        else:
            print(printable(line), flush=True)


def duration(seconds: float) -> str:
    """'45 s', '12 min', '3 h 20 min'"""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def size(count: int) -> str:
    """'340 MB', '1.2 GB'"""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"

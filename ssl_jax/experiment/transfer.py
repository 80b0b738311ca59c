"""One pretrained encoder on a set of tasks: a run for each task, start and seed, and one table of their main numbers.

A recipe takes part if it has the stage 'backbone', `config.model.backbone`, and a `best_metric`, which is its column. Each run is a
workdir of its own, `OUTPUT/TASK/START-SEED`, so it resumes as any other, and a finished one is not run again. Imports no JAX.
"""

from __future__ import annotations

import csv
import io
import itertools
import logging
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ssl_jax import files
from ssl_jax.engine.intervals import t_half_width
from ssl_jax.engine.records import read_evaluations
from ssl_jax.errors import UserError
from ssl_jax.experiment import config as configs
from ssl_jax.experiment import runs

log = logging.getLogger(__name__)

TASKS = {
    "classification": "configs/supervised.py:transfer",
    "segmentation": "configs/segmentation.py",
    "detection": "configs/detection.py",
    "vqa": "configs/vqa.py",
}
SAME = "--config.optim.net.lr_multipliers=(('.*', 1.0),)"  # whatever the recipe has
SLOWER = "--config.optim.net.lr_multipliers=(('^net/backbone/', 0.1), ('.*', 1.0))"  # pretrained weights need small steps
STARTS = {  # where the backbone starts, and whether it is trained with the task
    "untrained": ("--config.stages.backbone.untrained=True", "--config.model.backbone=frozen", SAME),
    "pretrained": ("--config.model.backbone=frozen", SAME),
    "finetuned": ("--config.model.backbone=trained", SLOWER),
    "scratch": ("--config.stages.backbone.untrained=True", "--config.model.backbone=trained", SAME),
}
WORDS = {
    "untrained": "initial weights, frozen",
    "pretrained": "pretrained, frozen",
    "finetuned": "pretrained, trained with the task",
    "scratch": "initial weights, trained with the task",
}


class Cell(NamedTuple):
    """One run of the plan."""

    task: str
    recipe: str
    start: str
    seed: int
    metric: str  # '<label>/<name>'
    workdir: Path
    overrides: tuple[str, ...]


class Row(NamedTuple):
    """A number of the table."""

    task: str
    metric: str
    start: str
    seed: int
    step: int
    value: float
    protocol: str


def plan(
    encoder: Sequence[str], output: Path, tasks: Sequence[str], starts: Sequence[str], seeds: Sequence[int], overrides: Sequence[str]
) -> list[Cell]:
    """All runs in order, with every config checked.

    Args:
        encoder: flags that name it, such as ('--config.stages.backbone.workdir=runs/simclr',).
        tasks: names of `TASKS`, or recipes 'configs/NAME.py:VARIANT'.
        overrides: for the config of every task.

    Raises:
        UserError: an unknown task or start, one that is named twice, or a recipe that is none of a transfer.
    """
    for what, given, known in (("--starts", starts, STARTS), ("--seeds", seeds, None), ("--tasks", tasks, None)):
        if not given or len(set(given)) < len(given):
            raise UserError(f"{what}={','.join(map(str, given))} names {'none' if not given else 'one twice'}; give each once")
        unknown = [name for name in given if known is not None and name not in known]
        if unknown:
            raise UserError(f"{what}: {unknown[0]!r} is unknown; choose of {', '.join(known)}")
    cells = []
    for task in tasks:
        recipe = TASKS.get(task, task)
        if ".py" not in recipe:
            raise UserError(f"--tasks: {task!r} is unknown; choose of {', '.join(TASKS)}, or give configs/NAME.py:VARIANT")
        bare = configs.load(recipe, ())
        if "backbone" not in bare.stages or "backbone" not in bare.model or not bare.best_metric:
            raise UserError(f"--tasks: {task} builds on no backbone, or has no config.best_metric; see docs/guides/transfer.md")
        if "lr_multipliers" not in bare.optim.get("net", {}):
            raise UserError(f"--tasks: {task} has no config.optim.net.lr_multipliers; give it configs.common.SAME")
        for start, seed in itertools.product(starts, seeds):
            flags = (*encoder, *STARTS[start], f"--config.seed={seed}", "--config.baselines=()", *overrides)
            config = configs.load(recipe, flags)
            name = task if task in TASKS else f"{Path(recipe).name.replace('.py', '').replace(':', '_')}"
            workdir = output / name / f"{start}-{seed}"
            cells.append(Cell(name, recipe, start, seed, config.best_metric.removeprefix("-"), workdir, flags))
    if len({cell.workdir for cell in cells}) < len(cells):
        raise UserError("--tasks: two of them have one name; run them with another --output")
    return cells


def run(cells: Sequence[Cell], command: Sequence[str], shares: Sequence[runs.Share] = (runs.Share(),)) -> list[str]:
    """Train every cell that is not finished, as many at once as there are `shares`; returns a line for each that failed.

    Args:
        command: the program that takes `train`, `--config`, ...

    Raises:
        MachineFault: a run ended with a fault of the machine, which would end the others too.
        KeyboardInterrupt: a run was interrupted; it saved.
    """
    by_workdir = {cell.workdir: cell for cell in cells}
    numbers = {cell.workdir: number for number, cell in enumerate(cells, 1)}

    def on_event(kind: str, run: runs.Run, line: str) -> None:
        cell = by_workdir[run.workdir]
        if kind == "started":
            log.info("%d of %d: %s, %s, seed %d", numbers[run.workdir], len(cells), cell.task, WORDS[cell.start], cell.seed)
        elif kind == "failed":
            log.error("%s: %s (see %s/output.txt)", run.name, line, run.workdir)

    plan = [runs.Run(f"{cell.task} {cell.start} seed {cell.seed}", cell.recipe, cell.overrides, cell.workdir) for cell in cells]
    return runs.train_all(plan, command, lambda run: measured(by_workdir[run.workdir]) is not None, shares, on_event=on_event)


def measured(cell: Cell) -> Row | None:
    """The number of a finished run; None where it is not there yet."""
    if not runs.finished(cell.workdir):
        return None
    entries = [entry for entry in read_evaluations(cell.workdir) if entry["subject"] == "trained" and cell.metric in entry["metrics"]]
    if not entries:
        return None
    last = max(entries, key=lambda entry: entry["step"])
    protocol = last["protocols"].get(cell.metric.partition("/")[0], "")
    return Row(cell.task, cell.metric, cell.start, cell.seed, last["step"], last["metrics"][cell.metric], protocol)


def write_tables(cells: Sequence[Cell], output: Path) -> str:
    """Write `transfer.csv`, a row for each run, and `transfer.md`, the table; returns the table.

    A cell is the mean over seeds, the half width of its 95 % t-interval (none for one seed), and each seed.
    """
    rows = [row for row in map(measured, cells) if row is not None]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Row._fields)
    writer.writerows(rows)
    files.write(output / "transfer.csv", text.getvalue())
    starts = list(dict.fromkeys(cell.start for cell in cells))
    lines = ["| task | metric | " + " | ".join(WORDS[start] for start in starts) + " |", "|" + " --- |" * (2 + len(starts))]
    for task, metric in dict.fromkeys((cell.task, cell.metric) for cell in cells):
        values = [[row.value for row in rows if (row.task, row.metric, row.start) == (task, metric, start)] for start in starts]
        lines.append(f"| {task} | {metric} | " + " | ".join(map(summary, values)) + " |")
    table = "\n".join(lines) + "\n"
    files.write(output / "transfer.md", table)
    return table


def summary(values: Sequence[float]) -> str:
    """'52.10 ± 1.24 (51.6, 52.6)': mean, half width of the 95 % t-interval and every value; '–' without values."""
    if not values:
        return "–"
    if len(values) == 1:
        return f"{values[0]:.2f} (1 seed)"
    return f"{statistics.mean(values):.2f} ± {t_half_width(values):.2f} ({', '.join(f'{value:.1f}' for value in values)})"


def read_transfers(workdir: Path, missing: list[str]) -> list[Row]:
    """The rows of `transfer/transfer.csv`; [] without one. Damage is a line in `missing`."""
    path = workdir / "transfer" / "transfer.csv"
    if not path.is_file():
        return []
    try:
        with open(path, encoding="utf-8", newline="") as file:
            lines = list(csv.DictReader(file, strict=True))
        kinds = (str, str, str, int, int, float, str)
        rows = [Row(*(kind(line[name]) for name, kind in zip(Row._fields, kinds, strict=True))) for line in lines]
        if any(row.start not in WORDS or not math.isfinite(row.value) for row in rows):
            raise ValueError("an unknown start, or a number that is not finite")
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        missing.append(f"transfer/transfer.csv is damaged ({error})")
        return []
    return rows

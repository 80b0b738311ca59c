"""The table of a comparison: a row for each group and each baseline that its runs measured, a column for each metric and protocol."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from ssl_jax.engine.intervals import Difference, Summary, paired, summarize
from ssl_jax.errors import UserError
from ssl_jax.report.charts import PERCENT, number
from ssl_jax.report.compare.runs import TRAINED, Comparison, Group, short
from ssl_jax.report.sections import ACCURACY

MAIN = re.compile(r"[^/]*/(best_)?(top1|accuracy)")  # the metric that stands for an evaluation
MOST_COLUMNS = 8  # that are chosen without --metric


class Column(NamedTuple):
    metric: str  # '<label>/<name>'
    protocol: str  # of all its numbers; '' where it was not recorded
    title: str  # the metric, and what sets its protocol apart from that of another column


class Cell(NamedTuple):
    """The numbers of one group under one protocol."""

    values: dict[int, float]  # {seed: finite value}
    not_numbers: list[int]  # seeds whose value is NaN or infinite
    missing: list[int]  # seeds that were evaluated without this metric, where others have it
    summary: Summary
    difference: Difference | None  # to the baseline; None for the baseline itself


class Row(NamedTuple):
    name: str
    subject: str  # 'trained', 'untrained', ...
    runs: int  # of its groups
    cells: dict[Column, Cell]


class Table(NamedTuple):
    columns: list[Column]  # all that were measured after training
    shown: list[Column]  # on the page, in Markdown and in LaTeX
    rows: list[Row]  # trained groups, then baselines
    step: int | None  # None: the end of each run
    baseline: str | None  # the name of a row


def make_table(comparison: Comparison, metrics: Sequence[str], step: int | None, others: Sequence[str] = ()) -> Table:
    """The table of all metrics, with those of `metrics` shown, or by default the main one of each evaluation.

    Args:
        metrics: names '<label>/<name>'; [] for the default.
        step: of the evaluations of trained models; None for the end of finished runs.
        others: names that are no evaluations, and are no mistakes in `metrics`.

    Raises:
        UserError: an unknown metric, a step without an evaluation, or groups that have no evaluation in common.
    """
    groups = comparison.groups
    found: dict[str, dict[str, set[int]]] = {}  # {metric: {protocol: indices of the groups that measured it}}
    for i, group in enumerate(groups):
        for run in group.runs:
            for metric, under in run.evaluation(TRAINED, step) or ():
                found.setdefault(metric, {}).setdefault(under, set()).add(i)
    _check_metrics(metrics, found, others)
    if step is not None and not found:
        steps = sorted({at for group in groups for run in group.runs for at in run.evaluations.get(TRAINED, {})})
        known = f"there are steps {', '.join(map(str, steps[-10:]))}" if steps else "no run has been evaluated after training"
        raise UserError(f"--step={step}: no run was evaluated there; {known}")
    columns = [column for metric, protocols in found.items() for column in _columns(metric, list(protocols))]
    shown = [metric for metric in metrics if metric in found] if metrics else _main(groups, found)
    rows = [
        _row(group.name, TRAINED, [group], columns, step, comparison.baseline if group is not comparison.baseline else None)
        for group in groups
    ]
    rows += _baselines(groups, columns, step)
    chosen = [column for metric in shown for column in columns if column.metric == metric]
    return Table(columns, chosen, rows, step, comparison.baseline.name if comparison.baseline else None)


def _check_metrics(metrics: Sequence[str], found: Mapping, others: Sequence[str]) -> None:
    for i, metric in enumerate(metrics):
        if metric in metrics[:i]:
            raise UserError(f"--metric={metric} is given twice; give each once")
        if metric not in found and metric not in others:
            known = [*found, *others]
            near = difflib.get_close_matches(metric, known, 3, 0.4) or known[:10]
            remedy = f"did you mean {' or '.join(near)}?" if near else "the runs have no metrics yet"
            raise UserError(f"--metric={metric} is a metric of none of the runs; {remedy}")


def _main(groups: Sequence[Group], found: Mapping[str, Mapping[str, set[int]]]) -> list[str]:
    """One metric for each evaluation that two groups have, or the only group: best_metric, else an accuracy, else the first."""
    measured = {i for protocols in found.values() for members in protocols.values() for i in members}
    common = [name for name, protocols in found.items() if len(measured) < 2 or len(set().union(*protocols.values())) > 1]
    if measured and not common:
        texts = []
        for i in sorted(measured)[:2]:
            names = [name for name, protocols in found.items() if any(i in members for members in protocols.values())]
            texts.append(f"{groups[i].name} has {', '.join(dict.fromkeys(name.partition('/')[0] for name in names))}")
        remedy = "run one of both by `launch.py evaluate --workdir=RUN --eval=KIND`"
        raise UserError(f"no evaluation in common: {'; '.join(texts)}; {remedy}")
    best = [str(group.config.get("best_metric", "")).removeprefix("-") for group in groups]
    main: dict[str, str] = {}
    for name in sorted(common, key=lambda name: (name not in best, not MAIN.fullmatch(name))):
        main.setdefault(name.partition("/")[0], name)
    order = sorted(main.values(), key=lambda name: (name not in best, [*found].index(name)))
    return order[:MOST_COLUMNS]


def _columns(metric: str, protocols: Sequence[str]) -> list[Column]:
    """A column for each protocol; where there are several, its title has the first word that no other protocol has."""
    if len(protocols) < 2:
        return [Column(metric, protocols[0], metric)]
    columns = []
    for i, protocol in enumerate(protocols, 1):
        others = {word for other in protocols if other != protocol for word in other.split()}
        own = next((word for word in protocol.split() if word not in others), f"protocol {i}")
        columns.append(Column(metric, protocol, f"{metric}, {short(own)}"))
    if len({column.title for column in columns}) < len(columns):
        columns = [column._replace(title=f"{metric}, protocol {i}") for i, column in enumerate(columns, 1)]
    return columns


def _row(name: str, subject: str, groups: Sequence[Group], columns: Sequence[Column], step: int | None, baseline: Group | None) -> Row:
    cells = {}
    for column in columns:
        values: dict[int, float] = {}
        for group in groups:
            values.update(group.values(column.metric, column.protocol, step, subject))
        seeds = sorted({run.seed for group in groups for run in group.runs if run.evaluation(subject, step) is not None})
        against = baseline.values(column.metric, column.protocol, step) if baseline else None
        cells[column] = _cell(values, seeds, against)
    return Row(name, subject, len({run.name for group in groups for run in group.runs}), cells)


def _cell(values: Mapping[int, float], seeds: Sequence[int], against: Mapping[int, float] | None) -> Cell:
    finite = {seed: values[seed] for seed in sorted(values) if math.isfinite(values[seed])}
    missing = [seed for seed in seeds if seed not in values] if values else []
    difference = None
    if against is not None:
        difference = paired(finite, {seed: value for seed, value in against.items() if math.isfinite(value)})
    return Cell(finite, [seed for seed in values if seed not in finite], missing, summarize(list(finite.values())), difference)


def _baselines(groups: Sequence[Group], columns: Sequence[Column], step: int | None) -> list[Row]:
    """Rows of what the runs measured beside the trained model. Groups whose numbers agree, seed by seed, share one."""
    rows = []
    subjects = dict.fromkeys(name for group in groups for run in group.runs for name in run.evaluations if name != TRAINED)
    for subject in subjects:
        shared: list[tuple[list[Group], dict]] = []
        for group in groups:
            numbers = {
                (column, seed): value
                for column in columns for seed, value in group.values(column.metric, column.protocol, step, subject).items()
            }  # fmt: skip
            if not numbers:
                continue
            same = next((both for both in shared if _agree(both[1], numbers)), None)
            if same is None:
                shared.append(([group], numbers))
            else:
                same[0].append(group)
                same[1].update(numbers)
        for of, _ in shared:
            name = subject if len(shared) == 1 else f"{subject}: {', '.join(group.name for group in of)}"
            rows.append(_row(name, subject, of, columns, step, None))
    return rows


def _agree(one: Mapping, other: Mapping) -> bool:
    common = one.keys() & other.keys()
    return bool(common) and all(one[key] == other[key] or (math.isnan(one[key]) and math.isnan(other[key])) for key in common)


def unit(metric: str) -> str:
    return PERCENT if ACCURACY.search(metric) else ""


def formatter(metric: str, sign: bool = False) -> Callable[[float], str]:
    """A function of a value that gives it as text: two decimals for percentages, else at most four significant digits."""

    def text(value: float) -> str:
        shown = f"{value:.2f}" if unit(metric) else number(value)
        return f"+{shown}" if sign and value > 0 else shown

    return text

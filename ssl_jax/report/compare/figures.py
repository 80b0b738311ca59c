"""The figures of a comparison: curves with bands, effects of varied keys, heat maps, quality against compute."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence

from ssl_jax.engine.intervals import t_interval
from ssl_jax.report.charts import chart, legend_of, thinned
from ssl_jax.report.compare.cost import cost
from ssl_jax.report.compare.runs import TRAINED, Comparison, Group
from ssl_jax.report.compare.scatter import Point, scatter
from ssl_jax.report.compare.table import Column, Table, formatter, unit
from ssl_jax.report.sections import section, text

MOST_LINES = 12  # of a chart: six colors, plain and dashed
POINTS = 80  # of a line with a band
MOST_CURVES = 12  # charts of metrics of the log
MOST_PAIRS = 3  # heat maps

Band = list[tuple[float, float, float, float]]  # (step, mean, low, high)


def logged(comparison: Comparison) -> dict[str, None]:
    """The metrics of metrics.jsonl, in order, but those of the clock."""
    lines = (line for group in comparison.groups for run in group.runs for line in run.record.lines)
    return dict.fromkeys(name for line in lines for name in line if name != "step" and not name.startswith("time/"))


def band(group: Group, metric: str, under: str | None, per_step: float = 1) -> Band:
    """Mean, least and largest value over the seeds at the steps that all have; of finished runs where there are some.

    Args:
        under: the protocol of an evaluation; None for a metric of metrics.jsonl.
        per_step: what the steps are multiplied with.
    """
    runs = [run for run in group.runs if run.finished] or group.runs
    series = []
    for run in runs:
        if under is None:
            points = {int(line["step"]): line[metric] for line in run.record.lines if metric in line}
        else:
            found = {step: numbers.get((metric, under), math.nan) for step, numbers in run.evaluations.get(TRAINED, {}).items()}
            points = {step: value for step, value in found.items() if math.isfinite(value)}
        if points:
            series.append(points)
    steps = sorted(set.intersection(*map(set, series))) if series else []
    values = [[points[step] for points in series] for step in steps]
    return [(step * per_step, statistics.fmean(of), min(of), max(of)) for step, of in zip(steps, values, strict=True)]


def curves(comparison: Comparison, table: Table, metrics: Sequence[str]) -> str:
    """Evaluations over steps where there are several, and losses or the chosen metrics of the log."""
    groups = _drawn(comparison)
    batches = {group.config.get("batch_size") for group in comparison.groups}
    images = len(batches) > 1 and all(type(batch) is int for batch in batches)
    evaluated = {column.metric for column in table.columns}
    names = [name for name in metrics or logged(comparison) if name not in evaluated and (metrics or name.endswith("/loss"))]
    drawn = [(column.title, column.metric, column.protocol) for column in table.shown]
    drawn += [(name, name, None) for name in names[:MOST_CURVES]]
    figures = []
    for title, metric, under in drawn:
        bands = {group.name: band(group, metric, under, group.config["batch_size"] if images else 1) for group in groups}
        if under is None or max(map(len, bands.values())) > 1:
            figures.append(_curve(title, bands, unit(metric) if under is not None else "", "image" if images else "step"))
    figures = list(filter(None, figures))
    if not figures:
        return ""
    note = "Line: mean over the seeds, at the steps that all of them have. Band: least to largest value of a seed."
    if len(groups) < len(comparison.groups):
        note += f" Of {len(comparison.groups):,} groups, {len(groups)} are drawn: the first ones and the baseline."
    note += " The horizontal axis counts images seen, since the batch sizes differ." if images else ""
    legend = f'<p class="legend names">{"".join(legend_of({group.name: "" for group in groups}))}</p>'
    return section("Curves", f'<p class="note">{text(note)}</p>{legend}<div class="charts">{"".join(figures)}</div>')


def _drawn(comparison: Comparison) -> list[Group]:
    """The groups of a chart: all, or the first ones and the baseline."""
    groups = comparison.groups[:MOST_LINES]
    if comparison.baseline is not None and comparison.baseline not in groups:
        groups = [comparison.baseline, *groups[:-1]]
    return groups


def _curve(title: str, bands: dict[str, Band], of_unit: str, axis: str) -> str:
    """A chart; '' without a point. A group without points keeps its color, so that one legend is right for all charts."""
    if not any(bands.values()):
        return ""
    columns = {name: [thinned([(at[0], at[i]) for at in points], POINTS) for i in (1, 2, 3)] for name, points in bands.items()}
    lines = {name: of[0] for name, of in columns.items()}
    ranges = {
        name: [(x, low, high) for (x, low), (_, high) in zip(of[1], of[2], strict=True)]
        for name, of in columns.items() if len(of[0]) > 1
    }  # fmt: skip
    return chart(title, lines, unit=of_unit, bands=ranges, axis=axis, legend=False)


def effects(comparison: Comparison, table: Table) -> str:
    """For each varied key its effect on the shown metrics, and a heat map for each of the first pairs of keys."""
    groups = [group for group in comparison.groups if group.keys]
    keys = dict.fromkeys(key for group in groups for key in group.keys)
    keys = [key for key in keys if len({group.keys.get(key) for group in groups} - {None}) > 1]
    if not keys or not table.shown:
        return ""
    figures = [_effect(groups, keys, key, column, table.step) for key in keys for column in table.shown]
    note = "Point: mean over the seeds; bar: 95 % t-interval. A line for each setting of the other varied keys; where these are more "
    note += f"than {MOST_LINES}, the means of groups are averaged over them, and the bar is the t-interval over the groups."
    maps = [_heat_map(groups, pair, column, table.step) for pair in _pairs(keys) for column in table.shown]
    body = f'<p class="note">{text(note)}</p><div class="charts">{"".join(figures)}</div>{"".join(maps)}'
    return section("Effects of the varied keys", body) if any(figures) else ""


def _pairs(keys: Sequence[str]) -> list[tuple[str, str]]:
    return list(itertools.combinations(keys, 2))[:MOST_PAIRS]


def _effect(groups: Sequence[Group], keys: Sequence[str], key: str, column: Column, step: int | None) -> str:
    show, settings = formatter(column.metric), {}
    for group in groups:
        values = [value for value in group.values(column.metric, column.protocol, step).values() if math.isfinite(value)]
        if key in group.keys and values:
            other = ", ".join(f"{name}={group.keys[name]}" for name in keys if name != key and name in group.keys)
            settings.setdefault(other, []).append((group.keys[key], values))
    if not settings:
        return ""
    if len(settings) > MOST_LINES:
        means: dict[str, list[float]] = {}
        for value, values in itertools.chain(*settings.values()):
            means.setdefault(value, []).append(statistics.fmean(values))
        settings = {"mean over the other keys": list(means.items())}
    texts = list(dict.fromkeys(value for found in settings.values() for value, _ in found))
    numbers = {value: _number(value) for value in texts}
    numeric = None not in numbers.values()
    places = numbers if numeric else {value: i for i, value in enumerate(texts)}
    series = {}
    for other, found in settings.items():
        points = []
        for value, values in sorted(found, key=lambda pair: places[pair[0]]):
            mean, interval = statistics.fmean(values), t_interval(values) or (None, None)
            points.append(Point(places[value], mean, *interval, f"{key}={value}: {show(mean)}, n={len(values)}"))
        series[other or key] = points
    return scatter(column.title, series, key, () if numeric else texts, joined=True)


def _heat_map(groups: Sequence[Group], pair: tuple[str, str], column: Column, step: int | None) -> str:
    """A table of means, darker where they are larger; '' unless both keys have a cell with numbers."""
    cells: dict[tuple[str, str], list[float]] = {}
    for group in groups:
        values = [value for value in group.values(column.metric, column.protocol, step).values() if math.isfinite(value)]
        if values and all(key in group.keys for key in pair):
            cells.setdefault(tuple(group.keys[key] for key in pair), []).append(statistics.fmean(values))
    means = {place: statistics.fmean(values) for place, values in cells.items()}
    if not means:
        return ""
    down, across = (_ordered({place[i] for place in means}) for i in (0, 1))
    low, high, show = min(means.values()), max(means.values()), formatter(column.metric)
    rows = []
    for value in down:
        row = ""
        for other in across:
            mean = means.get((value, other))
            share = 0 if mean is None else round(60 * (mean - low) / (high - low)) if high > low else 30
            style = f' style="background: color-mix(in srgb, var(--accent) {share}%, transparent)"'
            row += f'<td class="value"{style}>{"–" if mean is None else show(mean)}</td>'
        rows.append(f"<tr><th>{text(value)}</th>{row}</tr>")
    heads = "".join(f'<th class="value">{text(other)}</th>' for other in across)
    table = f"<table><thead><tr><th></th>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    several = ", mean of the groups with both values" if max(map(len, cells.values())) > 1 else ""
    title = f"{column.title}: {pair[0]} (down), {pair[1]} (across){several}"
    return f'<div class="card"><h3>{text(title)}</h3><div class="scroll">{table}</div></div>'


def _ordered(values: set[str]) -> list[str]:
    """Numbers in ascending order, else texts in the order of the alphabet."""
    numbers = {value: _number(value) for value in values}
    return sorted(values, key=numbers.get if None not in numbers.values() else str)


def _number(value: str) -> float | None:
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def against_compute(comparison: Comparison, table: Table) -> str:
    """Charts of the shown metrics over device-seconds: a point for each group."""
    figures = []
    for column in table.shown:
        series = {}
        for group in comparison.groups:
            values = [value for value in group.values(column.metric, column.protocol, table.step).values() if math.isfinite(value)]
            seconds = [cost(run, table.step).device_seconds for run in group.runs if run.evaluation(TRAINED, table.step) is not None]
            seconds = [value for value in seconds if value]
            if values and seconds:
                interval, show = t_interval(values) or (None, None), formatter(column.metric)
                mean, spent = statistics.fmean(values), statistics.fmean(seconds)
                series[group.name] = [Point(spent, mean, *interval, f"{group.name}: {show(mean)}, {spent:,.0f} device-seconds")]
        if len(series) > 1 or len(comparison.groups) == 1:
            figures.append(scatter(column.title, series, "device-seconds in steps", legend=len(series) <= MOST_LINES))
    return f'<div class="charts">{"".join(figures)}</div>' if figures else ""

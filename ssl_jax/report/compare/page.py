"""The tables of the page of a comparison. `text` escapes every string from the workdirs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from ssl_jax.engine.intervals import COVERAGE_OF_3, RESAMPLES, SIGNIFICANT_FROM, Interval
from ssl_jax.report.compare.cost import Cost, cost
from ssl_jax.report.compare.figures import against_compute
from ssl_jax.report.compare.runs import TRAINED, Comparison, Group, differing, short
from ssl_jax.report.compare.table import Cell, Column, Table, formatter
from ssl_jax.report.compare.text import count, missing
from ssl_jax.report.sections import flatten, section, text

MOST_UNFINISHED = 20  # lines of the banner
OPEN_KEYS = 12  # a longer table of keys is folded
FORMULAS = (
    "In a cell: the mean over n seeds ± half of the 95 % t-interval, t(0.975, n - 1) s / √n, where s is the standard deviation with "
    "n - 1. Below: s; the 95 % percentile bootstrap of the mean over seeds (scipy.stats.bootstrap, method='percentile', "
    f"{RESAMPLES:,} resamples); the value of each seed. With n = 3 a percentile bootstrap of 95 % covers the true mean in only "
    f"{COVERAGE_OF_3} of cases, so the t-interval is the one to read; it takes the seeds for normally distributed. One seed has no "
    "interval. A column holds numbers of one protocol only."
)
COSTS = (
    "Means over the finished runs of a group. Device-seconds: time in steps times the number of devices, without compiling and "
    "evaluating; those of different machines do not compare. FLOPs: of matrix products and convolutions in these steps, with "
    "gradients; a multiply-add is two."
)
STYLE = """<style>
td.name { min-width: 170px; max-width: 280px; overflow-wrap: anywhere; } .banner, h2 { overflow-wrap: anywhere; }
td.cell, th.cell { min-width: 140px; } th.value { min-width: 84px; } th.cell, th.value { overflow-wrap: anywhere; max-width: 190px; }
td.cell .note { white-space: normal; } td.setting { min-width: 60px; font-size: 13px; overflow-wrap: anywhere; }
.legend.names { margin: 8px 0 12px; overflow-wrap: anywhere; } td code { font-size: 12px; overflow-wrap: anywhere; }
.charts .picture img { width: 100%; } .charts .picture { margin: 0; padding: 10px; align-self: start; }
section { content-visibility: auto; contain-intrinsic-size: auto 900px; } tr.first td { border-top: 2px solid var(--rule); }
@media (max-width: 600px) { td.name { min-width: 110px; max-width: 150px; font-size: 13px; } }
</style>"""


def header(comparison: Comparison, table: Table) -> str:
    """What is compared, and which runs are not finished."""
    runs = [run for group in comparison.groups for run in group.runs]
    groups = len(comparison.groups)
    title = f"Comparison of {groups:,} groups of runs" if groups > 1 else f"{comparison.groups[0].name}: {len(runs):,} runs"
    open_runs = [run for run in runs if not run.finished]
    banner = ""
    if open_runs:
        lines = [f"{run.name}: {run.state}" for run in open_runs[:MOST_UNFINISHED]]
        lines += [f"and {len(open_runs) - MOST_UNFINISHED:,} more, see Runs"] * (len(open_runs) > MOST_UNFINISHED)
        left_out = "" if table.step is not None else " They have no place in the table, whose numbers are from the end of each run."
        items = "<br>".join(map(text, lines))
        banner = f'<p class="banner">{len(open_runs):,} of {len(runs):,} runs are not finished.{left_out}<br>{items}</p>'
    when = "at the end of each run" if table.step is None else f"at step {table.step:,}"
    baseline = f" Baseline: {comparison.baseline.name}." if comparison.baseline else ""
    return f'<h1>{text(title)}</h1><p class="soft">{len(runs):,} runs, evaluated {when}.{text(baseline)}</p>{banner}'


def results(table: Table) -> str:
    """Mean, standard deviation, intervals and every seed."""
    if not table.shown:
        return section("Evaluations", '<p class="soft">No finished run has been evaluated yet.</p>')
    rows, trained = [], True
    for row in table.rows:
        kind = "first" if trained and row.subject != TRAINED else ""
        trained = row.subject == TRAINED
        name = f"<b>{text(row.name)}</b>" if row.name == table.baseline and trained else text(row.name)
        cells = [_cell(column, row.cells[column]) for column in table.shown]
        seeds = f"{count(row, table)} of {row.runs} seed{'s' * (row.runs > 1)}"
        rows.append(_row(f"{name}{_notes([seeds])}", cells, "value cell", kind))
    body = _table([column.title for column in table.shown], rows, "value cell")
    protocols = "".join(f"<li>{text(column.title)}: {text(column.protocol or 'protocol not recorded')}</li>" for column in table.shown)
    others = len(table.columns) - len(table.shown)
    more = f" compare.csv has {others:,} other columns; --metric chooses those of this page." if others else ""
    notes = f'<p class="note">{text(FORMULAS + more)}</p><h3>Protocols</h3><ul class="card">{protocols}</ul>'
    return section("Evaluations", body + notes)


def _table(heads: Sequence[str], rows: Sequence[str], kind: str = "value") -> str:
    """A card with `rows` as HTML, below plain texts as heads of all columns but the first."""
    cells = "".join(f'<th class="{kind}">{text(head)}</th>' for head in heads)
    table = f"<table><thead><tr><th></th>{cells}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<div class="card"><div class="scroll">{table}</div></div>'


def _row(name: str, cells: Sequence[str], kind: str = "value", of_row: str = "") -> str:
    """All as HTML."""
    shown = "".join(f'<td class="{kind}">{cell}</td>' for cell in cells)
    return f'<tr class="{of_row}"><td class="name">{name}</td>{shown}</tr>'


def _cell(column: Column, cell: Cell) -> str:
    show, summary = formatter(column.metric), cell.summary
    notes = missing(cell)
    if summary.mean is None:
        return f'<span class="note">{text("; ".join(notes))}</span>' if notes else "–"
    if summary.t:
        half = f" ± {show((summary.t.high - summary.t.low) / 2)}"
        lines = [f"s {show(summary.deviation)}", f"bootstrap {_interval(summary.bootstrap, show)}"]
    else:
        half, lines = "", ["1 seed: no interval"]
    lines.append(" · ".join(f"{seed}: {show(value)}" for seed, value in cell.values.items()))
    return f"<b>{show(summary.mean)}</b>{half}{_notes([*lines, *notes])}"


def _notes(lines: Sequence[str]) -> str:
    return "".join(f'<div class="note">{text(line)}</div>' for line in lines)


def _interval(interval: Interval | None, show) -> str:
    return "" if interval is None else f"[{show(interval.low)}, {show(interval.high)}]"


def differences(table: Table) -> str:
    """Each group minus the baseline over the seeds that both have."""
    trained = [row for row in table.rows if row.subject == TRAINED]
    baseline = next((row for row in trained if row.name == table.baseline), None)
    rows, most = [], 0
    for row in trained if baseline else ():
        if row is baseline:
            continue
        cells = []
        for column in table.shown:
            difference, show = row.cells[column].difference, formatter(column.metric, sign=True)
            if difference is None or difference.mean is None:
                both = row.cells[column].values and baseline.cells[column].values
                cells.append(f"–{_notes(['no shared seed'] if both else [])}")
                continue
            n = len(difference.seeds)
            seeds = f"n={n}: seed{'s' * (n > 1)} {', '.join(map(str, difference.seeds))}"
            lines = [_interval(difference.t, show) or "no interval", seeds, *["significant at 5 %"] * difference.significant]
            cells.append(f"<b>{show(difference.mean)}</b>{_notes(lines)}")
            most = max(most, n)
        rows.append(_row(text(row.name), cells, "value cell"))
    if not rows or not table.shown:
        return ""
    note = "Mean of the differences between runs with the same seed, and their 95 % t-interval, mean(d) ± t(0.975, n - 1) s(d) / √n. "
    note += "Seeds that only one of the two has are left out. "
    if most >= SIGNIFICANT_FROM:
        note += f"Significant: n of at least {SIGNIFICANT_FROM} and an interval without 0, with no correction for several comparisons."
    else:
        note += f"With fewer than {SIGNIFICANT_FROM} seeds there is no verdict: p of a two-sided sign test is at least 2 / 2^n."
    body = _table([column.title for column in table.shown], rows, "value cell")
    return section(f"Differences from {table.baseline}", f'{body}<p class="note">{text(note)}</p>')


def compute(comparison: Comparison, table: Table) -> str:
    """Images seen, FLOPs and seconds beside the shown metrics."""
    metrics = table.shown[:3]
    rows = []
    for group, row in zip(comparison.groups, table.rows, strict=False):  # trained rows come first, in the order of the groups
        ended = [run for run in group.runs if run.finished] if table.step is None else group.runs
        costs = [cost(run, table.step) for run in ended or group.runs]
        cells = [_mean(costs, name) for name in ("steps", "images", "devices", "device_seconds")]
        flops = [found.flops for found in costs if found.flops is not None]
        cells.insert(2, f"{statistics.fmean(flops):.3g}" if flops else "–")
        hours = [found.elapsed / 3600 for found in costs if found.elapsed]
        cells.append(f"{statistics.fmean(hours):,.3g}" if hours else "–")
        for column in metrics:
            mean = row.cells[column].summary.mean
            cells.append("–" if mean is None else formatter(column.metric)(mean))
        rows.append(_row(text(group.name), cells))
    heads = ["steps", "images seen", "FLOPs", "devices", "device-seconds in steps", "hours from start to end"]
    body = _table([*heads, *(column.title for column in metrics)], rows)
    note = f'<p class="note">{text(COSTS)}</p>'
    return section("Quality and compute", body + note + against_compute(comparison, table))


def _mean(costs: Sequence[Cost], name: str) -> str:
    values = [getattr(found, name) for found in costs if getattr(found, name) is not None]
    return f"{statistics.fmean(values):,.0f}" if values else "–"


def keys(groups: Sequence[Group]) -> str:
    """The config keys whose values are not the same in all groups, and the commits where they differ."""
    flat = [dict(flatten(group.config, str)) for group in groups]
    for values, group in zip(flat, groups, strict=True):
        commits = dict.fromkeys(str(run.record.provenance.get("commit", "unknown")) for run in group.runs if run.record.config)
        values["(commit)"] = ", ".join(commits)
    names = differing(flat)
    if not names:
        return ""
    values = {name: [short(of.get(name, "–")) for of in flat] for name in names}
    if len(names) > len(groups):  # the shorter side across
        heads, lines = [group.name for group in groups], values
    else:
        heads, lines = names, {group.name: [values[name][i] for name in names] for i, group in enumerate(groups)}
    rows = [_row(text(name), [text(value) for value in of], "setting") for name, of in lines.items()]
    body = _table(heads, rows, "setting")
    folded = f"<details><summary>{len(names):,} keys</summary>{body}</details>"
    return section("Config keys that differ", folded if len(names) > OPEN_KEYS else body)


def runs(comparison: Comparison) -> str:
    """State, commit, machine and command of every run."""
    rows = []
    for group in comparison.groups:
        for run in group.runs:
            provenance = run.record.provenance
            cells = [group.name, run.seed, run.state, provenance.get("commit", "–"), provenance.get("devices", "–")]
            command = f"<code>{text(run.command)}</code>" if run.command else "not recorded; config.json has every key"
            rows.append(_row(text(run.name), [*map(text, cells), command], "setting"))
    body = _table(["group", "seed", "state", "commit", "devices", "command"], rows, "setting")
    return section("Runs", f"<details><summary>{len(rows):,} runs with their commands and commits</summary>{body}</details>")

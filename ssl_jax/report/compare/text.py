"""A comparison as CSV, Markdown and LaTeX."""

from __future__ import annotations

import csv
import io
import re

from ssl_jax.engine.intervals import Interval
from ssl_jax.errors import printable
from ssl_jax.report.compare.table import Cell, Column, Row, Table, formatter

FIELDS = (
    "row", "subject", "metric", "protocol", "step", "n", "mean", "standard_deviation", "t_low", "t_high", "bootstrap_low",
    "bootstrap_high", "seeds", "values", "not_numbers", "missing", "baseline", "shared_seeds", "difference", "difference_low",
    "difference_high",
)  # fmt: skip
SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", **{c: f"\\{c}" for c in "&%$#_{}"}}
INTERVALS = "mean ± half width of the 95 % t-interval over seeds (every seed)"


def as_csv(table: Table) -> str:
    """A line for each row and each column that was measured, with FIELDS as the header. Lists are separated by spaces."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(FIELDS)
    for row in table.rows:
        for column, cell in row.cells.items():
            if not (cell.values or cell.not_numbers):
                continue
            summary, difference = cell.summary, cell.difference
            values = [row.name, row.subject, column.metric, column.protocol, "end" if table.step is None else table.step, summary.n]
            values += [_empty(summary.mean), _empty(summary.deviation), *_ends(summary.t), *_ends(summary.bootstrap)]
            values += [_list(cell.values), " ".join(map(repr, cell.values.values())), _list(cell.not_numbers), _list(cell.missing)]
            if difference is not None:
                values += [table.baseline, _list(difference.seeds), _empty(difference.mean), *_ends(difference.t)]
            else:
                values += [""] * 5
            writer.writerow([printable(str(value)) for value in values])
    return text.getvalue()


def as_markdown(table: Table) -> str:
    """The shown columns, then the protocol of each."""
    heads = ["", "seeds", *(column.title for column in table.shown)]
    lines = [heads, ["---"] * len(heads)]
    lines += [[row.name, count(row, table), *(_words(column, row.cells[column]) for column in table.shown)] for row in table.rows]
    text = "\n".join("| " + " | ".join(printable(word).replace("|", "\\|") for word in line) + " |" for line in lines)
    protocols = "\n".join(f"- {column.title}: {column.protocol or 'protocol not recorded'}" for column in table.shown)
    return f"{text}\n\nCells: {INTERVALS}, {_when(table)}.\n\n{printable(protocols, keep=chr(10))}\n"


def as_latex(table: Table) -> str:
    """A `tabular` of the shown columns for the package booktabs, with the protocols as comments."""
    lines = [f"% {INTERVALS.partition(' (')[0]}, {_when(table)}"]
    lines += [f"% {printable(column.title)}: {printable(column.protocol) or 'protocol not recorded'}" for column in table.shown]
    lines += [rf"\begin{{tabular}}{{l{'r' * (1 + len(table.shown))}}}", r"\toprule"]
    heads = ["", "seeds", *(column.title for column in table.shown)]
    lines += [" & ".join(map(latex, heads)) + r" \\", r"\midrule"]
    baselines = False
    for row in table.rows:
        if row.subject != "trained" and not baselines:
            baselines = True
            lines.append(r"\midrule")
        cells = [_math(column, row.cells[column]) for column in table.shown]
        lines.append(" & ".join([latex(row.name), latex(count(row, table)), *cells]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def latex(text: str) -> str:
    return re.sub(r"[\\~^&%$#_{}]", lambda match: SPECIAL[match[0]], printable(text))


def _words(column: Column, cell: Cell) -> str:
    """'63.10 ± 1.24 (62.80, 63.40; seed 2 missing)'"""
    show, summary = formatter(column.metric), cell.summary
    notes = missing(cell)
    if summary.mean is None:
        return "; ".join(notes) or "–"
    if summary.n == 1:
        return f"{show(summary.mean)} ({'; '.join(['1 seed', *notes])})"
    half = (summary.t.high - summary.t.low) / 2
    return f"{show(summary.mean)} ± {show(half)} ({'; '.join([', '.join(map(show, cell.values.values())), *notes])})"


def _math(column: Column, cell: Cell) -> str:
    show, summary = formatter(column.metric), cell.summary
    if summary.mean is None:
        return "--" if not cell.not_numbers else "NaN"
    half = rf" \pm {show((summary.t.high - summary.t.low) / 2)}" if summary.t else ""
    return f"${show(summary.mean)}{half}$".replace(",", "{,}")


def missing(cell: Cell) -> list[str]:
    """['seed 1 is not a number', 'seed 2 missing']"""
    return [f"seed {seed} is not a number (NaN)" for seed in cell.not_numbers] + [f"seed {seed} missing" for seed in cell.missing]


def count(row: Row, table: Table) -> str:
    """The number of seeds in the shown columns, '3' or '2 to 3'."""
    counts = sorted({row.cells[column].summary.n for column in table.shown if row.cells[column].values}) or [0]
    return f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def _when(table: Table) -> str:
    return "at the end of each run" if table.step is None else f"at step {table.step:,}"


def _empty(value: float | None) -> str:
    return "" if value is None else repr(value)


def _ends(interval: Interval | None) -> tuple[str, str]:
    return ("", "") if interval is None else (repr(interval.low), repr(interval.high))


def _list(values) -> str:
    return " ".join(map(str, values))

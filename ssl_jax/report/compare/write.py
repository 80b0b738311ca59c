"""Writes a comparison of runs and sweeps: compare.html, compare.csv, compare.md, compare.tex."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from ssl_jax import files
from ssl_jax.errors import workdir_not_made
from ssl_jax.report.compare import figures, page
from ssl_jax.report.compare.pictures import pictures
from ssl_jax.report.compare.power_law import power_laws
from ssl_jax.report.compare.runs import read_comparison
from ssl_jax.report.compare.table import make_table
from ssl_jax.report.compare.text import as_csv, as_latex, as_markdown
from ssl_jax.report.page import PAGE


def write_comparison(
    folders: Sequence[Path], output: Path, baseline: str | None = None, metrics: Sequence[str] = (), step: int | None = None,
    quantities: Sequence[str] = (),
) -> Path:
    """Compare runs and sweeps; returns the path of the page.

    Args:
        folders: directories of runs and sweeps.
        output: where the four files are written; it is created.
        baseline: the name of a group; None for that of the sweep, else the first group.
        metrics: '<label>/<name>' of evaluations or of metrics.jsonl; () for the main one of each evaluation.
        step: of the evaluations and pictures; None for the end of each run.
        quantities: costs and varied keys over which power laws are fitted; () for none.

    Raises:
        UserError: a directory without a run, one that is given twice, an unknown baseline, metric, step or quantity, nothing in common.
        MachineFault: a file cannot be written.
    """
    comparison = read_comparison(folders, baseline)
    table = make_table(comparison, metrics, step, list(figures.logged(comparison)))
    body = [
        page.STYLE,
        page.header(comparison, table),
        page.results(table),
        page.differences(table),
        figures.effects(comparison, table),
        power_laws(comparison, table, quantities),
        page.compute(comparison, table),
        figures.curves(comparison, table, metrics),
        pictures(comparison.groups, step),
        page.keys(comparison.groups),
        page.runs(comparison),
        f"<footer>written {time.strftime('%Y-%m-%d %H:%M')}</footer>",
    ]
    html = PAGE.substitute(title="Comparison", body="\n".join(filter(None, body)))
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise workdir_not_made(output, error, "--output") from error
    written = {"compare.csv": as_csv(table), "compare.md": as_markdown(table), "compare.tex": as_latex(table), "compare.html": html}
    for name, content in written.items():
        files.write(output / name, content.encode("utf-8", "backslashreplace"))
    return output / "compare.html"

"""Turn a workdir into one self-contained HTML page.

  python launch.py report --workdir=runs/simclr

Writes report.html into the workdir: verdict, table of evaluations with their protocols, curves, augmented views,
nearest neighbors, settings, versions, warnings. It reads only what the run has written, so it works while the run
goes on, on another machine, and on a run that has failed: what is missing is named on the page.
`train` writes it in the end.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from ssl_jax.cli.main import add_workdir
from ssl_jax.errors import UserError, not_written
from ssl_jax.report import sections
from ssl_jax.report.page import PAGE
from ssl_jax.report.run import read_run


def add_arguments(sub) -> None:
    add_workdir(sub)


def main(args, overrides) -> int:
    if overrides:
        raise UserError(f"argument {overrides[0]!r} is not understood; report takes --workdir only")
    print(write_report(args.workdir))
    return 0


def write_report(workdir: Path) -> Path:
    """Write `<workdir>/report.html` and return its path.

    Raises:
        UserError: there is no such directory.
        MachineFault: it cannot be written.
    """
    if not workdir.is_dir():
        raise UserError(f"--workdir={workdir} is no directory; give the directory of a run")
    run = read_run(workdir)
    body = [
        sections.header(run),
        sections.evaluations(run),
        sections.curves(run),
        sections.pictures(run),
        sections.warnings(run),
        sections.settings(run),
        sections.provenance(run),
        f"<footer>{sections.text(workdir.resolve())} · written {time.strftime('%Y-%m-%d %H:%M')}</footer>",
    ]
    path, temporary = workdir / "report.html", workdir / "report.html.tmp"
    try:
        temporary.write_text(PAGE.substitute(title=sections.text(run.title), body="\n".join(body)), encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise not_written(path, error) from error
    return path

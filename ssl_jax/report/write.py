"""Writes the report of a run as one self-contained HTML page."""

from __future__ import annotations

import time
from pathlib import Path

from ssl_jax import files
from ssl_jax.errors import UserError
from ssl_jax.report import sections
from ssl_jax.report.page import PAGE
from ssl_jax.report.run import read_run
from ssl_jax.report.transfers import transfers


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
        sections.opening(run),
        sections.evaluations(run),
        transfers(run.transfers),
        sections.curves(run),
        sections.pictures(run),
        sections.warnings(run),
        sections.settings(run),
        sections.provenance(run),
        f"<footer>{sections.text(workdir.resolve())} · written {time.strftime('%Y-%m-%d %H:%M')}</footer>",
    ]
    page = PAGE.substitute(title=sections.text(run.title), body="\n".join(body))
    path = workdir / "report.html"
    files.write(path, page.encode("utf-8", "backslashreplace"))
    return path

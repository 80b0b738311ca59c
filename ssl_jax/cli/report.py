"""Turn a workdir into one self-contained HTML page.

  python launch.py report --workdir=runs/simclr

Writes report.html into the workdir: verdict, table of evaluations with their protocols, curves, augmented views,
nearest neighbors, settings, versions, warnings. It reads only what the run has written, so it works while the run
goes on, on another machine, and on a run that has failed: what is missing is named on the page.
`train` writes it in the end.
"""

from __future__ import annotations

from ssl_jax.cli.main import add_workdir
from ssl_jax.errors import UserError


def add_arguments(sub) -> None:
    add_workdir(sub)


def main(args, overrides) -> int:
    if overrides:
        raise UserError(f"argument {overrides[0]!r} is not understood; report takes --workdir only")
    from ssl_jax.report.write import write_report

    print(write_report(args.workdir))
    return 0

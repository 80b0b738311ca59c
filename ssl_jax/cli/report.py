"""Write a workdir as one self-contained HTML page.

  python launch.py report --workdir=runs/simclr

Writes WORKDIR/report.html: verdict, table of evaluations with their protocols, curves, augmented views, nearest neighbors,
settings, versions, warnings. It reads files of the workdir only, so it works during a run, on another machine, and on a failed run;
the page names what is missing. `train` writes it at its end.
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

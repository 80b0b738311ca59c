"""Print the state of the job that was submitted from a workdir, or of every run of a sweep.

The states of runs are read from their files: done, running, interrupted, failed (with the line of its cause), waiting.
"""

from __future__ import annotations

from pathlib import Path

from ssl_jax.cli.main import add_workdir, refuse_rest
from ssl_jax.engine.records import read_metrics
from ssl_jax.launchers import jobs


def add_arguments(sub) -> None:
    add_workdir(sub)


def main(args, rest) -> int:
    refuse_rest(rest)
    if (args.workdir / "sweep.json").exists():
        from rich.console import Console  # and others that --help avoids

        from ssl_jax.experiment import sweep_folder
        from ssl_jax.report import sweep_table

        sweep_table.show(sweep_folder.read(args.workdir), args.workdir, Console())
        if not (args.workdir / "job.json").exists():
            return 0
    job, engine = jobs.read(args.workdir)
    print(f"{job['engine']} job {job['id']}: {engine.state(job, args.workdir).text}{progress(args.workdir)}")
    return 0


def progress(workdir: Path) -> str:
    """'; step 12 is the last one logged', or '' where the metrics cannot be seen from here."""
    last = max((line["step"] for line in read_metrics(workdir)), default=None)
    return "" if last is None else f"; step {last} is the last one logged"

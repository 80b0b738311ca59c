"""Print the state of the job that was submitted from a workdir."""

from __future__ import annotations

from pathlib import Path

from ssl_jax.cli.main import add_workdir, refuse_rest
from ssl_jax.engine.records import read_metrics
from ssl_jax.launchers import jobs


def add_arguments(sub) -> None:
    add_workdir(sub)


def main(args, rest) -> int:
    refuse_rest(rest)
    job, engine = jobs.read(args.workdir)
    print(f"{job['engine']} job {job['id']}: {engine.state(job, args.workdir).text}{progress(args.workdir)}")
    return 0


def progress(workdir: Path) -> str:
    """'; step 12 is the last one logged', or '' where the metrics cannot be seen from here."""
    last = max((line["step"] for line in read_metrics(workdir)), default=None)
    return "" if last is None else f"; step {last} is the last one logged"

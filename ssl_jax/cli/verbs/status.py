"""Tell how the job is that was submitted from a workdir."""

from __future__ import annotations

from ssl_jax.cli.main import add_workdir, refuse_rest
from ssl_jax.launchers import jobs


def add_arguments(sub) -> None:
    add_workdir(sub)


def main(args, rest) -> int:
    refuse_rest(rest)
    job, engine = jobs.read(args.workdir)
    print(f"{job['engine']} job {job['id']}: {engine.state(job, args.workdir).told}{jobs.progress(args.workdir)}")
    return 0

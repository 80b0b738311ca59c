"""Cancel the job that was submitted from a workdir. It gets SIGTERM and saves; submitting it again resumes."""

from __future__ import annotations

from ssl_jax.cli.main import add_workdir, refuse_rest
from ssl_jax.launchers import jobs


def add_arguments(sub) -> None:
    add_workdir(sub)


def main(args, rest) -> int:
    refuse_rest(rest)
    job, engine = jobs.read(args.workdir)
    state = engine.state(job, args.workdir)
    if not state.alive:
        print(f"{job['engine']} job {job['id']} had ended before: {state.text}")
        return 0
    engine.cancel(job, args.workdir)
    print(f"{job['engine']} job {job['id']} is being canceled")
    return 0

"""Print the log of the job that was submitted from a workdir."""

from __future__ import annotations

from ssl_jax.cli.main import add_workdir, refuse_rest, whole
from ssl_jax.errors import UserError
from ssl_jax.launchers import jobs


def add_arguments(sub) -> None:
    add_workdir(sub)
    sub.add_argument("--lines", type=whole("--lines", 0), default=100, help="how many of the last lines (default: 100)")
    sub.add_argument("--follow", action="store_true", help="go on printing until the job has ended")


def main(args, rest) -> int:
    refuse_rest(rest)
    if (args.workdir / "sweep.json").exists():
        raise UserError(f"--workdir={args.workdir} holds a sweep; see VARIATION/seed-N/output.txt there for the log of a run")
    job, engine = jobs.read(args.workdir)
    engine.logs(job, args.workdir, args.lines, args.follow)
    return 0

"""Train a config on Slurm, on GKE, on a Cloud TPU, or detached on this machine.

  python launch.py submit --to=local --config=configs/simclr.py --workdir=runs/a
  python launch.py submit --to=slurm --config=configs/simclr.py:imagenet --workdir=/shared/runs/a --nodes=2 \\
      --processes_per_node=8 --gres=gpu:8 --partition=a100 --time=24:00:00
  python launch.py submit --to=gke --config=configs/simclr.py:imagenet --workdir=runs/a --topology=v5e:16x16 \\
      --image=IMAGE --claim=CLAIM
  python launch.py submit --to=tpu-vm --config=configs/simclr.py:imagenet --workdir=runs/a --vm=NAME --zone=ZONE --topology=v5e:2x4

--dry_run prints exactly what would be sent and sends nothing. A config that `train` would refuse is refused here. WORKDIR/job.json
records what was sent; `launch.py status`, `logs` and `cancel --workdir=...` read it. A workdir has one job at a time.

All engines run the same command. They restart it when it does not end with 0, at most --max_restarts times, and not after bad input
(exit code 2); it resumes from its workdir. A job that is preempted, canceled or near the end of its time gets SIGTERM and saves.
"""

from __future__ import annotations

import argparse

from ssl_jax.cli.main import Parser, add_workdir, whole
from ssl_jax.errors import UserError, workdir_not_made
from ssl_jax.launchers import jobs
from ssl_jax.where import as_called, program


def add_arguments(sub) -> None:
    sub.add_argument("--to", required=True, choices=list(jobs.ENGINES), help="where it runs")
    sub.add_argument(
        "--config", required=True, help="configs/NAME.py or configs/NAME.py:VARIANT; --config.KEY=VALUE overrides"
    )
    add_workdir(sub)
    sub.add_argument(
        "--max_restarts", type=whole("--max_restarts", 0), default=10, help="how often it is restarted automatically (default: 10)"
    )
    sub.add_argument("--profile", default="", metavar="START:END", help="trace these steps, as `train` does")
    sub.add_argument("--dry_run", action="store_true", help="print what would be sent, and send nothing")
    sub.epilog = "\n".join(parser(name).format_help() for name in jobs.ENGINES)


def parser(name: str) -> argparse.ArgumentParser:
    """The parser of the flags that only this engine has."""
    found = Parser(prog=f"{program()} submit --to={name}", usage=argparse.SUPPRESS, add_help=False, allow_abbrev=False)
    jobs.engine(name).add_arguments(found.add_argument_group(f"with --to={name}"))
    return found


def engine_options(name: str, arguments: list[str], verb: str) -> tuple[argparse.Namespace, list[str]]:
    """(flags of an engine, arguments that it passes on). Raises UserError for an argument that is neither."""
    options, left = parser(name).parse_known_args(arguments)
    if left and not getattr(jobs.engine(name), "PASSES_ON", False):
        raise UserError(f"argument {left[0]!r} is not understood with --to={name}; see `python launch.py {verb} --help`")
    return options, left


def main(args, rest) -> int:
    overrides = [argument for argument in rest if argument.startswith("--config.")]
    others = [argument for argument in rest if not argument.startswith("--config.")]
    options, left = engine_options(args.to, others, "submit")
    engine = jobs.engine(args.to)
    from ssl_jax.engine.timing import Trace
    from ssl_jax.experiment import training  # imports JAX, which --help avoids

    training.load_config(args.config, overrides)
    Trace(args.workdir, args.profile)  # raises UserError for a wrong range of steps
    flags = [*overrides, *([f"--profile={args.profile}"] if args.profile else [])]
    before = jobs.earlier(args.workdir)
    number = before["number"] + 1 if before else 1
    request = jobs.JobRequest(args.config, flags, args.workdir, args.max_restarts, number, options, left)
    jobs.check_words(request)
    sent = engine.describe(request)
    if args.dry_run:
        print(sent)
        return 0
    jobs.check_ended(before, args.workdir)
    try:
        args.workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise workdir_not_made(args.workdir, error) from None
    job = jobs.start(request, args.to, sent)
    remedy = as_called(f"`python launch.py status --workdir={args.workdir}` prints its state")
    print(f"{args.to} job {job['id']} submitted; {remedy}")
    return 0

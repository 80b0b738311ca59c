"""Train a config in a workdir.

  python launch.py train --config=configs/simclr.py --workdir=runs/simclr
  python launch.py train --config=configs/simclr.py:cifar10 --workdir=runs/c10 --config.seed=1 --config.optim.net.lr=0.1

The same command on the same workdir resumes from the last intact checkpoint, to the same numbers as an uninterrupted run. SIGTERM
saves and exits with 0 (or --saved_code), SIGINT (Ctrl-C) saves and exits with 130, SIGHUP saves and exits with 129, SIGUSR1 saves
and goes on, kill -9 loses what came after the last checkpoint.

The workdir holds config.json, vocabulary.json (of texts), metrics.jsonl, log.txt, checkpoints/, checkpoints.json (the newest step
that was saved), pictures/, evaluations.json, report.html.

A workdir whose checkpoints are not there any more is refused, since going on would erase its metrics. --start_over moves what it
holds into WORKDIR/before-N and begins at step 0.
"""

from __future__ import annotations

import os

from ssl_jax.cli.main import add_workdir, whole
from ssl_jax.errors import UserError
from ssl_jax.experiment import launch_environment
from ssl_jax.launchers import supervise


def add_arguments(sub) -> None:
    sub.add_argument("--config", required=True, help="configs/NAME.py or configs/NAME.py:VARIANT; --config.KEY=VALUE overrides")
    add_workdir(sub)
    sub.add_argument(
        "--processes", type=whole("--processes", 1, 1024), help="number of processes on this machine (on GPUs, one for each)"
    )
    sub.add_argument("--profile", default="", metavar="START:END", help="trace these steps, for TensorBoard or Perfetto")
    sub.add_argument("--start_over", action="store_true", help="begin at step 0; earlier files of the run move to WORKDIR/before-N")
    sub.add_argument(
        "--max_restarts", type=whole("--max_restarts", 0), default=0, help="how often all processes are restarted when one fails"
    )
    sub.add_argument(
        "--saved_code", type=whole("--saved_code", 0, 255), default=0,
        help="exit code after a SIGTERM that saved (default: 0); schedulers that restart a job until it exits with 0 need another",
    )  # fmt: skip


def main(args, overrides) -> int:
    processes = 1 if args.processes is None and args.max_restarts else args.processes
    if processes is not None and launch_environment.launched_process(os.environ) is None:
        launcher = launch_environment.detect_launcher(os.environ)
        if args.processes is None and launcher:
            raise UserError(f"--max_restarts={args.max_restarts}: {launcher} started these processes and has to restart them")
        flags = [f"--config={args.config}", f"--workdir={args.workdir}", f"--profile={args.profile}"]
        command = ["train", *flags, *overrides]
        first = ["--start_over"] if args.start_over else []
        return supervise.supervise(command, processes, args.workdir, args.max_restarts, args.saved_code, first)
    from ssl_jax.experiment import training  # imports JAX, which --help and `supervise` avoid
    from ssl_jax.report.write import write_report

    return training.run_training(args.config, overrides, args.workdir, write_report, args.profile, args.saved_code, args.start_over)

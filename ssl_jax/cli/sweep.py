"""Train variations of configs with several seeds: an ablation study, on this machine, Slurm or GKE.

  python launch.py sweep --config=configs/simclr.py --vary model.temperature=0.1,0.2,0.5 --seeds=3 --workdir=sweeps_out/tau
  python launch.py sweep --sweep=sweeps/simclr_temperature.py --workdir=sweeps_out/tau --jobs=2
  python launch.py sweep --config=configs/simclr.py --vary optim.net.lr=log:1e-4:1e-1 --search=random --trials=20 --workdir=DIR
  python launch.py sweep --config=configs/simclr.py --vary batch_size=128,256 --to=slurm --partition=a100 --gres=gpu:1 --workdir=DIR

Every --vary is an axis, and the sweep trains all combinations. The keys of one --zip move together. Commas in brackets or quotes
belong to a value. --config may be repeated, and --config.KEY=VALUE changes every run. All configs, data and shapes are checked before
the first run starts. --dry_run prints the plan and starts nothing.

Every run is a workdir of its own, WORKDIR/VARIATION/seed-N, by `launch.py train`; output.txt there is what it printed. The same
command again goes on where it was ended, and tries failed runs again. With more values or seeds it trains only what is new.
`launch.py status --workdir=WORKDIR` prints the state of every run. Exit code 2: a run failed.
"""

from __future__ import annotations

import argparse

from ssl_jax.cli.main import add_workdir, whole
from ssl_jax.errors import UserError

PLACES = ("local", "slurm", "gke")
MOST = 10_000  # runs of a sweep


def add_arguments(sub) -> None:
    sub.add_argument("--sweep", metavar="FILE", help="a file with get_sweep(), instead of --config and --vary (docs/guides/sweeps.md)")
    sub.add_argument("--config", action="append", default=[], help="configs/NAME.py:VARIANT; may be repeated")
    sub.add_argument("--vary", action="append", default=[], metavar="KEY=VALUE,...", help="an axis; may be repeated")
    sub.add_argument("--zip", action="append", default=[], nargs="+", metavar="KEY=VALUE,...", help="keys that move together")
    sub.add_argument(
        "--seeds", type=_seeds, metavar="N or N,N,...", help="how many, from 0 on, or which ones (default: 1, or those of the file)"
    )
    sub.add_argument("--baseline", metavar="NAME", help="the variation that others are compared with")
    sub.add_argument("--search", choices=["grid", "random", "optuna"], default="grid", help="draws instead of all combinations")
    sub.add_argument("--trials", type=whole("--trials", 1, MOST), help="how many draws, with --search")
    sub.add_argument("--search_seed", type=whole("--search_seed", 0), default=0, help="of the draws (default: 0)")
    add_workdir(sub)
    sub.add_argument("--jobs", type=whole("--jobs", 1, 1024), default=1, help="runs at once; cores or GPUs are divided (default: 1)")
    sub.add_argument("--fail_fast", action="store_true", help="end the others when a run fails; they save")
    sub.add_argument("--dry_run", action="store_true", help="print the plan, or what would be sent, and start nothing")
    sub.add_argument("--to", choices=PLACES, default="local", help="as one job array of Slurm, or one indexed Job of GKE")
    sub.add_argument(
        "--max_restarts", type=whole("--max_restarts", 0), default=10, help="with --to: restarts of each run (default: 10)"
    )
    sub.add_argument("--only", type=whole("--only", 0, MOST), help=argparse.SUPPRESS)  # what each job of an array is started with
    sub.epilog = "With --to the flags of `launch.py submit --to=...` are understood, too."


def main(args, rest) -> int:
    from ssl_jax.cli.run_sweep import run_sweep  # imports what --help avoids

    return run_sweep(args, rest)


def _seeds(text: str) -> list[int]:
    """'3' is 0, 1, 2; '0,4,7' and '4,' name them."""
    given = [part.strip() for part in text.split(",") if part.strip()]
    if not given or not all(part.isdecimal() and len(part) < 10 for part in given):
        raise UserError(f"--seeds={text} is no number of seeds and no list of whole numbers; give --seeds=3 or --seeds=0,4,7")
    if "," not in text and not 1 <= int(text) <= MOST:
        raise UserError(f"--seeds={text} must be from 1 to {MOST}; '--seeds={text},' names one seed")
    return [int(part) for part in given] if "," in text else list(range(int(text)))

"""Compare runs or sweeps: one self-contained page, and its table as CSV, Markdown and LaTeX.

  python launch.py compare runs/simclr_0 runs/simclr_1 runs/rotation_0 runs/rotation_1 --output=comparison
  python launch.py compare sweeps/tau --baseline=tau_0.1 --metric=knn/top1 --metric=ssl/loss

Runs of one config with different seeds are a group, as are the seeds of a variation of a sweep. The page has mean, standard deviation,
95 % intervals and every seed; differences from a baseline over the seeds that both have; curves, effects of varied keys, compute,
pictures side by side, the keys that differ, commands and commits. A column holds numbers of one protocol. Runs that are not finished
are listed. It reads files of the workdirs only.
"""

from __future__ import annotations

from pathlib import Path

from ssl_jax.cli.main import folder, refuse_rest, whole
from ssl_jax.errors import UserError


def add_arguments(sub) -> None:
    sub.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="workdirs of runs, or directories of sweeps")
    sub.add_argument("--output", type=folder("--output"), help="directory of the files (default: that of the only sweep)")
    sub.add_argument("--baseline", metavar="NAME", help="group to subtract (default: that of the sweep, else the first)")
    sub.add_argument(
        "--metric", action="append", default=[], metavar="LABEL/NAME", help="may be repeated (default: the main one of each evaluation)"
    )
    sub.add_argument(
        "--power_law", default="", metavar="NAME[,NAME]", help="fit error = c NAME^-b: images, flops, device_seconds, or varied keys"
    )
    sub.add_argument("--step", type=whole("--step", 0), help="of the evaluations and pictures (default: the end of each run)")


def main(args, overrides) -> int:
    refuse_rest(overrides)
    from ssl_jax.report.compare.runs import SWEEP
    from ssl_jax.report.compare.write import write_comparison

    output = args.output
    if output is None:
        if len(args.folders) > 1 or not (args.folders[0] / SWEEP).is_file():
            raise UserError("--output is not set; give the directory that gets compare.html, as --output=comparison")
        output = args.folders[0]
    quantities = [name.strip() for name in args.power_law.split(",") if name.strip()]
    print(write_comparison(args.folders, output, args.baseline, args.metric, args.step, quantities))
    return 0

"""Transfer one encoder to tasks: classification, segmentation, detection and visual question answering.

  python launch.py transfer --workdir=runs/simclr
  python launch.py transfer --workdir=runs/simclr --tasks=segmentation,configs/detection.py:bccd --seeds=0,1,2
  python launch.py transfer --weights=resnet50.safetensors --tasks=configs/segmentation.py:camvid --output=runs/resnet50

Every task is trained with the same head and budget on four starts: the encoder's initial weights, frozen; the pretrained encoder,
frozen; the same, trained with the task; and its initial weights, trained with the task. Each is a run of its own in
OUTPUT/TASK/START-SEED. The same command again goes on where it was ended. OUTPUT gets transfer.md (mean, 95 % interval, every seed) and
transfer.csv; by default it is WORKDIR/transfer, and the report of the run shows the table. --config.KEY=VALUE changes every task.
"""

from __future__ import annotations

import os
import sys

from ssl_jax.cli.main import folder, whole
from ssl_jax.errors import UserError


def add_arguments(sub) -> None:
    sub.add_argument("--workdir", type=folder("--workdir"), help="directory of the run that trained the encoder")
    sub.add_argument("--weights", default="", help="a file of weights instead, see docs/guides/foreign_weights.md")
    sub.add_argument("--output", type=folder("--output"), help="directory of the transfers (default: WORKDIR/transfer)")
    sub.add_argument("--tasks", default="classification,segmentation,detection,vqa", help="tasks, or recipes configs/NAME.py:VARIANT")
    sub.add_argument("--starts", default="untrained,pretrained,finetuned,scratch", help="of these four (default: all)")
    sub.add_argument("--seeds", default="0", metavar="N[,N...]", help="seeds of heads and batches (default: 0)")
    sub.add_argument("--jobs", type=whole("--jobs", 1, 1024), default=1, help="runs at once; cores or GPUs are divided (default: 1)")


def main(args, overrides) -> int:
    from ssl_jax.experiment import transfer
    from ssl_jax.launchers import shares
    from ssl_jax.launchers.supervise import launch_command
    from ssl_jax.report.write import write_report

    if (args.workdir is None) == (not args.weights):
        raise UserError("transfer takes one encoder: give --workdir=RUN or --weights=FILE")
    if args.workdir is None and args.output is None:
        raise UserError("--weights needs --output=DIR, where the transfers are kept")
    if args.workdir is not None and not (args.workdir / "config.json").is_file():
        raise UserError(f"--workdir={args.workdir} holds no run (no config.json); give the directory of a run")
    encoder = [f"--config.stages.backbone.weights={args.weights}"] if args.weights else [
        f"--config.stages.backbone.workdir={args.workdir}"
    ]  # fmt: skip
    output = args.output or args.workdir / "transfer"
    seeds = [_seed(text) for text in filter(None, args.seeds.split(","))]
    parts = shares.divide(args.jobs, os.environ)
    cells = transfer.plan(encoder, output, _names(args.tasks), _names(args.starts), seeds, overrides)
    try:
        failed = transfer.run(cells, launch_command(), parts)
    finally:
        output.mkdir(parents=True, exist_ok=True)
        table = transfer.write_tables(cells, output)
    print(table)
    if args.workdir is not None:
        print(write_report(args.workdir))
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    return UserError.code if failed else 0


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _seed(text: str) -> int:
    if not text.strip().isdecimal():
        raise UserError(f"--seeds: {text!r} is no whole number from 0 on")
    return int(text)

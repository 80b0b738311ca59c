"""Export the encoder of a finished run.

  python launch.py export --workdir=runs/simclr
  python launch.py export --workdir=runs/simclr --format=safetensors --output=/models/simclr
  python launch.py export --workdir=runs/simclr --step=2000

Writes WORKDIR/export/<format>/ with the weights and card.json: safetensors in torchvision's or timm's naming, Orbax
parameters, and StableHLO with a free batch. `ssl_jax.load(folder)` gives encode(images) back from each.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

from ssl_jax.cli.main import add_workdir
from ssl_jax.engine.checkpoint import Checkpoints
from ssl_jax.errors import UserError
from ssl_jax.experiment.build import provenance, start_jax
from ssl_jax.experiment.config import resolve
from ssl_jax.experiment.stages import open_stages
from ssl_jax.experiment.workdir import read_config
from ssl_jax.export import FORMATS, TOLERANCES, NoTorchLayout, make_source, write

log = logging.getLogger(__name__)


def add_arguments(sub) -> None:
    add_workdir(sub)
    sub.add_argument("--format", default="all", help=f"{', '.join(FORMATS)} or all (default): every one there is")
    sub.add_argument("--step", type=int, help="which checkpoint (default: the last one of a finished run)")
    sub.add_argument("--output", type=Path, help="folder for the folders of the formats (default: WORKDIR/export)")
    sub.add_argument("--dtype", default="float32", help="of the exported computation: float32 (default) or bfloat16")


def main(args, overrides) -> int:
    start_jax()
    if overrides:
        raise UserError(f"argument {overrides[0]!r} is not understood; export writes a run as it was trained")
    for flag, value, valid in (("format", args.format, (*FORMATS, "all")), ("dtype", args.dtype, tuple(TOLERANCES))):
        if value not in valid:
            raise UserError(f"--{flag}={value} is unknown; choose {', '.join(valid)}")
    config = read_config(args.workdir)
    config.dtype = args.dtype
    total = resolve(config, config.data.examples)["total"]
    step, saved = read_checkpoint(args.workdir, total, args.step)
    _, frozen = open_stages(config)
    source = make_source(config, saved["params"], {**saved["mutable"], **frozen})
    about = {"step": step, "total_steps": total, **scores(args.workdir, step), "versions": versions(args.workdir)}
    for form in FORMATS if args.format == "all" else [args.format]:
        folder = (args.output or args.workdir / "export") / form
        try:
            card = write(folder, form, source, about)
        except NoTorchLayout as error:
            if args.format != "all":
                raise
            log.warning("no %s: %s", form, error)
            continue
        size = sum(file["bytes"] for file in card["files"].values()) / 2**20
        print(f"{folder}: step {step}, {size:.1f} MiB, features within {card['largest_difference']:.0e} of the run's")
    return 0


def read_checkpoint(workdir: Path, total: int, step: int | None) -> tuple[int, dict]:
    """(step, {'params', 'mutable'}) of a checkpoint: the one asked for, or the last one of a finished run.

    Raises:
        UserError: there is no such checkpoint, it is corrupt, or the run is unfinished and no step was asked for.
    """
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    try:
        steps = checkpoints.steps()
        if not steps or (step is not None and step not in steps):
            raise UserError(f"{workdir} has no checkpoint {'' if step is None else step}; there are {steps or 'none'}")
        if step is None and steps[-1] < total:
            raise UserError(
                f"{workdir} is unfinished (step {steps[-1]} of {total}); finish it with the same train command, "
                f"or export what there is with --step={steps[-1]}"
            )
        step = steps[-1] if step is None else step
        return step, checkpoints.read(step)
    finally:
        checkpoints.close()


def scores(workdir: Path, step: int) -> dict:
    """{'metrics', 'protocols'} that the run recorded at `step`; empty if it was not evaluated then."""
    path = workdir / "evaluations.json"
    entries = json.loads(path.read_text()) if path.exists() else []
    found = [entry for entry in entries if (entry["subject"], entry["step"]) == ("trained", step)]
    return {name: {k: v for entry in found for k, v in entry[name].items()} for name in ("metrics", "protocols")}


def versions(workdir: Path) -> dict:
    """What trained the run and what exports it."""
    path = workdir / "provenance.json"
    return {"training": json.loads(path.read_text()) if path.exists() else None, "export": provenance()}

"""Export the encoder of a run.

  python launch.py export --workdir=runs/simclr
  python launch.py export --workdir=runs/simclr --format=safetensors --output=/models/simclr
  python launch.py export --workdir=runs/simclr --step=2000

Writes WORKDIR/export/<format>/ with the weights and card.json: safetensors in torchvision's or timm's naming, Orbax
parameters, and StableHLO for any batch size. `ssl_jax.load(folder)` loads each as a function of images.
"""

from __future__ import annotations

from ssl_jax.cli.main import add_step, add_workdir, folder
from ssl_jax.errors import UserError


def add_arguments(sub) -> None:
    add_workdir(sub)
    sub.add_argument("--format", default="all", help="safetensors, orbax, stablehlo, or all that the encoder has (default)")
    add_step(sub, "the last one of a finished run")
    sub.add_argument("--output", type=folder("--output"), help="folder for the folders of the formats (default: WORKDIR/export)")
    sub.add_argument("--dtype", default="float32", help="of the exported computation: float32 (default) or bfloat16")


def main(args, overrides) -> int:
    if overrides:
        raise UserError(f"argument {overrides[0]!r} is not understood; export writes a run as it was trained")
    from ssl_jax.experiment.export_run import export  # imports JAX, which --help avoids

    for path, card in export(args.workdir, args.output or args.workdir / "export", args.format, args.step, args.dtype):
        size = sum(file["bytes"] for file in card["files"].values()) / 2**20
        print(f"{path}: step {card['step']}, {size:.1f} MiB, features within {card['largest_difference']:.0e} of the run's")
    return 0

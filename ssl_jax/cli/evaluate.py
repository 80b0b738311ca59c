"""Evaluate a checkpoint of a run and its baselines.

  python launch.py evaluate --workdir=runs/simclr
  python launch.py evaluate --workdir=runs/simclr --eval=knn,k=200 --eval=linear,solver=ridge,l2=(1e-3,1e-2)
  python launch.py evaluate --workdir=runs/simclr --eval=fewshot --subjects=trained,untrained,pixels --step=200

  python launch.py evaluate --weights=dinov2_vits14_pretrain.pth --config=configs/simclr.py --output=evaluations/dinov2

--eval names any kind of evaluation with its options; without it those of the config are run. Baselines of the config (raw pixels,
the initial state of the run) that lack these evaluations are measured too. --config.KEY=VALUE changes evaluations or data for this
call. The numbers go to stdout and, with their protocols, to evaluations.json.

--weights evaluates an encoder that others have trained (docs/guides/foreign_weights.md) with the data and evaluations of a config.
"""

from __future__ import annotations

from ssl_jax.cli.main import add_encoder, check_encoder, folder
from ssl_jax.errors import UserError


def add_arguments(sub) -> None:
    add_encoder(sub)
    sub.add_argument("--output", type=folder("--output"), help="with --weights: directory of evaluations.json")
    sub.add_argument(
        "--eval", action="append", default=[], metavar="KIND[,option=value...]",
        help="an evaluation and its options; label=NAME names it in the results; may be repeated",
    )  # fmt: skip
    sub.add_argument(
        "--subjects", metavar="NAME[,NAME...]",
        help="of trained, untrained, pixels (default: trained, and baselines of the config that were not measured yet)",
    )  # fmt: skip


def main(args, overrides) -> int:
    check_encoder(args)
    if args.weights:
        if args.output is None:
            raise UserError("--weights needs --output=DIR, the directory of its evaluations.json")
        from ssl_jax.experiment.evaluate_weights import evaluate_weights  # imports JAX, which --help avoids

        evaluate_weights(args.weights, args.config, overrides, args.output, args.eval, args.subjects)
        return 0
    if args.output is not None:
        raise UserError(f"--output={args.output} is for --weights; the numbers of a run go to its workdir")
    from ssl_jax.experiment.evaluate import evaluate

    evaluate(args.workdir, overrides, args.step, args.eval, args.subjects)
    return 0

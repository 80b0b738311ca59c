"""Evaluate a checkpoint of a run and its baselines.

  python launch.py evaluate --workdir=runs/simclr
  python launch.py evaluate --workdir=runs/simclr --eval=knn,k=200 --eval=linear,solver=ridge,l2=(1e-3,1e-2)
  python launch.py evaluate --workdir=runs/simclr --eval=fewshot --subjects=trained,untrained,pixels --step=200

--eval names any kind of evaluation with its options; without it those of the config are run. Baselines of the config (raw pixels,
the initial state of the run) that lack these evaluations are measured too. --config.KEY=VALUE changes evaluations or data for this
call. The numbers go to stdout and, with their protocols, to evaluations.json.
"""

from __future__ import annotations

from ssl_jax.cli.main import add_step, add_workdir


def add_arguments(sub) -> None:
    add_workdir(sub)
    add_step(sub)
    sub.add_argument(
        "--eval", action="append", default=[], metavar="KIND[,option=value...]",
        help="an evaluation and its options; label=NAME names it in the results; may be repeated",
    )  # fmt: skip
    sub.add_argument(
        "--subjects", metavar="NAME[,NAME...]",
        help="of trained, untrained, pixels (default: trained, and baselines of the config that were not measured yet)",
    )  # fmt: skip


def main(args, overrides) -> int:
    from ssl_jax.experiment.evaluate import evaluate  # imports JAX, which --help avoids

    evaluate(args.workdir, overrides, args.step, args.eval, args.subjects)
    return 0

"""Evaluate the checkpoint of a run.

  python launch.py evaluate --workdir=runs/simclr
  python launch.py evaluate --workdir=runs/simclr --step=200 --config.evals.knn.k=200

Reads the config that the run was trained with; --config.KEY=VALUE changes evaluations or data for this call. The numbers go to
stdout and, with their protocols, to evaluations.json.
"""

from __future__ import annotations

from ssl_jax.cli.main import add_workdir


def add_arguments(sub) -> None:
    add_workdir(sub)
    sub.add_argument("--step", type=int, help="which checkpoint (default: the newest)")


def main(args, overrides) -> int:
    from ssl_jax.cli.evaluate import evaluate  # JAX, which --help does without

    evaluate(args.workdir, overrides, args.step)
    return 0

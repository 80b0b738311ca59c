"""Accuracy of the class scores of a model that was trained on labels; no probe is fitted."""

from __future__ import annotations

import jax

from ssl_jax.errors import UserError
from ssl_jax.evals.context import Context, Result, require_labels
from ssl_jax.evals.evaluator import Evaluator, Option
from ssl_jax.evals.lib.features import hits


def prepare(context: Context, *, layer: str) -> None:
    """Raises UserError if the model has no output `layer`."""
    offered = jax.eval_shape(context.encode, context.images())
    if layer not in offered:
        raise UserError(f"classifier needs a model with {layer!r}; this has {', '.join(sorted(offered))}")


def evaluate(context: Context, *, layer: str = "logits") -> Result:
    """Scores `layer` [N, C] of the test split.

    top1, top5: percent of images whose label has the largest score, or is among the five largest.
    """
    scores = context.features("test", layer)
    require_labels(scores, "classifier")
    metrics = {f"top{k}": 100 * float(hits(scores.x, scores.y, k).mean()) for k in (1, 5)}
    return Result(metrics, f"classifier layer={layer} of {context.name('test')}, nothing fitted")


EVALUATOR = Evaluator(
    evaluate,
    {"layer": Option("output of the encoder with one score per class")},
    needs=("model",),
    data=("label",),
    prepare=prepare,
)

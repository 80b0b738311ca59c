"""Few-shot linear regression on frozen features: `fewshot_lsr` of big_vision (Kolesnikov et al. 2020, BiT).

The choice of labels is a source of noise beside the seeds of the training. A draw follows from its seed and the labels alone, so all
methods and runs on the same data get the same images; compare them draw by draw.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.special import stdtrit

from ssl_jax.evals.context import Context, Result, require_labels
from ssl_jax.evals.evaluator import LAYER, Evaluator, Option
from ssl_jax.evals.lib.features import Features, chunks, hits

BIAS = 100.0  # constant feature for the intercept; large, so that the ridge penalty hardly shrinks it


def evaluate(
    context: Context,
    *,
    shots: Sequence[int] = (1, 5, 10, 100),
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    l2: float = 1024.0,
    layer: str = "pooled",
) -> Result:
    """A ridge classifier on `shots` training images per class, tested on the test split.

    <n>shot_top1: top-1 accuracy in percent with n images per class, mean over `seeds`.
    <n>shot_top1_std: its population standard deviation over `seeds`.
    <n>shot_top1_ci: half of its 95 % t-interval over `seeds`, from two on. It covers other draws of labels, not other trainings.
    """
    bank, query = context.features("bank", layer), context.features("test", layer)
    require_labels(bank, "few-shot evaluation")
    metrics = {}
    for count in shots:
        accuracy = [_accuracy(bank, query, support(bank.y, count, seed), l2) for seed in seeds]
        metrics[f"{count}shot_top1"] = float(np.mean(accuracy))
        metrics[f"{count}shot_top1_std"] = float(np.std(accuracy))
        if len(seeds) > 1:
            metrics[f"{count}shot_top1_ci"] = half_interval(accuracy)
    protocol = (
        f"few-shot ridge l2={l2:g} whitened by the support shots={','.join(map(str, shots))}"
        f" seeds={','.join(map(str, seeds))} layer={layer} support from {context.name('bank')}"
        f" query={context.name('test')}"
    )
    return Result(metrics, protocol)


EVALUATOR = Evaluator(
    evaluate,
    {
        "shots": Option("training images per class", least=1),
        "seeds": Option("seeds of the choice of training images; at least five for an interval that means something"),
        "l2": Option("ridge penalty", above=0),
        "layer": LAYER,
    },
    data=("label",),
)


def half_interval(values: Sequence[float]) -> float:
    """Half of the 95 % t-interval of the mean of two or more values."""
    count = len(values)
    return float(stdtrit(count - 1, 0.975) * np.std(values, ddof=1) / np.sqrt(count))


def support(labels: np.ndarray, shots: int, seed: int) -> np.ndarray:
    """Bank rows of the support set: for each class in ascending order, the first `shots` of a permutation by one seeded generator.

    Supports are nested: the 5 shots of a seed contain its 1 shot. A class with fewer examples contributes all of them.
    """
    generator = np.random.default_rng(seed)
    return np.concatenate([generator.permutation(np.flatnonzero(labels == c))[:shots] for c in np.unique(labels)])


def ridge(x: np.ndarray, targets: np.ndarray, l2: float, dual: bool | None = None) -> np.ndarray:
    """argmin_W |x W - targets|^2 + l2 |W|^2 in float64; x [N, D], targets [N, C] -> W [D, C].

    Solves the D x D (primal) or the N x N (dual) system, by default the smaller one. Both give the same W.
    """
    x, targets = np.asarray(x, np.float64), np.asarray(targets, np.float64)
    if len(x) < x.shape[1] if dual is None else dual:
        return x.T @ np.linalg.solve(x @ x.T + l2 * np.eye(len(x)), targets)
    return np.linalg.solve(x.T @ x + l2 * np.eye(x.shape[1]), x.T @ targets)


def whiten(x: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """(x - mean) / (std + 1e-5) with the constant feature appended: [N, D] -> [N, D + 1] float64."""
    white = (x - mean) / (std + 1e-5)
    return np.concatenate([white, np.full((len(x), 1), BIAS)], 1)


def _accuracy(bank: Features, query: Features, rows: np.ndarray, l2: float) -> float:
    x, y = bank.x[rows].astype(np.float64), bank.y[rows]
    mean, std = x.mean(0), x.std(0)
    targets = 2.0 * (y[:, None] == np.arange(y.max() + 1)) - 1
    weights = ridge(whiten(x, mean, std), targets, l2)
    correct = 0
    for start, stop in chunks(len(query.y), 8192):
        correct += hits(whiten(query.x[start:stop], mean, std) @ weights, query.y[start:stop], 1).sum()
    return 100 * correct / len(query.y)

"""Label-free measures of a representation, in float64 on the host.

Ranks are comparable only between models with the same feature dimension. The output of a projector shows collapse more clearly than
that of the backbone.
"""

from __future__ import annotations

import numpy as np
import scipy.stats

from ssl_jax.errors import UserError
from ssl_jax.evals.context import Context, Result
from ssl_jax.evals.evaluator import LAYER, SEED, Evaluator, Option
from ssl_jax.evals.lib.features import chunks


def evaluate(context: Context, *, layer: str = "pooled", examples: int = 4096, seed: int = 0) -> Result:
    """The first `examples` test images.

    rankme, effective_rank: exp of the entropy of the singular values, with and without the epsilon of RankMe.
    covariance_rank: exp of the entropy of the squared singular values.
    participation_ratio: (sum s^2)^2 / sum s^4 of the singular values s.
    alpha: exponent of the power law of the centered covariance; about 1 is desirable (Agrawal et al. 2022, alpha-ReQ).
    l2_std: standard deviation of the l2-normalized features times sqrt(D): about 1 when spread, 0 when collapsed.
    uniformity: log of the mean of exp(-2 |x - y|^2) over pairs of l2-normalized features; lower is more uniform.
    alignment: mean squared distance of two views of an image; only for methods with views, in the layer that the method chooses.
    """
    x = context.features("test", layer).x[:examples].astype(np.float64)
    if len(x) < 2:
        raise UserError("representation measures need at least two test examples; check the split and its limit")
    s = np.linalg.svd(x, compute_uv=False)
    metrics = {
        "rankme": rankme(s),
        "effective_rank": effective_rank(s),
        "covariance_rank": covariance_rank(s),
        "participation_ratio": participation_ratio(s),
        "alpha": alpha(x),
        "l2_std": l2_std(x),
        "uniformity": uniformity(x),
    }
    views = context.views(examples, seed)
    if views is not None and views.shape[1] < 2:
        views = None  # nothing to align
    if views is not None:
        metrics["alignment"] = alignment(views)
    aligned = f"over {views.shape[1]} views of {len(views)} images" if views is not None else "not measured (no views)"
    protocol = (
        f"representation layer={layer} D={x.shape[1]} first {len(x)} of {context.name('test')} uncentered spectrum"
        f" uniformity t=2 alignment alpha=2 {aligned}"
    )
    return Result({name: float(value) for name, value in metrics.items()}, protocol)


EVALUATOR = Evaluator(
    evaluate,
    {"layer": LAYER, "examples": Option("number of test images, the first ones", least=2), "seed": SEED},
    smallest={"test": 2},
)


def rankme(s: np.ndarray, epsilon: float = 1e-7) -> float:
    """exp of the entropy of p = s / sum(s) + epsilon (Garrido et al. 2023, RankMe, eq. 1).

    s: singular values of the uncentered features [N, D]. For equal s the epsilon raises it slightly above D.
    """
    p = s / s.sum() + epsilon if s.any() else np.full(len(s), epsilon)
    return _exp_entropy(p)


def effective_rank(s: np.ndarray) -> float:
    """exp of the entropy of s / sum(s) (Roy and Vetterli 2007): RankMe without its epsilon; 0 for s = 0."""
    return _exp_entropy(s / s.sum()) if s.any() else 0.0


def covariance_rank(s: np.ndarray) -> float:
    """exp of the entropy of s^2 / sum(s^2), the eigenvalues of the second-moment matrix; 0 for s = 0."""
    return effective_rank(np.square(s))


def participation_ratio(s: np.ndarray) -> float:
    """(sum s^2)^2 / sum s^4: 1 for rank one, D for a flat spectrum; 0 for s = 0."""
    energy = np.square(s / s.max()) if s.any() else s
    return energy.sum() ** 2 / np.square(energy).sum() if s.any() else 0.0


def alpha(x: np.ndarray) -> float:
    """-slope of log(v_j) over log(j) by least squares, for the eigenvalues v_1 >= v_2 >= ... of the covariance of x [N, D].

    Agrawal et al. 2022 (alpha-ReQ), section 3. Eigenvalues below 1e-9 of the first are numerical zeros and are left out; 0 if fewer
    than two are left.
    """
    values = np.square(np.linalg.svd(x - x.mean(0), compute_uv=False))
    values = values[values > 1e-9 * values[0]]
    return -scipy.stats.linregress(np.log(1 + np.arange(len(values))), np.log(values)).slope if len(values) > 1 else 0.0


def l2_std(x: np.ndarray) -> float:
    """Mean over dimensions of the std (ddof 0) of x / |x|, times sqrt(D): about 1 when spread, 0 when collapsed."""
    return unit(x).std(0).mean() * np.sqrt(x.shape[1])


def uniformity(x: np.ndarray, t: float = 2.0) -> float:
    """log of the mean over pairs i < j of exp(-t |x_i - x_j|^2) of unit rows (Wang and Isola 2020, eq. 2); x [N, D]."""
    x = unit(x)
    total = 0.0
    for start, stop in chunks(len(x), 1024):
        squared = np.maximum(2 - 2 * x[start:stop] @ x[start:].T, 0)
        total += np.triu(np.exp(-t * squared), 1).sum()
    return np.log(total / (len(x) * (len(x) - 1) / 2))


def alignment(views: np.ndarray, alpha: float = 2.0) -> float:
    """Mean |x - y|^alpha over pairs of views of one image, unit rows [N, V, D] (Wang and Isola 2020, eq. 1)."""
    views = unit(np.asarray(views, np.float64))
    first, second = np.triu_indices(views.shape[1], 1)
    distance = np.linalg.norm(views[:, first] - views[:, second], axis=-1)
    return (distance**alpha).mean()


def unit(x: np.ndarray) -> np.ndarray:
    """Rows of length 1 in float64; zero rows stay zero."""
    x = np.asarray(x, np.float64)
    norm = np.linalg.norm(x, axis=-1, keepdims=True)
    return x / np.where(norm == 0, 1, norm)


def _exp_entropy(p):
    p = p[p > 0]
    return np.exp(-(p * np.log(p)).sum())

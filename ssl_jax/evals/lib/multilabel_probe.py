"""Linear probe of images that may have several classes: a logistic regression per class, and their mean average precision.

All classes share one l2, chosen on held-out training images, as the common protocol on PASCAL VOC 2007 does for its SVMs. l2 is
1 / (C n) of scikit-learn's LogisticRegression. `logistic` fits them, as it fits the linear probe of classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from ssl_jax.errors import UserError
from ssl_jax.evals.lib import logistic
from ssl_jax.evals.lib.features import Features, flat_mesh, moments
from ssl_jax.evals.lib.linear_probe import Probe, predict


class Chosen(NamedTuple):
    """The probe with the best l2, refitted on the whole bank."""

    probe: Probe  # one head
    l2: float
    validation: np.ndarray  # [l2] held-out mean average precision in percent
    fits: int  # one per l2, and the refit
    unconverged: int  # how many of them ended at the largest number of iterations


def mean_average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """Mean over classes of the average precision (scikit-learn's, without interpolation) in percent; both [N, C].

    A class without an example is left out of the mean; without any, the value is NaN.
    """
    from sklearn.metrics import average_precision_score  # takes a second, which few runs need

    values = [average_precision_score(labels[:, c], scores[:, c]) for c in range(labels.shape[1]) if labels[:, c].any()]
    return 100 * float(np.mean(values)) if values else float("nan")


def fit(
    bank: Features, l2: Sequence[float], iterations: int, standardize: bool, validation: float, seed: int, mesh: Mesh | None
) -> Chosen:
    """Choose the l2 with the best mean average precision on held-out images (the first of equals), and refit on the whole bank.

    bank.y: int [N, C] of 0 and 1.

    Raises UserError for fewer than two images, or a bank that is too large for the memory of the devices.
    """
    count, dim = bank.x.shape
    mesh = flat_mesh(mesh)
    if count < 2:
        raise UserError("a linear probe needs at least two training images; check the split")
    scale = moments(bank.x) if standardize else (np.zeros(dim, np.float32), np.ones(dim, np.float32))
    options = dict(iterations=iterations, within=logistic.directions(bank, scale, mesh))
    order = np.random.default_rng(seed).permutation(count)
    held_out = min(max(1, round(validation * count)), count - 1)
    train, rest = np.sort(order[held_out:]), np.sort(order[:held_out])
    kernels, biases, gradients = logistic.fit(bank, train, scale, [(value,) for value in l2], mesh, **options)
    logits = predict(Probe(kernels, biases, *scale), bank.x[rest], mesh)
    scores = [mean_average_precision(logits[:, head], bank.y[rest]) for head in range(len(l2))]
    best = 0 if np.isnan(scores).all() else int(np.nanargmax(scores))  # NaN: no held-out image has a class
    kernel, bias, last = logistic.fit(bank, np.arange(count), scale, [(l2[best],)], mesh, **options)
    unconverged = int((np.concatenate([gradients, last]) > logistic.CONVERGED).sum())
    return Chosen(Probe(kernel, bias, *scale), l2[best], np.asarray(scores), len(l2) + 1, unconverged)

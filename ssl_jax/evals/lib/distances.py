"""Distances between generated and real features, as functions of arrays, in float64 on the host.

The values depend on the network behind the features. Only with the Inception network of 2015-12-05 is the Frechet distance
"FID" and the kernel distance "KID"; callers name the network beside the value.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np


class Moments(NamedTuple):
    """Count, mean [D] and scatter [D, D] (the sum of outer products of deviations) of feature rows."""

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @property
    def covariance(self) -> np.ndarray:
        """[D, D], unbiased (divided by count - 1)."""
        return self.scatter / (self.count - 1)


def moments(features: np.ndarray) -> Moments:
    """Two passes over features [N, D]: one-pass sums of squares in float32 lose the variance beside a large mean."""
    features = np.asarray(features, np.float64)
    mean = features.mean(0)
    centered = features - mean
    return Moments(len(features), mean, centered.T @ centered)


def chunked_moments(features: np.ndarray, rows: int = 8192) -> Moments:
    """`moments` of features [N, D], with at most `rows` of them in float64 at a time."""
    return functools.reduce(merge, (moments(features[start : start + rows]) for start in range(0, len(features), rows)))


def merge(a: Moments, b: Moments) -> Moments:
    """The moments of the union of two sets of rows (Chan et al. 1983)."""
    count = a.count + b.count
    shift = b.mean - a.mean
    scatter = a.scatter + b.scatter + np.outer(shift, shift) * (a.count * b.count / count)
    return Moments(count, a.mean + shift * (b.count / count), scatter)


def frechet(real: Moments, fake: Moments) -> float:
    """Heusel et al. 2017 (arXiv:1706.08500), equation 6: |difference of means|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)).

    The trace of the root is the sum of the square roots of the eigenvalues of S1^(1/2) S2 S1^(1/2). That matrix is symmetric,
    so all values are real. The estimate is biased upwards by about D^2 / N: compare only equal numbers of examples.
    """
    values, vectors = np.linalg.eigh(real.covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    product = np.linalg.eigvalsh(root @ fake.covariance @ root)
    apart = np.sum((real.mean - fake.mean) ** 2)
    return float(apart + np.trace(real.covariance + fake.covariance) - 2 * np.sum(np.sqrt(np.maximum(product, 0))))


def kernel_distance(real: np.ndarray, fake: np.ndarray, subsets: int = 100, size: int = 1000, seed: int = 0) -> tuple[float, float]:
    """Binkowski et al. 2018 (arXiv:1801.01401): (mean, standard error) of the unbiased squared MMD with kernel (<x, y> / D + 1)^3.

    Each of `subsets` takes `size` rows (at most all) of both sets without replacement. May be negative for equal distributions.
    """
    generator, values = np.random.default_rng(seed), []
    m, n = min(size, len(real)), min(size, len(fake))
    for _ in range(subsets):
        x = np.asarray(real[generator.choice(len(real), m, replace=False)], np.float64)
        y = np.asarray(fake[generator.choice(len(fake), n, replace=False)], np.float64)
        xx, yy, xy = (_cubic(a, b) for a, b in ((x, x), (y, y), (x, y)))
        within = (xx.sum() - np.trace(xx)) / (m * (m - 1)) + (yy.sum() - np.trace(yy)) / (n * (n - 1))
        values.append(within - 2 * xy.mean())
    return float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(subsets)) if subsets > 1 else 0.0


def _cubic(x, y):
    root = x @ y.T / x.shape[1] + 1
    return root * root * root  # NumPy's power is ten times slower


def inception_score(logits: np.ndarray, splits: int = 10) -> tuple[float, float]:
    """Salimans et al. 2016 (arXiv:1606.03498): (mean, deviation over splits) of exp(E KL(p(y | x) | p(y))), logits [N, classes].

    Between 1 and the number of classes. Rows are split in order, as in the original code.
    """
    scores = []
    for part in np.array_split(np.asarray(logits, np.float64), splits):
        log_p = part - part.max(1, keepdims=True)
        log_p -= np.log(np.exp(log_p).sum(1, keepdims=True))
        p = np.exp(log_p)
        scores.append(np.exp(np.mean(np.sum(p * (log_p - np.log(p.mean(0))), 1))))
    return float(np.mean(scores)), float(np.std(scores))


def neighborhoods(real: np.ndarray, fake: np.ndarray, k: int = 3) -> dict[str, float]:
    """{'precision', 'recall', 'density', 'coverage'}; the ball of a row reaches to its k-th neighbor in its own set.

    Kynkaanniemi et al. 2019 (arXiv:1904.06991; k=3): precision is the share of fakes in the ball of some real row, recall the share
    of reals in the ball of some fake row. Naeem et al. 2020 (arXiv:2002.09797; k=5): density is the mean number of real balls that
    contain a fake, over k; coverage is the share of reals whose ball contains a fake. Euclidean, closed balls.
    """
    real, fake = np.asarray(real, np.float64), np.asarray(fake, np.float64)
    radius_real, radius_fake = _radii(real, k), _radii(fake, k)
    covered_by_fake, nearest, holding = np.zeros(len(real), bool), np.full(len(real), np.inf), np.zeros(len(fake))
    for start, distance in _distances(real, fake):
        rows = slice(start, start + len(distance))
        covered_by_fake[rows] = (distance <= radius_fake).any(1)
        nearest[rows] = distance.min(1)
        holding += (distance <= radius_real[rows, None]).sum(0)
    return {
        "precision": float(np.mean(holding > 0)),
        "recall": float(np.mean(covered_by_fake)),
        "density": float(np.mean(holding) / k),
        "coverage": float(np.mean(nearest <= radius_real)),
    }


def _radii(x, k):
    """Distance of each row to its k-th nearest other row."""
    return np.concatenate([np.partition(distance, k, axis=1)[:, k] for _, distance in _distances(x, x)])


def _distances(x: np.ndarray, y: np.ndarray, rows: int = 1024) -> Iterator[tuple[int, np.ndarray]]:
    """(start, distances [rows, M]) in blocks of rows of x; [N, M] at once does not fit in memory for 50,000 rows."""
    squares = np.sum(y * y, 1)
    for start in range(0, len(x), rows):
        block = x[start : start + rows]
        squared = np.sum(block * block, 1)[:, None] + squares - 2 * block @ y.T
        if x is y:
            squared[np.arange(len(block)), start + np.arange(len(block))] = 0  # exactly 0, so that index 0 is the row itself
        yield start, np.sqrt(np.maximum(squared, 0))

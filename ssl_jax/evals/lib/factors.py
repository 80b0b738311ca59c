"""Disentanglement scores: does each dimension of a code hold one factor of variation? Functions of arrays, in float64 on the host.

MIG: Chen et al. 2018 (arXiv:1802.04942). DCI: Eastwood and Williams 2018. FactorVAE score: Kim and Mnih 2018
(arXiv:1802.05983). The protocols follow Locatello et al. 2019 (arXiv:1811.12359) unless a comment says otherwise. All scores
are in [0, 1] and do not depend on the order or the signs of the dimensions.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy.optimize
from scipy.special import log_softmax
from sklearn.ensemble import GradientBoostingClassifier
from sklearn.linear_model import Lasso

BINS = 20  # bins of equal width per code dimension
VALUES = 10  # bins of equal frequency per continuous factor
LASSO_ALPHA = 0.002  # for inputs and targets of deviation 1; a smaller one lets chance correlations look important
CLASSES_L1 = 0.01  # the same beside a mean cross-entropy
VOTES, TEST_VOTES, EXAMPLES = 10000, 5000, 64  # of the FactorVAE score: votes to fit, votes to test, examples per vote
PRUNED = 0.05  # dimensions with less than this share of the largest deviation do not vote


class Factor(NamedTuple):
    """The values of one factor in the training and test examples, as indices below `count`."""

    train: np.ndarray  # [N] int
    test: np.ndarray  # [M] int
    count: int
    ordered: bool  # True: numbers, predicted by a regression; False: names of classes, predicted by a classifier


def factor(train: np.ndarray, test: np.ndarray, ordered: bool | None = None) -> Factor:
    """The factor of values [N] and [M]; None: floats are ordered, and whole numbers are names of classes.

    Ordered factors with more than 10 values are binned at quantiles of `train`.
    """
    values = np.unique(train)
    ordered = train.dtype.kind == "f" if ordered is None else ordered
    if not ordered:
        values = np.union1d(values, test)
        return Factor(np.searchsorted(values, train), np.searchsorted(values, test), len(values), False)
    few, quantiles = (values[1:] + values[:-1]) / 2, np.quantile(train, np.arange(1, VALUES) / VALUES)
    edges = few if len(values) <= VALUES else np.unique(quantiles)
    return Factor(*(np.searchsorted(edges, x, "right") for x in (train, test)), len(edges) + 1, True)


# --- mutual information gap


def mutual_information_gap(code: np.ndarray, factors: list[np.ndarray]) -> float:
    """Mean over factors of the gap in mutual information between the best and second-best dimension, over the factor's entropy.

    code [N, D]. Each dimension has 20 bins of equal width, and frequencies serve as probabilities. The bias of each mutual
    information is about (20 - 1) (values - 1) / 2N nats upwards.
    """
    binned = [np.digitize(z, np.histogram(z, BINS)[1][:-1]) - 1 for z in np.asarray(code, np.float64).T]
    gaps = []
    for values in factors:
        information = np.sort([mutual_information(z, values) for z in binned] + [0.0])
        gaps.append((information[-1] - information[-2]) / mutual_information(values, values))
    return float(np.mean(gaps))


def mutual_information(a: np.ndarray, b: np.ndarray) -> float:
    """Mutual information of the joint frequencies of indices a, b [N], in nats."""
    width = int(b.max()) + 1
    joint = np.bincount(a * width + b, minlength=(int(a.max()) + 1) * width).reshape(-1, width) / len(a)
    independent = joint.sum(1, keepdims=True) * joint.sum(0)
    seen = joint > 0
    return float(np.sum(joint[seen] * np.log(joint[seen] / independent[seen])))


# --- disentanglement, completeness, informativeness


def dci(train: np.ndarray, test: np.ndarray, factors: list[Factor], trees: bool, seed: int) -> dict[str, float]:
    """{'disentanglement', 'completeness', 'informativeness'} of codes train [N, D] and test [M, D], standardized by `train`.

    Importance is that of gradient-boosted trees (`trees`; takes minutes), or the absolute weights of sparse linear models. An
    ordered factor has a lasso, which predicts its index. A factor of classes has a logistic regression over all classes with an L1
    penalty; its weights are scaled to the sum 1 - cross-entropy / entropy, so that they compare with those of a lasso.
    informativeness: share of test examples whose value is predicted, mean over factors.

    One lasso per class would be wrong: that of a class in the middle of an axis finds no line, and weights of chance remain.
    """
    mean, std = train.mean(0), train.std(0)
    train, test = ((x - mean) / np.where(std > 0, std, 1) for x in (train, test))
    if trees:
        fitted = [_boosted(train, test, factor, seed) for factor in factors]
    else:
        fitted = [(_lasso if factor.ordered else _logistic)(train, test, factor) for factor in factors]
    importance = np.stack([weights for weights, _ in fitted], 1)
    accuracies = [np.mean(guess == factor.test) for factor, (_, guess) in zip(factors, fitted, strict=True)]
    return {
        "disentanglement": concentration(importance),
        "completeness": concentration(importance.T),
        "informativeness": float(np.mean(accuracies)),
    }


def concentration(importance: np.ndarray) -> float:
    """1 - entropy (base J) of each row of [I, J], averaged with the row sums as weights: 1 if each row has one nonzero entry."""
    rows = importance.sum(1)
    if not rows.any() or importance.shape[1] == 1:
        return float(rows.any())
    p = importance[rows > 0] / rows[rows > 0, None]
    entropies = -np.sum(p * np.log(np.where(p > 0, p, 1)), 1) / np.log(importance.shape[1])
    return float(np.sum(rows[rows > 0] * (1 - entropies)) / rows.sum())


def _boosted(train, test, factor, seed):
    model = GradientBoostingClassifier(random_state=seed).fit(train, factor.train)
    return model.feature_importances_, model.predict(test)


def _lasso(train, test, factor):
    target = factor.train.astype(np.float64)
    mean, std = target.mean(), target.std() or 1.0
    model = Lasso(LASSO_ALPHA, precompute=True, max_iter=10000).fit(train, (target - mean) / std)
    return np.abs(model.coef_), np.clip(np.round(model.predict(test) * std + mean), 0, factor.count - 1)


def _logistic(train, test, factor):
    """Weights are differences of two parts >= 0, so that L-BFGS-B finds exact zeros."""
    (count, dim), classes, rows = train.shape, factor.count, np.arange(len(train))
    one_hot = factor.train[:, None] == np.arange(classes)

    def unpack(flat):
        up, down = flat[:-classes].reshape(2, dim, classes)
        return up - down, flat[-classes:]

    def objective(flat):
        weights, bias = unpack(flat)
        log_p = log_softmax(train @ weights + bias, axis=1)
        error = (np.exp(log_p) - one_hot) / count
        slope = train.T @ error
        value = -log_p[rows, factor.train].mean() + CLASSES_L1 * flat[:-classes].sum()
        return value, np.concatenate([(CLASSES_L1 + slope).ravel(), (CLASSES_L1 - slope).ravel(), error.sum(0)])

    size = 2 * dim * classes
    bounds = [(0, None)] * size + [(None, None)] * classes
    options = {"maxiter": 1000, "maxfun": 2000, "gtol": 1e-5}
    start = np.zeros(size + classes)
    found = scipy.optimize.minimize(objective, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    weights, bias = unpack(found.x)
    importance, frequency = np.abs(weights).sum(1), one_hot.mean(0)
    entropy = -np.sum(frequency * np.log(np.where(frequency > 0, frequency, 1)))
    cross_entropy = -log_softmax(train @ weights + bias, axis=1)[rows, factor.train].mean()
    scale = (1 - cross_entropy / entropy) / importance.sum() if importance.any() else 0.0
    return scale * importance, np.argmax(test @ weights + bias, 1)


# --- FactorVAE score


def factorvae(train: np.ndarray, test: np.ndarray, factors: list[Factor], seed: int) -> float:
    """Share of votes in which the dimension with the least variance predicts the factor that 64 examples have in common.

    train, test: codes [N, D], [M, D]. Variances are relative to those of all examples. 10,000 votes of training examples assign
    a factor to each dimension; 5,000 votes of test examples are scored. Factors are binned, so a shared factor still varies
    within its bin.
    """
    std = train.std(0)
    active = std >= PRUNED * max(std.max(), np.finfo(float).tiny)
    if not active.any():  # a collapsed code
        return 0.0
    scaled = [x[:, active] / std[active] for x in (train, test)]
    generator, counts = np.random.default_rng(seed), np.zeros((active.sum(), len(factors)))
    for z, k in _votes(scaled[0], [factor.train for factor in factors], VOTES, generator):
        counts[:, k] += np.bincount(z, minlength=len(counts))
    answer, right = counts.argmax(1), 0
    for z, k in _votes(scaled[1], [factor.test for factor in factors], TEST_VOTES, generator):
        right += np.sum(answer[z] == k)
    return right / TEST_VOTES


def _votes(code, factors, count, generator):
    """Pairs (dimensions [n] of least variance, factor), `count` votes in all, with random factors and values."""
    which, example = generator.integers(len(factors), size=count), generator.integers(len(code), size=count)
    for k, values in enumerate(factors):
        requested = np.bincount(values[example[which == k]], minlength=values.max() + 1)
        for value in np.flatnonzero(requested):
            rows = generator.choice(np.flatnonzero(values == value), (requested[value], EXAMPLES))
            yield np.concatenate([code[part].var(1, ddof=1).argmin(1) for part in np.array_split(rows, -(-len(rows) // 256))]), k

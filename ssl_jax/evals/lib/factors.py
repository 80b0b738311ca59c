"""Does each number of a code stand for one factor of variation, and each factor in one number? Of arrays, in float64 on the host.

MIG: Chen et al. 2018 (arXiv:1802.04942). DCI: Eastwood and Williams 2018. FactorVAE score: Kim and Mnih 2018 (arXiv:1802.05983). As
Locatello et al. 2019 (arXiv:1811.12359) measure them, unless said otherwise. All are in [0, 1] and do not change where the numbers of a
code change places or signs.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from sklearn.ensemble import GradientBoostingClassifier
from sklearn.linear_model import Lasso

BINS = 20  # of the numbers of a code, equally wide
VALUES = 10  # of a continuous factor, equally frequent
SHRINK = 0.002  # alpha of the lasso for rows and targets of deviation 1: below chance correlations, of which a few would look important
VOTES, EXAMINED, EXAMPLES = 10000, 5000, 64  # of the FactorVAE score: votes to learn from, votes to be right in, examples of a vote
PRUNED = 0.05  # numbers of a code with less than this share of the largest deviation do not vote


class Factor(NamedTuple):
    """One factor: its value in the training examples and in the others, as indices below `count`."""

    train: np.ndarray  # [N] int
    test: np.ndarray  # [M] int
    count: int
    ordered: bool  # indices have the order of numbers; else they are names


def factor(train: np.ndarray, test: np.ndarray) -> Factor:
    """Whole numbers are names; others are ordered, and have bins at the quantiles of `train` where they have more than 10 values."""
    values = np.unique(train)
    ordered = train.dtype.kind == "f"
    if not ordered:
        values = np.union1d(values, test)
        return Factor(np.searchsorted(values, train), np.searchsorted(values, test), len(values), False)
    few, quantiles = (values[1:] + values[:-1]) / 2, np.quantile(train, np.arange(1, VALUES) / VALUES)
    edges = few if len(values) <= VALUES else np.unique(quantiles)
    return Factor(*(np.searchsorted(edges, x, "right") for x in (train, test)), len(edges) + 1, True)


# --- mutual information gap


def mutual_information_gap(code: np.ndarray, factors: list[np.ndarray]) -> float:
    """Mean over factors of what the best number of a code [N, D] tells of a factor beyond the second best, as a share of its entropy.

    Numbers in 20 bins of equal width, frequencies as probabilities: biased upwards, by about (20 - 1) (values - 1) / 2N nats a pair.
    """
    binned = [np.digitize(z, np.histogram(z, BINS)[1][:-1]) - 1 for z in np.asarray(code, np.float64).T]
    gaps = []
    for values in factors:
        told = np.sort([mutual_information(z, values) for z in binned] + [0.0])
        gaps.append((told[-1] - told[-2]) / mutual_information(values, values))
    return float(np.mean(gaps))


def mutual_information(a: np.ndarray, b: np.ndarray) -> float:
    """Of the joint frequencies of indices a, b [N], in nats."""
    width = int(b.max()) + 1
    joint = np.bincount(a * width + b, minlength=(int(a.max()) + 1) * width).reshape(-1, width) / len(a)
    apart = joint.sum(1, keepdims=True) * joint.sum(0)
    seen = joint > 0
    return float(np.sum(joint[seen] * np.log(joint[seen] / apart[seen])))


# --- disentanglement, completeness, informativeness


def dci(train: np.ndarray, test: np.ndarray, factors: list[Factor], trees: bool, seed: int) -> dict[str, float]:
    """{'disentanglement', 'completeness', 'informativeness'} of codes [N, D], [M, D], scaled by mean and deviation of the first.

    Importance is that of gradient-boosted trees (`trees`; minutes), or the absolute weights of lassos: one for an ordered factor, which
    predicts its index; one for each value of another factor, of which the largest prediction counts and the mean weight.
    informativeness: mean over factors of the share of test examples whose value is predicted.
    """
    mean, std = train.mean(0), train.std(0)
    train, test = ((x - mean) / np.where(std > 0, std, 1) for x in (train, test))
    fit = _boosted if trees else _lasso
    found = [fit(train, test, each, seed) for each in factors]
    importance = np.stack([weights for weights, _ in found], 1)
    accuracies = [np.mean(guess == each.test) for each, (_, guess) in zip(factors, found, strict=True)]
    return {
        "disentanglement": concentration(importance),
        "completeness": concentration(importance.T),
        "informativeness": float(np.mean(accuracies)),
    }


def concentration(importance: np.ndarray) -> float:
    """Mean over rows [I, J], by their share of the whole, of 1 - entropy (base J): 1 where each row has one entry; 0 without any."""
    rows = importance.sum(1)
    if not rows.any() or importance.shape[1] == 1:
        return float(rows.any())
    p = importance[rows > 0] / rows[rows > 0, None]
    entropies = -np.sum(p * np.log(np.where(p > 0, p, 1)), 1) / np.log(importance.shape[1])
    return float(np.sum(rows[rows > 0] * (1 - entropies)) / rows.sum())


def _boosted(train, test, factor, seed):
    model = GradientBoostingClassifier(random_state=seed).fit(train, factor.train)
    return model.feature_importances_, model.predict(test)


def _lasso(train, test, factor, seed):
    targets = factor.train[:, None] if factor.ordered else factor.train[:, None] == np.arange(factor.count)
    weights, predicted = np.zeros(train.shape[1]), []
    for target in targets.astype(np.float64).T:
        mean, std = target.mean(), target.std() or 1.0
        model = Lasso(SHRINK, precompute=True, max_iter=10000).fit(train, (target - mean) / std)
        weights += np.abs(model.coef_) / targets.shape[1]
        predicted.append(model.predict(test) * std + mean)
    guess = np.clip(np.round(predicted[0]), 0, factor.count - 1) if factor.ordered else np.argmax(predicted, 0)
    return weights, guess


# --- FactorVAE score


def factorvae(train: np.ndarray, test: np.ndarray, factors: list[Factor], seed: int) -> float:
    """Share of votes in which the number of a code [N, D] that varies least tells which factor was the same in 64 examples.

    Variances are those of 64 examples of one value over those of all. 10,000 votes of training examples say which factor goes with
    which number, 5,000 votes of the others count. Factors are binned, so a factor that is the same still varies within its bin.
    """
    std = train.std(0)
    active = std >= PRUNED * max(std.max(), np.finfo(float).tiny)
    if not active.any():  # a code that is the same for all
        return 0.0
    scaled = [x[:, active] / std[active] for x in (train, test)]
    generator, counts = np.random.default_rng(seed), np.zeros((active.sum(), len(factors)))
    for z, k in _votes(scaled[0], [each.train for each in factors], VOTES, generator):
        counts[:, k] += np.bincount(z, minlength=len(counts))
    answer, right = counts.argmax(1), 0
    for z, k in _votes(scaled[1], [each.test for each in factors], EXAMINED, generator):
        right += np.sum(answer[z] == k)
    return right / EXAMINED


def _votes(code, factors, count, generator):
    """Pairs of (numbers [n] that vary least, factor): `count` votes in all, a random factor and the value of a random example each."""
    which, example = generator.integers(len(factors), size=count), generator.integers(len(code), size=count)
    for k, values in enumerate(factors):
        asked = np.bincount(values[example[which == k]], minlength=values.max() + 1)
        for value in np.flatnonzero(asked):
            rows = generator.choice(np.flatnonzero(values == value), (asked[value], EXAMPLES))
            yield np.concatenate([code[part].var(1, ddof=1).argmin(1) for part in np.array_split(rows, -(-len(rows) // 256))]), k

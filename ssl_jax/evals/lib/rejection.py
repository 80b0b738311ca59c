"""Rejection sampling with a classifier: keep the samples that it assigns to their class with the highest confidence.

This trades variety for quality: Razavi et al. 2019 (arXiv:1906.00446), Esser et al. 2021 (arXiv:2012.09841, section 4.4, with a
ResNet-101), Yu et al. 2022 (arXiv:2110.04627). The classifier is a linear probe of real training images in the features of a fixed
network. Candidates are generated twice, so that memory holds only a score for each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax.errors import UserError
from ssl_jax.evals.context import Context, Extractor
from ssl_jax.evals.lib import linear_probe
from ssl_jax.evals.lib.features import extract, flat_mesh
from ssl_jax.evals.lib.real_features import classifier, sample_batches


def check_rate(acceptance: float, name: str) -> None:
    """Raises UserError unless 0 < acceptance <= 1; `name` is the name of the option."""
    if not 0 < acceptance <= 1:
        raise UserError(f"{name}={acceptance} must be above 0 and at most 1; leave it out to keep all samples")


def check_labels(acceptance: float, name: str, sampled_labels: Callable | None) -> None:
    """Raises UserError for acceptance < 1 if samples have no classes."""
    if acceptance < 1 and sampled_labels is None:
        raise UserError(f"{name}={acceptance:g} needs samples of classes, and this model knows none; leave it out")


def select_samples(
    context: Context, network: Extractor, labels: np.ndarray, seed: int, truncation: float | None, acceptance: float
) -> tuple[Iterator[np.ndarray], np.ndarray, str]:
    """The best share `acceptance` of the candidates of each class in `labels` int [N].

    Returns (uint8 batches [B, H, W, 3] with N samples in all, their classes [N], the text for the protocol). Each class occurs
    as often as in `labels`.
    """
    candidates = candidate_labels(labels, acceptance)

    def sample():
        return context.model.samples(len(candidates), seed, truncation, candidates)

    batches = sample()
    first = next(batches)
    fitted, train_labels = classifier(context, network, first.shape[1:3])
    if not np.isin(candidates, train_labels).all():
        raise UserError(f"acceptance={acceptance:g}: the train split has no image of some classes; use more of it, or acceptance=1")
    probe = linear_probe.replicate_tree(fitted.probe, context.mesh or flat_mesh(None))

    def score(images, labels):
        return {"score": log_odds(probe, network.encode(images)["pooled"], labels)[:, None]}

    scores = extract(score, sample_batches(first, batches, context, candidates), "score", context.mesh, names=("label",)).x[:, 0]
    kept = rank_in_class(candidates, -scores) < np.bincount(labels)[candidates]
    real = context.name("bank", len(train_labels))
    protocol = f" acceptance={acceptance:g} of each class by a linear probe lbfgs on extractor={network.name} of {real}"
    protocol += linear_probe.convergence(fitted)
    return regroup(sample(), kept, len(first)), candidates[kept], protocol


def candidate_labels(labels: np.ndarray, acceptance: float) -> np.ndarray:
    """The classes of the candidates, in the order of `labels` [N]: ceil(n / acceptance) for a class that occurs n times."""
    rank = rank_in_class(labels, np.zeros(len(labels)))
    # 1e-9, because 0.7 / 0.1 is slightly above 7
    before, after = (np.ceil((rank + more) / acceptance - 1e-9).astype(int) for more in (0, 1))
    return np.repeat(labels, after - before)


def rank_in_class(labels: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """int [N]: the rank of each example within its class by ascending `keys` [N]; ties in order of index."""
    order = np.lexsort((keys, labels))
    _, start, count = np.unique(labels[order], return_index=True, return_counts=True)
    rank = np.empty(len(labels), int)
    rank[order] = np.arange(len(labels)) - np.repeat(start, count)
    return rank


@jax.jit
def log_odds(probe: linear_probe.Probe, x: jax.Array, labels: jax.Array) -> jax.Array:
    """log(p / (1 - p)) [B], where p is the probability of the labels [B] for x [B, D]. Keeps the order where p rounds to 1."""
    logits = jnp.dot((x.astype(jnp.float32) - probe.mean) / probe.std, probe.kernel[:, 0], precision="highest") + probe.bias[0]
    own = jnp.arange(logits.shape[1]) == labels[:, None]
    return jnp.sum(jnp.where(own, logits, 0), 1) - jax.nn.logsumexp(jnp.where(own, -jnp.inf, logits), 1)


def regroup(batches: Iterator[np.ndarray], kept: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """The rows of `batches` where bool `kept` [N] is true, in batches of `size`; the last batch may be smaller."""
    waiting, start = None, 0
    for images in batches:
        part = images[kept[start : start + len(images)]]
        waiting, start = part if waiting is None else np.concatenate([waiting, part]), start + len(images)
        if len(waiting) >= size:
            yield waiting[:size]
            waiting = waiting[size:]
    if len(waiting):
        yield waiting

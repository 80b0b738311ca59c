"""Rejection sampling with a classifier: of the pictures of each class, the share that is taken for that class most surely.

Razavi et al. 2019 (arXiv:1906.00446) trade variety for quality this way; so do Esser et al. 2021 (arXiv:2012.09841, section 4.4, with a
ResNet-101) and Yu et al. 2022 (arXiv:2110.04627). Here the classifier is a linear probe, which real training images have trained on the
features of a fixed network. Pictures are made twice, so that nothing but a score has to be kept of each candidate.
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
from ssl_jax.evals.lib.real_features import classifier, sampled


def check_rate(acceptance: float, name: str) -> None:
    """UserError for a share of nothing or of more than all; `name` is what the option is called."""
    if not 0 < acceptance <= 1:
        raise UserError(f"{name}={acceptance} must be above 0 and at most 1; leave it out to keep all samples")


def check_labels(acceptance: float, name: str, sampled_labels: Callable | None) -> None:
    """UserError for samples of no class, of which a classifier cannot prefer any."""
    if acceptance < 1 and sampled_labels is None:
        raise UserError(f"{name}={acceptance:g} needs samples of classes, and this model knows none; leave it out or train with them")


def preferred(
    context: Context, network: Extractor, labels: np.ndarray, seed: int, truncation: float | None, acceptance: float
) -> tuple[Iterator[np.ndarray], np.ndarray, str]:
    """Pictures of the classes `labels` int [N], of each class the best `acceptance` of its candidates.

    Returns uint8 batches [B, H, W, 3], N in all; their classes [N], as many of each as in `labels`, in order if those are; and what a
    protocol has to say.
    """
    asked = candidates(labels, acceptance)

    def made():
        return context.model.samples(len(asked), seed, truncation, asked)

    batches = made()
    first = next(batches)
    probe, known = classifier(context, network, first.shape[1:3])
    if not np.isin(asked, known).all():
        raise UserError(f"acceptance={acceptance:g}: the train split has no image of some classes; use more of it, or acceptance=1")
    on_devices = linear_probe.replicate_tree(probe, context.mesh or flat_mesh(None))

    def score(images, labels):
        return {"score": log_odds(on_devices, network.encode(images)["pooled"], labels)[:, None]}

    scores = extract(score, sampled(first, batches, context, asked), "score", context.mesh, names=("label",)).x[:, 0]
    kept = places(asked, -scores) < np.bincount(labels)[asked]
    real = context.name("train", len(known))
    told = f" acceptance={acceptance:g} of each class by a linear probe lbfgs on extractor={network.name} of {real}"
    return regroup(made(), kept, len(first)), asked[kept], told


def candidates(labels: np.ndarray, acceptance: float) -> np.ndarray:
    """The classes to make, in the order of `labels` [N]: of a class that is n times in there, ceil(n / acceptance)."""
    place = places(labels, np.zeros(len(labels)))
    before, after = (np.ceil((place + more) / acceptance - 1e-9).astype(int) for more in (0, 1))  # 0.7 / 0.1 is a little above 7
    return np.repeat(labels, after - before)


def places(labels: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """int [N]: the place of each among those of its class by ascending `keys` [N]; of equal ones the earlier is first."""
    order = np.lexsort((keys, labels))
    _, start, count = np.unique(labels[order], return_index=True, return_counts=True)
    place = np.empty(len(labels), int)
    place[order] = np.arange(len(labels)) - np.repeat(start, count)
    return place


@jax.jit
def log_odds(probe: linear_probe.Probe, x: jax.Array, labels: jax.Array) -> jax.Array:
    """log(p / (1 - p)) [B] of the probability of the own class of x [B, D]: orders as p does, also where p rounds to 1."""
    logits = jnp.dot((x.astype(jnp.float32) - probe.mean) / probe.std, probe.kernel[:, 0], precision="highest") + probe.bias[0]
    own = jnp.arange(logits.shape[1]) == labels[:, None]
    return jnp.sum(jnp.where(own, logits, 0), 1) - jax.nn.logsumexp(jnp.where(own, -jnp.inf, logits), 1)


def regroup(batches: Iterator[np.ndarray], kept: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """The rows of `batches`, none longer than `size`, that bool `kept` [N] names: in batches of `size`, the last of what remains."""
    waiting, start = None, 0
    for images in batches:
        part = images[kept[start : start + len(images)]]
        waiting, start = part if waiting is None else np.concatenate([waiting, part]), start + len(images)
        if len(waiting) >= size:
            yield waiting[:size]
            waiting = waiting[size:]
    if len(waiting):
        yield waiting

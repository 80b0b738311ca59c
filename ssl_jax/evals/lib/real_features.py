"""Pictures in the features of a fixed network: real images, samples, and the classifier that real images train."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from ssl_jax.engine.sharding import local_parts
from ssl_jax.errors import UserError
from ssl_jax.evals.context import Context, Extractor, Split, require_labels
from ssl_jax.evals.lib import distances, linear_probe
from ssl_jax.evals.lib.features import Features, padded
from ssl_jax.evals.lib.resize import to_size

INCEPTION = "inception-2015-12-05"  # the only features, 2048 of them, whose distance is called FID


class Real(NamedTuple):
    """Features of real images [N, D] float32, their labels [N], and the moments of the features."""

    x: np.ndarray
    y: np.ndarray
    moments: distances.Moments


def joined(network: Extractor, names: list[str], size: tuple[int, int] | None = None):
    """images -> the outputs in `names` side by side, so that one pass brings all of them."""

    def encode(images):
        given = images.shape[1:3]
        if size is not None and given != size:
            if given[0] < size[0] or given[1] < size[1]:
                raise UserError(f"samples are {size} pixels and real images only {given}; enlarge those with config.data.eval_ops")
            images = to_size(images, size)
        outputs = network.encode(images)
        return {"joined": jnp.concatenate([outputs[name].astype(jnp.float32) for name in names], axis=1)}

    return encode


def sampled(first: np.ndarray, rest: Iterator[np.ndarray], context: Context, labels: np.ndarray | None = None):
    """Batches of equal size for `extract`, with their `labels` [N] where given; with several processes, this one's `parts` of each."""
    own, count = ((0,), 1) if context.mesh is None else local_parts(context.mesh)
    size, start = -(-len(first) // count) * count, 0
    share = np.arange(size).reshape(count, -1)[list(own)].ravel()
    for images in itertools.chain([first], rest):
        if images.dtype != np.uint8:
            raise TypeError(f"samples must be uint8, not {images.dtype}")
        batch = {"image": padded(images, size)[share], "_valid": (np.arange(size) < len(images))[share]}
        if labels is not None:
            batch["label"] = padded(labels[start : start + len(images)].astype(np.int32), size)[share]
        start += len(images)
        yield batch


def real_features(context: Context, network: Extractor, split: Split, size: tuple[int, int]) -> Real:
    """Features of a split for samples of `size` pixels; computed once in a run."""
    key = (network.name, network.sha256, network.resize, split, size)
    known = context.model.known
    if key not in known:
        features = context.encode_with(joined(network, ["pooled"], size), split, "joined")
        known[key] = Real(*features, distances.in_parts(features.x))
    return known[key]


def classifier(context: Context, network: Extractor, size: tuple[int, int]) -> tuple[linear_probe.Probe, np.ndarray]:
    """A linear probe of the labels of real training images on their `real_features`, and those labels [N]; fitted once in a run."""
    train = real_features(context, network, "train", size)
    cache, key = context.model.cache, ("classifier", network.name, network.sha256, network.resize, size)
    if key not in known:
        bank = Features(train.x, train.y)
        require_labels(bank, "an evaluation of conditional samples")
        known[key] = linear_probe.fit(bank, "lbfgs", mesh=context.mesh).probe
    return known[key], train.y


def frechet(network: Extractor, real: Real, fake: distances.Moments) -> dict[str, float]:
    """'frechet', in percent of the variance of the real features, and 'fid', the plain distance, where it may be called so."""
    spread = real.moments.covariance.trace()
    if not spread > 0:
        raise UserError(f"all real images have the same features under {network.name}; choose another extractor or split")
    distance = distances.frechet(real.moments, fake)
    return {"frechet": 100 * distance / spread} | ({"fid": distance} if (network.name, network.dim) == (INCEPTION, 2048) else {})

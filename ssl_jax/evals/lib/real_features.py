"""Features of real images and of samples in a fixed network, and a classifier of real images; cached for a run."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from ssl_jax.engine.sharding import local_parts
from ssl_jax.errors import UserError
from ssl_jax.evals.context import AnySplit, Context, Extractor, require_labels
from ssl_jax.evals.lib import distances, linear_probe
from ssl_jax.evals.lib.features import Features, padded
from ssl_jax.evals.lib.resize import to_size

INCEPTION = "inception-2015-12-05"  # FID is the Frechet distance of the 2048 features of this network only


class Real(NamedTuple):
    """Features float32 [N, D] of real images, their labels [N], and the moments of the features."""

    x: np.ndarray
    y: np.ndarray
    moments: distances.Moments


def joined(network: Extractor, names: list[str], size: tuple[int, int] | None = None):
    """An encoder for `extract`: images, resized to `size` -> {'joined': the outputs `names`, concatenated}."""

    def encode(images):
        real_size = images.shape[1:3]
        if size is not None and real_size != size:
            if real_size[0] < size[0] or real_size[1] < size[1]:
                raise UserError(
                    f"samples are {size} pixels and real images only {real_size}; enlarge those with config.data.eval_ops"
                )
            images = to_size(images, size)
        outputs = network.encode(images)
        return {"joined": jnp.concatenate([outputs[name].astype(jnp.float32) for name in names], axis=1)}

    return encode


def sample_batches(first: np.ndarray, rest: Iterator[np.ndarray], context: Context, labels: np.ndarray | None = None):
    """Samples as batches of equal size for `extract`, with `labels` [N] if given; each process gets its rows of each batch."""
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


def real_features(context: Context, network: Extractor, split: AnySplit, size: tuple[int, int]) -> Real:
    """Features of a split at the `size` of samples; cached for the run."""
    key = (network.name, network.sha256, network.resize, context.own(split), size)
    cache = context.model.cache
    if key not in cache:
        features = context.encode_with(joined(network, ["pooled"], size), split, "joined")
        cache[key] = Real(*features, distances.chunked_moments(features.x))
    return cache[key]


def classifier(context: Context, network: Extractor, size: tuple[int, int]) -> tuple[linear_probe.Fit, np.ndarray]:
    """(a linear probe of the `real_features` of the bank, its labels [N]); cached for the run."""
    train = real_features(context, network, "bank", size)
    cache, key = context.model.cache, ("classifier", network.name, network.sha256, network.resize, size)
    if key not in cache:
        bank = Features(train.x, train.y)
        require_labels(bank, "a classifier of real images")
        cache[key] = linear_probe.fit(bank, "lbfgs", mesh=context.mesh)
    return cache[key], train.y


def frechet(network: Extractor, real: Real, fake: distances.Moments) -> dict[str, float]:
    """'frechet', in percent of the total variance of the real features, and for INCEPTION also 'fid', the plain distance."""
    variance = real.moments.covariance.trace()
    if not variance > 0:
        raise UserError(f"all real images have the same features under {network.name}; choose another extractor or split")
    distance = distances.frechet(real.moments, fake)
    return {"frechet": 100 * distance / variance} | ({"fid": distance} if (network.name, network.dim) == (INCEPTION, 2048) else {})

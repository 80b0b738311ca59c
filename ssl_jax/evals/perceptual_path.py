"""Perceptual path length (Karras et al. 2019, arXiv:1812.04948, section 4.1): how much pictures change along a short way of latents.

The published figures take LPIPS in VGG-16 and, for faces, the middle of the picture; those of another network are not comparable.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax.errors import UserError
from ssl_jax.evals.context import Context, Result
from ssl_jax.objectives.perceptual import feature_distance, random_features, random_kernels

NEEDS = "between"


def check_options(examples: int = 1024, epsilon: float = 1e-3, **_) -> None:
    """UserError for a value out of range."""
    if examples < 2 or not 0 < epsilon < 1:
        raise UserError(f"perceptual_path needs examples={examples} of at least 2 and epsilon={epsilon} in (0, 1)")


def evaluate(
    context: Context,
    *,
    examples: int = 1024,
    space: Literal["w", "z"] = "w",
    where: Literal["end", "full"] = "end",
    epsilon: float = 1e-3,
    seed: int = 0,
) -> Result:
    """length: the mean over `examples` pairs of latents, without the lowest and the highest hundredth, of the distance of the pictures
    at a place of their way and `epsilon` further on, over epsilon^2. The place is the start ('end'; the other end is the same), or
    anywhere ('full'). Distances are those of `feature_distance` in the random convolutions; the noise of both pictures is the same.
    """
    check_options(examples, epsilon)
    place = np.zeros(examples) if where == "end" else np.random.default_rng(seed).random(examples)
    first, second = (context.pictures.between(space, seed, place + step) for step in (0.0, epsilon))
    kernels = random_kernels()
    lengths = np.concatenate([_distance(kernels, a, b) for a, b in zip(first, second, strict=True)]) / epsilon**2
    protocol = (
        f"perceptual path space={space} where={where} epsilon={epsilon:g} examples={len(lengths)} seed={seed} distance=random_conv,"
        " each layer with unit channels (not LPIPS), pictures whole, in [0, 1]; mean between the 1st and the 99th percentile"
    )
    return Result({"length": trimmed_mean(lengths)}, protocol)


@jax.jit
def _distance(kernels, a: jax.Array, b: jax.Array) -> jax.Array:
    """[N] of pictures [N, H, W, 3], a few at a time: features of large pictures are many times as large."""

    def one(pair):
        return feature_distance(*(random_features(kernels, x[None]) for x in pair))[0]

    return jax.lax.map(one, (jnp.asarray(a), jnp.asarray(b)), batch_size=8)


def trimmed_mean(lengths: np.ndarray, least: float = 1, most: float = 99) -> float:
    """The mean of what lies between two percentiles (values of the sample), as published."""
    low, high = np.percentile(lengths, least, method="lower"), np.percentile(lengths, most, method="higher")
    return float(np.mean(lengths[(lengths >= low) & (lengths <= high)]))

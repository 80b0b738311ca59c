"""Perceptual path length (Karras et al. 2019, arXiv:1812.04948, section 4.1): how much pictures change along a short way of latents.

The published figures take LPIPS in VGG-16 (distance='lpips', a file that you bring: `ssl_jax.models.pretrained.vgg`), an epsilon of 1e-4 and, in
2019, the faces in the middle of the picture (crop=True); those of another network are not comparable.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax.evals.context import Context, Result
from ssl_jax.evals.evaluator import SEED, Evaluator, Option
from ssl_jax.models.pretrained import vgg
from ssl_jax.objectives.perceptual import feature_distance, random_features, random_kernels

SIDE = 256  # pixels: larger pictures are reduced by means of whole squares, as published


def prepare(context: Context, *, distance: str, path: str, sha256: str, **_) -> None:
    """Open the network: UserError for a file that is missing now, and not after hours."""
    open_network(distance, path, sha256)


def open_network(distance: str, path: str, sha256: str) -> tuple[Callable, dict]:
    """(weights, pictures [N, H, W, 3] twice -> distances [N]; the weights)."""
    if distance == "lpips":
        return _lpips, vgg.load(path, sha256)
    return _random, dict(enumerate(random_kernels()))


def _lpips(weights, *pair):
    return feature_distance(*(vgg.features(weights, x) for x in pair), vgg.lins(weights))


def _random(weights, *pair):
    return feature_distance(*(random_features([weights[i] for i in range(len(weights))], x) for x in pair))


def evaluate(
    context: Context,
    *,
    examples: int = 1024,
    space: Literal["w", "z"] = "w",
    where: Literal["end", "full"] = "end",
    epsilon: float = 1e-3,
    seed: int = 0,
    distance: Literal["random_conv", "lpips"] = "random_conv",
    path: str = "",
    sha256: str = "",
    crop: bool = False,
) -> Result:
    """length: the mean over `examples` pairs of latents, without the lowest and the highest hundredth, of the distance of the pictures
    at a place of their way and `epsilon` further on, over epsilon^2. Distances are those of `feature_distance`; the noise of both
    pictures is the same.
    """
    place = np.zeros(examples) if where == "end" else np.random.default_rng(seed).random(examples)
    first, second = (context.pictures.between(space, seed, place + step) for step in (0.0, epsilon))
    measure, weights = open_network(distance, path, sha256)
    lengths = np.concatenate([_distances(measure, crop, weights, a, b) for a, b in zip(first, second, strict=True)]) / epsilon**2
    told = f"lpips weights={sha256[:8]}" if distance == "lpips" else "random_conv, each layer with unit channels (not LPIPS)"
    protocol = (
        f"perceptual path space={space} where={where} epsilon={epsilon:g} examples={len(lengths)} seed={seed} distance={told},"
        f" pictures {'of faces' if crop else 'whole'}, in [0, 1]; mean between the 1st and the 99th percentile"
    )
    return Result({"length": trimmed_mean(lengths)}, protocol)


EVALUATOR = Evaluator(
    evaluate,
    {
        "examples": Option("pairs of latents", least=2),
        "space": Option("of the latents: w, after the mapping network, or z before it"),
        "where": Option("place on the way: its start (the other end is the same), or anywhere"),
        "epsilon": Option("share of the way between the two pictures", above=0, below=1),
        "seed": SEED,
        "distance": Option("network that pictures are compared in: random convolutions, or LPIPS"),
        "path": Option("file with the weights of LPIPS"),
        "sha256": Option("what the checksum of that file begins with"),
        "crop": Option("compare rows 3/8 to 7/8 and columns 1/4 to 3/4 only, where faces are"),
    },
    needs=("between",),
    prepare=prepare,
)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _distances(measure: Callable, crop: bool, weights, a: jax.Array, b: jax.Array) -> jax.Array:
    """[N] of pictures [N, H, W, 3], a few at a time: features of large pictures are many times as large."""

    def one(pair):
        return measure(weights, *(reduced(x[None], crop) for x in pair))[0]

    return jax.lax.map(one, (jnp.asarray(a), jnp.asarray(b)), batch_size=8)


def reduced(x: jax.Array, crop: bool) -> jax.Array:
    """[N, H, W, C]: what is compared of pictures, with at most 256 pixels a side where sides are multiples of that."""
    height, width = x.shape[1:3]
    if crop:
        x = x[:, height * 3 // 8 : height * 7 // 8, width // 4 : width * 3 // 4]
    side = x.shape[1] // SIDE
    if side > 1:
        x = x.reshape(len(x), x.shape[1] // side, side, x.shape[2] // side, side, -1).mean((2, 4))
    return x


def trimmed_mean(lengths: np.ndarray, least: float = 1, most: float = 99) -> float:
    """The mean of what lies between two percentiles (values of the sample), as published."""
    low, high = np.percentile(lengths, least, method="lower"), np.percentile(lengths, most, method="higher")
    return float(np.mean(lengths[(lengths >= low) & (lengths <= high)]))

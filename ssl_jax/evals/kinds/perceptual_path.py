"""Perceptual path length (Karras et al. 2019, arXiv:1812.04948, section 4.1): how much images change over a short path of latents.

The published figures use LPIPS in VGG-16 (distance='lpips', with your weight file, see `ssl_jax.models.pretrained.vgg`) and an
epsilon of 1e-4; in 2019 they also crop the face (crop=True). Values of another network are not comparable.
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

SIDE = 256  # pixels; larger images are downsampled by averaging squares, as published


def prepare(context: Context, *, distance: str, path: str, sha256: str, **_) -> None:
    """Open the network, so that a missing file raises UserError before training."""
    open_network(distance, path, sha256)


def open_network(distance: str, path: str, sha256: str) -> tuple[Callable, dict]:
    """(distance: (weights, two batches of images [N, H, W, 3]) -> [N]; the weights)."""
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
    """`examples` pairs of latents, each with the images at position t and at t + epsilon of the path between them.

    Distances are those of `feature_distance`. Both images have the same noise.

    length: distance / epsilon^2, mean over pairs without the lowest and the highest percent.
    """
    t = np.zeros(examples) if where == "end" else np.random.default_rng(seed).random(examples)
    first, second = (context.model.between(space, seed, t + step) for step in (0.0, epsilon))
    measure, weights = open_network(distance, path, sha256)
    lengths = np.concatenate([_distances(measure, crop, weights, a, b) for a, b in zip(first, second, strict=True)]) / epsilon**2
    random_conv = "random_conv, each layer with unit channels (not LPIPS)"
    distance_text = f"lpips weights={sha256[:8]}" if distance == "lpips" else random_conv
    protocol = (
        f"perceptual path space={space} where={where} epsilon={epsilon:g} examples={len(lengths)} seed={seed}"
        f" distance={distance_text}, pictures {'of faces' if crop else 'whole'}, in [0, 1];"
        " float32 products, mean between the 1st and the 99th percentile"
    )
    return Result({"length": trimmed_mean(lengths)}, protocol)


EVALUATOR = Evaluator(
    evaluate,
    {
        "examples": Option("number of pairs of latents", least=2),
        "space": Option("space of the latents: w, after the mapping network, or z, before it"),
        "where": Option("position t on the path: its start (t = 0), or a random position"),
        "epsilon": Option("step along the path, which has length 1", above=0, below=1),
        "seed": SEED,
        "distance": Option("distance of images: in random convolutions, or LPIPS"),
        "path": Option("file with the weights of LPIPS"),
        "sha256": Option("checksum of that file, or its beginning"),
        "crop": Option("compare only rows 3/8 to 7/8 and columns 1/4 to 3/4, where the face is"),
    },
    needs=("between",),
    prepare=prepare,
)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _distances(measure: Callable, crop: bool, weights, a: jax.Array, b: jax.Array) -> jax.Array:
    """[N] for images [N, H, W, 3], a few at a time: the features take many times the memory of the images.

    Both networks multiply in full float32 precision on every accelerator: the two images of a pair are nearly equal.
    """

    def one(pair):
        return measure(weights, *(crop_and_downsample(x[None], crop) for x in pair))[0]

    return jax.lax.map(one, (jnp.asarray(a), jnp.asarray(b)), batch_size=8)


def crop_and_downsample(x: jax.Array, crop: bool) -> jax.Array:
    """Cropped and downsampled images [N, H, W, C]; sides above 256 pixels must be multiples of 256."""
    height, width = x.shape[1:3]
    if crop:
        x = x[:, height * 3 // 8 : height * 7 // 8, width // 4 : width * 3 // 4]
    side = x.shape[1] // SIDE
    if side > 1:
        x = x.reshape(len(x), x.shape[1] // side, side, x.shape[2] // side, side, -1).mean((2, 4))
    return x


def trimmed_mean(lengths: np.ndarray, least: float = 1, most: float = 99) -> float:
    """Mean of the values between two percentiles, which are values of the sample, as published."""
    low, high = np.percentile(lengths, least, method="lower"), np.percentile(lengths, most, method="higher")
    return float(np.mean(lengths[(lengths >= low) & (lengths <= high)]))

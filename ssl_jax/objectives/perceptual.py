"""Perceptual distance in the features of a fixed network, and an adaptive weight for a second loss.

Zhang et al. 2018 (arXiv:1801.03924), equation 1. LPIPS is this distance in a network trained with labels, with channel weights
fitted to human judgments. In any other network it is not LPIPS.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

CHANNELS = (3, 32, 64, 64)  # of the random network
STRIDES = (1, 2, 2)


def feature_distance(x: Sequence[jax.Array], y: Sequence[jax.Array], weights: Sequence[jax.Array] | None = None) -> jax.Array:
    """Distance of two batches, given their features [B, ..., C] in each layer -> float32 [B].

    At each position the channels are normalized to norm 1. Squared differences are summed over channels (with `weights` [C] >=
    0 per layer, if given), averaged over positions and summed over layers.
    """
    total = 0.0
    for i, (a, b) in enumerate(zip(x, y, strict=True)):
        difference = (_unit(a) - _unit(b)) ** 2
        summed = jnp.sum(difference if weights is None else difference * weights[i], axis=-1)
        total += summed.reshape(len(summed), -1).mean(-1)
    return total


def _unit(x):
    """x / (|x| + 1e-10) over channels; value and gradient are zero where all channels are zero (after a ReLU)."""
    x = x.astype(jnp.float32)
    squares = jnp.sum(x * x, axis=-1, keepdims=True)
    norm = jnp.sqrt(jnp.where(squares > 0, squares, 1.0))
    return jnp.where(squares > 0, x / (norm + 1e-10), 0.0)


def random_kernels() -> list[np.ndarray]:
    """Three fixed 3x3 kernels [3, 3, C, F] with He initialization: the 'random_conv' extractor of evaluations."""
    generator = np.random.default_rng(0)  # NumPy, because its streams are stable across versions
    shapes = [(3, 3, a, b) for a, b in itertools.pairwise(CHANNELS)]
    return [(generator.standard_normal(shape) * np.sqrt(2 / np.prod(shape[:3]))).astype(np.float32) for shape in shapes]


def random_features(kernels: Sequence[jax.Array], images: jax.Array) -> list[jax.Array]:
    """ReLU outputs [B, h, w, C] of each convolution, with strides 1, 2 and 2: images [B, H, W, 3] in [0, 1]."""
    x, features = 2 * images.astype(jnp.float32) - 1, []
    for kernel, stride in zip(kernels, STRIDES, strict=True):
        x = jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest"
        )
        x = jnp.maximum(x, 0)
        features.append(x)
    return features


def adaptive_weight(first: jax.Array, second: jax.Array) -> jax.Array:
    """|first| / (|second| + 1e-4), clipped to [0, 10,000], without a gradient (Esser et al. 2021, arXiv:2012.09841, equation 7).

    first, second: gradients of two losses with respect to the same parameters. Multiplied by this weight, the second loss has a
    gradient of the same norm as the first.
    """
    ratio = jnp.linalg.norm(first.ravel()) / (jnp.linalg.norm(second.ravel()) + 1e-4)
    return jax.lax.stop_gradient(jnp.clip(ratio, 0.0, 1e4))

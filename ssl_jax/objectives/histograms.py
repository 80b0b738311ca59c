"""Losses on distributions over bins (colors, lightness), and the frequencies of bins in the data.

Zhang et al. 2016, "Colorful image colorization" (arXiv:1603.08511), section 2.2; Larsson et al. 2016, "Learning representations for
automatic colorization" (arXiv:1603.06668).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.scipy.special import xlogy


def soft_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """-sum of target * log softmax(logits) in nats: logits and probabilities [..., Q] -> float32 [...]."""
    return -jnp.sum(targets * jax.nn.log_softmax(logits.astype(jnp.float32)), axis=-1)


def divergence(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Kullback-Leibler divergence of softmax(logits) from the targets, in nats: [..., Q] -> float32 [...]. 0 if they agree."""
    return soft_cross_entropy(logits, targets) - entropy(targets)


def entropy(probabilities: jax.Array) -> jax.Array:
    """-sum of p log p in nats: [..., Q] -> [...]."""
    return -jnp.sum(xlogy(probabilities, probabilities), axis=-1)


def bin_frequencies(codes: jax.Array, count: int, weights: jax.Array) -> jax.Array:
    """Shares of the bins: codes int [N] in [0, count), weights [N] of 0 or more, not all 0 -> float32 [count]. Their sum is 1.

    With weights that are all 0 the shares are 0.
    """
    hits = (codes[:, None] == jnp.arange(count)) * weights[:, None]  # no scattered sum, which is slow on accelerators
    return jnp.sum(hits, axis=0) / jnp.maximum(jnp.sum(weights), 1e-12)


def update_frequencies(frequencies: jax.Array, batch: jax.Array, step: jax.Array, decay: float = 0.99) -> jax.Array:
    """Frequencies [Q] after a batch with its own frequencies [Q]: their mean over all steps so far, later a moving average.

    The first step (0) forgets the start. A batch of sum 0, without colored images, changes nothing.
    """
    rate = jnp.maximum(1 / (step + 1), 1 - decay)
    return jnp.where(jnp.sum(batch) > 0, frequencies + rate * (batch - frequencies), frequencies)

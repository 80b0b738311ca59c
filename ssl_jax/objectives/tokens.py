"""Losses of token models, and masks for masked modeling.

Masks: Chang et al. 2022, MaskGIT (arXiv:2202.04200), sections 3.1 and 3.2.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

# Share of masked tokens at time r, from 1 at r = 0 to 0 at r = 1; for arrays and floats.
SCHEDULES = {
    "cosine": lambda r: jnp.cos(r * math.pi / 2),
    "linear": lambda r: 1 - r,
    "square": lambda r: 1 - r**2,
    "cubic": lambda r: 1 - r**3,
    "root": lambda r: 1 - r**0.5,
}


def token_nll(logits: jax.Array, tokens: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """-log p of each token in nats: [..., K], int [...] -> float32 [...].

    smoothing: label smoothing; the target is 1 - smoothing on the token plus smoothing / K on all K (Szegedy et al. 2016).
    """
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    nll = -jnp.take_along_axis(log_p, tokens[..., None], -1)[..., 0]
    return nll if not smoothing else (1 - smoothing) * nll - smoothing * log_p.mean(-1)


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean over masked values of each sequence, then over sequences: [B, T], bool [B, T] -> scalar. 0 without a mask."""
    return (jnp.where(mask, values, 0).sum(-1) / jnp.maximum(mask.sum(-1), 1)).mean()


def unigram_bits(tokens: jax.Array, codes: int) -> jax.Array:
    """Entropy of the histogram of tokens int [...] in bits: the least cross-entropy of a model without context.

    For n tokens it is biased downwards by about (codes - 1) / (2 n ln 2).
    """
    p = jnp.bincount(tokens.reshape(-1), length=codes) / tokens.size
    return -jnp.where(p > 0, p * jnp.log2(jnp.where(p > 0, p, 1)), 0).sum()


def lowest(scores: jax.Array, count: jax.Array | int) -> jax.Array:
    """True at the `count` ([B] or a scalar) lowest scores of each row, the first of equals: [B, T] -> bool [B, T]."""
    rank = jnp.argsort(jnp.argsort(scores, -1), -1)
    return rank < jnp.broadcast_to(jnp.asarray(count), scores.shape[:1])[:, None]


def random_masks(key: jax.Array, shape: tuple[int, int], schedule: str, least: float = 0.0) -> jax.Array:
    """Random masks, bool [B, T]: a share SCHEDULES[schedule](r) of each sequence, r uniform on [0, 1), at least one token.

    Shares below `least` are raised to it.
    """
    ratio_key, position_key = jax.random.split(key)
    ratio = jnp.maximum(SCHEDULES[schedule](jax.random.uniform(ratio_key, shape[:1])), least)
    count = jnp.clip(jnp.round(ratio * shape[1]), 1, shape[1]).astype(jnp.int32)
    return lowest(jax.random.uniform(position_key, shape), count)


def masked_counts(unknown: int, steps: int, schedule: str) -> tuple[int, ...]:
    """Number of the `unknown` tokens that are still masked after each of `steps` steps.

    Each step fixes at least one token while any are masked. If there are enough tokens, each later step has at least one left.
    The last count is 0.
    """
    counts, left = [], unknown
    with jax.ensure_compile_time_eval():  # also works in a traced function
        share = np.asarray(SCHEDULES[schedule](np.arange(1, steps + 1) / steps))
    for step, scheduled in enumerate(np.floor(share * unknown).astype(int).tolist(), 1):
        left = max(0, min(left - 1, max(scheduled, steps - step)))
        counts.append(left)
    return tuple(counts)

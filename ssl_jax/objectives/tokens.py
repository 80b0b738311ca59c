"""Likelihoods of tokens, and which tokens a masked model is asked for.

Masks: Chang et al. 2022, MaskGIT (arXiv:2202.04200), sections 3.1 and 3.2.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

# The share of tokens that is masked at time r, from 1 at r = 0 to 0 at r = 1. Functions of `jnp` or float arguments alike.
SCHEDULES = {
    "cosine": lambda r: jnp.cos(r * math.pi / 2),
    "linear": lambda r: 1 - r,
    "square": lambda r: 1 - r**2,
    "cubic": lambda r: 1 - r**3,
    "root": lambda r: 1 - r**0.5,
}


def token_nll(logits: jax.Array, tokens: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """-log p of each token in nats: [..., K], int [...] -> float32 [...].

    smoothing: the target has 1 - smoothing on the token and the rest spread evenly over all K (Szegedy et al. 2016).
    """
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    nll = -jnp.take_along_axis(log_p, tokens[..., None], -1)[..., 0]
    return nll if not smoothing else (1 - smoothing) * nll - smoothing * log_p.mean(-1)


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean over the sequences of the mean over what is masked in each: [B, T], bool [B, T] -> scalar. Nothing masked counts as 0."""
    return (jnp.where(mask, values, 0).sum(-1) / jnp.maximum(mask.sum(-1), 1)).mean()


def unigram_bits(tokens: jax.Array, codes: int) -> jax.Array:
    """Entropy of the histogram of int [...] in bits: what the best model that sees no other token needs for each of these.

    Of n tokens it is too low by about (codes - 1) / (2 n ln 2).
    """
    p = jnp.bincount(tokens.reshape(-1), length=codes) / tokens.size
    return -jnp.where(p > 0, p * jnp.log2(jnp.where(p > 0, p, 1)), 0).sum()


def lowest(scores: jax.Array, count: jax.Array | int) -> jax.Array:
    """True at exactly `count` ([B] or one for all) lowest scores of each row: [B, T] -> bool [B, T]; of equal ones the first."""
    rank = jnp.argsort(jnp.argsort(scores, -1), -1)
    return rank < jnp.broadcast_to(jnp.asarray(count), scores.shape[:1])[:, None]


def random_masks(key: jax.Array, shape: tuple[int, int], schedule: str) -> jax.Array:
    """bool [B, T]: of each sequence a share of SCHEDULES[schedule](r), r uniform on [0, 1), at least one token, anywhere."""
    of_ratio, of_place = jax.random.split(key)
    ratio = SCHEDULES[schedule](jax.random.uniform(of_ratio, shape[:1]))
    count = jnp.clip(jnp.round(ratio * shape[1]), 1, shape[1]).astype(jnp.int32)
    return lowest(jax.random.uniform(of_place, shape), count)


def masked_counts(unknown: int, steps: int, schedule: str) -> tuple[int, ...]:
    """How many of `unknown` tokens are masked after each of `steps` steps.

    At least one token becomes known in each step as long as there is one, and, where the tokens are enough, one is left for each step
    that follows. The last is 0: what the last step predicts is final.
    """
    counts, left = [], unknown
    with jax.ensure_compile_time_eval():  # within a traced function too
        share = np.asarray(SCHEDULES[schedule](np.arange(1, steps + 1) / steps))
    for step, asked in enumerate(np.floor(share * unknown).astype(int).tolist(), 1):
        left = max(0, min(left - 1, max(asked, steps - step)))
        counts.append(left)
    return tuple(counts)

"""Contrastive objectives: pure functions of embeddings, in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def unit(x: jax.Array, eps: float = 1e-12) -> jax.Array:
    """x / |x| along the last axis, with a finite gradient at 0 (the quotient by the norm has none)."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + eps)


def nt_xent(z: jax.Array, temperature: float) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Normalised temperature-scaled cross-entropy of two views (Chen et al. 2020, SimCLR, eq. 1 and algorithm 1).

    Every other view in the global batch is a negative, and gradients flow through all of them: under one jit the similarities
    of a batch that is spread over devices are those of the whole batch.

    Args:
        z: [N, 2, D] projections of the two views, any length.
        temperature: tau > 0.

    Returns:
        (loss, {'accuracy': share of anchors whose nearest other view is their partner}). The loss is the mean over the 2N
        anchors, as in the paper; the official code returns twice that value.
    """
    n = z.shape[0]
    z = unit(z).swapaxes(0, 1).reshape(2 * n, -1)
    logits = z @ z.T / temperature
    logits = jnp.where(jnp.eye(2 * n, dtype=bool), -jnp.inf, logits)
    partner = (jnp.arange(2 * n) + n) % (2 * n)
    positive = jnp.take_along_axis(logits, partner[:, None], 1)[:, 0]
    loss = jnp.mean(jax.nn.logsumexp(logits, -1) - positive)
    return loss, {"accuracy": jnp.mean(jnp.argmax(logits, -1) == partner)}

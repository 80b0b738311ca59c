"""Cross-entropy with integer labels, and with soft targets."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float = 0.0) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean softmax cross-entropy (Szegedy et al. 2016, section 7, for the smoothing).

    Args:
        logits: [B, C], any float type; computed in float32.
        labels: int [B], in [0, C).
        smoothing: weight in [0, 1) of the uniform distribution in the target.

    Returns:
        (loss, {'accuracy': top-1 share in [0, 1]}).
    """
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    target = jnp.take_along_axis(log_p, labels[:, None], -1)[:, 0]
    loss = -jnp.mean((1 - smoothing) * target + smoothing * jnp.mean(log_p, -1))
    return loss, {"accuracy": jnp.mean(jnp.argmax(logits, -1) == labels)}


def soft_cross_entropy(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean of -sum_c targets_c log p_c, the cross-entropy with soft targets, such as those of mixed images.

    Args:
        logits: [B, C], any float type; computed in float32.
        targets: float [B, C], each row a distribution.

    Returns:
        (loss, {'accuracy': share in [0, 1] whose largest logit is at the largest target}).
    """
    loss = -jnp.mean(jnp.sum(targets * jax.nn.log_softmax(logits.astype(jnp.float32)), -1))
    return loss, {"accuracy": jnp.mean(jnp.argmax(logits, -1) == jnp.argmax(targets, -1))}

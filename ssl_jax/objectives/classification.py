"""Cross-entropy with integer labels, of images or of pixels, and with soft targets."""

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


def pixel_cross_entropy(logits: jax.Array, labels: jax.Array, ignore: int) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean softmax cross-entropy over the pixels that have a class (Long et al. 2015, arXiv:1411.4038, section 4).

    Each valid pixel of the whole batch has the same weight. DINOv3's code divides by the number of all pixels instead, so that images
    with many ignored pixels count less. A batch without a valid pixel has loss 0 and no gradient.

    Args:
        logits: [B, H, W, C], any float type; computed in float32.
        labels: integers [B, H, W]: classes in [0, C), or `ignore`.
        ignore: the label of pixels without a class.

    Returns:
        (loss, {'accuracy': share of the valid pixels that are right, 'valid': share of the pixels that are valid}), both in [0, 1].
    """
    labels = labels.astype(jnp.int32)
    valid = labels != ignore
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    own = labels[..., None] == jnp.arange(logits.shape[-1])  # a comparison has a faster gradient than a look-up
    each = -jnp.sum(jnp.where(own, log_p, 0), -1)
    count = jnp.sum(valid)
    right = jnp.sum(valid & (jnp.argmax(logits, -1) == labels))
    some = jnp.maximum(count, 1)
    return jnp.sum(jnp.where(valid, each, 0)) / some, {"accuracy": right / some, "valid": count / valid.size}

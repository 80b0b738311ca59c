"""Objectives that compare soft assignments to prototypes, in float32. Sums over a batch are over the global batch, on any mesh."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ssl_jax.errors import UserError


def sinkhorn(scores: jax.Array, epsilon: jax.Array | float, iterations: int) -> jax.Array:
    """Assignments [N, K] of N rows to K prototypes that use all prototypes about equally; each row sums to 1.

    Rows and columns of exp(scores / epsilon) are scaled in turn, in log space, so large scores do not overflow. Caron et al. 2020,
    "SwAV" (arXiv:2006.09882), algorithm in appendix A: every iteration scales prototypes to 1/K, then images to 1/N. The result has no
    gradient.
    """
    if isinstance(epsilon, int | float) and epsilon <= 0:
        raise UserError(f"config.model.epsilon={epsilon} must be positive; the paper has 0.05")
    q = jax.lax.stop_gradient(scores).astype(jnp.float32) / epsilon
    for _ in range(iterations):
        q = q - jax.nn.logsumexp(q, axis=0, keepdims=True)
        q = q - jax.nn.logsumexp(q, axis=1, keepdims=True)
    return jnp.exp(q)


def cross_entropy(assignments: jax.Array, logits: jax.Array) -> jax.Array:
    """Mean of -sum_k q_k log softmax(logits)_k over rows [..., K]; the assignments get no gradient."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return -jnp.mean(jnp.sum(jax.lax.stop_gradient(assignments) * log_p, -1))


def swapped(assignments: jax.Array, logits: jax.Array) -> jax.Array:
    """Every view predicts the assignments of the other views (SwAV, equation 1; DINO, equation 3, arXiv:2104.14294).

    Args:
        assignments: [N, G, K] of the first G views, which are the global crops.
        logits: [N, V, K] of all views, divided by the temperature.

    Returns:
        Mean over the pairs of a global view and another view.
    """
    pairs = [(g, v) for g in range(assignments.shape[1]) for v in range(logits.shape[1]) if g != v]
    return sum(cross_entropy(assignments[:, g], logits[:, v]) for g, v in pairs) / len(pairs)


def masked_cross_entropy(assignments: jax.Array, logits: jax.Array, weights: jax.Array) -> jax.Array:
    """A mean over each image's masked patches, then over images: iBOT's loss of patches (Zhou et al. 2022, arXiv:2111.07832, eq. 2).

    So an image with few masked patches counts as much as one with many; one without any counts 0.

    Args:
        assignments, logits: [N, P, K] of P patches an image; logits are divided by the temperature.
        weights: [N, P], 1 for masked patches, else 0.
    """
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    each = -jnp.sum(jax.lax.stop_gradient(assignments) * log_p, -1)
    return jnp.mean(jnp.sum(each * weights, -1) / jnp.maximum(weights.sum(-1), 1))


def entropy(p: jax.Array) -> jax.Array:
    """Entropy in nats of distributions [..., K]."""
    return -jnp.sum(p * jnp.log(jnp.maximum(p, 1e-30)), -1)


def koleo(x: jax.Array, group: int, epsilon: float = 1e-8) -> jax.Array:
    """Kozachenko-Leonenko estimate of entropy: -mean log of the distance to the nearest neighbor, which spreads embeddings.

    Sablayrolles et al. 2019 (arXiv:1806.03198), equation 4; DINOv2 (arXiv:2304.07193) has it with weight .1.

    Args:
        x: [N, D], of any length.
        group: rows whose neighbors are sought among themselves: nearest neighbors get nearer as their number grows, so the loss
          depends on it. DINOv2 has the images of a device.
    """
    if len(x) % group or group < 2:
        raise UserError(f"config.model.koleo_group={group} does not divide the {len(x)} images of a batch into groups of 2 or more")
    x = x.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + 1e-16)
    x = x.reshape(-1, group, x.shape[-1])
    similarities = jnp.einsum("gid,gjd->gij", x, x, precision="highest") - 3 * jnp.eye(group)
    nearest = jax.lax.stop_gradient(jnp.argmax(similarities, -1))
    neighbors = jnp.take_along_axis(x, nearest[..., None], 1)
    distances = jnp.sqrt(jnp.sum((x - neighbors + epsilon) ** 2, -1))  # as torch.nn.PairwiseDistance
    return -jnp.mean(jnp.log(distances + epsilon))

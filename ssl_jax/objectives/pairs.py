"""Losses on pairs: do two things belong together?"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def balanced_pairs(together: jax.Array, apart: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Logistic loss that tells pairs which occur together from pairs of things drawn independently, half and half.

    Both halves count alike, whatever their numbers. So the best logit of a pair (a, b) is its pointwise mutual information
    log P(a, b) / (P(a) P(b)) (Isola et al. 2016, arXiv:1511.06811, section 3).

    Args:
        together: logits of any shape and float type, of pairs drawn from P(a, b); computed in float32.
        apart: logits of any shape, of pairs drawn from P(a) P(b).

    Returns:
        (loss in nats, {'accuracy': share of right signs in [0, 1], both halves alike}); ln 2 and 0.5 for a guess.
    """
    together, apart = together.astype(jnp.float32), apart.astype(jnp.float32)
    loss = (jnp.mean(jax.nn.softplus(-together)) + jnp.mean(jax.nn.softplus(apart))) / 2
    return loss, {"accuracy": (jnp.mean(together > 0) + jnp.mean(apart <= 0)) / 2}


def distances_after_maps(maps: jax.Array, first: jax.Array, second: jax.Array) -> jax.Array:
    """float32 [B, G]: Euclidean distance of maps[g] first[b] and second[b], for G linear maps [G, D, D] and features [B, D]."""
    moved = jnp.einsum("gij,bj->bgi", maps.astype(jnp.float32), first.astype(jnp.float32), precision="highest")
    return jnp.sqrt(jnp.sum((moved - second.astype(jnp.float32)[:, None]) ** 2, -1) + 1e-12)  # a finite gradient at 0


def equivariance(distances: jax.Array, motions: jax.Array, others: jax.Array, margin: float) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The map of the true motion brings features together; any other map, and features of another image, stay `margin` apart.

    Jayaraman and Grauman 2015, "Learning image representations tied to ego-motion" (arXiv:1505.02206), section 3.3. Without the
    second part features that are all zero would be perfect. Both parts are means, so each counts alike.

    Args:
        distances: [B, G] after each map (see `distances_after_maps`).
        motions: int32 [B], the true one of G.
        others: [B], after the true map to the features of another image.
        margin: of distances, above 0.

    Returns:
        (loss, {'attract': mean true distance, 'repel': mean of what the others lack to the margin, 'accuracy': share of pairs whose
        true map is the best}); all-zero features have attract 0 and repel `margin`.
    """
    distances, others = distances.astype(jnp.float32), others.astype(jnp.float32)
    true = jax.nn.one_hot(motions, distances.shape[1])
    attract = jnp.mean(jnp.sum(distances * true, 1))
    wrong, foreign = (1 - true) * jax.nn.relu(margin - distances), jax.nn.relu(margin - others)
    repel = (jnp.sum(wrong) + jnp.sum(foreign)) / distances.size  # G - 1 maps and one image for each pair
    return attract + repel, {"attract": attract, "repel": repel, "accuracy": jnp.mean(jnp.argmin(distances, 1) == motions)}

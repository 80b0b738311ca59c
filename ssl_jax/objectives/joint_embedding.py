"""Objectives of two embeddings of an image without negatives, in float32. Every mean is over the global batch, on any mesh."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ssl_jax.objectives.contrastive import unit

BATCH_NORM_EPSILON = 1e-5  # Barlow Twins normalizes by a BatchNorm without scale and offset
VARIANCE_EPSILON = 1e-4  # of VICReg
LEAST_LENGTH = 1e-12  # squared; keeps gradients at zero finite


class VICRegTerms(NamedTuple):
    """The three unweighted terms of VICReg."""

    invariance: jax.Array
    variance: jax.Array
    covariance: jax.Array


def negative_cosine(predictions: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean of -cos(prediction, target) over the rows [..., D]; in [-1, 1].

    Chen and He 2021, "Exploring simple Siamese representation learning" (arXiv:2011.10566), equation 1. BYOL's distance of unit
    vectors (Grill et al. 2020, arXiv:2006.07733, equation 2) is 2 plus twice this. The caller stops the gradient of the targets.
    """
    return -jnp.mean(jnp.sum(unit(predictions, LEAST_LENGTH) * unit(targets, LEAST_LENGTH), -1))


def cross_correlation(first: jax.Array, second: jax.Array) -> jax.Array:
    """Correlations [D, D] over the batch of the dimensions of two embeddings [N, D], with biased variances."""
    first, second = (_normalized(x.astype(jnp.float32)) for x in (first, second))
    return jnp.matmul(first.T, second, precision="highest") / len(first)


def _normalized(x: jax.Array) -> jax.Array:
    return (x - x.mean(0)) * jax.lax.rsqrt(jnp.var(x, 0) + BATCH_NORM_EPSILON)


def barlow_twins(first: jax.Array, second: jax.Array, off_diagonal: float) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The cross-correlation matrix should be the identity.

    Zbontar et al. 2021, "Barlow Twins" (arXiv:2103.03230), equation 1.

    Args:
        first, second: [N, D] embeddings of the two views.
        off_diagonal: lambda, the weight of squares off the diagonal; the paper has .0051 for D = 8192.

    Returns:
        (loss, {'on_diagonal': D for constant embeddings, 'off_diagonal': unweighted}).
    """
    correlation = cross_correlation(first, second)
    diagonal = jnp.diagonal(correlation)
    on, off = jnp.sum((diagonal - 1) ** 2), jnp.sum(correlation**2) - jnp.sum(diagonal**2)
    return on + off_diagonal * off, {"on_diagonal": on, "off_diagonal": off}


def vicreg(first: jax.Array, second: jax.Array) -> VICRegTerms:
    """Invariance, variance and covariance of two embeddings [N, D]; the loss is their weighted sum.

    Bardes et al. 2022, "VICReg" (arXiv:2105.04906), equations 1 to 6, as the official code has them: the squared distance is a mean
    over dimensions, too, and the variance terms of both views are averaged (solo-learn adds them). Variances are unbiased.
    Constant embeddings have variance .99. Needs N >= 2.
    """
    first, second = first.astype(jnp.float32), second.astype(jnp.float32)
    variances, covariances = zip(_spread_terms(first), _spread_terms(second), strict=True)
    return VICRegTerms(jnp.mean((first - second) ** 2), sum(variances) / 2, sum(covariances))


def _spread_terms(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(mean over dimensions of how much the deviation lacks to 1, sum of squared covariances / D)."""
    x = x - x.mean(0)
    covariance = jnp.matmul(x.T, x, precision="highest") / (len(x) - 1)
    variances = jnp.diagonal(covariance)
    lacking = jnp.mean(jax.nn.relu(1 - jnp.sqrt(variances + VARIANCE_EPSILON)))
    return lacking, (jnp.sum(covariance**2) - jnp.sum(variances**2)) / x.shape[-1]


def spread(z: jax.Array) -> jax.Array:
    """Standard deviation of unit embeddings [..., D] over all rows, times sqrt(D): about 1 where they are spread, 0 in collapse."""
    rows = unit(z.reshape(-1, z.shape[-1]), LEAST_LENGTH)
    return jnp.mean(jnp.std(rows, 0)) * z.shape[-1] ** 0.5

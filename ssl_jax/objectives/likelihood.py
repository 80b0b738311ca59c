"""Densities of pixels, and bounds on the likelihood of latent-variable models.

All results are float32 in nats. Densities are elementwise; the caller sums over an image. Sum both terms of a bound: a mean
over pixels or latents in one of them changes the objective. Values x are in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

LEVELS = 256
LAPLACE_EPSILON = 0.1
LEAST_LOG_SCALE = -7.0  # lower bound of learned scales: a constant pixel must not overflow the gradients


def bernoulli(x: jax.Array, logits: jax.Array) -> jax.Array:
    """x log p + (1 - x) log (1 - p) with p = sigmoid(logits): a log-probability for x in {0, 1}, else minus a cross-entropy."""
    return x * logits - jax.nn.softplus(logits)


def gaussian(x: jax.Array, mean: jax.Array, log_std: jax.Array) -> jax.Array:
    """Log-density of N(mean, exp(log_std)^2)."""
    return -0.5 * (((x - mean) * jnp.exp(-log_std)) ** 2 + math.log(2 * math.pi)) - log_std


def to_level(x: jax.Array) -> jax.Array:
    """The nearest of the levels {0, 1/255, ..., 1} to x in [0, 1]; a level with a rounding error stays as it is."""
    scaled = (LEVELS - 1) * x
    nearest = jnp.round(scaled)
    return jnp.where(jnp.abs(scaled - nearest) < 1e-3, x, nearest / (LEVELS - 1))


def discretized_logistic(x: jax.Array, mean: jax.Array, log_scale: jax.Array) -> jax.Array:
    """Log-probability of level x in {0, 1/255, ..., 1}: the mass of a logistic distribution between the edges of the level.

    Level i reaches from (i - 1/2) / 255 to (i + 1/2) / 255. The first and the last level include the tails, so the levels sum
    to one (Kingma et al. 2016, arXiv:1606.04934; Salimans et al. 2017, arXiv:1701.05517). mean and scale are in units of x. A value
    between levels, as of a resized image, counts as the nearest one: its own interval would be no level, and x < 1/510 a whole tail.

    With s the sigmoid and a > b the scaled edges, log(s(a) - s(b)) = log s(a) + log s(-b) + log(1 - exp(b - a)). This form has no
    cancellation and needs no clipping.
    """
    x = to_level(x)
    precision, half = jnp.exp(-log_scale), 0.5 / (LEVELS - 1)
    above, below = (precision * (x + edge - mean) for edge in (half, -half))
    up, down = jax.nn.log_sigmoid(above), jax.nn.log_sigmoid(-below)
    width = jnp.log(-jnp.expm1(-2 * half * precision))
    return jnp.where(x < half, up, jnp.where(x > 1 - half, down, up + down + width))


def logit_laplace(x: jax.Array, mean: jax.Array, log_scale: jax.Array) -> jax.Array:
    """Log-density of x' = (1 - 2 eps) x + eps, eps = 0.1, whose logit is Laplace (Ramesh et al. 2021, arXiv:2102.12092, A.3).

    It is a density on (0, 1), but x' only covers [eps, 1 - eps]. It may be positive, and it gives no bits per dimension.
    """
    shrunk = (1 - 2 * LAPLACE_EPSILON) * x + LAPLACE_EPSILON
    distance = jnp.abs(jnp.log(shrunk) - jnp.log1p(-shrunk) - mean)
    return -math.log(2) - log_scale - jnp.log(shrunk) - jnp.log1p(-shrunk) - distance * jnp.exp(-log_scale)


def logit_laplace_image(mean: jax.Array) -> jax.Array:
    """The image x in [0, 1] of a mean of `logit_laplace`."""
    return jnp.clip((jax.nn.sigmoid(mean) - LAPLACE_EPSILON) / (1 - 2 * LAPLACE_EPSILON), 0, 1)


# ------------------------------------------------------------------------------------------------ decoders of images


class Likelihood(NamedTuple):
    """p(x | z) of a decoder with `outputs` parameters per value: decoder outputs are [..., outputs * C] for x [..., C]."""

    outputs: int
    data: Callable[[jax.Array, jax.Array], jax.Array]  # (key, x in [0, 1]) -> modeled values: a new sample per call, or x
    log_prob: Callable[[jax.Array, jax.Array], jax.Array]  # (data, decoder output) -> nats, elementwise
    mean: Callable[[jax.Array], jax.Array]  # decoder output -> values in [0, 1]
    note: str  # for protocols: the modeled distribution


def _identity(key, x):
    return x


def _binarized(key, x):
    """Each value is 1 with a probability equal to its gray level, else 0."""
    return jax.random.bernoulli(key, x).astype(jnp.float32)


def _dequantized(key, x):
    """(nearest level + uniform noise) / 256 in [0, 1). Its density times 256^-D bounds the probability of the levels from below."""
    return ((LEVELS - 1) * to_level(x) + jax.random.uniform(key, x.shape)) / LEVELS


def _gaussian(x, out):
    mean, log_std = jnp.split(out, 2, -1)
    return gaussian(x, jax.nn.sigmoid(mean), _scale(log_std)) - math.log(LEVELS)


def _logistic(x, out):
    mean, log_scale = jnp.split(out, 2, -1)
    return discretized_logistic(x, 0.5 + mean, _scale(log_scale))


def _scale(out):
    """Log-scales start at -2: exp(-2) is about the standard deviation of pixels."""
    return jnp.maximum(out - 2, LEAST_LOG_SCALE)


LIKELIHOODS = {
    "bernoulli": Likelihood(1, _binarized, bernoulli, jax.nn.sigmoid, "bernoulli, binarized anew at each draw"),
    "cross_entropy": Likelihood(1, _identity, bernoulli, jax.nn.sigmoid, "cross-entropy of gray values, not a likelihood"),
    "gaussian": Likelihood(
        2, _dequantized, _gaussian, lambda out: jax.nn.sigmoid(jnp.split(out, 2, -1)[0]),
        "gaussian, uniformly dequantized, 256 levels",
    ),
    "discretized_logistic": Likelihood(
        2, _identity, _logistic, lambda out: jnp.clip(0.5 + jnp.split(out, 2, -1)[0], 0, 1), "discretized logistic, 256 levels"
    ),
}


# ---------------------------------------------------------------------------------------------- posteriors and bounds


def sample_gaussian(key: jax.Array, mean: jax.Array, log_variance: jax.Array) -> jax.Array:
    """A reparameterized sample of N(mean, exp(log_variance)); the standard deviation is exp(log_variance / 2)."""
    return mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape)


def kl_gaussian(mean: jax.Array, log_variance: jax.Array) -> jax.Array:
    """KL(N(mean, exp(log_variance)) || N(0, 1)), elementwise: sum it over the latents."""
    return 0.5 * (mean**2 + jnp.exp(log_variance) - 1 - log_variance)


def elbo(log_likelihood: jax.Array, kl: jax.Array, beta: jax.Array | float = 1.0, free_bits: float = 0.0) -> jax.Array:
    """Mean over the batch of E log p(x | z) - beta KL: log_likelihood [B] (sums over an image), kl [B, Z] -> scalar.

    beta: Higgins et al. 2017 (beta-VAE). Values below 1 give no bound of log p(x).
    free_bits: nats per latent without cost: the KL of a latent, averaged over the batch, counts as at least this value
      (Kingma et al. 2016, arXiv:1606.04934, section C.8).
    """
    cost = jnp.maximum(kl.mean(0), free_bits).sum() if free_bits else kl.sum(-1).mean()
    return log_likelihood.mean() - beta * cost


def importance_bound(log_weights: jax.Array) -> jax.Array:
    """log of the mean of k importance weights p(x, z) / q(z | x), [k, ...] -> [...] (Burda et al. 2016, arXiv:1509.00519, eq. 8).

    Its expectation is a lower bound of log p(x) that grows with k; for k = 1 it is the ELBO.
    """
    return jax.nn.logsumexp(log_weights, axis=0) - math.log(log_weights.shape[0])


def bits_per_dimension(nats: jax.Array, dimensions: int) -> jax.Array:
    """log p(x) in nats per image -> -log2 p(x) per dimension; smaller is better."""
    return -nats / (dimensions * math.log(2))

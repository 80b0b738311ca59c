"""Adversarial losses: pure functions of logits, and gradient penalties of a discriminator.

Losses are float32 means over the batch. `real` and `fake` are logits of any shape, positive for "real".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp


class GanLoss(NamedTuple):
    """The losses that the discriminator and the generator minimize."""

    discriminator: Callable[[jax.Array, jax.Array], jax.Array]  # (real, fake) -> scalar
    generator: Callable[[jax.Array], jax.Array]  # fake -> scalar


def _mean(x: jax.Array) -> jax.Array:
    return jnp.mean(x.astype(jnp.float32))


def _classify(real: jax.Array, fake: jax.Array) -> jax.Array:
    """Binary cross-entropy with real as positives and fake as negatives; 2 ln 2 for zero logits."""
    return _mean(jax.nn.softplus(-real)) + _mean(jax.nn.softplus(fake))


GAN_LOSSES = {
    # Goodfellow et al. 2014 (arXiv:1406.2661), equation 1; the gradient of the generator vanishes for a confident discriminator.
    "minimax": GanLoss(_classify, lambda fake: -_mean(jax.nn.softplus(fake))),
    # The same paper, section 3; StyleGAN's logistic loss.
    "non_saturating": GanLoss(_classify, lambda fake: _mean(jax.nn.softplus(-fake))),
    # Lim and Ye 2017 (arXiv:1705.02894); SNGAN, BigGAN.
    "hinge": GanLoss(lambda real, fake: _mean(jax.nn.relu(1 - real)) + _mean(jax.nn.relu(1 + fake)), lambda fake: -_mean(fake)),
    # Mao et al. 2017 (arXiv:1611.04076), on the linear output.
    "least_squares": GanLoss(
        lambda real, fake: 0.5 * _mean((real - 1) ** 2) + 0.5 * _mean(fake**2), lambda fake: 0.5 * _mean((fake - 1) ** 2)
    ),
    # Arjovsky et al. 2017 (arXiv:1701.07875); needs `gradient_penalty`.
    "wasserstein": GanLoss(lambda real, fake: _mean(fake) - _mean(real), lambda fake: -_mean(fake)),
}


def health(real: jax.Array, fake: jax.Array) -> dict[str, jax.Array]:
    """Metrics of a discriminator: its accuracy on real and on fake, in [0, 1], and the standard deviation of all logits.

    A standard deviation near zero means that the discriminator has collapsed.
    """
    logits = jnp.concatenate([real.astype(jnp.float32), fake.astype(jnp.float32)])
    return {"accuracy_real": _mean(real > 0), "accuracy_fake": _mean(fake < 0), "logit_std": jnp.std(logits)}


def diversity(real: jax.Array, fake: jax.Array) -> jax.Array:
    """Standard deviation of `fake` over the batch, mean over pixels, relative to `real`; both [N, H, W, C]. 0 for equal images."""
    return jnp.std(fake.astype(jnp.float32), 0).mean() / jnp.std(real.astype(jnp.float32), 0).mean()


def bigan(real: jax.Array, fake: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Losses of BiGAN (Donahue et al. 2017, arXiv:1605.09782, equation 3): (discriminator, generator and encoder).

    `real` are logits of pairs (x, E(x)), `fake` those of (G(z), z). As in the published code, generator and encoder minimize
    the cross-entropy of swapped labels, which has a gradient for a confident discriminator. Both losses are halved: ln 2 for
    zero logits.
    """
    return 0.5 * _classify(real, fake), 0.5 * _classify(fake, real)


def bigbigan(encoded: Sequence[jax.Array], generated: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Losses of BigBiGAN (Donahue and Simonyan 2019, arXiv:1907.02544, section 2): (discriminator, generator and encoder).

    Args:
        encoded: three scores of (x, E(x)): of x, of z, and joint.
        generated: the same scores of (G(z), z).

    The three hinge losses are summed; the released code takes their mean, a third of these values.
    """
    discriminator = sum(GAN_LOSSES["hinge"].discriminator(e, g) for e, g in zip(encoded, generated, strict=True))
    return discriminator, sum(_mean(e) for e in encoded) - sum(_mean(g) for g in generated)


def squared_gradient(score: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """Squared norm of the gradient of the score for each example: x [N, ...] -> [N].

    `score` returns [N] scores. If it mixes examples (BatchNorm, minibatch deviation), the gradient is that of the sum of
    scores, as in the published implementations.
    """
    gradient = jax.grad(lambda x: jnp.sum(score(x).astype(jnp.float32)))(x).astype(jnp.float32)
    return jnp.sum(gradient**2, axis=tuple(range(1, gradient.ndim)))


def r1(score: Callable[[jax.Array], jax.Array], real: jax.Array) -> jax.Array:
    """R1 penalty: half the mean squared gradient norm on real examples; R2 on fakes.

    Mescheder et al. 2018 (arXiv:1801.04406), equation 9. Multiply by gamma. The authors' code omits the factor 1/2: its gamma
    of 10 is 20 here and in StyleGAN.
    """
    return 0.5 * jnp.mean(squared_gradient(score, real))


def gradient_penalty(score: Callable[[jax.Array], jax.Array], real: jax.Array, fake: jax.Array, key: jax.Array) -> jax.Array:
    """Mean of (|gradient| - 1)^2 at random points between real and fake (Gulrajani et al. 2017, arXiv:1704.00028, equation 3).

    Multiply by lambda. The point is sampled per example. 1e-12 under the root keeps the derivative finite for a zero gradient.
    """
    t = jax.random.uniform(key, (real.shape[0],) + (1,) * (real.ndim - 1))
    norm = jnp.sqrt(squared_gradient(score, real + t * (fake - real)) + 1e-12)
    return jnp.mean((norm - 1) ** 2)


def orthogonality(kernel: jax.Array) -> jax.Array:
    """Orthogonal regularization |W^T W - diag(W^T W)|_F^2 of a kernel [..., C_in, C_out].

    Brock et al. 2019 (arXiv:1809.11096), equation 3. It makes filters (columns) orthogonal and does not change their norms.
    Multiply by beta (1e-4). A widely used port adds half of this gradient. The products have the default precision of the
    accelerator: they are large, and the gradient is weighted by beta.
    """
    w = kernel.reshape(-1, kernel.shape[-1]).astype(jnp.float32)
    if w.shape[0] < w.shape[1]:  # |W^T W| = |W W^T|: use the smaller matrix
        return jnp.sum((w @ w.T) ** 2) - jnp.sum(jnp.sum(w**2, axis=0) ** 2)
    gram = w.T @ w
    return jnp.sum((gram * (1 - jnp.eye(len(gram)))) ** 2)


def path_length(
    synthesize: Callable[[jax.Array], jax.Array], latents: jax.Array, average: jax.Array, key: jax.Array, decay: float = 0.99
) -> tuple[jax.Array, jax.Array]:
    """Path length regularization (Karras et al. 2020, arXiv:1912.04958, equation 4): (penalty, new average length).

    Multiply the penalty by its weight (2).

    Args:
        synthesize: latents [N, layers, D] -> images [N, H, W, C].
        average: running mean of the lengths, scalar. The gradient flows through its newest term, as in the published code.
        decay: decay of the running mean.
    """
    images, pull = jax.vjp(synthesize, latents)
    noise = jax.random.normal(key, images.shape, jnp.float32) / jnp.sqrt(images.shape[1] * images.shape[2])
    (gradient,) = pull(noise.astype(images.dtype))
    length = jnp.sqrt(jnp.mean(jnp.sum(gradient.astype(jnp.float32) ** 2, -1), -1))
    average = average + (1 - decay) * (jnp.mean(length) - average)
    return jnp.mean((length - average) ** 2), average

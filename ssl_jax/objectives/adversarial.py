"""Adversarial objectives: pure functions of logits, and the gradient penalties of a discriminator. Everything is float32 and a mean
over the batch; `real` and `fake` are logits of any shape, positive for "real".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Game(NamedTuple):
    """What each player minimizes."""

    discriminator: Callable[[jax.Array, jax.Array], jax.Array]  # (real, fake) -> scalar
    generator: Callable[[jax.Array], jax.Array]  # fake -> scalar


def _mean(x: jax.Array) -> jax.Array:
    return jnp.mean(x.astype(jnp.float32))


def _classify(real: jax.Array, fake: jax.Array) -> jax.Array:
    """Cross-entropy of "real" for real and "fake" for fake; 2 ln 2 at zero."""
    return _mean(jax.nn.softplus(-real)) + _mean(jax.nn.softplus(fake))


GAN_LOSSES = {
    # Goodfellow et al. 2014 (arXiv:1406.2661), equation 1; the generator's gradient vanishes where the discriminator is sure.
    "minimax": Game(_classify, lambda fake: -_mean(jax.nn.softplus(fake))),
    # The same paper, section 3; StyleGAN's logistic loss.
    "non_saturating": Game(_classify, lambda fake: _mean(jax.nn.softplus(-fake))),
    # Lim and Ye 2017 (arXiv:1705.02894); SNGAN, BigGAN.
    "hinge": Game(lambda real, fake: _mean(jax.nn.relu(1 - real)) + _mean(jax.nn.relu(1 + fake)), lambda fake: -_mean(fake)),
    # Mao et al. 2017 (arXiv:1611.04076), on the linear output.
    "least_squares": Game(
        lambda real, fake: 0.5 * _mean((real - 1) ** 2) + 0.5 * _mean(fake**2), lambda fake: 0.5 * _mean((fake - 1) ** 2)
    ),
    # Arjovsky et al. 2017 (arXiv:1701.07875); needs `gradient_penalty`.
    "wasserstein": Game(lambda real, fake: _mean(fake) - _mean(real), lambda fake: -_mean(fake)),
}


def health(real: jax.Array, fake: jax.Array) -> dict[str, jax.Array]:
    """What tells a game that goes on from one that is over: shares of real and fake that are judged right (0 is the border), and
    the deviation of all logits, which is zero where the discriminator has given up.
    """
    logits = jnp.concatenate([real.astype(jnp.float32), fake.astype(jnp.float32)])
    return {"accuracy_real": _mean(real > 0), "accuracy_fake": _mean(fake < 0), "logit_std": jnp.std(logits)}


def diversity(real: jax.Array, fake: jax.Array) -> jax.Array:
    """Deviation of `fake` over that of `real` [N, H, W, C], each over the batch and averaged over pixels; 0 for one single image."""
    return jnp.std(fake.astype(jnp.float32), 0).mean() / jnp.std(real.astype(jnp.float32), 0).mean()


def bigan(real: jax.Array, fake: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Donahue et al. 2017 (arXiv:1605.09782), equation 3, as its code trains it: (discriminator, generator and encoder).

    `real` are logits of pairs (x, E(x)), `fake` those of (G(z), z). Generator and encoder minimize the cross-entropy of the swapped
    labels, so that both get gradients where the discriminator is sure. Both are halved: ln 2 each at zero.
    """
    return 0.5 * _classify(real, fake), 0.5 * _classify(fake, real)


def bigbigan(encoded: Sequence[jax.Array], generated: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Donahue and Simonyan 2019 (arXiv:1907.02544), section 2: (discriminator, generator and encoder).

    Args:
        encoded: scores of (x, E(x)): of x alone, of z alone, of both.
        generated: the same three of (G(z), z).

    Each score is hinged by itself and the three are summed; the released code takes their mean, a third of these values.
    """
    discriminator = sum(GAN_LOSSES["hinge"].discriminator(e, g) for e, g in zip(encoded, generated, strict=True))
    return discriminator, sum(_mean(e) for e in encoded) - sum(_mean(g) for g in generated)


def squared_gradient(score: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """Per example the squared norm of the gradient of its score: x [N, ...] -> [N].

    `score` gives [N] scores; where it mixes examples (BatchNorm, minibatch deviation) the gradient is that of their sum, as in
    the published implementations.
    """
    gradient = jax.grad(lambda x: jnp.sum(score(x).astype(jnp.float32)))(x).astype(jnp.float32)
    return jnp.sum(gradient**2, axis=tuple(range(1, gradient.ndim)))


def r1(score: Callable[[jax.Array], jax.Array], real: jax.Array) -> jax.Array:
    """Mescheder et al. 2018 (arXiv:1801.04406), equation 9: half the mean squared gradient norm on real examples; R2 is that on fakes.

    Multiply by gamma. Their own code leaves the half out, so its 10 is StyleGAN's 20.
    """
    return 0.5 * jnp.mean(squared_gradient(score, real))


def gradient_penalty(score: Callable[[jax.Array], jax.Array], real: jax.Array, fake: jax.Array, key: jax.Array) -> jax.Array:
    """Gulrajani et al. 2017 (arXiv:1704.00028), equation 3: mean of (|gradient| - 1)^2 between real and fake; multiply by lambda.

    Each example has its own place on its line. 1e-12 under the root keeps its derivative finite where the gradient is zero.
    """
    place = jax.random.uniform(key, (real.shape[0],) + (1,) * (real.ndim - 1))
    norm = jnp.sqrt(squared_gradient(score, real + place * (fake - real)) + 1e-12)
    return jnp.mean((norm - 1) ** 2)


def orthogonality(kernel: jax.Array) -> jax.Array:
    """Brock et al. 2019 (arXiv:1809.11096), equation 3: |W^T W without its diagonal|_F^2, for kernel [..., C_in, C_out].

    Filters (columns) are pushed apart and their lengths left alone; multiply by beta (1e-4). A widely used port adds half
    of this gradient.
    """
    w = kernel.reshape(-1, kernel.shape[-1]).astype(jnp.float32)
    if w.shape[0] < w.shape[1]:  # |W^T W| = |W W^T|, which is the smaller matrix: of a first layer by a thousandfold
        return jnp.sum((w @ w.T) ** 2) - jnp.sum(jnp.sum(w**2, axis=0) ** 2)
    gram = w.T @ w
    return jnp.sum((gram * (1 - jnp.eye(len(gram)))) ** 2)


def path_length(
    synthesize: Callable[[jax.Array], jax.Array], latents: jax.Array, average: jax.Array, key: jax.Array, decay: float = 0.99
) -> tuple[jax.Array, jax.Array]:
    """Karras et al. 2020 (arXiv:1912.04958), equation 4: (penalty, the new average length); multiply the penalty by its weight (2).

    Args:
        synthesize: latents [N, layers, D] -> images [N, H, W, C].
        average: running mean of the lengths, scalar. The gradient flows through its newest term, as in the published code.
        decay: of that mean.
    """
    images, pull = jax.vjp(synthesize, latents)
    noise = jax.random.normal(key, images.shape, jnp.float32) / jnp.sqrt(images.shape[1] * images.shape[2])
    (gradient,) = pull(noise.astype(images.dtype))
    length = jnp.sqrt(jnp.mean(jnp.sum(gradient.astype(jnp.float32) ** 2, -1), -1))
    average = average + (1 - decay) * (jnp.mean(length) - average)
    return jnp.mean((length - average) ** 2), average

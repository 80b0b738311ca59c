"""How probable held-out images are: the evidence lower bound and the tighter one of importance weights, in nats and bits per dimension.

Burda et al. 2016 (arXiv:1509.00519), equation 8: log (1/k) sum_i p(x, z_i) / q(z_i | x), z_i from q; its mean rises with k toward
log p(x). What is modeled (bits, 256 levels, how images are binarized or dequantized) is the method's to say, in its notes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax.evals.context import Context, Result
from ssl_jax.evals.evaluator import SEED, Evaluator, Option


def evaluate(context: Context, *, k: int = 100, examples: int | None = None, seed: int = 0) -> Result:
    """The test split, or its first `examples`; `k` importance samples of each image.

    elbo, iwae_<k>: means over images in nats, of the same draws.
    bits_per_dimension: -iwae_<k> / (D ln 2), D numbers of an image. elbo_bits_per_dimension: the same of the elbo.
    """
    dimensions = []

    def encode(images, key):
        told = context.pictures.fns.log_prob(images, key, k)  # all k at once: what is drawn of an image itself is drawn once
        dimensions[:] = [told.get("dimensions", np.prod(images.shape[1:]))]
        return {"bounds": _columns(told["elbo"], told["iwae"])}

    bounds = context.through(context.keyed(encode, seed), "test", "bounds", examples).x.astype(np.float64)
    elbo, iwae = bounds.mean(0)
    count = float(jax.device_get(dimensions[0]))
    bits = 1 / (count * np.log(2))
    metrics = {"elbo": elbo, f"iwae_{k}": iwae, "bits_per_dimension": -iwae * bits, "elbo_bits_per_dimension": -elbo * bits}
    protocol = f"likelihood k={k} seed={seed} of {context.named('test', len(bounds))} dimensions={count:g}"
    return Result({name: float(value) for name, value in metrics.items()}, protocol)


EVALUATOR = Evaluator(
    evaluate,
    {
        "k": Option("importance samples of an image", least=1),
        "examples": Option("the first so many test images; None: all", least=1),
        "seed": SEED,
    },
    needs=("log_prob",),
)


@jax.jit
def _columns(*columns):
    return jnp.stack(columns, 1)

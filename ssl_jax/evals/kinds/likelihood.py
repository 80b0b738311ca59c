"""Log-likelihood of held-out images: the evidence lower bound and the importance-weighted bound, in nats and bits per dimension.

Burda et al. 2016 (arXiv:1509.00519), equation 8: log (1/k) sum_i p(x, z_i) / q(z_i | x) with z_i from q. Its mean rises with k
toward log p(x). The notes of the method say what is modeled: bits or 256 levels, and how images are binarized or dequantized.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax.evals.context import Context, Result
from ssl_jax.evals.evaluator import SEED, Evaluator, Option


def evaluate(context: Context, *, k: int = 100, examples: int | None = None, seed: int = 0) -> Result:
    """The test split, or its first `examples`, with `k` importance samples per image.

    elbo, iwae_<k>: the two bounds from the same samples, in nats, means over images.
    bits_per_dimension: -iwae_<k> / (D ln 2), where D is the number of values in an image.
    elbo_bits_per_dimension: -elbo / (D ln 2).
    """
    dimensions = []

    def encode(images, key):
        bounds = context.model.fns.log_prob(images, key, k)  # one call for all k: binarized or dequantized pixels are sampled once
        dimensions[:] = [bounds.get("dimensions", np.prod(images.shape[1:]))]
        return {"bounds": _columns(bounds["elbo"], bounds["iwae"])}

    bounds = context.encode_with(context.with_batch_keys(encode, seed), "test", "bounds", examples).x.astype(np.float64)
    elbo, iwae = bounds.mean(0)
    count = float(jax.device_get(dimensions[0]))
    bits = 1 / (count * np.log(2))
    metrics = {"elbo": elbo, f"iwae_{k}": iwae, "bits_per_dimension": -iwae * bits, "elbo_bits_per_dimension": -elbo * bits}
    protocol = f"likelihood k={k} seed={seed} of {context.name('test', len(bounds))} dimensions={count:g}"
    return Result({name: float(value) for name, value in metrics.items()}, protocol)


EVALUATOR = Evaluator(
    evaluate,
    {
        "k": Option("importance samples per image", least=1),
        "examples": Option("number of test images, the first ones; None: all", least=1),
        "seed": SEED,
    },
    needs=("log_prob",),
)


@jax.jit
def _columns(*columns):
    return jnp.stack(columns, 1)

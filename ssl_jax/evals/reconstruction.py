"""How much of an image its code keeps: the distance to G(E(x)), beside that of images to the reconstructions of others.

Donahue et al. 2017 (arXiv:1605.09782): EGr and EGr_b of its code's log. Means of the Euclidean distance over all pixels and
channels, in [0, 1]; where images are in [-1, 1], as in the paper's ImageNet runs, they are twice as large. The ratio has no unit.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax.errors import UserError
from ssl_jax.evals.context import Context, Result

NEEDS = "reconstruct"


def check_options(examples: int = 1024, **_) -> None:
    """UserError for fewer than two examples: one has no other to compare with."""
    if examples < 2:
        raise UserError(f"reconstruction examples={examples} must be at least 2")


def evaluate(context: Context, *, examples: int = 1024, seed: int = 0) -> Result:
    """The first `examples` test images; where the generator makes smaller ones than the encoder sees, both are compared at its size.

    distance: of an image to its own reconstruction.
    distance_shuffled: to that of another one, `seed` says which.
    ratio: of the two; 1 where a code tells nothing about its image.
    """
    check_options(examples)

    def encode(images):
        again = context.pictures.reconstruct(images)
        return {"both": _side_by_side(images, again)}

    both = context.through(encode, "test", "both", examples)
    real, again = np.split(both, 2, axis=1)
    others = (np.arange(len(real)) + np.random.default_rng(seed).integers(1, len(real))) % len(real)
    own, other = (np.linalg.norm(real[rows] - again, axis=1).mean() for rows in (slice(None), others))
    metrics = {"distance": own, "distance_shuffled": other, "ratio": own / other}
    protocol = f"reconstruction first of {context.named('test', len(real))} pixels in [0, 1] D={real.shape[1]} shift seed={seed}"
    return Result({name: float(value) for name, value in metrics.items()}, protocol)


@jax.jit
def _side_by_side(images: jax.Array, again: jax.Array) -> jax.Array:
    real = images.astype(jnp.float32) / 255
    if real.shape != again.shape:
        real = jnp.clip(jax.image.resize(real, again.shape, "cubic"), 0, 1)
    return jnp.concatenate([x.reshape(len(x), -1) for x in (real, again)], axis=1)

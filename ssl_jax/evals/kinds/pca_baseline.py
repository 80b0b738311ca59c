"""Reduction of dimensions: what a code of D numbers keeps of held-out images, beside D principal components of their pixels.

Hinton and Salakhutdinov 2006 (Science 313): MNIST, 30 numbers: squared error per image 3.00, principal components 13.87. Venna and
Kaski 2001: trustworthiness, the share of neighborhoods of the code that are neighborhoods of pixels too.
"""

from __future__ import annotations

import jax
import numpy as np
from sklearn.manifold import trustworthiness

from ssl_jax.errors import UserError
from ssl_jax.evals.context import Context, Result
from ssl_jax.evals.evaluator import CODE, Evaluator, Option
from ssl_jax.evals.lib import linear_maps
from ssl_jax.evals.lib.features import side_by_side
from ssl_jax.evals.lib.quality import LEAST_ERROR, squared_error

NEIGHBORS = 5
COMPARED = 1000  # images whose neighbors are looked for: the work grows with the square


def prepare(context: Context, *, layer: str, **_) -> None:
    """UserError for a method without such a code, or pictures that are too large for principal components."""
    height, width = linear_maps.picture_size(context)
    size = code_size(context, layer)
    if size >= 3 * height * width:
        raise UserError(f"the code {layer!r} has {size} numbers, no fewer than a picture of {height}x{width} pixels; leave it out")


def code_size(context: Context, layer: str) -> int:
    """How many numbers the code of an image has."""
    outputs = jax.eval_shape(context.encode, context.images())
    if layer not in outputs:
        raise UserError(f"the code {layer!r} does not exist; the encoder has {', '.join(sorted(outputs))}")
    return int(np.prod(outputs[layer].shape[1:]))


def evaluate(context: Context, *, layer: str = "code", examples: int = 2000) -> Result:
    """The first `examples` test images at the size of reconstructions; principal components are those of the training images.

    squared_error: per image, the sum over pixels and channels in [0, 1] (gray images have one channel).
    squared_error_pca: the same of as many principal components as the code has numbers.
    ratio: of the two; below 1 the code is better.
    trustworthiness, trustworthiness_pca: of the code, and of the components, in [0, 1]; chance is 0.5.
    """
    size, dim = linear_maps.picture_size(context), code_size(context, layer)

    def encode(images):
        again = context.pictures.fns.reconstruct(images)
        return {"all": side_by_side(linear_maps.at_size(images, size), again, context.encode(images)[layer])}

    rows = context.through(encode, "test", "all", examples).x
    numbers = (rows.shape[1] - dim) // 2
    real, again, code = np.split(rows, [numbers, 2 * numbers], axis=1)
    learned = linear_maps.known_components(context, size, dim)
    plain = real.reshape(len(real), -1, 3)[..., : learned.channels].reshape(len(real), -1)
    per_image = squared_error(real, again).mean() * learned.channels / 3
    pca = squared_error(plain, learned.linear(plain)).mean()
    metrics = {"squared_error": per_image, "squared_error_pca": pca, "ratio": per_image / max(pca, LEAST_ERROR)}
    some = slice(0, min(COMPARED, len(real)))
    for name, reduced in (("trustworthiness", code), ("trustworthiness_pca", learned.linear.code(plain[some]))):
        metrics[name] = trustworthiness(plain[some], reduced[some], n_neighbors=NEIGHBORS)
    protocol = (
        f"reduction layer={layer} D={dim} first of {context.named('test', len(real))} pixels={size[0]}x{size[1]}x{learned.channels}"
        f" in [0, 1], principal components of {context.named('train', learned.count)};"
        f" trustworthiness of {NEIGHBORS} neighbors among {some.stop}"
    )
    return Result({name: float(value) for name, value in metrics.items()}, protocol)


EVALUATOR = Evaluator(
    evaluate,
    {"layer": CODE, "examples": Option("the first so many test images; they need neighbors", above=2 * NEIGHBORS)},
    needs=("reconstruct",),
    prepare=prepare,
)

"""Dimensionality reduction: a code of D numbers against D principal components of pixels, on held-out images.

Hinton and Salakhutdinov 2006 (Science 313): 30 numbers on MNIST have a squared error per image of 3.00, 30 principal components
13.87. Venna and Kaski 2001: trustworthiness, the share of neighbors in the code that are also neighbors in pixels.
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
COMPARED = 1000  # images for trustworthiness; its cost is quadratic


def prepare(context: Context, *, layer: str, **_) -> None:
    """Raises UserError for a missing code, a code that is no reduction, or reconstructions that are too large for PCA."""
    height, width = linear_maps.picture_size(context)
    size = code_size(context, layer)
    if size >= 3 * height * width:
        raise UserError(f"the code {layer!r} has {size} numbers, no fewer than a picture of {height}x{width} pixels; leave it out")


def code_size(context: Context, layer: str) -> int:
    """Number of values in the code of one image."""
    outputs = jax.eval_shape(context.encode, context.images())
    if layer not in outputs:
        raise UserError(f"the code {layer!r} does not exist; the encoder has {', '.join(sorted(outputs))}")
    return int(np.prod(outputs[layer].shape[1:]))


def evaluate(context: Context, *, layer: str = "code", examples: int = 2000) -> Result:
    """The first `examples` test images at the size of reconstructions; principal components are fitted to the training images.

    squared_error: sum over pixels and channels in [0, 1], mean over images; gray images have one channel.
    squared_error_pca: squared error of D principal components, where D is the size of the code.
    ratio: squared_error / squared_error_pca; below 1 the code is better.
    trustworthiness, trustworthiness_pca: trustworthiness of the code and of the principal components, in [0, 1]; chance is 0.5.
    """
    size, dim = linear_maps.picture_size(context), code_size(context, layer)

    def encode(images):
        reconstructed = context.model.fns.reconstruct(images)
        return {"all": side_by_side(linear_maps.at_size(images, size), reconstructed, context.encode(images)[layer])}

    rows = context.encode_with(encode, "test", "all", examples).x
    values = (rows.shape[1] - dim) // 2  # of an image
    real, reconstructed, code = np.split(rows, [values, 2 * values], axis=1)
    pca_map = linear_maps.principal_components(context, size, dim)
    plain = real.reshape(len(real), -1, 3)[..., : pca_map.channels].reshape(len(real), -1)
    per_image = squared_error(real, reconstructed).mean() * pca_map.channels / 3
    pca = squared_error(plain, pca_map.linear(plain)).mean()
    metrics = {"squared_error": per_image, "squared_error_pca": pca, "ratio": per_image / max(pca, LEAST_ERROR)}
    some = slice(0, min(COMPARED, len(real)))
    for name, reduced in (("trustworthiness", code), ("trustworthiness_pca", pca_map.linear.code(plain[some]))):
        metrics[name] = trustworthiness(plain[some], reduced[some], n_neighbors=NEIGHBORS)
    protocol = (
        f"reduction layer={layer} D={dim} first of {context.name('test', len(real))} pixels={size[0]}x{size[1]}x{pca_map.channels}"
        f" in [0, 1], principal components of {context.name('train', pca_map.count)};"
        f" trustworthiness of {NEIGHBORS} neighbors among {some.stop}"
    )
    return Result({name: float(value) for name, value in metrics.items()}, protocol)


EVALUATOR = Evaluator(
    evaluate,
    {"layer": CODE, "examples": Option("number of test images, the first ones", above=2 * NEIGHBORS)},
    needs=("reconstruct",),
    prepare=prepare,
)

"""Colors of reconstructions: how near they are to the true ones, how strong, and what they tell a classifier.

The measures of Zhang et al. 2016 (arXiv:1603.08511, section 3.1 and appendix), beside those of gray versions of the same images. Their
classifier is VGG on ImageNet; here a linear probe of a fixed network learns from the true train images.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax.augment import lab
from ssl_jax.errors import UserError
from ssl_jax.evals.context import Context, Result
from ssl_jax.evals.evaluator import EXTRACTOR, RESIZE, Evaluator, Option
from ssl_jax.evals.lib import linear_probe
from ssl_jax.evals.lib.features import hits, side_by_side
from ssl_jax.evals.lib.linear_maps import at_size
from ssl_jax.evals.lib.real_features import classifier
from ssl_jax.evals.lib.resize import Resize

FARTHEST = 150.0  # of the thresholds of the cumulative curve, in units of a and b
GRID = 10  # side of a bin of a and b
VERSIONS = ("true", "gray", "colorized")


def prepare(context: Context, *, extractor: str, resize: Resize, **_) -> None:
    """Open the network, so that a missing file raises UserError before training; the same for images without color."""
    if context.images().shape[-1] != 3:
        raise UserError(f"the evaluation 'colors' needs images in color, not of {context.images().shape[-1]} channel; remove it")
    context.model.extractor(extractor, resize)


def evaluate(
    context: Context, *, examples: int = 1024, extractor: str = "random_conv", resize: Resize = "legacy"
) -> Result:
    """The first `examples` test images, at the size of the reconstructions.

    auc: area under the share of pixels whose a and b are within a distance of the true ones, over distances from 0 to 150; percent.
    auc_balanced: the mean of that area over the bins of true colors, so that rare colors count as much as frequent ones.
    auc_gray, auc_balanced_gray: the same for gray images, which have a = b = 0.
    colorfulness, colorfulness_true: of reconstructions and of true images, mean over images (see `colorfulness`).
    top1_true, top1_gray, top1_colorized: accuracy of a linear probe of the network's features, fitted to true train images; percent.
    """
    network, shape = context.model.extractor(extractor, resize), []

    def rows(images):
        found = context.model.fns.reconstruct(images)
        shape[:] = found.shape[1:]
        true = at_size(images, found.shape[1:3])
        lightness = lab.rgb_to_lab(true)[..., :1]
        gray = lab.lab_to_rgb(jnp.concatenate([lightness, jnp.zeros((*lightness.shape[:-1], 2))], -1))
        features = [network.encode(jnp.round(255 * x).astype(jnp.uint8))["pooled"].astype(jnp.float32) for x in (true, gray, found)]
        return {"rows": side_by_side(true, found, *features)}

    both = context.encode_with(rows, "test", "rows", examples)
    pixels = int(np.prod(shape))
    true, found, *features = np.split(both.x, np.cumsum([pixels, pixels, network.dim, network.dim]), axis=1)
    true, found = true.reshape(-1, *shape), found.reshape(-1, *shape)
    ab, own = (np.concatenate([_ab(part) for part in np.array_split(x, -(-len(x) // 64))]) for x in (true, found))
    metrics = dict(zip(("auc", "auc_balanced"), areas(ab, own), strict=True))
    metrics |= dict(zip(("auc_gray", "auc_balanced_gray"), areas(ab, np.zeros_like(ab)), strict=True))
    metrics |= {"colorfulness": colorfulness(found).mean(), "colorfulness_true": colorfulness(true).mean()}
    fitted, train_labels = classifier(context, network, tuple(shape[:2]))
    for name, x in zip(VERSIONS, features, strict=True):
        scores = linear_probe.predict(fitted.probe, x, context.mesh)[:, 0]
        metrics[f"top1_{name}"] = 100 * hits(scores, both.y, 1).mean()
    protocol = (
        f"colors of first of {context.name('test', len(true))} at {shape[0]}x{shape[1]} pixels, bins of side {GRID}; classified by a"
        f" linear probe lbfgs{linear_probe.convergence(fitted)} on extractor={network.name} weights={network.sha256[:8] or 'none'}"
        f" resize={network.resize} of {context.name('bank', len(train_labels))}"
    )
    return Result({name: float(value) for name, value in metrics.items()}, protocol)


EVALUATOR = Evaluator(
    evaluate,
    {"examples": Option("number of test images, the first ones", least=1), "extractor": EXTRACTOR, "resize": RESIZE},
    needs=("reconstruct",),
    data=("label",),
    prepare=prepare,
)


@jax.jit
def _ab(rgb):
    return lab.rgb_to_lab(rgb)[..., 1:]


def areas(true: np.ndarray, found: np.ndarray) -> tuple[float, float]:
    """(auc, auc_balanced) in percent, see `evaluate`, of a and b [..., 2]. A pixel at distance d counts 1 - d / 150, or 0."""
    each = np.maximum(1 - np.linalg.norm(true - found, axis=-1) / FARTHEST, 0).ravel()
    bins = lab.ab_bins(GRID)
    parts = np.array_split(true.reshape(-1, 2).astype(np.float32), -(-each.size // 2**16))
    codes = np.concatenate([lab.nearest_bin(part, bins) for part in parts])
    count = np.bincount(codes, minlength=len(bins))
    means = np.bincount(codes, each, len(bins))[count > 0] / count[count > 0]
    return 100 * each.mean(), 100 * means.mean()


def colorfulness(rgb: np.ndarray) -> np.ndarray:
    """[N] of images [N, H, W, 3] in [0, 1] (Hasler and Suesstrunk 2003, "Measuring colorfulness in natural images", equation 7).

    The deviation plus 0.3 times the mean of red - green and (red + green) / 2 - blue, both as lengths of two numbers, times 255.
    """
    red, green, blue = np.moveaxis(255 * rgb.astype(np.float64), -1, 0)
    both = np.stack([red - green, (red + green) / 2 - blue])
    return np.sqrt(both.var((2, 3)).sum(0)) + 0.3 * np.sqrt((both.mean((2, 3)) ** 2).sum(0))

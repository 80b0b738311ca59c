"""How much of an image its code keeps: the picture that the code gives against the image itself.

Distances and their ratio: Donahue et al. 2017 (arXiv:1605.09782), EGr and EGr_b of its code's log. Means of the Euclidean distance
over all pixels and channels, in [0, 1]; where images are in [-1, 1], as in the paper's ImageNet runs, they are twice as large. The
ratio has no unit. PSNR and SSIM are defined in `quality`. The Frechet distance of reconstructions to their originals is what papers
on tokenizers call rFID, where the features are those of Inception.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax.engine.pictures import grid
from ssl_jax.evals.context import Context, Result
from ssl_jax.evals.evaluator import EXTRACTOR, RESIZE, Evaluator, Option
from ssl_jax.evals.lib import distances, quality, real_features
from ssl_jax.evals.lib.features import side_by_side
from ssl_jax.evals.lib.linear_maps import at_size
from ssl_jax.evals.lib.resize import Resize


def prepare(context: Context, *, extractor: str, resize: Resize, **_) -> None:
    """Open the network: UserError for a file that is missing now, and not after hours."""
    if extractor != "none":
        context.pictures.extractor(extractor, resize)


def evaluate(
    context: Context, *, examples: int = 1024, seed: int = 0, extractor: str = "none", resize: Resize = "legacy"
) -> Result:
    """The first `examples` test images; where the generator makes smaller ones than the encoder sees, both are compared at its size.

    distance: of an image to its own reconstruction.
    distance_shuffled: to that of another one.
    ratio: of the two; 1 where a code tells nothing about its image.
    psnr, ssim: means over images; ssim where they have at least 11 pixels each way.
    frechet: reconstructions of the whole test split to its images in the features of `extractor`, in percent of
        the variance of those. fid: the plain distance, where the features are those of the Inception network of 2015-12-05.
    """
    shape = []

    def encode(images):
        again = context.pictures.fns.reconstruct(images)
        shape[:] = again.shape[1:]
        return {"both": side_by_side(at_size(images, again.shape[1:3]), again)}

    both = context.through(encode, "test", "both", examples).x
    real, again = np.split(both, 2, axis=1)
    others = (np.arange(len(real)) + np.random.default_rng(seed).integers(1, len(real))) % len(real)
    own = np.sqrt(quality.squared_error(real, again)).mean()
    other = np.mean([np.linalg.norm(real[row] - y) for row, y in zip(others, again, strict=True)])
    metrics = {"distance": own, "distance_shuffled": other, "ratio": own / other, "psnr": quality.psnr(real, again).mean()}
    if min(shape[:2]) >= quality.WINDOW:
        metrics["ssim"] = quality.ssim(*(x.reshape(-1, *shape) for x in (real, again))).mean()
    protocol = f"reconstruction first of {context.named('test', len(real))} pixels in [0, 1] D={real.shape[1]} shift seed={seed}"
    if extractor != "none":
        found, told = _frechet(context, extractor, resize, tuple(shape[:2]))
        metrics, protocol = metrics | found, f"{protocol}; {told}"
    return Result({name: float(value) for name, value in metrics.items()}, protocol, picture=_pairs(real, again, shape))


def _pairs(real: np.ndarray, again: np.ndarray, shape: list[int]) -> np.ndarray:
    """uint8 [H, W, 3]: up to three rows of ten images [N, D] of `shape`, each above its reconstruction."""
    columns = min(10, len(real))
    rows = min(3, len(real) // columns)
    pairs = np.stack([real, again], axis=1)[: rows * columns].reshape(rows, columns, 2, *shape)
    return grid(pairs.swapaxes(1, 2).reshape(2 * rows, columns, *shape))


EVALUATOR = Evaluator(
    evaluate,
    {
        "examples": Option("the first so many test images; one has no other to compare with", least=2),
        "seed": Option("of the other image that `distance_shuffled` takes"),
        "extractor": EXTRACTOR._replace(meaning=f"{EXTRACTOR.meaning}; none: no Frechet distance"),
        "resize": RESIZE,
    },
    needs=("reconstruct",),
    prepare=prepare,
)


@jax.jit
def _to_levels(pictures: jax.Array) -> jax.Array:
    """float [0, 1] -> uint8, as samples are rounded."""
    return jnp.round(pictures * 255).astype(jnp.uint8)


def _frechet(context: Context, extractor: str, resize: Resize, size: tuple[int, int]) -> tuple[dict[str, float], str]:
    network = context.pictures.extractor(extractor, resize)
    of_pictures = real_features.joined(network, ["pooled"])
    again = context.through(lambda images: of_pictures(_to_levels(context.pictures.fns.reconstruct(images))), "test", "joined").x
    real = real_features.real_features(context, network, "test", size)
    metrics = real_features.frechet(network, real, distances.in_parts(again))
    told = (
        f"frechet extractor={network.name} weights={network.sha256[:8] or 'none'} dimensions={network.dim} resize={network.resize}"
        f" pixels={size[0]}x{size[1]} all of {context.named('test', len(again))}, in percent of the variance of the images"
    )
    return metrics, told

"""Reconstruction quality: the reconstruction of each image against the image itself.

Distances are Euclidean over all pixels and channels in [0, 1] (Donahue et al. 2017, arXiv:1605.09782: EGr and EGr_b in the log
of its code; its ImageNet images are in [-1, 1], which doubles the distances). PSNR and SSIM are defined in
`ssl_jax.evals.lib.quality`. The Frechet distance of reconstructions in Inception features is called rFID in papers on
tokenizers.
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
    """Open the network, so that a missing file raises UserError before training."""
    if extractor != "none":
        context.model.extractor(extractor, resize)


def evaluate(
    context: Context, *, examples: int = 1024, seed: int = 0, extractor: str = "none", resize: Resize = "legacy"
) -> Result:
    """The first `examples` test images, compared at the size of the reconstructions.

    distance: distance of an image to its own reconstruction, mean over images.
    distance_shuffled: distance of an image to the reconstruction of another image, mean over images.
    ratio: distance / distance_shuffled; 1 for a code without information about its image.
    psnr, ssim: means over images; ssim only for images of at least 11 x 11 pixels.
    frechet: Frechet distance of all reconstructions of the test split to its images, in percent of the variance of their features.
    fid: the plain Frechet distance; only for the features of the Inception network of 2015-12-05.
    """
    shape = []

    def encode(images):
        reconstructed = context.model.fns.reconstruct(images)
        shape[:] = reconstructed.shape[1:]
        return {"both": side_by_side(at_size(images, reconstructed.shape[1:3]), reconstructed)}

    both = context.encode_with(encode, "test", "both", examples).x
    real, reconstructed = np.split(both, 2, axis=1)
    others = (np.arange(len(real)) + np.random.default_rng(seed).integers(1, len(real))) % len(real)
    own = np.sqrt(quality.squared_error(real, reconstructed)).mean()
    other = np.mean([np.linalg.norm(real[row] - y) for row, y in zip(others, reconstructed, strict=True)])
    metrics = {"distance": own, "distance_shuffled": other, "ratio": own / other, "psnr": quality.psnr(real, reconstructed).mean()}
    if min(shape[:2]) >= quality.WINDOW:
        metrics["ssim"] = quality.ssim(*(x.reshape(-1, *shape) for x in (real, reconstructed))).mean()
    protocol = f"reconstruction first of {context.name('test', len(real))} pixels in [0, 1] D={real.shape[1]} shift seed={seed}"
    if extractor != "none":
        frechet_metrics, frechet_protocol = _frechet(context, extractor, resize, tuple(shape[:2]))
        metrics, protocol = metrics | frechet_metrics, f"{protocol}; {frechet_protocol}"
    return Result({name: float(value) for name, value in metrics.items()}, protocol, picture=_pairs(real, reconstructed, shape))


def _pairs(real: np.ndarray, reconstructed: np.ndarray, shape: list[int]) -> np.ndarray:
    """uint8 [H, W, 3]: up to three rows of ten images [N, D] of `shape`, each above its reconstruction."""
    columns = min(10, len(real))
    rows = min(3, len(real) // columns)
    pairs = np.stack([real, reconstructed], axis=1)[: rows * columns].reshape(rows, columns, 2, *shape)
    return grid(pairs.swapaxes(1, 2).reshape(2 * rows, columns, *shape))


EVALUATOR = Evaluator(
    evaluate,
    {
        "examples": Option("number of test images, the first ones", least=2),
        "seed": Option("seed of the choice of the other image in `distance_shuffled`"),
        "extractor": EXTRACTOR._replace(meaning=f"{EXTRACTOR.meaning}; none: no Frechet distance"),
        "resize": RESIZE,
    },
    needs=("reconstruct",),
    prepare=prepare,
)


@jax.jit
def _to_uint8(images: jax.Array) -> jax.Array:
    """float [0, 1] -> uint8, rounded as samples are."""
    return jnp.round(images * 255).astype(jnp.uint8)


def _frechet(context: Context, extractor: str, resize: Resize, size: tuple[int, int]) -> tuple[dict[str, float], str]:
    network = context.model.extractor(extractor, resize)
    encode = real_features.joined(network, ["pooled"])
    fake = context.encode_with(lambda images: encode(_to_uint8(context.model.fns.reconstruct(images))), "test", "joined").x
    real = real_features.real_features(context, network, "test", size)
    metrics = real_features.frechet(network, real, distances.chunked_moments(fake))
    protocol = (
        f"frechet extractor={network.name} weights={network.sha256[:8] or 'none'} dimensions={network.dim} resize={network.resize}"
        f" pixels={size[0]}x{size[1]} all of {context.name('test', len(fake))}, in percent of the variance of the images"
    )
    return metrics, protocol

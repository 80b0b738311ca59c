"""Segments of images by the affinity of their patches, scored on masks, beside segments by color alone.

The affinity of two patches is the probability that they are from one image, sigmoid(PMI) (Isola et al. 2016, arXiv:1511.06811), for
all pairs of patches: with near ones only, balanced cuts follow the geometry of the grid. Spectral clustering groups the patches. Each
pixel gets the segment of the nearest patch.
"""

from __future__ import annotations

import numpy as np
from scipy.special import expit
from sklearn.metrics import adjusted_rand_score

from ssl_jax.engine.pictures import grid
from ssl_jax.evals.context import Context, Result
from ssl_jax.evals.evaluator import SEED, Evaluator, Option
from ssl_jax.evals.lib import spectral
from ssl_jax.evals.lib.features import side_by_side

SHOWN = 8  # images of the picture
PALETTE = np.array([(68, 1, 84), (253, 191, 80), (42, 157, 143), (200, 50, 45), (90, 120, 200), (160, 160, 160)], np.uint8)


def evaluate(
    context: Context, *, examples: int = 200, segments: int = 2, mask: str = "mask", seed: int = 0
) -> Result:
    """The first `examples` test images, each cut into `segments` segments. 100 is perfect, 0 the mean of random segments.

    ari: adjusted Rand index of segments and mask over pixels, in percent, mean over images.
    ari_color: that of segments by the mean colors of the same patches.
    covering: the best overlap (intersection over union) of each region of the mask with a segment, in percent, weighted by its
        size (Arbelaez et al. 2011), mean over images; not 0 for random segments.
    covering_color: that of segments by color.
    """
    places = {}

    def rows(images, masks):
        found = context.model.fns.affinity(images)
        places.update(corners=np.asarray(found["corners"]), size=int(found["size"]), shapes=(found["pmi"].shape[1:], images.shape[1:]))
        return {"rows": side_by_side(found["pmi"], images, masks)}

    found = context.encode_with(rows, "test", "rows", examples, (mask,)).x
    corners, size, (square, shape) = places["corners"], places["size"], places["shapes"]
    split = np.cumsum([square[0] * square[1], int(np.prod(shape))])
    own = nearest(corners + (size - 1) / 2, shape[:2])
    scores, shown = [], []
    for index, (pmi, image, truth) in enumerate(np.split(row, split) for row in found):
        pmi, image, truth = pmi.reshape(square), image.reshape(shape), truth.reshape(shape[:2]).astype(np.int32)
        maps = [spectral.segments(a, segments, seed)[own] for a in (expit(pmi), by_color(image / 255, corners, size))]
        scores.append([score(cut, truth) for cut in maps for score in (ari, covering)])
        if index < SHOWN:
            shown.append(column(image, pmi, corners, size, own, *maps, truth))
    metrics = dict(zip(("ari", "covering", "ari_color", "covering_color"), 100 * np.mean(scores, 0), strict=True))
    protocol = (
        f"affinity {segments} segments of {len(corners)} patches of {size} pixels seed={seed}, {mask} of first of"
        f" {context.name('test', len(found))}"
    )
    return Result({name: float(value) for name, value in metrics.items()}, protocol, grid(np.stack(shown, 1)))


EVALUATOR = Evaluator(
    evaluate,
    {
        "examples": Option("number of test images, the first ones", least=1),
        "segments": Option("number of segments of an image", least=2, most=len(PALETTE)),
        "mask": Option("feature with the true region of each pixel"),
        "seed": SEED,
    },
    needs=("affinity",),
    data=("mask",),
)


def nearest(centers: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """int64 [H, W]: the number of the center [N, 2] nearest to each pixel."""
    pixels = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    return np.square(pixels[:, :, None] - centers).sum(-1).argmin(-1)


def by_color(image: np.ndarray, corners: np.ndarray, size: int) -> np.ndarray:
    """[N, N] in (0, 1]: exp(-d^2 / (2 s^2)) of the distance d of mean colors, with s^2 the mean of d^2 over all pairs."""
    colors = np.stack([image[y : y + size, x : x + size].mean((0, 1)) for y, x in corners])
    squared = np.square(colors[:, None] - colors).sum(-1)
    return np.exp(-squared / (2 * max(squared.mean(), 1e-12)))


def ari(cut: np.ndarray, truth: np.ndarray) -> float:
    return adjusted_rand_score(truth.ravel(), cut.ravel())


def covering(cut: np.ndarray, truth: np.ndarray) -> float:
    """Of int maps [H, W]: for each true region the largest intersection over union with a segment, weighted by the region's size."""
    regions, parts = ([x == value for value in np.unique(x)] for x in (truth, cut))
    best = [max((region & part).sum() / (region | part).sum() for part in parts) for region in regions]
    return float(np.average(best, weights=[region.sum() for region in regions]))


def column(image, pmi, corners, size, own, cut, color_cut, truth) -> np.ndarray:
    """uint8 [5, H, W, 3]: the image with a framed patch, its PMI with all patches, both segmentations, the mask."""
    chosen = own[own.shape[0] // 2, own.shape[1] // 2]
    framed, (y, x) = image.astype(np.uint8), corners[chosen]
    framed[[y, y + size - 1], x : x + size] = framed[y : y + size, [x, x + size - 1]] = (255, 0, 0)
    heat = expit(pmi[chosen])[own][..., None] * np.array([255, 255, 255])
    return np.stack([framed, heat.astype(np.uint8), *(PALETTE[x % len(PALETTE)] for x in (cut, color_cut, truth))])

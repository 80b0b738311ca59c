"""Samples of a generator against real images, in the features of a fixed network.

Frechet distance (Heusel et al. 2017), kernel distance (Binkowski et al. 2018), precision and recall (Kynkaanniemi et al. 2019), density
and coverage (Naeem et al. 2020), inception score (Salimans et al. 2016); the definitions are in `distances`. With acceptance < 1,
of the samples that a classifier prefers (`rejection`).
"""

from __future__ import annotations

import numpy as np

from ssl_jax.errors import UserError
from ssl_jax.evals.context import Context, Result, Split
from ssl_jax.evals.evaluator import ACCEPTANCE, EXTRACTOR, RESIZE, SEED, Evaluator, Option
from ssl_jax.evals.lib import distances, rejection
from ssl_jax.evals.lib.features import extract
from ssl_jax.evals.lib.real_features import frechet, joined, real_features, sampled
from ssl_jax.evals.lib.resize import Resize


def check(*, examples: int, k: int, **_) -> None:
    """UserError for fewer samples than neighbors."""
    if examples <= k:
        raise UserError(f"generation needs examples={examples} above k={k}")


def prepare(context: Context, *, extractor: str, resize: Resize, acceptance: float, **_) -> None:
    """Open the network: UserError for a file that is missing now, and not after hours; or for classes that are."""
    rejection.check_labels(acceptance, "generation acceptance", context.pictures.sampled_labels)
    context.pictures.extractor(extractor, resize)


def evaluate(
    context: Context,
    *,
    extractor: str = "random_conv",
    resize: Resize = "legacy",
    examples: int = 2048,
    split: Split = "train",
    k: int = 3,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
    truncation: float | None = None,
    acceptance: float = 1.0,
) -> Result:
    """`examples` samples of the latents of `seed` against a whole split.

    frechet: in percent of the total variance of the real features, which makes networks of any scale comparable.
    kernel: times 1000.
    fid, kid: the plain distances, where the features are those of the Inception network of 2015-12-05 and only there.
    precision, recall, density, coverage: shares, against at most `examples` real images, evenly spaced in the split.
    inception_score: over ten splits, where the network has logits.
    Real images that are larger than samples are reduced to their size (Pillow's bicubic, 256 levels).
    With an acceptance below 1, selecting raises precision and inception score by itself; variety that is lost by it counts in the
    distances, recall and coverage.
    """
    network = context.pictures.extractor(extractor, resize)
    if acceptance == 1:
        batches, selected = context.pictures.samples(examples, seed, truncation), ""
    else:
        labels = np.asarray(context.pictures.sampled_labels(examples, seed))
        batches, _, selected = rejection.preferred(context, network, labels, seed, truncation, acceptance)
    first = next(batches)
    size, names = first.shape[1:3], ["pooled", "logits"] if network.classes else ["pooled"]
    rows = extract(joined(network, names), sampled(first, batches, context), "joined", context.mesh)
    fake, logits = np.split(rows.x, [network.dim], axis=1)
    real = real_features(context, network, split, size)

    close = frechet(network, real, distances.in_parts(fake))
    kernel, _ = distances.kernel_distance(real.x, fake, subsets, subset_size, seed)
    some = real.x[np.linspace(0, len(real.x) - 1, min(examples, len(real.x))).astype(int)]
    if len(some) <= k:
        raise UserError(f"the real split has {len(some)} images, too few for k={k}; check the split")
    metrics = {**close, "kernel": 1000 * kernel, **distances.neighborhoods(some, fake, k)}
    if "fid" in close:
        metrics["kid"] = kernel
    if network.classes:
        metrics["inception_score"], _ = distances.inception_score(logits)
    told = "none" if truncation is None else f"{truncation:g}"
    protocol = (
        f"generation extractor={network.name} weights={network.sha256[:8] or 'none'} dimensions={network.dim} resize={network.resize}"
        f" pixels={size[0]}x{size[1]} real={context.named(split, len(real.x))} fake={len(fake)} seed={seed} truncation={told}{selected}"
        f" generator=settled; k={k} against {len(some)} real;"
        f" kernel x 1000 over {subsets} subsets of {min(subset_size, len(fake), len(real.x))}; frechet in percent of the real variance"
    )
    return Result({name: float(value) for name, value in metrics.items()}, protocol)


EVALUATOR = Evaluator(
    evaluate,
    {
        "extractor": EXTRACTOR,
        "resize": RESIZE,
        "examples": Option("samples"),
        "split": Option("real images"),
        "k": Option("neighbors that make up a neighborhood of precision, recall, density and coverage", least=1),
        "subsets": Option("subsets that the kernel distance is the mean over", least=1),
        "subset_size": Option("images of a subset", least=2),
        "seed": SEED,
        "truncation": Option("of the latents, as the method defines it; None: none", least=0),
        "acceptance": ACCEPTANCE,
    },
    needs=("samples",),
    check=check,
    prepare=prepare,
)

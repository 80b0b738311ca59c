"""Samples of a generator against real images, compared in the features of a fixed network.

Frechet distance (Heusel et al. 2017), kernel distance (Binkowski et al. 2018), precision and recall (Kynkaanniemi et al. 2019),
density and coverage (Naeem et al. 2020), inception score (Salimans et al. 2016). The definitions are in
`ssl_jax.evals.lib.distances`. With acceptance < 1 a classifier selects the samples (`ssl_jax.evals.lib.rejection`).
"""

from __future__ import annotations

import numpy as np

from ssl_jax.errors import UserError
from ssl_jax.evals.context import Context, Result, Split
from ssl_jax.evals.evaluator import ACCEPTANCE, EXTRACTOR, RESIZE, SEED, Evaluator, Option
from ssl_jax.evals.lib import distances, rejection
from ssl_jax.evals.lib.features import extract
from ssl_jax.evals.lib.real_features import frechet, joined, real_features, sample_batches
from ssl_jax.evals.lib.resize import Resize


def check(*, examples: int, k: int, **_) -> None:
    """Raises UserError unless there are more samples than neighbors."""
    if examples <= k:
        raise UserError(f"generation needs examples={examples} above k={k}")


def prepare(context: Context, *, extractor: str, resize: Resize, acceptance: float, **_) -> None:
    """Open the network, so that a missing file raises UserError before training; also for acceptance < 1 without classes."""
    rejection.check_labels(acceptance, "generation acceptance", context.model.sampled_labels)
    context.model.extractor(extractor, resize)


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
    """`examples` samples, generated with `seed`, against a whole split.

    Real images larger than samples are resized to the size of samples (Pillow's bicubic, 256 levels). With
    acceptance < 1 the selection itself raises precision and inception score. It costs variety, which the distances, recall and
    coverage measure.

    frechet: Frechet distance in percent of the total variance of the real features, so that networks of any scale are comparable.
    kernel: kernel distance times 1000.
    fid, kid: the plain distances; only for the features of the Inception network of 2015-12-05.
    precision, recall, density, coverage: shares, measured against at most `examples` real images, evenly spaced in the split.
    inception_score: mean over ten splits; only for networks with logits.
    """
    network = context.model.extractor(extractor, resize)
    if acceptance == 1:
        batches, selected = context.model.samples(examples, seed, truncation), ""
    else:
        labels = np.asarray(context.model.sampled_labels(examples, seed))
        batches, _, selected = rejection.select_samples(context, network, labels, seed, truncation, acceptance)
    first = next(batches)
    size, names = first.shape[1:3], ["pooled", "logits"] if network.classes else ["pooled"]
    rows = extract(joined(network, names), sample_batches(first, batches, context), "joined", context.mesh)
    fake, logits = np.split(rows.x, [network.dim], axis=1)
    real = real_features(context, network, split, size)

    from_moments = frechet(network, real, distances.chunked_moments(fake))
    kernel, _ = distances.kernel_distance(real.x, fake, subsets, subset_size, seed)
    some = real.x[np.linspace(0, len(real.x) - 1, min(examples, len(real.x))).astype(int)]
    if len(some) <= k:
        raise UserError(f"the real split has {len(some)} images, too few for k={k}; check the split")
    metrics = {**from_moments, "kernel": 1000 * kernel, **distances.neighborhoods(some, fake, k)}
    if "fid" in from_moments:
        metrics["kid"] = kernel
    if network.classes:
        metrics["inception_score"], _ = distances.inception_score(logits)
    truncation_text = "none" if truncation is None else f"{truncation:g}"
    protocol = (
        f"generation extractor={network.name} weights={network.sha256[:8] or 'none'} dimensions={network.dim}"
        f" resize={network.resize} pixels={size[0]}x{size[1]} real={context.name(split, len(real.x))} fake={len(fake)} seed={seed}"
        f" truncation={truncation_text}{selected} generator=settled; k={k} against {len(some)} real;"
        f" kernel x 1000 over {subsets} subsets of {min(subset_size, len(fake), len(real.x))};"
        f" frechet in percent of the real variance"
    )
    return Result({name: float(value) for name, value in metrics.items()}, protocol)


EVALUATOR = Evaluator(
    evaluate,
    {
        "extractor": EXTRACTOR,
        "resize": RESIZE,
        "examples": Option("number of samples"),
        "split": Option("split of the real images"),
        "k": Option("neighbors that define the neighborhoods of precision, recall, density and coverage", least=1),
        "subsets": Option("number of subsets over which the kernel distance is averaged", least=1),
        "subset_size": Option("images per subset", least=2),
        "seed": SEED,
        "truncation": Option("truncation of the latents, as the method defines it; None: no truncation", least=0),
        "acceptance": ACCEPTANCE,
    },
    needs=("samples",),
    at_most={"k": ("split", 1)},
    check=check,
    prepare=prepare,
)

"""Are pictures that were made for a class of that class? A classifier of real images says so.

Ravuri and Vinyals 2019 (arXiv:1905.10887) train on samples and test on real images; here it is the other way round, which tells
whether a class was obeyed, not whether all of it is shown. With acceptance < 1 the samples are those that the same classifier prefers
(`rejection`), which flatters the accuracy: the protocol says so, and the distances of `generation` are the honest measure of selecting.
"""

from __future__ import annotations

import numpy as np

from ssl_jax.evals.context import Context, Result
from ssl_jax.evals.evaluator import ACCEPTANCE, EXTRACTOR, RESIZE, SEED, Evaluator, Option
from ssl_jax.evals.lib import linear_probe, rejection
from ssl_jax.evals.lib.features import extract, hits
from ssl_jax.evals.lib.real_features import classifier, joined, real_features, sampled
from ssl_jax.evals.lib.resize import Resize


def prepare(context: Context, *, extractor: str, resize: Resize, **_) -> None:
    """Open the network: UserError for a file that is missing now, and not after hours."""
    context.pictures.extractor(extractor, resize)


def evaluate(
    context: Context,
    *,
    extractor: str = "random_conv",
    resize: Resize = "legacy",
    examples: int = 2048,
    seed: int = 0,
    acceptance: float = 1.0,
) -> Result:
    """`examples` samples of the latents of `seed`, by a linear probe on features of real training images; in percent.

    accuracy: samples that are taken for the class that they were made for.
    accuracy_real: test images that are taken for their class.
    chance: of a guess without looking.
    """
    network = context.pictures.extractor(extractor, resize)
    labels = np.asarray(context.pictures.sampled_labels(examples, seed))
    if acceptance == 1:
        batches, selected = context.pictures.samples(examples, seed, None), ""
    else:
        batches, labels, selected = rejection.preferred(context, network, labels, seed, None, acceptance)
    first = next(batches)
    fake = extract(joined(network, ["pooled"]), sampled(first, batches, context), "joined", context.mesh)
    size = first.shape[1:3]
    probe, known = classifier(context, network, size)
    test = real_features(context, network, "test", size)
    metrics = {}
    for name, x, y in (("accuracy", fake.x, labels), ("accuracy_real", test.x, test.y)):
        metrics[name] = 100 * hits(linear_probe.predict(probe, x, context.mesh)[:, 0], y, 1).mean()
    metrics["chance"] = 100 / len(np.unique(known))
    protocol = (
        f"classified by a linear probe lbfgs on extractor={network.name} weights={network.sha256[:8] or 'none'} resize={network.resize}"
        f" pixels={size[0]}x{size[1]} of {context.named('train', len(known))}, fake={len(labels)} seed={seed}{selected}"
        f" real={context.named('test', len(test.y))} generator=settled"
    )
    return Result({name: float(value) for name, value in metrics.items()}, protocol)


EVALUATOR = Evaluator(
    evaluate,
    {
        "extractor": EXTRACTOR,
        "resize": RESIZE,
        "examples": Option("samples", least=1),
        "seed": SEED,
        "acceptance": ACCEPTANCE,
    },
    needs=("samples", "sampled_labels"),
    data=("label",),
    prepare=prepare,
)

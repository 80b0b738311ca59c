"""Class accuracy of conditional samples: a classifier of real images predicts the class of each sample.

Ravuri and Vinyals 2019 (arXiv:1905.10887) train on samples and test on real images. This evaluation trains on real images, so
it measures whether samples show their class, not whether they cover it. With acceptance < 1 the same classifier selects the
samples (`ssl_jax.evals.lib.rejection`), which raises the accuracy; the protocol says so. Use the distances of `generation` to
judge selection.
"""

from __future__ import annotations

import numpy as np

from ssl_jax.evals.context import Context, Result
from ssl_jax.evals.evaluator import ACCEPTANCE, EXTRACTOR, RESIZE, SEED, Evaluator, Option
from ssl_jax.evals.lib import linear_probe, rejection
from ssl_jax.evals.lib.features import extract, hits
from ssl_jax.evals.lib.real_features import classifier, joined, real_features, sample_batches
from ssl_jax.evals.lib.resize import Resize


def prepare(context: Context, *, extractor: str, resize: Resize, **_) -> None:
    """Open the network, so that a missing file raises UserError before training."""
    context.model.extractor(extractor, resize)


def evaluate(
    context: Context,
    *,
    extractor: str = "random_conv",
    resize: Resize = "legacy",
    examples: int = 2048,
    seed: int = 0,
    acceptance: float = 1.0,
) -> Result:
    """`examples` samples, generated with `seed` and classified by a linear probe of real training images, in percent.

    accuracy: samples that the probe assigns to the class they were generated for.
    accuracy_real: real test images that the probe assigns to their class.
    chance: 100 / number of classes.
    """
    network = context.model.extractor(extractor, resize)
    labels = np.asarray(context.model.sampled_labels(examples, seed))
    if acceptance == 1:
        batches, selected = context.model.samples(examples, seed, None), ""
    else:
        batches, labels, selected = rejection.select_samples(context, network, labels, seed, None, acceptance)
    first = next(batches)
    fake = extract(joined(network, ["pooled"]), sample_batches(first, batches, context), "joined", context.mesh)
    size = first.shape[1:3]
    fitted, train_labels = classifier(context, network, size)
    test = real_features(context, network, "test", size)
    metrics = {}
    for name, x, y in (("accuracy", fake.x, labels), ("accuracy_real", test.x, test.y)):
        metrics[name] = 100 * hits(linear_probe.predict(fitted.probe, x, context.mesh)[:, 0], y, 1).mean()
    metrics["chance"] = 100 / len(np.unique(train_labels))
    protocol = (
        f"classified by a linear probe lbfgs{linear_probe.convergence(fitted)} on extractor={network.name}"
        f" weights={network.sha256[:8] or 'none'}"
        f" resize={network.resize} pixels={size[0]}x{size[1]} of {context.name('bank', len(train_labels))},"
        f" fake={len(labels)} seed={seed}{selected}"
        f" real={context.name('test', len(test.y))} generator=settled"
    )
    return Result({name: float(value) for name, value in metrics.items()}, protocol)


EVALUATOR = Evaluator(
    evaluate,
    {
        "extractor": EXTRACTOR,
        "resize": RESIZE,
        "examples": Option("number of samples", least=1),
        "seed": SEED,
        "acceptance": ACCEPTANCE,
    },
    needs=("samples", "sampled_labels"),
    data=("label",),
    prepare=prepare,
)

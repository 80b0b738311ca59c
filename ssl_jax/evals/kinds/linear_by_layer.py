"""Linear classification of the features of every layer: where in a network its best representation lies.

In generative transformers accuracy rises with depth, is best in the middle and falls toward the output (Chen et al. 2020, iGPT; Yu
et al. 2022, arXiv:2110.04627, appendix A).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from ssl_jax.errors import UserError
from ssl_jax.evals.context import Context, Result
from ssl_jax.evals.evaluator import SEED, Evaluator, Option
from ssl_jax.evals.lib import linear_probe
from ssl_jax.evals.lib.features import Features, hits, pool

LAYERS = r"embedding|(block|layer)\d+"
WIDTH = 8192  # features of an image that one pass over the data brings to the host, where one layer has no more


def check(*, layers: str, **_) -> None:
    """UserError for a pattern that is none."""
    try:
        re.compile(layers)
    except re.error as error:
        raise UserError(f"depth layers={layers!r} is no regular expression: {error}") from None


def prepare(context: Context, *, layers: str, **_) -> None:
    """UserError where no layer has such a name."""
    chosen(context, layers)


def chosen(context: Context, pattern: str) -> dict[str, int]:
    """{layer: number of its features} of the layers whose whole names fit, by the numbers in them, the embedding first."""
    outputs = {name: x.shape for name, x in jax.eval_shape(context.encode, context.images()).items()}
    names = sorted((name for name in outputs if re.fullmatch(pattern, name)), key=_by_number)
    if not names:
        raise UserError(f"no layer fits layers={pattern!r}; the encoder has {', '.join(sorted(outputs))}")
    return {name: outputs[name][-1] for name in names}


def evaluate(
    context: Context, *, layers: str = LAYERS, solver: linear_probe.Solver = "lbfgs", seed: int = 0
) -> Result:
    """The linear probe of `linear_probe`, with its defaults for `solver`, on each layer.

    <layer>_top1: on the test split, in percent.
    best_top1: of the layer that is best on held-out training images.
    best_layer: its place among these layers, from 1; an embedding is one of them.
    """
    widths = chosen(context, layers)
    held_out, metrics = {}, {}
    for group in groups(widths):
        for name, bank, query in _features(context, {name: widths[name] for name in group}):
            fitted = linear_probe.fit(bank, solver, seed=seed, mesh=context.mesh)
            scores = linear_probe.predict(fitted.probe, query.x, context.mesh)[:, 0]
            metrics[f"{name}_top1"] = float(100 * hits(scores, query.y, 1).mean())
            held_out[name] = fitted.validation.max()
    best = max(held_out, key=held_out.get)
    metrics |= {"best_top1": metrics[f"{best}_top1"], "best_layer": float(1 + list(widths).index(best))}
    protocol = (
        f"depth: linear probe {solver} of {len(widths)} layers, standardized frozen features without augmentation seed={seed},"
        f" the best one chosen on 10% of train; train={context.named('train', len(bank.y))} test={context.named('test', len(query.y))}"
    )
    return Result(metrics, protocol)


EVALUATOR = Evaluator(
    evaluate,
    {
        "layers": Option("a regular expression that the whole name of a layer fits"),
        "solver": Option("how a probe is fitted: stochastic gradients, logistic regression, or least squares"),
        "seed": SEED,
    },
    needs=("model",),
    data=("label",),
    check=check,
    prepare=prepare,
)


def groups(widths: dict[str, int], most: int = WIDTH) -> list[list[str]]:
    """Layers in their order, together as long as they have at most `most` features."""
    found, total = [], most
    for name, width in widths.items():
        if total + width > most:
            found.append([])
            total = 0
        found[-1].append(name)
        total += width
    return found


def _features(context: Context, widths: dict[str, int]) -> Iterator[tuple[str, Features, Features]]:
    """(layer, bank, query) of each of some layers, from one pass over each split."""

    def encode(images):
        outputs = context.encode(images)
        return {"all": _joined([outputs[name] for name in widths])}

    train, test = (context.through(encode, split, "all") for split in ("train", "test"))
    start = 0
    for name, width in widths.items():
        columns = slice(start, start + width)
        yield name, *(Features(each.x[:, columns], each.y) for each in (train, test))
        start += width


@jax.jit
def _joined(features):
    return jnp.concatenate([pool(x) for x in features], 1)


def _by_number(name):
    return [int(number) for number in re.findall(r"\d+", name)], name

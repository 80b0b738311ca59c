"""Linear classification of the features of every layer: which layer of a network has the best representation.

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
WIDTH = 8192  # most features per image that one pass over the data brings to the host (a wider layer has its own pass)


def check(*, layers: str, **_) -> None:
    """Raises UserError for an invalid pattern."""
    try:
        re.compile(layers)
    except re.error as error:
        raise UserError(f"layers={layers!r} is no regular expression: {error}") from None


def prepare(context: Context, *, layers: str, **_) -> None:
    """Raises UserError if no layer matches."""
    matching_layers(context, layers)


def matching_layers(context: Context, pattern: str) -> dict[str, int]:
    """{layer: number of features} of the layers whose full names match, sorted by the numbers in the names, the embedding first."""
    outputs = {name: x.shape for name, x in jax.eval_shape(context.encode, context.images()).items()}
    names = sorted((name for name in outputs if re.fullmatch(pattern, name)), key=_by_number)
    if not names:
        raise UserError(f"no layer fits layers={pattern!r}; the encoder has {', '.join(sorted(outputs))}")
    return {name: outputs[name][-1] for name in names}


def evaluate(
    context: Context, *, layers: str = LAYERS, solver: linear_probe.Solver = "lbfgs", seed: int = 0
) -> Result:
    """A linear probe on each layer, with the defaults of `linear_probe` for `solver`.

    <layer>_top1: accuracy of the layer on the test split, in percent.
    best_top1: test accuracy of the layer that is best on held-out training images.
    best_layer: position of that layer among the matching layers, from 1; an embedding counts as a layer.
    """
    widths = matching_layers(context, layers)
    held_out, metrics, fits = {}, {}, []
    for group in groups(widths):
        for name, bank, query in _features(context, {name: widths[name] for name in group}):
            fitted = linear_probe.fit(bank, solver, seed=seed, mesh=context.mesh)
            fits.append(fitted._replace(probe=None))  # kernels of all layers would fill the memory
            scores = linear_probe.predict(fitted.probe, query.x, context.mesh)[:, 0]
            metrics[f"{name}_top1"] = float(100 * hits(scores, query.y, 1).mean())
            held_out[name] = fitted.validation.max()
    best = max(held_out, key=held_out.get)
    metrics |= {"best_top1": metrics[f"{best}_top1"], "best_layer": float(1 + list(widths).index(best))}
    protocol = (
        f"depth: linear probe {solver} of {len(widths)} layers, standardized frozen features without augmentation seed={seed},"
        f" the best one chosen on 10% of train; train={context.name('bank', len(bank.y))}"
        f" test={context.name('test', len(query.y))}{linear_probe.convergence(*fits)}"
    )
    return Result(metrics, protocol)


EVALUATOR = Evaluator(
    evaluate,
    {
        "layers": Option("regular expression for the full names of layers"),
        "solver": Option("how a probe is fitted: stochastic gradient descent, logistic regression, or least squares"),
        "seed": SEED,
    },
    needs=("model",),
    data=("label",),
    check=check,
    prepare=prepare,
)


def groups(widths: dict[str, int], most: int = WIDTH) -> list[list[str]]:
    """Consecutive layers in groups of at most `most` features."""
    found, total = [], most
    for name, width in widths.items():
        if total + width > most:
            found.append([])
            total = 0
        found[-1].append(name)
        total += width
    return found


def _features(context: Context, widths: dict[str, int]) -> Iterator[tuple[str, Features, Features]]:
    """(layer, bank, query) for each layer in `widths`, from one pass over each split."""

    def encode(images):
        outputs = context.encode(images)
        return {"all": _joined([outputs[name] for name in widths])}

    train, test = (context.encode_with(encode, split, "all") for split in ("bank", "test"))
    start = 0
    for name, width in widths.items():
        columns = slice(start, start + width)
        yield name, *(Features(f.x[:, columns], f.y) for f in (train, test))
        start += width


@jax.jit
def _joined(features):
    return jnp.concatenate([pool(x) for x in features], 1)


def _by_number(name):
    return [int(number) for number in re.findall(r"\d+", name)], name

"""Linear classification of the features of every layer: which layer of a network has the best representation.

In generative transformers accuracy rises with depth, is best in the middle and falls toward the output (Chen et al. 2020, iGPT; Yu
et al. 2022, arXiv:2110.04627, appendix A); so it does in networks trained on pretext tasks (Zhang et al. 2016, arXiv:1603.08511).
Those papers pool each map to about 9,000 numbers and normalize its channels by BatchNorm without scale and offset:
`features=9600, normalization='channel', solver='sgd'`, for RotNet with `pooling='max'`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax.errors import UserError
from ssl_jax.evals.context import Context, Result
from ssl_jax.evals.evaluator import SEED, Evaluator, Option
from ssl_jax.evals.lib import linear_probe
from ssl_jax.evals.lib.features import Features, grid_side, hits, moments, pool_to_grid

LAYERS = r"embedding|(block|layer|conv|fc)\d+(_\d+)?"
WIDTH = 8192  # most features per image that one pass over the data brings to the host (a wider layer has its own pass)
NORMALIZED = {
    "feature": "standardized",
    "channel": "standardized by channel (BatchNorm without scale and offset),",
    "none": "unscaled",
}


def check(*, layers: str, **_) -> None:
    """Raises UserError for an invalid pattern."""
    try:
        re.compile(layers)
    except re.error as error:
        raise UserError(f"layers={layers!r} is no regular expression: {error}") from None


def prepare(context: Context, *, layers: str, **_) -> None:
    """Raises UserError if no layer matches."""
    matching_layers(context, layers)


def matching_layers(context: Context, pattern: str, features: int = 0) -> dict[str, int]:
    """{layer: number of features} of the layers whose full names match, sorted by the numbers in the names, the embedding first.

    Layers are pooled to at most `features` numbers, see `pool_to_grid`.
    """
    outputs = {name: x.shape for name, x in jax.eval_shape(context.encode, context.images()).items()}
    names = sorted((name for name in outputs if re.fullmatch(pattern, name)), key=_by_number)
    if not names:
        raise UserError(f"no layer fits layers={pattern!r}; the encoder has {', '.join(sorted(outputs))}")
    return {name: int(np.prod(grid_side(outputs[name], features))) * outputs[name][-1] for name in names}


def evaluate(
    context: Context,
    *,
    layers: str = LAYERS,
    features: int = 0,
    pooling: Literal["mean", "max"] = "mean",
    normalization: Literal["feature", "channel", "none"] = "feature",
    solver: linear_probe.Solver = "lbfgs",
    seed: int = 0,
) -> Result:
    """A linear probe on each layer, with the defaults of `linear_probe` for `solver`.

    <layer>_top1: accuracy of the layer on the test split, in percent.
    best_top1: test accuracy of the layer that is best on held-out training images.
    best_layer: position of that layer among the matching layers, from 1; an embedding counts as a layer.
    """
    widths = matching_layers(context, layers, features)
    held_out, metrics, fits = {}, {}, []
    for group in groups(widths):
        parts = _features(context, {name: widths[name] for name in group}, features, pooling == "max")
        for name, bank, query, channels in parts:
            if normalization == "channel":
                bank, query = by_channel(bank, query, channels)
            fitted = linear_probe.fit(bank, solver, normalization == "feature", seed=seed, mesh=context.mesh)
            fits.append(fitted._replace(probe=None))  # kernels of all layers would fill the memory
            scores = linear_probe.predict(fitted.probe, query.x, context.mesh)[:, 0]
            metrics[f"{name}_top1"] = float(100 * hits(scores, query.y, 1).mean())
            held_out[name] = fitted.validation.max()
    best = max(held_out, key=held_out.get)
    metrics |= {"best_top1": metrics[f"{best}_top1"], "best_layer": float(1 + list(widths).index(best))}
    grid = f" {pooling}-pooled to at most {features} numbers" if features else " maximum over space" if pooling == "max" else ""
    protocol = (
        f"depth: linear probe {solver} of {len(widths)} layers, {NORMALIZED[normalization]} frozen features{grid} without"
        f" augmentation seed={seed}, the best one chosen on 10% of train; train={context.name('bank', len(bank.y))}"
        f" test={context.name('test', len(query.y))}{linear_probe.convergence(*fits)}"
    )
    return Result(metrics, protocol)


EVALUATOR = Evaluator(
    evaluate,
    {
        "layers": Option("regular expression for the full names of layers, such as 'conv1|conv5'"),
        "features": Option("pool maps to the largest grid with at most so many numbers; 0 pools over the whole space", least=0),
        "pooling": Option("how pixels of a map, or tokens, are pooled: by their mean or their maximum"),
        "normalization": Option("mean and deviation of the training images are removed from each feature, each channel, or not"),
        "solver": Option("how a probe is fitted: stochastic gradient descent, logistic regression, or least squares"),
        "seed": SEED,
    },
    needs=("model",),
    data=("label",),
    check=check,
    prepare=prepare,
)


def by_channel(bank: Features, query: Features, channels: int) -> tuple[Features, Features]:
    """Both without the mean and deviation of the channels of `bank`, over its examples and positions; x [N, positions * channels]."""
    mean, std = moments(bank.x.reshape(-1, channels))
    return tuple(Features(((f.x.reshape(-1, channels) - mean) / std).reshape(f.x.shape), f.y) for f in (bank, query))


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


def _features(
    context: Context, widths: dict[str, int], most: int, largest: bool
) -> Iterator[tuple[str, Features, Features, int]]:
    """(layer, bank, query, channels) for each layer in `widths`, from one pass over each split."""
    channels = {name: x.shape[-1] for name, x in jax.eval_shape(context.encode, context.images()).items()}

    @jax.jit
    def joined(features):
        return jnp.concatenate([pool_to_grid(x, most, largest) for x in features], 1)

    def encode(images):
        outputs = context.encode(images)
        return {"all": joined([outputs[name] for name in widths])}

    train, test = (context.encode_with(encode, split, "all") for split in ("bank", "test"))
    start = 0
    for name, width in widths.items():
        columns = slice(start, start + width)
        yield name, *(Features(f.x[:, columns], f.y) for f in (train, test)), channels[name]
        start += width


def _by_number(name):
    return [int(number) for number in re.findall(r"\d+", name)], name

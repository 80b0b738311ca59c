"""Disentanglement of a code, measured on factors of variation that the data contain, with shuffled factors as baseline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from ssl_jax.errors import UserError
from ssl_jax.evals.context import Context, Result, Split
from ssl_jax.evals.evaluator import CODE, SEED, Evaluator, Option
from ssl_jax.evals.lib import factors as measures


def prepare(context: Context, *, factors: Sequence[str], **_) -> None:
    """Raises UserError for factors that the data do not have or that are not numeric."""
    first = next(iter(context.batches("train", ("image", *factors))))
    missing = [name for name in factors if name not in first]
    if missing:  # batches of unlabeled data have no label
        raise UserError(f"the data have no {', '.join(missing)}; choose other factors")
    for name in factors:
        if first[name].dtype.kind not in "biuf" or first[name].ndim > 2:
            raise UserError(f"feature {name!r} of the data is no number and no vector of numbers; choose other factors")


def evaluate(
    context: Context,
    *,
    layer: str = "code",
    factors: Sequence[str] = ("label", "pose"),
    model: Literal["lasso", "trees"] = "lasso",
    examples: int = 10000,
    seed: int = 0,
) -> Result:
    """Fitted on the first `examples` training images, tested on the first `examples` / 2 test images. MIG uses training images.

    Definitions are in `ssl_jax.evals.lib.factors`. Each entry of a vector is one factor.

    mig, disentanglement, completeness, informativeness, factorvae: scores of the code in `layer` for the features `factors`.
    <metric>_shuffled: the same score with the factors of other examples: the value of a code without information.
    """
    train, test = context.features("train", layer), context.features("test", layer)
    limits = {"train": examples, "test": max(1, examples // 2)}
    code = {split: f.x[: limits[split]].astype(np.float64) for split, f in (("train", train), ("test", test))}
    targets = {split: values(context, split, factors, len(code[split])) for split in code}
    names = [name for name in targets["train"] if len(np.unique(targets["train"][name])) > 1]
    if not names:
        raise UserError(f"factors {', '.join(factors)} are the same in all training examples; choose others")
    metrics = {}
    for suffix, shuffled in (("", False), ("_shuffled", True)):
        generator = np.random.default_rng(seed)
        order = {split: generator.permutation(len(x)) if shuffled else np.arange(len(x)) for split, x in code.items()}
        found = [measures.factor(*(targets[split][name][order[split]] for split in ("train", "test"))) for name in names]
        scores = {"mig": measures.mutual_information_gap(code["train"], [factor.train for factor in found])}
        scores |= measures.dci(code["train"], code["test"], found, model == "trees", seed)
        scores["factorvae"] = measures.factorvae(code["train"], code["test"], found, seed)
        metrics |= {name + suffix: value for name, value in scores.items()}
    bins = [f"{factor.count} bins" if factor.ordered else str(factor.count) for factor in found]
    used = ", ".join(f"{name} ({count})" for name, count in zip(names, bins, strict=True))
    protocol = (
        f"disentanglement layer={layer} D={code['train'].shape[1]} factors {used}; importance of {model} seed={seed}"
        f" train={context.name('train', len(code['train']))} test={context.name('test', len(code['test']))}"
    )
    return Result({name: float(value) for name, value in metrics.items()}, protocol)


EVALUATOR = Evaluator(
    evaluate,
    {
        "layer": CODE,
        "factors": Option("features of the data that are numbers or vectors of numbers"),
        "model": Option("regressor whose feature importance is used; trees take minutes"),
        "examples": Option("number of training images, the first ones; half as many test images", least=2),
        "seed": SEED,
    },
    needs=("model",),
    data=("factors",),
    prepare=prepare,
)


def values(context: Context, split: Split, names: Sequence[str], count: int) -> dict[str, np.ndarray]:
    """{factor: [N]} of the first `count` examples of a split; vectors are split: 'pose' -> 'pose[0]', 'pose[1]', ..."""
    found = {}
    for name, column in context.columns(split, names, count).items():
        found |= {name: column} if column.ndim == 1 else {f"{name}[{i}]": x for i, x in enumerate(column.T)}
    return found

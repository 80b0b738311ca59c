"""Disentanglement of a code, measured on factors of variation that the data contain, with shuffled factors as baseline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from ssl_jax.errors import UserError
from ssl_jax.evals.context import Context, Result, Split
from ssl_jax.evals.evaluator import CODE, SEED, Evaluator, Option
from ssl_jax.evals.lib import factors as measures


def check(*, factors: Sequence[str], ordered: Sequence[str], **_) -> None:
    """Raises UserError for an ordered factor that is not measured."""
    others = [name for name in ordered if name not in factors]
    if others:
        raise UserError(f"ordered={others[0]!r} is not in factors; choose from {', '.join(factors)}")


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
    ordered: Sequence[str] = (),
    model: Literal["lasso", "trees"] = "lasso",
    examples: int = 10000,
    seed: int = 0,
) -> Result:
    """Fitted on the first `examples` training images, tested on the first `examples` / 2 test images. MIG uses training images.

    Definitions are in `ssl_jax.evals.lib.factors`. Each entry of a vector is one factor. Whole numbers are names of classes, and
    other numbers are ordered; `ordered` names features of whole numbers that are ordered, too, such as a size.

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
        found = [
            measures.factor(*(targets[split][name][order[split]] for split in ("train", "test")), _is_ordered(name, ordered))
            for name in names
        ]
        scores = {"mig": measures.mutual_information_gap(code["train"], [factor.train for factor in found])}
        scores |= measures.dci(code["train"], code["test"], found, model == "trees", seed)
        scores["factorvae"] = measures.factorvae(code["train"], code["test"], found, seed)
        metrics |= {name + suffix: value for name, value in scores.items()}
    bins = [f"{factor.count} bins" if factor.ordered else str(factor.count) for factor in found]
    used = ", ".join(f"{name} ({count})" for name, count in zip(names, bins, strict=True))
    by_class = "" if model == "trees" or all(factor.ordered for factor in found) else ", of L1 logistic regression for classes"
    protocol = (
        f"disentanglement layer={layer} D={code['train'].shape[1]} factors {used}; importance of {model}{by_class} seed={seed}"
        f" train={context.name('train', len(code['train']))} test={context.name('test', len(code['test']))}"
    )
    return Result({name: float(value) for name, value in metrics.items()}, protocol)


EVALUATOR = Evaluator(
    evaluate,
    {
        "layer": CODE,
        "factors": Option("features of the data that are numbers or vectors of numbers"),
        "ordered": Option("those of the factors whose whole numbers are ordered; other whole numbers are names of classes"),
        "model": Option("model whose feature importance is used: sparse linear models, or trees, which take minutes"),
        "examples": Option("number of training images, the first ones; half as many test images", least=2),
        "seed": SEED,
    },
    needs=("model",),
    data=("factors",),
    check=check,
    prepare=prepare,
)


def _is_ordered(name: str, ordered: Sequence[str]) -> bool | None:
    """Whether the factor `name` ('pose[0]') is of a feature in `ordered`; None leaves it to its type."""
    return True if name.partition("[")[0] in ordered else None


def values(context: Context, split: Split, names: Sequence[str], count: int) -> dict[str, np.ndarray]:
    """{factor: [N]} of the first `count` examples of a split; vectors are split: 'pose' -> 'pose[0]', 'pose[1]', ..."""
    found = {}
    for name, column in context.columns(split, names, count).items():
        found |= {name: column} if column.ndim == 1 else {f"{name}[{i}]": x for i, x in enumerate(column.T)}
    return found

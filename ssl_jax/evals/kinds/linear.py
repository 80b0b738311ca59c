"""Linear classification of frozen features: a grid of probes is trained at once and chosen on held-out training examples.

The test split is read once, after the choice. The solvers are described in `ssl_jax.evals.lib.linear_probe`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ssl_jax.errors import UserError
from ssl_jax.evals.context import Context, Result
from ssl_jax.evals.evaluator import LAYER, SEED, Evaluator, Option
from ssl_jax.evals.lib import multilabel_probe
from ssl_jax.evals.lib.features import Features, hits, share_of_each_class
from ssl_jax.evals.lib.linear_probe import CONVERGED, Solver, convergence, fit, predict, solver_options

SOLVER_OPTIONS = ("learning_rates", "weight_decays", "epochs", "batch_size", "l2", "iterations")


def check(*, solver: str, **options) -> None:
    """Raises UserError for options that the solver does not have, or values out of range."""
    solver_options(solver, {name: options[name] for name in SOLVER_OPTIONS})


def evaluate(
    context: Context,
    *,
    solver: Solver = "sgd",
    layer: str = "pooled",
    standardize: bool = True,
    labels: float = 1.0,
    validation: float = 0.1,
    seed: int = 0,
    learning_rates: Sequence[float] | None = None,
    weight_decays: Sequence[float] | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    l2: Sequence[float] | None = None,
    iterations: int | None = None,
) -> Result:
    """Options that are None get the default of the solver in `linear_probe.DEFAULTS`; a solver has no other options.

    top1, top5: accuracy on the test split, in percent.
    validation_top1: accuracy of the chosen probe on held-out training examples, in percent.
    map, validation_map: the same for images with several classes, by solver='lbfgs': mean average precision in percent, of a
        logistic regression for each class.
    """
    given = {
        "learning_rates": learning_rates,
        "weight_decays": weight_decays,
        "epochs": epochs,
        "batch_size": batch_size,
        "l2": l2,
        "iterations": iterations,
    }
    options = solver_options(solver, given)
    bank, train = context.features("bank", layer), context.name("bank")
    if labels < 1:
        bank = share_of_each_class(bank, labels, seed)
        train = f"{labels:g} of the labels of each class of {train}: {len(bank.y)}"
    if bank.y.ndim == 2:
        return _several(context, bank, train, layer, standardize, validation, seed, **options)
    fitted = fit(bank, solver, standardize, validation, seed, context.mesh, **options)
    query = context.features("test", layer)
    scores = predict(fitted.probe, query.x, context.mesh)[:, 0]
    metrics = {f"top{k}": float(100 * hits(scores, query.y, k).mean()) for k in (1, 5)}
    metrics["validation_top1"] = float(fitted.validation.max())
    names = ("lr", "wd") if solver == "sgd" else ("l2",)
    chosen = " ".join(f"{name}={value:g}" for name, value in zip(names, fitted.setting, strict=True))
    extent = {
        "sgd": "nesterov .9 cosine zero-init epochs={epochs} batch={batch_size} lr x batch/256",
        "lbfgs": f"logistic regression to gradient {CONVERGED:g}",
        "ridge": "least squares on -1, 1",
    }[solver].format(**options)
    protocol = (
        f"linear probe {solver} ({extent}) {chosen} chosen of {len(fitted.grid)} on {validation:.0%} of train,"
        f" refitted on all, {'standardized' if standardize else 'unscaled'} frozen features without augmentation"
        f" seed={seed} layer={layer} train={train} test={context.name('test')}{convergence(fitted)}"
    )
    return Result(metrics, protocol)


def _several(context: Context, bank: Features, train: str, layer, standardize, validation, seed, *, l2, iterations) -> Result:
    """`evaluate` for label vectors."""
    fitted = multilabel_probe.fit(bank, l2, iterations, standardize, validation, seed, context.mesh)
    query = context.features("test", layer)
    score = multilabel_probe.mean_average_precision(predict(fitted.probe, query.x, context.mesh)[:, 0], query.y)
    protocol = (
        f"linear probe lbfgs (logistic regression per class) l2={fitted.l2:g} chosen of {len(l2)} on {validation:.0%} of train,"
        f" refitted on all, {'standardized' if standardize else 'unscaled'} frozen features without augmentation seed={seed}"
        f" layer={layer} train={train} test={context.name('test')}; mean over {int(query.y.any(0).sum())} classes of"
        f" scikit-learn's average precision{convergence(fitted)}"
    )
    if not query.y.any():
        raise UserError(f"{context.name('test')} has no image of any class; check the labels and the split")
    held_out = fitted.validation[np.isfinite(fitted.validation)]  # few held-out images may have no class
    return Result({"map": score} | ({"validation_map": float(held_out.max())} if held_out.size else {}), protocol)


EVALUATOR = Evaluator(
    evaluate,
    {
        "solver": Option("how a probe is fitted: stochastic gradient descent, logistic regression, or least squares"),
        "layer": LAYER,
        "standardize": Option("subtract the mean of the training features and divide by their standard deviation"),
        "labels": Option("share of the labels that is used, the same of each class and at least one of each", above=0, most=1),
        "validation": Option("share of the training images that is held out to choose the probe", above=0, below=1),
        "seed": SEED,
        "learning_rates": Option("candidate learning rates for a batch of 256; multiplied by batch_size / 256 (sgd)"),
        "weight_decays": Option("candidate weight decays (sgd)"),
        "epochs": Option("passes over the training images (sgd)"),
        "batch_size": Option("images per step (sgd)"),
        "l2": Option("candidate l2 penalties (lbfgs, ridge)"),
        "iterations": Option("largest number of iterations (lbfgs); the protocol says where they were too few"),
    },
    data=("label",),
    several=lambda solver, **_: solver == "lbfgs",
    check=check,
)

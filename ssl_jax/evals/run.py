"""Find, check and run evaluations by name. A kind is a module of this package that exports an `EVALUATOR`."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Collection, Mapping
from typing import Any

import jax

import ssl_jax.evals.kinds
from ssl_jax.errors import UserError
from ssl_jax.evals import evaluator
from ssl_jax.evals.context import PIXEL_LAYERS, Context, Result
from ssl_jax.evals.evaluator import Evaluator

Evals = Mapping[str, Mapping[str, Any]]  # {label: {'kind': ..., option: value, ...}}


def run(evals: Evals, context: Context) -> dict[str, Result]:
    """Run {label: {'kind': ..., option: value, ...}}; the metrics of each Result are named '<label>/<metric>'.

    Evaluations of a model are left out for features that belong to none. The notes of the context stand in brackets at the end of each
    protocol.
    """
    check(evals)
    check_needs(evals, context)
    results, notes = {}, "; ".join(f"{name}: {note}" for name, note in context.notes.items())
    for label, entry in evals.items():
        kind = find(entry["kind"])
        if context.pictures is None and kind.needs:
            continue
        options = evaluator.filled_in(kind, entry)
        if context.layers is not None and "layer" in options and options["layer"] not in context.layers:
            options["layer"] = context.layers[0]
        metrics, protocol, picture = kind.evaluate(context, **options)
        if notes:
            protocol = f"{protocol} [{notes}]"
        results[label] = Result({f"{label}/{name}": value for name, value in metrics.items()}, protocol, picture)
    return results


def check(evals: Evals) -> None:
    """UserError for an unknown kind, option or choice, or a value out of range, before anything is encoded."""
    for label, entry in evals.items():
        check_entry(entry, f"evals.{label}")


def check_entry(entry: Mapping[str, Any], place: str, separator: str = ".") -> None:
    """The same for one evaluation; `place` and `separator` are what an error begins with."""
    kind, valid = entry.get("kind"), kinds()
    if kind not in valid:
        raise UserError(f"{place}{separator}kind={kind!r} is unknown{evaluator.close(kind, valid)}; kinds: {', '.join(valid)}")
    evaluator.check_options(find(kind), kind, {name: value for name, value in entry.items() if name != "kind"}, place, separator)


def check_needs(evals: Evals, context: Context) -> None:
    """UserError for an evaluation of a model that does not offer what it needs, or that needs a file which is not there; before
    anything is trained.
    """
    if context.pictures is None:  # raw pixels
        return
    for label, entry in evals.items():
        kind, options = find(entry["kind"]), evaluator.filled_in(find(entry["kind"]), entry)
        for name in kind.needs:
            if name != "model" and context.pictures.offered(name) is None:
                raise UserError(
                    f"evals.{label}: kind={entry['kind']!r} needs a method that gives {name}, and this does not; leave it out"
                )
        if kind.prepare is not None:
            kind.prepare(context, **options)
        if options.get("layer", "pooled") != "pooled":  # which every encoder has
            outputs = sorted(jax.eval_shape(context.encode, context.images()))
            if options["layer"] not in outputs:
                hint = evaluator.close(options["layer"], outputs)
                raise UserError(f"evals.{label}.layer={options['layer']!r} does not exist{hint}; the encoder has {', '.join(outputs)}")


def missing_features(evals: Evals, features: Collection[str]) -> dict[str, str]:
    """{label: the first feature that the evaluation reads and that is not among the `features` of the data}."""
    found = {}
    for label, entry in evals.items():
        needed = evaluator.features_of_data(find(entry["kind"]), entry)
        missing = [name for name in needed if name not in features]
        found |= {label: missing[0]} if missing else {}
    return found


def of_pixels(evals: Evals) -> dict[str, Mapping[str, Any]]:
    """Those of the evaluations that raw pixels can have, of the same layer."""
    return {
        label: entry for label, entry in evals.items()
        if not find(entry["kind"]).needs and entry.get("layer", "pooled") in PIXEL_LAYERS
    }  # fmt: skip


def complete(entry: Mapping[str, Any]) -> dict[str, Any]:
    """{'kind': ..., option: value, ...} with every option, and tuples as JSON has them."""
    options = evaluator.filled_in(find(entry["kind"]), entry)
    return {"kind": entry["kind"]} | {name: list(x) if isinstance(x, tuple) else x for name, x in options.items()}


def same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two entries are the same evaluation, whichever of its options are given."""
    return one.get("kind") == other.get("kind") in kinds() and complete(one) == complete(other)


@functools.cache
def kinds() -> list[str]:
    """Names of all kinds of evaluations."""
    names = (module.name for module in pkgutil.iter_modules(ssl_jax.evals.kinds.__path__))
    return sorted(name for name in names if hasattr(importlib.import_module(f"ssl_jax.evals.kinds.{name}"), "EVALUATOR"))


def find(kind: str) -> Evaluator:
    """The record of a kind."""
    return importlib.import_module(f"ssl_jax.evals.kinds.{kind}").EVALUATOR

"""Find, check and run evaluations by name. A kind is a module in `kinds` that exports an `EVALUATOR`."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
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

    A context without a model skips the evaluations that need one. Each protocol ends with the notes of the context in brackets.
    """
    check(evals)
    check_needs(evals, context)
    results, notes = {}, "; ".join(f"{name}: {note}" for name, note in context.notes.items())
    for label, entry in evals.items():
        kind = find(entry["kind"])
        if context.model is None and kind.needs:
            continue
        options = evaluator.with_defaults(kind, entry)
        if context.layers is not None and "layer" in options and options["layer"] not in context.layers:
            options["layer"] = context.layers[0]
        metrics, protocol, picture = kind.evaluate(context, **options)
        if notes:
            protocol = f"{protocol} [{notes}]"
        results[label] = Result({f"{label}/{name}": value for name, value in metrics.items()}, protocol, picture)
    return results


def check(evals: Evals) -> None:
    """Raises UserError for an unknown kind, option or choice, or a value out of range. Nothing is loaded or compiled."""
    for label, entry in evals.items():
        check_entry(entry, f"evals.{label}")


def check_entry(entry: Mapping[str, Any], place: str, separator: str = ".") -> None:
    """`check` of one evaluation; `place` and `separator` begin the message."""
    kind, valid = entry.get("kind"), kinds()
    if kind not in valid:
        raise UserError(f"{place}{separator}kind={kind!r} is unknown{evaluator.suggestion(kind, valid)}; kinds: {', '.join(valid)}")
    evaluator.check_options(find(kind), kind, {name: value for name, value in entry.items() if name != "kind"}, place, separator)


def check_needs(evals: Evals, context: Context) -> None:
    """Raises UserError before training if an evaluation needs a function, layer or file that the model does not have."""
    if context.model is None:  # raw pixels
        return
    for label, entry in evals.items():
        kind, options = find(entry["kind"]), evaluator.with_defaults(find(entry["kind"]), entry)
        for name in kind.needs:
            if name != "model" and context.model.offered(name) is None:
                raise UserError(
                    f"evals.{label}: kind={entry['kind']!r} needs a method that gives {name}, and this does not; leave it out"
                )
        if kind.prepare is not None:
            kind.prepare(context, **options)
        if options.get("layer", "pooled") != "pooled":  # every encoder has 'pooled'
            outputs = sorted(jax.eval_shape(context.encode, context.images()))
            if options["layer"] not in outputs:
                hint = evaluator.suggestion(options["layer"], outputs)
                layers = ", ".join(outputs)
                raise UserError(f"evals.{label}.layer={options['layer']!r} does not exist{hint}; the encoder has {layers}")


def pixel_evals(evals: Evals) -> dict[str, Mapping[str, Any]]:
    """The evaluations that also apply to raw pixels: they need no model and name a layer that pixels have."""
    return {
        label: entry for label, entry in evals.items()
        if not find(entry["kind"]).needs and entry.get("layer", "pooled") in PIXEL_LAYERS
    }  # fmt: skip


def complete(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The entry with all options, defaults included; tuples become lists, as in JSON."""
    options = evaluator.with_defaults(find(entry["kind"]), entry)
    return {"kind": entry["kind"]} | {name: list(x) if isinstance(x, tuple) else x for name, x in options.items()}


def same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two entries are equal once defaults are filled in."""
    return one.get("kind") == other.get("kind") in kinds() and complete(one) == complete(other)


def kinds() -> list[str]:
    """Names of all kinds of evaluations: the modules in `kinds`, which are not imported."""
    return sorted(module.name for module in pkgutil.iter_modules(ssl_jax.evals.kinds.__path__))


def find(kind: str) -> Evaluator:
    """Import a kind and return its record."""
    return importlib.import_module(f"ssl_jax.evals.kinds.{kind}").EVALUATOR

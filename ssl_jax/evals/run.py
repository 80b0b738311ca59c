"""Find, check and run the evaluators that a config names. A kind is a module of this package with an `evaluate`."""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from types import ModuleType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import ssl_jax.evals.kinds
from ssl_jax.errors import UserError
from ssl_jax.evals.context import Context, Result


def run(evals: Mapping[str, Mapping[str, Any]], context: Context) -> dict[str, Result]:
    """Run {label: {'kind': ..., option: value, ...}}; the metrics of each Result are named '<label>/<metric>'.

    Evaluations of a model (whose modules have a NEEDS) are left out for features that belong to none. The notes of the context stand in
    brackets at the end of each protocol.
    """
    check(evals)
    check_needs(evals, context)
    results, notes = {}, "; ".join(f"{name}: {note}" for name, note in context.notes.items())
    for label, entry in evals.items():
        if context.pictures is None and hasattr(_evaluator(label, entry), "NEEDS"):
            continue
        options = _options(entry)
        if context.layers is not None and "layer" in options and options["layer"] not in context.layers:
            options["layer"] = context.layers[0]
        metrics, protocol, picture = _evaluator(label, entry).evaluate(context, **options)
        told = f"{protocol} [{notes}]" if notes else protocol
        results[label] = Result({f"{label}/{name}": value for name, value in metrics.items()}, told, picture)
    return results


def check(evals: Mapping[str, Mapping[str, Any]]) -> None:
    """UserError for an unknown kind, option or choice, or a value out of range, before anything is encoded."""
    for label, entry in evals.items():
        module = _evaluator(label, entry)
        parameters = inspect.signature(module.evaluate).parameters
        allowed = [name for name, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY]
        hints = get_type_hints(module.evaluate)
        for name, value in _options(entry).items():
            if name not in allowed:
                shown = f"options of {entry['kind']!r}: {', '.join(['kind', *allowed])}"
                raise UserError(f"evals.{label}.{name}: unknown option{_close(name, allowed)}; {shown}")
            choices = get_args(hints[name]) if get_origin(hints[name]) is Literal else None
            if choices and value not in choices:
                raise UserError(f"evals.{label}.{name}={value!r}{_close(value, choices)}; choose one of {choices}")
        if hasattr(module, "check_options"):
            try:
                module.check_options(**_options(entry))
            except UserError as error:
                raise UserError(f"evals.{label}: {error}") from None


def check_needs(evals: Mapping[str, Mapping[str, Any]], context: Context) -> None:
    """UserError for an evaluation of a model (its module names in NEEDS a field of `Pictures`, or None where features are enough) that
    the method offers nothing for, or that needs a file which is not there; before anything is trained.
    """
    for label, entry in evals.items():
        module = _evaluator(label, entry)
        if not hasattr(module, "NEEDS") or context.pictures is None:
            continue
        if module.NEEDS is not None and getattr(context.pictures, module.NEEDS) is None:
            kind = entry["kind"]
            raise UserError(f"evals.{label}: kind={kind!r} needs a method that gives {module.NEEDS}, and this does not; leave it out")
        if hasattr(module, "prepare"):
            module.prepare(context, **_options(entry))


def kinds() -> list[str]:
    """Names of all evaluators."""
    names = (module.name for module in pkgutil.iter_modules(ssl_jax.evals.kinds.__path__))
    return sorted(name for name in names if hasattr(_import(name), "evaluate"))


def _evaluator(label: str, entry: Mapping[str, Any]) -> ModuleType:
    kind = entry.get("kind")
    valid = kinds()
    if kind not in valid:
        raise UserError(f"evals.{label}.kind={kind!r} is unknown{_close(kind, valid)}; kinds: {', '.join(valid)}")
    return _import(kind)


def _import(name: str) -> ModuleType:
    return importlib.import_module(f"ssl_jax.evals.kinds.{name}")


def _options(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name != "kind"}


def _close(name: Any, valid: Any) -> str:
    matches = difflib.get_close_matches(str(name), valid, n=2)
    return f" (did you mean {' or '.join(map(repr, matches))}?)" if matches else ""

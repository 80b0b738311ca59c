"""The reference page of the evaluations as Markdown, built from their records: kinds, needs, options with defaults, metrics."""

from __future__ import annotations

import importlib
import inspect
import typing
from collections.abc import Sequence

from ssl_jax.evals import evaluator, run


def markdown() -> str:
    """One section per kind, in alphabetical order."""
    return "\n".join(section(kind) for kind in run.kinds())


def section(kind: str) -> str:
    """The section of one kind: what it measures, what it needs, a table of its options, and its metrics."""
    record = run.find(kind)
    about, *more = inspect.getdoc(importlib.import_module(record.evaluate.__module__)).split("\n\n")
    lines = [f"## {kind}", "", _one_line(about), ""]
    for paragraph in more:
        lines += [_one_line(paragraph), ""]
    lines += [needs(record), "", "| option | default | values | meaning |", "|---|---|---|---|"]
    for name, default in evaluator.defaults(record).items():
        cells = (f"`{name}`", f"`{default!r}`", values(record, name), record.options[name].meaning)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([*lines, "", "**Metrics.**", "", *_metrics(inspect.getdoc(record.evaluate)), ""])


def needs(record: evaluator.Evaluator) -> str:
    """One sentence: what a kind needs of the model and of the data."""
    offered = " and ".join(f"`{name}`" for name in record.needs if name != "model")
    model = f"a method that provides {offered}" if offered else "a model" if record.needs else "any features, also raw pixels"
    options = evaluator.defaults(record)
    read = [f"the features named by `{name}`" if name in options else f"`{name}`" for name in record.data]
    return f"Needs {model}. It reads {' and '.join(['images', *read])} from the data."


def values(record: evaluator.Evaluator, name: str) -> str:
    """The type and range of an option, or its allowed values."""
    words = evaluator.choices(record, name)
    if words:
        return ", ".join(f"`{word}`" for word in words)
    return " ".join([_type(typing.get_type_hints(record.evaluate)[name]), evaluator.limits(record.options[name])]).strip()


def _type(hint) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Sequence:
        return f"tuple of {_type(args[0])}"
    if args:
        return " or ".join(_type(arg) for arg in args)
    return "None" if hint is type(None) else hint.__name__


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _metrics(text: str) -> list[str]:
    """The docstring of `evaluate` as Markdown: a line 'name, name: meaning' becomes a list item; other lines stay."""
    lines: list[str] = []
    for line in text.splitlines():
        names, colon, meaning = line.strip().partition(": ")
        if colon and all(name.strip().isidentifier() or "<" in name for name in names.split(",")):
            if lines and lines[-1] and not lines[-1].startswith(("- ", "  ")):
                lines.append("")
            lines.append(f"- **{names.strip()}**: {meaning}".replace("<", "&lt;"))
        elif lines and lines[-1].startswith(("- ", "  ")) and line.strip():
            lines.append(f"  {line.strip()}")
        else:
            lines.append(line.strip())
    return lines

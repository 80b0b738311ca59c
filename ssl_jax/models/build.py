"""Build modules from parts of a config, with one-line messages for misspelled names."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn

from ssl_jax.errors import UserError


def build(kinds: Mapping[str, Callable[..., nn.Module]], part: str, spec: Mapping[str, Any], **given) -> nn.Module:
    """The module of `spec`, dict(name='resnet', depth=18, ...): `kinds[name]` with the other fields.

    Args:
        kinds: {name: module class, or function that returns a module}.
        part: place of `spec` in the config: 'encoder' is config.model.encoder.
        given: fields that the config may not set; kinds without such a field ignore it.

    Raises:
        UserError: an unknown name or field (names the nearest valid ones), a missing field, or a value that the class rejects.
    """
    fields = dict(spec)
    name = fields.pop("name", None)
    if name not in kinds:
        raise UserError(unknown(f"config.model.{part}.name", name, kinds))
    return construct(kinds[name], f"{part} ({name})", fields, **given)


def construct(kind: Callable[..., Any], part: str, fields: Mapping[str, Any], **given) -> Any:
    """`kind(**fields, **given)` with `fields` from a part of the config: 'head' is config.model.head.

    Args:
        kind: a class or function; its own exceptions keep their traceback.
        given: arguments that the config may not set; kinds without such an argument ignore it.

    Raises:
        UserError: a field that `kind` does not have (names the nearest valid ones), or a missing field.
    """
    parameters = inspect.signature(kind).parameters
    valid = [field for field in parameters if field not in ("name", "parent", *given)]
    for field in fields:
        if field not in valid:
            raise UserError(unknown(f"config.model.{part}", field, valid))
    missing = [field for field in valid if parameters[field].default is inspect.Parameter.empty and field not in fields]
    if missing:
        raise UserError(f"config.model.{part} needs {missing[0]!r}")
    return kind(**fields, **{field: value for field, value in given.items() if field in parameters})


def unknown(where: str, wrong: Any, valid: Iterable[str]) -> str:
    """Error message for a name that does not exist: nearest and valid names."""
    close = difflib.get_close_matches(str(wrong), list(valid), n=2)
    hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
    return f"{where} has no {wrong!r}; {hint}valid: {', '.join(valid) or 'none'}"

"""`--config.a.b=value` arguments: parsed as people type them, cast to the type of the value that they replace."""

from __future__ import annotations

import ast
import difflib
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ml_collections

from ssl_jax.engine.renamed_keys import refuse_old_names, refuse_override
from ssl_jax.errors import UserError
from ssl_jax.experiment.config_values import check_values, flatten

# Tables whose names are the user's own. An override may replace one as a whole, such as --config.evals={}.
OPEN = ("data.features", "data.kinds", "data.vocabulary", "data.specs", "evals", "references", "stages")
FEATURES = OPEN[:4]  # tables to which an override may add a name
PAIRS = ("data.ops", "data.eval_ops", "sharding", "warm_start.rules")  # lists of pairs, of which people type a single one as it is
DERIVED = ("data.image_shape", "data.num_classes", "data.examples")  # filled in from the data
DEPTH = 40  # of brackets in a value
TRUTH = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}

_PART = re.compile(r"([^.\[\]]+)((?:\[[^\[\]]*\])*)")


def apply_overrides(config: ml_collections.ConfigDict, overrides: Sequence[str]) -> ml_collections.ConfigDict:
    """Apply `--config.a.b=value` arguments to `config`, in place, and check all its values.

    `--config.evals.NAME.kind=KIND` adds an evaluation, and `--config.evals.NAME.option=value` an option of one. The tables of
    FEATURES take any key. Entries of sequences are named by index: `--config.model.mean[0]=0.5`.

    Raises:
        UserError: an unknown or renamed key, a value of the wrong type or out of range, or an index that does not exist.
    """
    pairs = []
    for argument in overrides:
        name, equals, value = argument.removeprefix("--config.").partition("=")
        if not argument.startswith("--config.") or not equals:
            raise UserError(f"argument {argument!r} is not understood; overrides look like --config.optim.net.lr=0.1")
        refuse_override(name, value)
        pairs.append((name, value))
    before = flatten(config)
    new = {name.split(".")[1] for name, _ in pairs if re.fullmatch(r"evals\.\w+\.kind", name)}  # labels that may be added
    with config.unlocked():
        for name, value in pairs:
            _set(config, _path(name), value, new)
    check_values(config, before)
    if overrides:
        refuse_old_names(config)
    return config


def refuse_derived(overrides: Iterable[str]) -> None:
    """Raises UserError for an override of a key that is filled in from the data, and so would have no effect."""
    for argument in overrides:
        name = argument.removeprefix("--config.").partition("=")[0].partition("[")[0]
        if name in DERIVED:
            raise UserError(f"config.{name} is filled in from the data, so setting it has no effect; leave it out (rehearse takes it)")


def literal(text: str) -> Any:
    """`text` as a Python literal, where `dict(a=1)` is one too, else as a word."""
    try:
        return _literal(text)
    except (ValueError, SyntaxError):
        return text


def _literal(text: str) -> Any:
    """As `literal`. Raises ValueError or SyntaxError where `text` is no literal."""
    deepest = level = 0
    for c in text:
        level += (c in "([{") - (c in ")]}")
        deepest = max(deepest, level)
    if deepest > DEPTH:
        raise ValueError("too many brackets")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as of '1or 2'
            tree = ast.parse(text.strip(), mode="eval")
        return ast.literal_eval(_Dicts().visit(tree))
    except (MemoryError, RecursionError, TypeError) as error:  # absurd nesting, or a list as the key of a dict
        raise ValueError(str(error)) from None


class _Dicts(ast.NodeTransformer):
    """Calls `dict(a=1)` as displays {'a': 1}."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        named = all(keyword.arg is not None for keyword in node.keywords)
        if not isinstance(node.func, ast.Name) or node.func.id != "dict" or node.args or not named:
            return node
        return ast.Dict([ast.Constant(keyword.arg) for keyword in node.keywords], [keyword.value for keyword in node.keywords])


def _path(name: str) -> list[str | int]:
    """'views[0].a' -> ['views', 0, 'a']. Raises UserError for an empty part or an index that is no whole number."""
    path: list[str | int] = []
    for part in name.split("."):
        match = _PART.fullmatch(part)
        if not match:
            raise UserError(f"config.{name} is not understood; keys are separated by dots, like config.optim.net.lr")
        path.append(match[1])
        for index in re.findall(r"\[([^\[\]]*)\]", match[2]):
            if not re.fullmatch(r"-?\d{1,9}", index):
                raise UserError(f"config.{name}: the index {index!r} is no whole number")
            path.append(int(index))
    return path


def _set(config: ml_collections.ConfigDict, path: list[str | int], text: str, new: set[str]) -> None:
    """Set the value at `path`; `new` are the labels of evaluations that may be added."""
    node: Any = config
    for depth, step in enumerate(path):
        where, left = _dotted(path[:depth]), path[depth + 1 :]
        here = _dotted(path[: depth + 1])
        if step not in node and not left and (where in FEATURES or re.fullmatch(r"evals\.\w+", where)):
            value = _plain(literal(text))
            if isinstance(value, dict):
                raise UserError(f"config.{here}={text} must be one value, not a table")
        elif step not in node and where == "evals" and step in new and len(left) == 1:
            node[step] = {}
            node = node[step]
            continue
        elif step not in node:
            raise UserError(_unknown(node, where, step))
        elif isinstance(node[step], ml_collections.ConfigDict) and left and isinstance(left[0], str):
            node = node[step]
            continue
        elif where in FEATURES:
            value = _plain(literal(text))
        else:
            value = _replaced(node[step], left, text, here, None if left else node.get_type(step))
        if step in node and (isinstance(value, dict) or isinstance(node[step], ml_collections.ConfigDict)):
            del node[step]  # a table is replaced as a whole, and ConfigDict would merge it or refuse another type
        try:
            node[step] = value
        except (TypeError, ValueError, KeyError, AttributeError) as error:  # a name that a table cannot have
            raise UserError(f"config.{here}={text}: {str(error).splitlines()[0]}") from None
        return


def _unknown(node: Mapping, where: str, step: str | int) -> str:
    if isinstance(step, int):
        return f"config.{where} is a table of keys and has no index [{step}]; it has {', '.join(sorted(node)) or 'no keys'}"
    keys, place = sorted(node), f"config.{where}" if where else "config"
    near = difflib.get_close_matches(step, keys, 1)
    hint = f"did you mean {place}.{near[0]}?" if near else f"{place} has {', '.join(keys) or 'no keys'}"
    hint += f"; --config.evals.{step}.kind=KIND adds one" if where == "evals" else ""
    return f"unknown key {place}.{step}; {hint}"


def _dotted(path: Sequence[str | int]) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).lstrip(".")


def _replaced(value: Any, path: Sequence[str | int], text: str, where: str, declared: type | None) -> Any:
    """`value` with the part at `path` replaced by `text`, cast to the type of what was there.

    Args:
        where: the dotted key of `value`, for messages.
        declared: the type of a value that is None.
    """
    if not path:
        return _cast(value, text, where, declared)
    step, *left = path
    if isinstance(step, int):
        if not isinstance(value, list | tuple):
            raise UserError(f"config.{where} is no sequence and has no index [{step}]; leave the index out")
        if not -len(value) <= step < len(value):
            raise UserError(f"config.{where}[{step}] does not exist; config.{where} has {len(value)} entries, counted from 0")
        items = list(value)
        items[step] = _replaced(items[step], left, text, f"{where}[{step}]", None)
        return tuple(items)
    if not isinstance(value, Mapping):
        raise UserError(f"unknown key config.{where}.{step}; config.{where} is no table")
    if step not in value:
        raise UserError(_unknown(value, where, step))
    return {**value, step: _replaced(value[step], left, text, f"{where}.{step}", None)}


def _cast(old: Any, text: str, where: str, declared: type | None) -> Any:
    """`text` as the type of `old`, or as `declared` where `old` is None. Raises UserError."""
    kind = declared if old is None and declared is not None else type(old)
    value = literal(text)
    if value is None and old is None:
        return None
    if kind is str:
        return value if isinstance(value, str) else text  # also a word in quotes
    if where == "views":
        fits, expected = isinstance(value, dict | list | tuple), "a sequence of recipes, one per view, or groups of them by name"
    elif hasattr(old, "items") and where in OPEN:
        fits, expected = isinstance(value, dict), "a table, such as {} or dict(name=...)"
    elif hasattr(old, "items"):
        keys = [f"--config.{where}.{key}=..." for key in old]
        raise UserError(f"config.{where} is a table; set its keys one by one" + (f", like {keys[0]}" if keys else ""))
    elif kind is bool:
        value = TRUTH.get(text.strip().lower())
        fits, expected = value is not None, "True or False"
    elif kind is int:
        fits, expected = _is_number(value) and (isinstance(value, int) or value.is_integer()), "a whole number"
        value = int(value) if fits else value
    elif kind is float:
        value = float(text) if text.strip().lower() in ("nan", "inf", "-inf") else value
        fits, expected = _is_number(value), "a number"
        value = _float(value) if fits else value
    elif kind in (tuple, list):
        fits = not isinstance(value, str | dict) and value is not None
        expected = "a sequence in brackets, such as (1, 2) or ('a', 'b'), with words in quotes"
        value = value if isinstance(value, list | tuple) else (value,)
        value = (value,) if where in PAIRS and _is_pair(value) else value
    else:
        fits, expected = True, ""  # the key had no type
    if not fits:
        raise UserError(f"config.{where}={text} must be {expected}")
    return _plain(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:  # a whole number of hundreds of digits; refused as infinite
        return float("inf")


def _is_pair(value: Sequence) -> bool:
    """Whether a list of pairs is one pair: it begins with a name, not with a pair."""
    return len(value) == 2 and isinstance(value[0], str)


def _plain(value: Any) -> Any:
    """`value` with tuples in place of lists, so that a config compares equal however it was typed."""
    if isinstance(value, list | tuple):
        return tuple(_plain(each) for each in value)
    return {key: _plain(each) for key, each in value.items()} if isinstance(value, dict) else value

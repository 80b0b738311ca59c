"""`--config.a.b=value` arguments: parsed as people type them, cast to the type of the value that they replace."""

from __future__ import annotations

import ast
import difflib
import re
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
TRUTH = {"true": True, "1": True, "false": False, "0": False}

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
        if step not in node:
            if not (where in FEATURES and not left) and not (where == "evals" and len(left) == 1 and step in new) \
                    and not (_is_evaluation(path[:depth]) and not left):  # fmt: skip
                raise UserError(_unknown(node, where, step))
            if left:
                node[step] = ml_collections.ConfigDict()
            else:
                node[step] = _plain(literal(text))
                return
        value = node[step]
        here = _dotted(path[: depth + 1])
        if isinstance(value, ml_collections.ConfigDict) and left and isinstance(left[0], str):
            node = value
            continue
        if not left and where in FEATURES:
            new_value = _plain(literal(text))
        else:
            new_value = _replaced(value, left, text, here, None if left else node.get_type(step))
        if isinstance(new_value, dict) or isinstance(value, ml_collections.ConfigDict):
            del node[step]  # else a table of another type would be refused
        try:
            node[step] = new_value
        except (TypeError, ValueError, KeyError, AttributeError) as error:  # a name that a table cannot have
            raise UserError(f"config.{here}={text}: {str(error).splitlines()[0]}") from None
        return


def _is_evaluation(path: Sequence[str | int]) -> bool:
    return len(path) == 2 and path[0] == "evals"


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
    """`text` as the type of `old`. Raises UserError."""

    def refuse(expected: str):
        raise UserError(f"config.{where}={text} must be {expected}")

    kind = declared if old is None and declared is not None else type(old)
    value = literal(text)
    if value is None and old is None:
        return None
    if kind is str:
        return value if isinstance(value, str) else text  # also a word in quotes
    if isinstance(old, ml_collections.ConfigDict | dict) or where == "views":
        if where == "views" and isinstance(value, dict | list | tuple):
            return _plain(value)
        if where in OPEN and isinstance(value, dict):
            return _plain(value)
        if where in OPEN:
            refuse("a table, such as {} or dict(name=...)")
        if where == "views":
            refuse("a sequence of recipes, one per view")
        keys = list(old)
        example = f"--config.{where}.{keys[0]}=..." if keys else "one by one"
        raise UserError(f"config.{where} is a table; set its keys {example if not keys else f'one by one, like {example}'}")
    if kind is bool:
        return TRUTH[text.strip().lower()] if text.strip().lower() in TRUTH else refuse("True or False")
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        if number and (isinstance(value, int) or value.is_integer()):
            return int(value)
        refuse("a whole number")
    if kind is float:
        if number or text.strip().lower() in ("nan", "inf", "-inf"):
            return _float(value if number else text)
        refuse("a number")
    if kind in (tuple, list):
        if isinstance(value, str | dict) or value is None:
            refuse("a sequence in brackets, such as (1, 2) or ('a',)" + (", with quotes around words" if "(" in text or "[" in text else ""))
        value = _plain(value if isinstance(value, list | tuple) else (value,))
        return (value,) if where in PAIRS and _is_pair(value) else value
    return _plain(value)  # the key had no type


def _float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:  # a whole number of hundreds of digits; refused as infinite
        return float("inf")


def _is_pair(value: tuple) -> bool:
    """Whether a list of pairs is one pair: it begins with a name, not with a pair."""
    return len(value) == 2 and isinstance(value[0], str)


def _plain(value: Any) -> Any:
    """`value` with tuples in place of lists, so that a config compares equal however it was typed."""
    if isinstance(value, list | tuple):
        return tuple(_plain(each) for each in value)
    return {key: _plain(each) for key, each in value.items()} if isinstance(value, dict) else value

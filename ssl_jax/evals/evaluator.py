"""The contract of an evaluation: the record that each module in `kinds` exports.

A kind of evaluation is one module in `ssl_jax/evals/kinds`. The file has the name of the kind and exports `EVALUATOR`. An example:

    def evaluate(context: Context, *, k: int = 20, layer: str = "pooled") -> Result:
        '''top1: percent of the test split whose label ...'''
        bank, query = context.features("train", layer), context.features("test", layer)
        ...
        return Result({"top1": 71.2}, f"kNN k={k} layer={layer} bank={context.name('train')} query={context.name('test')}")

    EVALUATOR = Evaluator(
        evaluate, {"k": Option("neighbors that vote", least=1), "layer": LAYER}, data=("label",),
    )

The keyword arguments of `evaluate` are the options; their defaults and types stand only there. `run` finds the module, checks the
options before anything is compiled, and calls `evaluate` with all options. Code that kinds share is in `ssl_jax/evals/lib`. No kind
imports another.
"""

from __future__ import annotations

import difflib
import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from ssl_jax.errors import UserError
from ssl_jax.evals.context import Result

MOST_INT, MOST_FLOAT = 2**31 - 1, 1e38  # of 32 bits, as devices compute


class Option(NamedTuple):
    """The meaning of an option and the range of its value. For a tuple it is the range of each entry; None is always allowed."""

    meaning: str  # one line
    least: float | None = None  # smallest allowed value
    above: float | None = None  # exclusive lower bound
    most: float | None = None  # largest allowed value
    below: float | None = None  # exclusive upper bound


class Evaluator(NamedTuple):
    """One kind of evaluation."""

    # (context, *, option=default, ...) -> Result(metrics, protocol[, picture]). Its docstring defines each metric.
    evaluate: Callable[..., Result]
    options: Mapping[str, Option]  # exactly the keyword arguments of `evaluate`
    # Fields of `EvaluatedModel` or `ModelFns` that the model must provide, or 'model' where its features are enough.
    # Empty: any features will do, also raw pixels.
    needs: tuple[str, ...] = ()
    # Features of the data beside the image. The name of an option stands for the features in its value.
    data: tuple[str, ...] = ()
    several: Callable[..., bool] | None = None  # (**options): whether 'label' may be a vector of 0 and 1, one for each class
    smallest: Mapping[str, int] = {}  # {split: the examples that it must have}
    # {option: (split, n)}: the largest value is n below the examples of the split. An option may stand for the split.
    at_most: Mapping[str, tuple[str, int]] = {}
    check: Callable[..., None] | None = None  # (**options): UserError for values that contradict each other; loads nothing
    prepare: Callable[..., None] | None = None  # (context, **options): UserError for a missing layer or file, before training


# Options that many kinds have.
LAYER = Option("layer of the encoder; maps and tokens are averaged over space")
CODE = Option("layer of the encoder that holds the code")
SEED = Option("seed of all random choices", least=0)
EXTRACTOR = Option("network whose features are compared: random_conv, inception:PATH, or a folder written by `launch.py export`")
RESIZE = Option("how images are resized for the Inception network")
ACCEPTANCE = Option("share of the samples of each class that is kept; a classifier chooses the best ones", above=0, most=1)


def defaults(kind: Evaluator) -> dict[str, Any]:
    """{option: default value} of a kind."""
    return {name: p.default for name, p in _keywords(kind).items()}


def with_defaults(kind: Evaluator, given: Mapping[str, Any]) -> dict[str, Any]:
    """{option: value} of all options of a kind: those in `given`, defaults for the rest."""
    return {**defaults(kind), **{name: value for name, value in given.items() if name != "kind"}}


def choices(kind: Evaluator, name: str) -> tuple[str, ...]:
    """The allowed values of an option with a Literal type, () for other types."""
    hint = typing.get_type_hints(kind.evaluate)[name]
    return typing.get_args(hint) if typing.get_origin(hint) is Literal else ()


def check_options(kind: Evaluator, name: str, given: Mapping[str, Any], place: str, separator: str = ".") -> None:
    """Raises UserError for an unknown option, a wrong type, a value out of range, or values that contradict each other.

    Args:
      name: the name of the kind.
      given: {option: value}.
      place, separator: the beginning of the message: 'evals.knn' and '.', or '--eval=knn,k=0' and ': '.
    """
    hints = typing.get_type_hints(kind.evaluate)
    allowed = list(_keywords(kind))
    for option, value in given.items():
        if option not in allowed:
            there = f"options of {name!r}: {', '.join(allowed)}"
            raise UserError(f"{place}{separator}{option}: unknown option{suggestion(option, allowed)}; {there}")
        optional = value == () and _keywords(kind)[option].default == ()
        problem = "" if optional else _problem(hints[option], kind.options[option], value)
        if problem:
            raise UserError(f"{place}{separator}{option}={value!r}{problem}")
    if kind.check is not None:
        try:
            kind.check(**with_defaults(kind, given))
        except UserError as error:
            raise UserError(f"{place}: {error}") from None


def data_features(kind: Evaluator, given: Mapping[str, Any]) -> tuple[str, ...]:
    """The features of the data that a kind reads with the options `given`."""
    options, names = with_defaults(kind, given), []
    for name in kind.data:
        value = options.get(name, name)
        names += [value] if isinstance(value, str) else value
    return tuple(names)


def limits(option: Option) -> str:
    """The range of an option in words; '' without bounds."""
    words = {"at least": option.least, "above": option.above, "at most": option.most, "below": option.below}
    return " and ".join(f"{word} {bound:g}" for word, bound in words.items() if bound is not None)


def suggestion(name: Any, valid: Sequence) -> str:
    """' (did you mean ...?)', or '' without a close match in `valid`."""
    matches = difflib.get_close_matches(str(name), [str(each) for each in valid], n=2)
    return f" (did you mean {' or '.join(map(repr, matches))}?)" if matches else ""


def _keywords(kind: Evaluator) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(kind.evaluate).parameters
    return {name: p for name, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}


def _problem(hint: Any, option: Option, value: Any) -> str:
    """The end of an error message that begins with the option and its value; '' for a valid value."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "" if value in args else f"{suggestion(value, args)}; choose one of {args}"
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return ""
        (hint,) = (arg for arg in args if arg is not types.NoneType)
        return _problem(hint, option, value)
    if origin is Sequence:
        if not isinstance(value, list | tuple):
            return f" must be a tuple, such as ({value!r},)"
        if not value:
            return " must not be empty"
        problems = (_problem(args[0], option, each) for each in value)
        return next((f": each{problem}" for problem in problems if problem), "")
    expected, words = {
        int: (int, "a whole number"), float: (int | float, "a number"), bool: (bool, "True or False"), str: (str, "a word"),
    }[hint]  # fmt: skip
    if not isinstance(value, expected) or (isinstance(value, bool) and hint is not bool):
        return f" must be {words}"
    if hint is float and not abs(value) <= MOST_FLOAT:
        return " must be finite"
    if hint is int and abs(value) > MOST_INT:
        return f" must be at most {MOST_INT}"
    return "" if _in_range(option, value) else f" must be {limits(option)}"


def _in_range(option: Option, value: Any) -> bool:
    return (
        (option.least is None or value >= option.least)
        and (option.above is None or value > option.above)
        and (option.most is None or value <= option.most)
        and (option.below is None or value < option.below)
    )  # a NaN is in no range

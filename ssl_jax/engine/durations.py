"""Durations of a config in any unit ('45 epochs', '10_000 steps', '3M examples') and their conversion to steps."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import Any, NamedTuple

from ssl_jax.errors import UserError

UNITS = ("steps", "epochs", "examples")
FORMS = "'200 steps', '45 epochs' or '3M examples'"
SUFFIXES = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9}
NOISE = Fraction(1, 10**6)  # steps of rounding to ignore: '0.3333333333333333 epochs' of nine steps is three steps

_NUMBER = re.compile(r"(\d[\d_]*)?(\.\d+)?(e[+-]?\d{1,2})?\s*([kMB])?")
_DURATION = re.compile(r"\s*(?P<number>\S.*?)\s*(?P<unit>[a-z]+)\s*")


class Duration(NamedTuple):
    """An exact amount of one of UNITS."""

    amount: Fraction
    unit: str

    def __str__(self) -> str:
        amount = self.amount.numerator if self.amount.denominator == 1 else float(self.amount)
        return f"{amount} {self.unit}"


def parse(text: Any, key: str) -> Duration:
    """The duration in `text`. `key` is the dotted name of the config key, for messages.

    Numbers may have underscores, a fraction, an exponent and one of the suffixes k, M, B. Units may be singular.

    Raises:
        UserError: no unit, no number, a negative number, or a fraction of a step or of an example.
    """
    if text is None or text == "":
        raise UserError(f"{key} is not set; give a duration such as {FORMS}")
    if isinstance(text, bool | int | float):
        raise UserError(f"{key}={text!r} has no unit; say '{text} steps', '{text} epochs' or '{text} examples'")
    whole = _DURATION.fullmatch(text) if isinstance(text, str) else None
    unit = next((unit for unit in UNITS if whole and whole["unit"] in (unit, unit[:-1])), None)
    number = _NUMBER.fullmatch(whole["number"]) if unit else None
    if unit is None and isinstance(text, str) and _NUMBER.fullmatch(text.strip()):
        raise UserError(f"{key}={text!r} has no unit; say '{text} steps', '{text} epochs' or '{text} examples'")
    if whole and whole["number"].startswith("-"):
        raise UserError(f"{key}={text!r} is negative; durations start at 0")
    if number is None or not (number[1] or number[2]):
        raise UserError(f"{key}={text!r} is not a duration; say {FORMS} (suffixes k, M, B)")
    exact = Fraction(f"{(number[1] or '0').replace('_', '')}{number[2] or ''}{number[3] or ''}") * SUFFIXES[number[4] or ""]
    if unit != "epochs" and exact.denominator != 1:
        one = "a step" if unit == "steps" else "an example"
        raise UserError(f"{key}={text!r} is a fraction of {one}; give a whole number of {unit}")
    return Duration(exact, unit)


def to_steps(text: Any, key: str, batch_size: int, examples: int, up: bool = False) -> int:
    """The number of steps of a duration, for batches of `batch_size` examples and epochs of `examples`.

    A fraction of a step is rounded down, or up if `up`. Intervals are rounded up, so that one that divides the run ends with the
    run rather than a few steps before.

    Raises:
        UserError: as `parse`.
    """
    amount, unit = parse(text, key)
    steps = {"steps": amount, "epochs": amount * examples / batch_size, "examples": amount / batch_size}[unit]
    return math.ceil(steps - NOISE) if up else math.floor(steps + NOISE)

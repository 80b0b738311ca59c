"""Axes of a sweep as they are typed, and random draws from ranges. Imports no JAX."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from ssl_jax.errors import UserError
from ssl_jax.experiment.sweep import Variation, named

OPEN, CLOSE, QUOTES = "([{", ")]}", "'\""
RANGES = ("log", "uniform", "int")
FORMS = "log:1e-4:1e-1, uniform:0:1 or int:1:8"
ATTEMPTS = 1000  # draws for one trial that differs from the earlier ones


def read_axis(flag: str, text: str) -> tuple[str, list[str]]:
    """('model.temperature', ['0.1', '0.2']) of 'model.temperature=0.1,0.2'.

    Values are separated by commas outside of brackets and quotes.

    Raises:
        UserError: no key, no value, an empty value, or a value that is given twice.
    """
    key, equals, given = text.partition("=")
    key = key.strip()
    if not equals or not key:
        raise UserError(f"{flag} {text!r} is not understood; give KEY=VALUE,VALUE,... such as model.temperature=0.1,0.2")
    values = _split(given)
    if not all(values):
        problem = "has no values, so the sweep has no runs" if len(values) == 1 else "has an empty value"
        raise UserError(f"{flag} {text!r} {problem}; write '' for an empty text")
    twice = [value for number, value in enumerate(values) if value in values[:number]]
    if twice:
        raise UserError(f"{flag} {text!r} gives {twice[0]} twice; give each value once")
    return key, values


def _split(text: str) -> list[str]:
    parts, depth, quote = [""], 0, ""
    for c in text:
        if c == "," and not depth and not quote:
            parts.append("")
            continue
        quote = "" if c == quote else c if not quote and c in QUOTES else quote
        depth += 0 if quote else (c in OPEN) - (c in CLOSE)
        parts[-1] += c
    return [part.strip() for part in parts]


def is_range(values: Sequence[str]) -> bool:
    """Whether the values of an axis are a range such as log:1e-4:1e-1."""
    return len(values) == 1 and values[0].partition(":")[0] in RANGES and ":" in values[0]


def draw(configs: Sequence[str], axes: Sequence[Mapping[str, Sequence[str]]], trials: int, seed: int) -> list[Variation]:
    """`trials` variations of every config, with values that are drawn at random: the same ones for the same `seed`.

    More trials begin with the same draws. A range is log-uniform ('log:LOW:HIGH'), uniform, or whole numbers with both ends
    ('int:LOW:HIGH'); numbers are rounded to four digits. Of a list, one value is drawn; keys of one axis move together.

    Raises:
        UserError: a range that is none, or fewer different draws than trials.
    """
    ranges = {key: read_range(key, values[0]) for axis in axes for key, values in axis.items() if is_range(values)}
    rng = np.random.default_rng(seed)
    drawn: list[dict[str, str]] = []
    for _ in range(trials):
        for _ in range(ATTEMPTS):
            values = {}
            for axis in axes:
                place = rng.integers(len(next(iter(axis.values()))))
                values |= {key: _number(rng, ranges[key]) if key in ranges else listed[place] for key, listed in axis.items()}
            if values not in drawn:
                drawn.append(values)
                break
        else:
            raise UserError(f"--trials={trials} is more than the {len(drawn)} different draws that there are; lower it or widen --vary")
    return [
        Variation(f"{named(config, {})} trial-{number}", config, values) for config in configs for number, values in enumerate(drawn)
    ]


def read_range(key: str, text: str) -> tuple[str, float, float]:
    """('log', 1e-4, 0.1) of 'log:1e-4:1e-1'. Raises UserError for another form or wrong ends."""
    kind, *ends = text.split(":")
    try:
        low, high = map(float, ends)
    except ValueError:
        raise UserError(f"--vary {key}={text} is no range; give {FORMS}") from None
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UserError(f"--vary {key}={text}: a range ends above its start; give {FORMS}")
    if kind == "log" and low <= 0:
        raise UserError(f"--vary {key}={text}: a logarithmic range is above 0; give a positive start, or uniform:{ends[0]}:{ends[1]}")
    if kind == "int" and not (low.is_integer() and high.is_integer()):
        raise UserError(f"--vary {key}={text}: the ends must be whole numbers; give {FORMS}")
    return kind, low, high


def _number(rng: np.random.Generator, given: tuple[str, float, float]) -> str:
    kind, low, high = given
    if kind == "int":
        return str(int(rng.integers(int(low), int(high), endpoint=True)))
    value = math.exp(rng.uniform(math.log(low), math.log(high))) if kind == "log" else rng.uniform(low, high)
    return f"{value:.4g}"

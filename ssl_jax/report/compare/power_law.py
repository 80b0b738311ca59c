"""A power law of what is missing to a perfect score: error = c x_1^-b_1 x_2^-b_2 ..., fitted over all runs of a comparison."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ssl_jax.engine.intervals import Interval, t_interval, t_quantile
from ssl_jax.errors import UserError
from ssl_jax.report.compare.cost import cost
from ssl_jax.report.compare.figures import MOST_LINES
from ssl_jax.report.compare.runs import TRAINED, Comparison, Run
from ssl_jax.report.compare.scatter import Point, scatter
from ssl_jax.report.compare.table import Column, Table, unit
from ssl_jax.report.sections import section, text

COSTS = ("images", "flops", "device_seconds")  # quantities of a run beside the varied keys
LEAST = 3  # different values of a quantity, so that a wrong law can show
FORMULA = (
    "Least squares of log error over the logarithms of the quantities (scipy.optimize.curve_fit); every run is a point. Error is 100 "
    "minus the metric in percent; other metrics are taken as they are. In brackets the 95 % t-interval of an exponent, with n minus "
    "the number of coefficients degrees of freedom. It holds for independent errors of one size around a true power law. Outside of "
    "the range that was measured the law is a guess."
)


class Law(NamedTuple):
    factor: float  # c
    exponents: dict[str, float]  # {quantity: b}; positive where more of it lowers the error
    intervals: dict[str, Interval]
    r2: float  # share of the variance of log error that the law explains
    n: int


def fit(quantities: Mapping[str, Sequence[float]], errors: Sequence[float]) -> Law:
    """The law of n points, more than there are coefficients.

    Args:
        quantities: {name: n positive values}, at least two different ones.
        errors: n positive values.
    """
    from scipy.optimize import curve_fit  # takes half a second to import

    x, y = np.log([quantities[name] for name in quantities]), np.log(errors)
    if len(y) < len(x) + 2:
        raise ValueError(f"{len(y)} points are too few for {len(x) + 1} coefficients")
    center = x.mean(1, keepdims=True)  # else the factor and the exponents depend on each other, and the fit is ill-conditioned

    def law(x, constant, *exponents):
        return constant - np.asarray(exponents) @ x

    found, covariance = curve_fit(law, x - center, y, p0=np.zeros(len(x) + 1))
    half = t_quantile(len(y) - len(found)) * np.sqrt(np.diag(covariance))
    exponents = dict(zip(quantities, map(float, found[1:]), strict=True))
    intervals = {name: Interval(float(b - h), float(b + h)) for (name, b), h in zip(exponents.items(), half[1:], strict=True)}
    left, whole = y - law(x - center, *found), y - y.mean()
    r2 = 1 - float(left @ left) / float(whole @ whole) if whole.any() else math.nan
    return Law(math.exp(found[0] + float(found[1:] @ center[:, 0])), exponents, intervals, r2, len(y))


def power_laws(comparison: Comparison, table: Table, names: Sequence[str]) -> str:
    """A section with the law of every shown metric over the quantities `names`; '' without names.

    Raises:
        UserError: a name that is neither a cost nor a varied key, or one with less than `LEAST` positive values.
    """
    if not names:
        return ""
    keys = dict.fromkeys(key for group in comparison.groups for key in group.keys)
    runs = [(group, run) for group in comparison.groups for run in group.runs if run.evaluation(TRAINED, table.step) is not None]
    points = [(group, run, [_quantity(name, group.keys, run, table.step) for name in names]) for group, run in runs]
    for i, name in enumerate(names):
        if name not in (*COSTS, *keys):
            varied = " or ".join(keys) or "one"
            raise UserError(f"--power_law: {name!r} is neither a varied key nor one of {', '.join(COSTS)}; give {varied}")
        values = {values[i] for *_, values in points}
        if None in values or len(values) < LEAST:
            raise UserError(f"--power_law: {name} has less than {LEAST} different positive values in the finished runs; vary it more")
    rows, charts = "", []
    for column in table.shown:
        errors = [(group, values, _error(column, run, table.step)) for group, run, values in points]
        errors = [(group, values, error) for group, values, error in errors if error is not None]
        if len(errors) < len(names) + 2:
            continue
        law = fit({name: [values[i] for _, values, _ in errors] for i, name in enumerate(names)}, [error for *_, error in errors])
        cells = [f"{law.exponents[name]:.3f} [{law.intervals[name].low:.3f}, {law.intervals[name].high:.3f}]" for name in names]
        cells += [f"{law.factor:.4g}", f"{law.r2:.3f}", str(law.n)]
        rows += f'<tr><td class="name">{text(_title(column))}</td>{"".join(f"<td>{text(cell)}</td>" for cell in cells)}</tr>'
        charts.append(_chart(column, names, errors, law))
    if not rows:
        return ""
    heads = [f"exponent of {name}" for name in names] + ["factor", "R²", "n"]
    head = "".join(f"<th>{text(name)}</th>" for name in ["", *heads])
    body = f'<div class="card"><div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div></div>'
    return section("Power laws", f'{body}<p class="note">{text(FORMULA)}</p><div class="charts">{"".join(charts)}</div>')


def _quantity(name: str, keys: Mapping[str, str], run: Run, step: int | None) -> float | None:
    try:
        value = getattr(cost(run, step), name) if name in COSTS else float(keys[name])
    except (KeyError, ValueError):
        return None
    return float(value) if value and math.isfinite(value) and value > 0 else None


def _error(column: Column, run: Run, step: int | None) -> float | None:
    value = (run.evaluation(TRAINED, step) or {}).get((column.metric, column.protocol), math.nan)
    error = 100 - value if unit(column.metric) else value
    return error if math.isfinite(error) and error > 0 else None


def _title(column: Column) -> str:
    return f"100 - {column.title}" if unit(column.metric) else column.title


def _chart(column: Column, names: Sequence[str], errors: Sequence[tuple], law: Law) -> str:
    """Every group over the first quantity, and the law as a line, for each setting of the others."""
    groups: dict[tuple, dict[str, list]] = {}
    for group, values, error in sorted(errors, key=lambda each: (each[1][1:], each[1][0])):
        groups.setdefault(tuple(values[1:]), {}).setdefault(group.name, []).append((values[0], error))
    series: dict[str, list[Point]] = {}
    lines = []
    for others, found in groups.items():
        setting = ", ".join(f"{name} {value:g}" for name, value in zip(names[1:], others, strict=True)) or names[0]
        series[setting] = []
        for name, of in found.items():
            (x, _), errors = of[0], [error for _, error in of]
            mean, interval = statistics.fmean(errors), t_interval(errors) or (None, None)
            series[setting].append(Point(x, mean, *interval, f"{name}: {mean:.4g}"))
        ends = {point.x for point in (series[setting][0], series[setting][-1])}
        lines.append(f"law, {setting}")
        series[lines[-1]] = [Point(x, _at(law, names, (x, *others)), None, None, "the law") for x in sorted(ends)]
    return scatter(_title(column), series, names[0], joined=lines, legend=len(series) <= MOST_LINES)


def _at(law: Law, names: Sequence[str], values: Sequence[float]) -> float:
    return law.factor * math.prod(value ** -law.exponents[name] for name, value in zip(names, values, strict=True))

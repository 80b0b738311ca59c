"""Statistics over seeds: mean, standard deviation, 95 % intervals, and differences of runs with the same seeds. Imports no JAX."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from scipy.special import stdtrit

LEVEL = 0.95
RESAMPLES = 9999  # of the bootstrap
SIGNIFICANT_FROM = 6  # seeds; below, no test of signs can have p < 0.05 (2 / 2**5 = 0.0625)
COVERAGE_OF_3 = "74 %"  # of a 95 % percentile bootstrap of three normal values


class Interval(NamedTuple):
    low: float
    high: float


class Summary(NamedTuple):
    """What is known of a metric from some seeds. Without values all but `n` are None, with one value the last three."""

    n: int
    mean: float | None
    deviation: float | None  # with n - 1
    t: Interval | None
    bootstrap: Interval | None


class Difference(NamedTuple):
    """Of a metric between two groups of runs, over the seeds that both have."""

    seeds: tuple[int, ...]
    mean: float | None  # None without shared seeds
    t: Interval | None  # None below two

    @property
    def significant(self) -> bool:
        """At least `SIGNIFICANT_FROM` seeds, and an interval without 0."""
        return len(self.seeds) >= SIGNIFICANT_FROM and not self.t.low <= 0 <= self.t.high


def t_quantile(freedom: int) -> float:
    """How many standard errors half of a 95 % interval is, with so many degrees of freedom."""
    return float(stdtrit(freedom, 0.5 + LEVEL / 2))


def t_half_width(values: Sequence[float]) -> float | None:
    """t(n - 1) s / sqrt(n), half of the 95 % t-interval of the mean of n values; None below two values."""
    if len(values) < 2:
        return None
    return t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


def t_interval(values: Sequence[float]) -> Interval | None:
    """The 95 % t-interval of the mean; None below two values."""
    half = t_half_width(values)
    return None if half is None else Interval(statistics.fmean(values) - half, statistics.fmean(values) + half)


def bootstrap_interval(values: Sequence[float]) -> Interval | None:
    """The 95 % percentile bootstrap of the mean, the same in every call; None below two values."""
    if len(values) < 2:
        return None
    import numpy as np
    from scipy.stats import bootstrap  # takes a second to import

    found = bootstrap(
        (np.asarray(values),), np.mean, n_resamples=RESAMPLES, confidence_level=LEVEL, method="percentile", rng=np.random.default_rng(0)
    )
    return Interval(*map(float, found.confidence_interval))


def summarize(values: Sequence[float]) -> Summary:
    """The statistics of finite values, one for each seed."""
    mean = statistics.fmean(values) if values else None
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Summary(len(values), mean, deviation, t_interval(values), bootstrap_interval(values))


def paired(values: Mapping[int, float], baseline: Mapping[int, float]) -> Difference:
    """`values` minus `baseline`, both {seed: finite value}, over the seeds that both have."""
    seeds = tuple(sorted(values.keys() & baseline.keys()))
    differences = [values[seed] - baseline[seed] for seed in seeds]
    return Difference(seeds, statistics.fmean(differences) if seeds else None, t_interval(differences))

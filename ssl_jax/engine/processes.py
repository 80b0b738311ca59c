"""What the processes of a run decide together."""

from __future__ import annotations

import jax
import numpy as np
from jax.experimental import multihost_utils


def gather(value: float) -> list[float]:
    """`value` of every process, in order, so that all processes decide alike."""
    return np.atleast_1d(multihost_utils.process_allgather(np.float64(value))).tolist() if jax.process_count() > 1 else [value]


def gather_lists(values: list[int]) -> list[list[int]]:
    """`values` of every process, in order. They must not be negative: -1 is the padding."""
    longest = int(max(gather(len(values))))
    if jax.process_count() == 1 or longest == 0:
        return [values] * jax.process_count()
    padded = np.array(values + [-1] * (longest - len(values)), np.int32)
    return [[int(value) for value in row if value >= 0] for row in multihost_utils.process_allgather(padded)]


def barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)

"""Divides the cores or the GPUs of this machine among runs that train at once."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping

from ssl_jax.errors import UserError
from ssl_jax.experiment.runs import Share

VISIBLE = "CUDA_VISIBLE_DEVICES"


def divide(jobs: int, environment: Mapping[str, str]) -> list[Share]:
    """A share for each of `jobs` runs; with one, the whole machine.

    Raises:
        UserError: more runs at once than GPUs, or without GPUs than cores.
    """
    if jobs == 1:
        return [Share()]
    gpus = visible_gpus(environment)
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []  # not on macOS
    if gpus and jobs > len(gpus):
        raise UserError(f"--jobs={jobs} is more than the {len(gpus)} GPUs of this machine; give at most --jobs={len(gpus)}")
    if cores and jobs > len(cores):
        raise UserError(f"--jobs={jobs} is more than the {len(cores)} cores of this machine; give at most --jobs={len(cores)}")
    parts = zip(_parts(cores, jobs), _parts(gpus, jobs), strict=True)
    return [Share(tuple(of_cores), {VISIBLE: ",".join(of_gpus)} if gpus else {}) for of_cores, of_gpus in parts]


def visible_gpus(environment: Mapping[str, str]) -> list[str]:
    """The names of the GPUs that a run would use, as CUDA_VISIBLE_DEVICES takes them; [] for runs on CPUs or TPUs."""
    if environment.get("JAX_PLATFORMS", "cuda").split(",")[0] not in ("cuda", "gpu", ""):
        return []
    if VISIBLE in environment:
        return [name.strip() for name in environment[VISIBLE].split(",") if name.strip() not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True)
    lines = listed.stdout.splitlines() if listed.returncode == 0 else []
    return [str(number) for number, line in enumerate(lines) if line.startswith("GPU ")]  # without the slices of MIG


def _parts(items: list, count: int) -> list[list]:
    """`items` in `count` runs of neighbors, whose lengths differ by one at most."""
    return [items[len(items) * i // count : len(items) * (i + 1) // count] for i in range(count)]

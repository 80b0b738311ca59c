"""What the environment variables of a process tell of the other processes of its run; imports no JAX."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

COORDINATOR, PROCESSES, PROCESS = "SSL_JAX_COORDINATOR", "SSL_JAX_PROCESSES", "SSL_JAX_PROCESS"  # set by `launchers.supervise`
TPU_VM = "SSL_JAX_TPU_VM"  # set by `launchers.tpu_vm`: on those hosts no variable of Google's tells of the others, only metadata


class Place(NamedTuple):
    """Of this process, as the one that started it told."""

    coordinator: str
    processes: int
    process: int


def place(environment: Mapping[str, str]) -> Place | None:
    """What `launchers.supervise` told; None where it did not start this process."""
    if COORDINATOR not in environment:
        return None
    return Place(environment[COORDINATOR], int(environment[PROCESSES]), int(environment[PROCESS]))


def engine(environment: Mapping[str, str]) -> str | None:
    """What started this process as one of several, judged by its environment; None for a process of its own."""
    several = {
        "Slurm": "SLURM_STEP_NODELIST" in environment and int(environment.get("SLURM_NTASKS", 1)) > 1,
        "Open MPI": int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1,
        "GKE": "," in environment.get("TPU_WORKER_HOSTNAMES", "") or "MEGASCALE_COORDINATOR_ADDRESS" in environment,
        "Cloud TPU": TPU_VM in environment,
        "JAX_COORDINATOR_ADDRESS": "JAX_COORDINATOR_ADDRESS" in environment,
    }
    return next((name for name, found in several.items() if found), None)

"""Whether this process is one of several, by the environment variables of ssl_jax's launchers and of others. Imports no JAX."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

COORDINATOR, PROCESSES, PROCESS = "SSL_JAX_COORDINATOR", "SSL_JAX_PROCESSES", "SSL_JAX_PROCESS"  # set by `launchers.supervise`
TPU_VM = "SSL_JAX_TPU_VM"  # set by `launchers.tpu_vm`: Google sets no variable on those hosts, only metadata


class LaunchedProcess(NamedTuple):
    """This process's place in a run that `launchers.supervise` started."""

    coordinator: str  # host:port of process 0
    processes: int
    process: int


def launched_process(environment: Mapping[str, str]) -> LaunchedProcess | None:
    """The place that `launchers.supervise` gave this process; None where it did not start it."""
    if COORDINATOR not in environment:
        return None
    return LaunchedProcess(environment[COORDINATOR], int(environment[PROCESSES]), int(environment[PROCESS]))


def detect_launcher(environment: Mapping[str, str]) -> str | None:
    """The name of what started this process as one of several, by its environment; None for a single process."""
    launchers = {
        "Slurm": "SLURM_STEP_NODELIST" in environment and int(environment.get("SLURM_NTASKS", 1)) > 1,
        "Open MPI": int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1,
        "GKE": "," in environment.get("TPU_WORKER_HOSTNAMES", "") or "MEGASCALE_COORDINATOR_ADDRESS" in environment,
        "Cloud TPU": TPU_VM in environment,
        "JAX_COORDINATOR_ADDRESS": "JAX_COORDINATOR_ADDRESS" in environment,
    }
    return next((name for name, found in launchers.items() if found), None)

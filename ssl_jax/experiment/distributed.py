"""The other processes of a run: found by JAX on Slurm, GKE, Cloud TPU and Open MPI, or started here by `--processes`."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import socket
import sys
import traceback
from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils

from ssl_jax.errors import MachineFault, UserError
from ssl_jax.experiment.launch_environment import TPU_VM, detect_launcher, launched_process

log = logging.getLogger(__name__)

HEARTBEAT = 30  # seconds after which a process that has died or was stopped is missed, and all others abort


def initialize() -> None:
    """Become one of the processes of a run; nothing for a process of its own. To be called before anything asks for a device.

    Where the others do not come within a few minutes, JAX ends the process with SIGABRT; what else keeps it from joining ends it with
    exit code 1. Neither is bad input: both are worth another start.

    Raises:
        UserError: a host of several does not know that it is one.
        MachineFault: the port of the coordinator is taken.
    """
    if jax.distributed.is_initialized():
        return
    told, found = launched_process(os.environ), detect_launcher(os.environ)
    if told is None and found is None:
        if jax.process_count() > 1:  # the driver of a TPU knows all hosts of its slice; checkpoints and SIGTERM need them joined
            raise UserError(f"this is one of {jax.process_count()} hosts of a TPU; start every one of them with {TPU_VM}=1")
        return
    if told is not None and told.process == 0:
        _check_port(told.coordinator)
    before = signal.getsignal(signal.SIGTERM)
    try:
        if told is not None:
            gpu = [told.process] if told.processes > 1 else None  # one each, of those that CUDA_VISIBLE_DEVICES leaves
            jax.distributed.initialize(
                told.coordinator, told.processes, told.process, gpu, "deactivate", heartbeat_timeout_seconds=HEARTBEAT,
                initialization_timeout=120,
            )  # fmt: skip
        else:
            jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT)
    except (RuntimeError, ValueError) as error:
        line = (str(error).strip().splitlines() or [""])[0]
        others = found or "on this machine"
        sys.exit(f"error: the other processes ({others}) could not be joined ({line[:160]}); are all of them running?")
    if jax.process_count() == 1:  # JAX would keep every SIGTERM for a step that all agree on, and none comes before the first one
        signal.signal(signal.SIGTERM, before)
    log.info("process %d of %d (%s)", jax.process_index(), jax.process_count(), found or "started on this machine")


def _check_port(coordinator: str) -> None:
    """Before JAX does, which ends with a segmentation fault where it is taken: `launchers.supervise` saw it free, and another was faster.

    Raises:
        MachineFault: since another start takes another port.
    """
    port = int(coordinator.rpartition(":")[2])
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        told = os.strerror(error.errno)
        raise MachineFault(f"port {port} of the coordinator is taken ({told}); start again, which takes another one") from None


def abort(error: BaseException) -> None:
    """End this process at once, with what went wrong, if it is one of several: whatever it closed, it would wait for the others, and
    they wait for it. Nothing for a process of its own.
    """
    if jax.distributed.is_initialized() and jax.process_count() > 1:
        told = isinstance(error, (UserError, MachineFault))
        if told:
            print(f"error: {error}", file=sys.stderr)
        else:
            traceback.print_exception(error)
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(error.code if told else 1)


def is_lead() -> bool:
    """Whether this is the process that writes what is written once."""
    return jax.process_index() == 0


def check_same_config(config: Mapping) -> None:
    """Raises UserError, in every process, where their configs are not the same."""
    if jax.process_count() == 1:
        return
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).digest()
    all_of_them = multihost_utils.process_allgather(np.frombuffer(digest, np.uint8))
    others = [i for i, theirs in enumerate(all_of_them) if not np.array_equal(theirs, all_of_them[0])]
    if others:
        told = ", ".join(map(str, others))
        raise UserError(f"the config of process {told} is not that of process 0; start all processes with the same command")

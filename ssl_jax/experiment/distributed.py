"""Start JAX, with the other processes of a run: found on Slurm, GKE, Cloud TPU and Open MPI, or started by `train --processes`."""

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
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from ssl_jax.errors import MachineFault, UserError
from ssl_jax.experiment.launch_environment import TPU_VM, detect_launcher, launched_process

log = logging.getLogger(__name__)

HEARTBEAT = 30  # seconds without a sign of life after which JAX takes a process for dead and all others abort


def start_jax() -> None:
    """Join the other processes of the run and set the persistent compilation cache. Every process calls this first."""
    initialize()
    check_devices()
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ssl_jax" / "xla"
    if not jax.config.jax_compilation_cache_dir:  # else JAX_COMPILATION_CACHE_DIR is set
        jax.config.update("jax_compilation_cache_dir", str(cache))
    # Low, since views, features and evaluations are many small programs.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def initialize() -> None:
    """Join the other processes of the run, before anything asks for a device. Does nothing for a single process.

    Where the others do not come within a few minutes, JAX ends this process with SIGABRT.

    Raises:
        UserError: this is one host of a TPU with several, and the environment does not say so.
        MachineFault: the port of the coordinator is taken, or the others cannot be joined.
    """
    if jax.distributed.is_initialized():
        return
    launched, launcher = launched_process(os.environ), detect_launcher(os.environ)
    if launched is None and launcher is None:
        check_devices()
        if jax.process_count() > 1:  # the TPU driver knows all hosts of its slice; checkpoints and SIGTERM need jax.distributed
            raise UserError(f"this is one of {jax.process_count()} hosts of a TPU; start every one of them with {TPU_VM}=1")
        return
    if launched is not None and launched.process == 0:
        _check_port(launched.coordinator)
    before = signal.getsignal(signal.SIGTERM)
    try:
        if launched is not None:
            gpu = [launched.process] if launched.processes > 1 else None  # an index into CUDA_VISIBLE_DEVICES
            jax.distributed.initialize(
                launched.coordinator, launched.processes, launched.process, gpu, "deactivate", heartbeat_timeout_seconds=HEARTBEAT,
                initialization_timeout=120,
            )  # fmt: skip
        else:
            jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT)
    except (RuntimeError, ValueError) as error:
        line = (str(error).strip().splitlines() or [""])[0]
        others = launcher or "on this machine"
        raise MachineFault(
            f"the other processes ({others}) could not be joined ({line[:160]}); see that all are running, and start again"
        ) from error
    if jax.process_count() == 1:  # JAX holds SIGTERM back until a step, so that none would end a process before its first step
        signal.signal(signal.SIGTERM, before)
    log.info("process %d of %d (%s)", jax.process_index(), jax.process_count(), launcher or "started on this machine")


def check_devices() -> None:
    """Raises MachineFault where JAX finds no device, such as with JAX_PLATFORMS=cuda and no GPU."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # AssertionError: the package for such devices is not installed
        line = (str(error).strip().splitlines() or ["its package is not installed"])[0]
        raise MachineFault(
            f"JAX finds no device for JAX_PLATFORMS={jax.config.jax_platforms or ''} ({line[:200]}); see that this machine has one, "
            "and that JAX is installed for it, or set another JAX_PLATFORMS"
        ) from error


def _check_port(coordinator: str) -> None:
    """Check that the port is still free, as `launchers.supervise` saw it. JAX ends with a segmentation fault where it is taken.

    Raises:
        MachineFault: the port is taken; a restart takes another one.
    """
    port = int(coordinator.rpartition(":")[2])
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        reason = os.strerror(error.errno)
        raise MachineFault(f"port {port} of the coordinator is taken ({reason}); start again, which takes another port") from None


def abort(error: BaseException) -> None:
    """Print `error` and end this process at once if it is one of several. Does nothing for a single process.

    An orderly end would deadlock: closing checkpoints waits for the other processes, which wait for this one.
    """
    if jax.distributed.is_initialized() and jax.process_count() > 1:
        expected = isinstance(error, (UserError, MachineFault))
        if expected:
            print(f"error: {error}", file=sys.stderr)
        else:
            traceback.print_exception(error)
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(error.code if expected else 1)


def is_lead() -> bool:
    """Whether this is process 0, which alone writes logs and tables."""
    return jax.process_index() == 0


def check_same_config(config: Mapping) -> None:
    """Raises UserError, in every process, where the processes have different configs."""
    if jax.process_count() == 1:
        return
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).digest()
    digests = multihost_utils.process_allgather(np.frombuffer(digest, np.uint8))
    others = [i for i, theirs in enumerate(digests) if not np.array_equal(theirs, digests[0])]
    if others:
        names = ", ".join(map(str, others))
        raise UserError(f"the config of process {names} is not that of process 0; start all processes with the same command")

"""Devices to compile for without having them: fake CPU devices, TPU slices (by libtpu) and GPUs (by JAX's CUDA packages)."""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from ssl_jax.errors import UserError
from ssl_jax.rehearsal import gpus
from ssl_jax.rehearsal.chips import CHIPS, EXAMPLES, Chip

log = logging.getLogger(__name__)

CORES = {"v3": 2}  # devices per chip, if more than one
LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",  # do not query the metadata server of a cloud
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",  # any type works, since nothing runs
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # otherwise two rehearsals at the same time abort
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}


class Slice(NamedTuple):
    """Devices to build a mesh of."""

    devices: Sequence[Any]  # slice after slice
    platform: str  # 'cpu', 'tpu' or 'gpu'
    chip: Chip | None  # the kind of all devices; None for CPUs
    chips: int  # may be fewer than devices: a TPU v3 chip has two
    hosts: int
    slices: int = 1  # of equal size


def open_topology(name: str, slices: int = 1) -> Slice:
    """The devices of a topology: 'cpu:N'; TPUs 'KIND:AxB' or 'KIND:AxBxC' in chips, `slices` times; or GPUs 'h100:HOSTSxGPUS' (h200).

    Without libtpu, TPUs become the same number of fake CPU devices, with a warning. Call it before JAX initializes its devices.

    Raises:
        UserError: an unknown name or shape, several slices of CPUs or GPUs, a missing GPU compiler, or too few initialized devices.
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    if not match or match[1] not in ("cpu", *CHIPS):
        raise UserError(f"--topology={name} is unknown; give KIND:SHAPE like {EXAMPLES}; kinds are cpu, {', '.join(CHIPS)}")
    if slices < 1 or (slices > 1 and match[1] in ("cpu", *gpus.NAMES)):
        raise UserError(f"--slices={slices}: give 1 or more for TPUs; CPUs and GPUs have no slices")
    if match[1] in gpus.NAMES:
        return _gpus(name, match[1], match[2].split("x"))
    return _cpu(name, match[2]) if match[1] == "cpu" else _tpu(name, match[2], slices)


def _cpu(name: str, count: str) -> Slice:
    if not count.isdigit() or int(count) < 1:
        raise UserError(f"--topology={name}: give the number of fake devices, like cpu:8")
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", int(count))
    except RuntimeError:  # JAX has initialized its devices
        pass
    devices = jax.devices("cpu")
    if len(devices) < int(count):
        raise UserError(
            f"--topology={name}: JAX has already initialized {len(devices)} devices; "
            f"set XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        )
    return Slice(devices[: int(count)], "cpu", None, int(count), 1)


def _gpus(name: str, kind: str, shape: list[str]) -> Slice:
    if len(shape) != 2 or "0" in shape:
        raise UserError(f"--topology={name}: give hosts and the GPUs of each, like {kind}:128x8")
    hosts, each = map(int, shape)
    chip = CHIPS[kind]._replace(share=gpus.share(os.environ))
    return Slice(gpus.describe(name, kind, hosts, each), "gpu", chip, hosts * each, hosts)


def _tpu(name: str, shape: str, slices: int) -> Slice:
    chip = CHIPS[name.partition(":")[0]]
    if not importlib.util.find_spec("libtpu"):
        count = CORES.get(name.partition(":")[0], 1) * math.prod(map(int, shape.split("x"))) * slices
        log.warning(
            "--topology=%s needs the TPU compiler, which is not installed: pip install -r requirements-rehearse.txt (no TPU is "
            "needed). Using %d fake CPU devices instead: FLOPs, state and collectives, but not the memory and speed of a TPU",
            name,
            count,
        )
        return _cpu(f"cpu:{count}", str(count))
    for variable, value in LIBTPU.items():
        os.environ.setdefault(variable, value)
    jax.config.update("jax_platforms", "cpu")  # libtpu only compiles; what has to run meanwhile runs on CPUs
    try:
        options = {**chip.options, "num_slices": slices} if slices > 1 else chip.options
        devices = topologies.get_topology_desc(name, "tpu", **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"--topology={name}: {str(error).splitlines()[0]}; shapes are like {EXAMPLES}") from error
    number = [getattr(device, "slice_index", 0) for device in devices]
    chips = {(index, *device.coords) for index, device in zip(number, devices, strict=True)}
    hosts = {(index, device.process_index) for index, device in zip(number, devices, strict=True)}
    return Slice(devices, "tpu", chip, len(chips), len(hosts), slices)

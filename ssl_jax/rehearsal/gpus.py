"""Descriptions of absent GPUs, for the compiler in JAX's CUDA packages, which needs neither a driver nor a GPU."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping

import jax
from jax.experimental import topologies

from ssl_jax.errors import UserError
from ssl_jax.rehearsal.chips import CHIPS

PACKAGES = ("jax_cuda12_plugin", "nvidia.cuda_nvcc")
# Triton matrix products do not compile without a GPU for autotuning.
FLAGS = {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "XLA_FLAGS": "--xla_gpu_enable_triton_gemm=false"}
# The share of a GPU's memory that JAX preallocates. The first variable changes it, the second is its old name.
SHARE, VARIABLES = 0.75, ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
NAMES = {"h100": "NVIDIA H100 80GB HBM3", "h200": "NVIDIA H200"}
# A GpuTargetConfigProto as text, from NVIDIA's H100 white paper and the CUDA programming guide (compute capability 9.0). An H200 is
# the same processor with larger and faster memory.
HOPPER = """
platform_name: "CUDA"
device_description_str: "{name}"
dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
gpu_device_info {{
  name: "{name}"
  device_vendor: "NVIDIA Corporation"
  cuda_compute_capability {{ major: 9 }}
  clock_rate_ghz: 1.98
  core_count: 132
  fpus_per_core: 128
  device_memory_size: {memory}
  memory_bandwidth: {bandwidth}
  l2_cache_size: 52428800
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_core: 233472
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}}
"""


def describe(name: str, kind: str, hosts: int, each: int) -> list:
    """Descriptions of `hosts` x `each` GPUs, host after host. `kind` is a key of NAMES, and `name` the topology, for messages.

    Raises:
        UserError: JAX's CUDA packages are not installed.
    """
    missing = [package for package in PACKAGES if not _installed(package)]
    if missing:
        raise UserError(
            f"--topology={name} needs the GPU compiler, which is not installed: pip install -r requirements-rehearse-gpu.txt "
            "(no GPU is needed), or use --topology=cpu:N"
        )
    for variable, value in FLAGS.items():
        os.environ[variable] = " ".join(filter(None, (os.environ.get(variable), value))) if variable == "XLA_FLAGS" else value
    jax.config.update("jax_platforms", "cpu")  # programs are compiled for the description; what has to run meanwhile runs on CPUs
    target = HOPPER.format(name=NAMES[kind], memory=int(CHIPS[kind].memory), bandwidth=int(CHIPS[kind].bandwidth))
    return topologies.get_topology_desc("", "cuda", target_config=target, topology=f"1x{hosts}x{each}").devices


def share(environment: Mapping[str, str]) -> float:
    """The share of a GPU's memory in [0, 1] that JAX uses with these environment variables.

    Raises:
        UserError: a variable is not a number.
    """
    name = next((name for name in VARIABLES if environment.get(name)), None)
    try:
        return SHARE if name is None else min(float(environment[name]), 1.0)
    except ValueError:
        raise UserError(f"{name}={environment[name]} is not a share of GPU memory; give a number such as 0.95") from None


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False

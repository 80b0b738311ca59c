"""XLA flags for tests, which compile for longer than they compute. Does not import jax, so that it can be imported first."""

import importlib.metadata
import importlib.util

QUICK = ["--xla_backend_optimization_level=0"]  # of machine code, not of HLO
supported = importlib.metadata.version("jaxlib").startswith("0.10.") and not importlib.util.find_spec("jax_cuda12_plugin")
if supported:  # later versions, and the compiler for GPUs, abort at an unknown flag
    QUICK.append("--xla_cpu_use_fusion_emitters=false")  # compiles fusions without MLIR in a third less time


def flags(devices: int) -> str:
    """XLA_FLAGS for a CPU split into `devices` devices."""
    return " ".join([*QUICK, f"--xla_force_host_platform_device_count={devices}"])

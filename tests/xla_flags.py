"""XLA's flags for tests, which compile for longer than they compute. Imports no jax, so that it can be read before."""

import importlib.metadata
import importlib.util

QUICK = ["--xla_backend_optimization_level=0"]  # of machine code, not of programs
known = importlib.metadata.version("jaxlib").startswith("0.10.") and not importlib.util.find_spec("jax_cuda12_plugin")
if known:  # later ones, and the compiler of GPUs, abort at a flag that they do not know
    QUICK.append("--xla_cpu_use_fusion_emitters=false")  # fusions without MLIR on the way to machine code: a third less time


def flags(devices: int) -> str:
    """For so many fake devices of the CPU."""
    return " ".join([*QUICK, f"--xla_force_host_platform_device_count={devices}"])

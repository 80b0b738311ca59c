"""What produced a run or an export: package versions, commit and devices."""

from __future__ import annotations

import importlib.metadata
import platform
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

import jax

from ssl_jax.models.conv import convolutions
from ssl_jax.where import CHECKOUT, IN_CHECKOUT, program

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "numpy")


def provenance() -> dict:
    """Versions, commit and devices as JSON types, for the workdir and the model card."""
    try:
        command = ["git", "-C", str(CHECKOUT), "describe", "--always", "--dirty"]
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() if IN_CHECKOUT else ""
    except OSError:  # git is not installed
        commit = ""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "packages": versions,
        "python": platform.python_version(),
        "commit": commit or "unknown",
        "convolutions": convolutions(),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }


def train_command(path_and_variant: str, overrides: Sequence[str], workdir: Path) -> str:
    """The command line of a training, for a shell."""
    return shlex.join([*program().split(), "train", f"--config={path_and_variant}", *overrides, f"--workdir={workdir}"])

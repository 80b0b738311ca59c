"""Whether a run can exist on its devices: arrays too large are refused before compiling, where XLA would abort the process."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

import jax

from ssl_jax.errors import UserError
from ssl_jax.rehearsal.memory import bytes_of_device, largest

LARGEST_ARRAY = 2**42  # bytes; XLA aborts on sizes that overflow, and no device holds this
VIEWS = 4  # bytes of a float32 view for each byte of an image


def check_arrays(state, batch: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    """Raises UserError if an array of the state or of a batch of shapes is larger than any machine's memory."""
    for path, x in jax.tree_util.tree_flatten_with_path((state, dict(batch)))[0]:
        if math.prod(x.shape) * x.dtype.itemsize > LARGEST_ARRAY:
            name = jax.tree_util.keystr(path[1:])
            raise UserError(f"the array {name} of shape {tuple(x.shape)} would take {_size(math.prod(x.shape) * x.dtype.itemsize)}; "
                            "make config.model or config.batch_size smaller")  # fmt: skip


def check_memory(state, batch: Mapping[str, jax.ShapeDtypeStruct], mesh) -> None:
    """Raises UserError if the state of a run and one batch do not fit into the memory of the devices of this process.

    Temporaries of a step come on top, so a run that passes may still be too large. `launch.py rehearse` counts those.

    Args:
        state: a tree of shapes with shardings.
        batch: shapes of a global batch.
    """
    device = mesh.local_devices[0]
    on_host = device.platform == "cpu"  # such devices share the memory of the machine
    devices = len(mesh.local_devices) if on_host else 1
    examples = sum(math.prod(x.shape) * x.dtype.itemsize for x in batch.values()) // mesh.size
    needed = devices * (bytes_of_device(state) + (1 + VIEWS) * examples)
    there = _memory() if on_host else (device.memory_stats() or {}).get("bytes_limit")
    if there and needed > there:
        array = largest(state, 1)[0]
        raise UserError(
            f"the parameters, optimizer states and a batch take {_size(needed)}, and there are {_size(there)} of memory (the largest "
            f"array is {array['of']}, {array['shape']}); make config.model or config.batch_size smaller"
        )


def _memory() -> int:
    """Bytes of memory of this machine, or of this container."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:  # no control groups of version 2 here
        return total
    return min(total, int(limit)) if limit.isdigit() else total


def _size(count: float) -> str:
    return f"{count / 2**30:,.0f} GiB" if count >= 2**31 else f"{count / 2**20:,.0f} MiB"

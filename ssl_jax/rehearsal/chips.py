"""Peak speeds and memory of TPUs and GPUs.

TPUs: Google's documentation (cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e, and /system-architecture for v3). All figures are per
device as JAX counts devices: a core of v3, a chip of the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Chip(NamedTuple):
    """Peaks of one device."""

    name: str
    flops: float  # FLOPs per second of bfloat16 matrix products
    memory: float  # bytes of HBM
    bandwidth: float  # of HBM, bytes per second
    network: float | None  # between chips, bytes per second in one direction over all links; None if no single figure exists
    options: Mapping = {}  # options of the compiler
    slice_network: float | None = None  # between slices, bytes per second and device; None if undocumented
    share: float = 1.0  # of the memory, the share that JAX uses for programs

    @property
    def usable(self) -> int:
        """Bytes of memory that a program may use on one device."""
        return int(self.memory * self.share)


EXAMPLES = "cpu:8, v4:4x4x8, v5e:16x16, v5p:8x8x8, v6e:16x16, h100:128x8"  # topologies, for messages
# Images per second that one core decodes and crops to 224 pixels (simplejpeg and OpenCV, 500 x 375 JPEGs of 71 KB, AMD EPYC).
DECODED = 860.0
GIB = 2**30
CHIPS = {
    "v3": Chip("TPU v3 core", 61.5e12, 16 * GIB, 450e9, 81e9),
    "v4": Chip("TPU v4", 275e12, 32 * GIB, 1200e9, 270e9, {"chip_config_name": "megacore"}),  # both cores are one device
    "v5e": Chip("TPU v5e", 197e12, 16 * GIB, 819e9, 200e9, slice_network=6.4e12 / 8 / 256),  # of a pod, divided by its chips
    "v5p": Chip("TPU v5p", 459e12, 96 * GIB, 2765e9, 600e9),  # documented as 95 GB; programs get 95.74 GiB
    "v6e": Chip("TPU v6e", 918e12, 32 * GIB, 1600e9, 400e9, slice_network=25.6e12 / 8 / 256),
    # NVIDIA's data sheets; the memory is that shown by nvidia-smi. GPUs have NVLink within a host and another network between
    # hosts.
    "h100": Chip("NVIDIA H100 SXM", 989e12, 84942979072, 3352e9, None),
    "h200": Chip("NVIDIA H200 SXM", 989e12, 143771 * 2**20, 4800e9, None),
}

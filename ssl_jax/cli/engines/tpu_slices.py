"""Slices of TPUs as Google Cloud names and divides them.

After cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus and cloud.google.com/tpu/docs.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from ssl_jax.errors import UserError

EXAMPLES = "v4:4x4x4, v5e:16x16, v5p:4x4x8, v6e:4x8"
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")  # of v5e and v6e there are no others


class Kind(NamedTuple):
    gke: str  # label cloud.google.com/gke-tpu-accelerator
    accelerator: str  # prefix of a type of Cloud TPU, '' where it is a kind and a topology
    cores: int  # that the type counts for each chip
    runtime: str  # version of the software of a TPU VM
    flat: bool


KINDS = {
    "v4": Kind("tpu-v4-podslice", "", 2, "tpu-ubuntu2204-base", False),
    "v5e": Kind("tpu-v5-lite-podslice", "v5litepod", 1, "v2-alpha-tpuv5-lite", True),
    "v5p": Kind("tpu-v5p-slice", "v5p", 2, "v2-alpha-tpuv5", False),
    "v6e": Kind("tpu-v6e-slice", "v6e", 1, "v2-alpha-tpuv6e", True),
}


class Slice(NamedTuple):
    kind: Kind
    shape: str  # '16x16'
    chips: int
    hosts: int

    @property
    def chips_of_host(self) -> int:
        return self.chips // self.hosts

    def flags(self) -> list[str]:
        """Of `gcloud compute tpus tpu-vm create`."""
        if not self.kind.accelerator:
            return ["--type=v4", f"--topology={self.shape}"]
        return [f"--accelerator-type={self.kind.accelerator}-{self.chips * self.kind.cores}"]


def parse(topology: str) -> Slice:
    """'v5e:16x16' or 'v5p:4x4x8', in chips; the notation of `launch.py rehearse`.

    Raises:
        UserError: an unknown kind, or a shape that it does not have.
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+){1,2})", topology)
    if not match or match[1] not in KINDS:
        raise UserError(
            f"--topology={topology} is unknown; give KIND:SHAPE like {EXAMPLES}; kinds are {', '.join(KINDS)}"
        )
    kind, sides = KINDS[match[1]], [int(side) for side in match[2].split("x")]
    chips = math.prod(sides)
    if kind.flat and match[2] not in FLAT:
        raise UserError(f"--topology={topology}: {match[1]} has the shapes {', '.join(FLAT)}")
    if not kind.flat and (len(sides) != 3 or min(sides) < 1 or chips % 4):
        raise UserError(
            f"--topology={topology}: {match[1]} has shapes of three sides, with a multiple of 4 chips, like 2x2x1 or 4x4x8"
        )
    # Hosts have 4 chips; v5e and v6e also come as one host of 8, or of 1.
    return Slice(kind, match[2], chips, 1 if kind.flat and chips <= 8 else chips // 4)

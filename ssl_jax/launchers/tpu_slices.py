"""TPU slices by the names and host counts of Google Cloud.

After cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus and cloud.google.com/tpu/docs.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from ssl_jax.errors import UserError

EXAMPLES = "v4:4x4x4, v5e:16x16, v5p:4x4x8, v6e:4x8"
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")  # all shapes of v5e and v6e


class Kind(NamedTuple):
    gke: str  # label cloud.google.com/gke-tpu-accelerator
    accelerator: str  # prefix of --accelerator-type, such as v5litepod in v5litepod-16; '' for --type and --topology
    runtime: str  # software version of a TPU VM
    max_chips: int  # of a slice

    @property
    def flat(self) -> bool:
        return bool(self.accelerator)


KINDS = {
    "v4": Kind("tpu-v4-podslice", "", "tpu-ubuntu2204-base", 4096),
    "v5e": Kind("tpu-v5-lite-podslice", "v5litepod", "v2-alpha-tpuv5-lite", 256),
    "v5p": Kind("tpu-v5p-slice", "", "v2-alpha-tpuv5", 6144),  # a pod has 8,960
    "v6e": Kind("tpu-v6e-slice", "v6e", "v2-alpha-tpuv6e", 256),
}


class Slice(NamedTuple):
    name: str  # key of KINDS
    kind: Kind
    shape: str  # '16x16'
    chips: int
    hosts: int

    @property
    def chips_of_host(self) -> int:
        return self.chips // self.hosts

    def flags(self) -> list[str]:
        """Flags of `gcloud compute tpus tpu-vm create`."""
        if not self.kind.accelerator:
            return [f"--type={self.name}", f"--topology={self.shape}"]
        return [f"--accelerator-type={self.kind.accelerator}-{self.chips}"]


def parse(topology: str) -> Slice:
    """Parse 'v5e:16x16' or 'v5p:4x4x8', shapes in chips, as in `launch.py rehearse`.

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
    ascending = sides == sorted(sides) and sides[0] > 1 and all(side == 2 or side % 4 == 0 for side in sides)
    if not kind.flat and (len(sides) != 3 or not (ascending or sides == [2, 2, 1])):
        raise UserError(
            f"--topology={topology}: {match[1]} has shapes of three sides: 2x2x1, and ascending ones of 2 or multiples of 4"
        )
    if chips > kind.max_chips:
        raise UserError(f"--topology={topology}: a slice of {match[1]} has {kind.max_chips:,} chips at most, not {chips:,}")
    # Hosts have 4 chips; v5e and v6e also come as one host of 8, or of 1.
    return Slice(match[1], kind, match[2], chips, 1 if kind.flat and chips <= 8 else chips // 4)

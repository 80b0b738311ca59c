"""The collectives of a compiled program (kinds, mesh axes, counts, bytes), read from its HLO text."""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Mapping
from typing import NamedTuple

from ssl_jax.rehearsal.hlo import count_runs, parse_computations, shape_bytes
from ssl_jax.rehearsal.replicas import device_groups, mesh_axes

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
SAME_SIZE = ("all-to-all", "ragged-all-to-all", "collective-permute")  # operand and result have the same size
BETWEEN_SLICES = "send"  # to the other slices of a job, over the network of the hosts

_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
_SEND = re.compile(r"= \((.*?), u32\[\].*? send\(.*_xla_megascale_target=\"\{([\d,]+)\}x")


class Collective(NamedTuple):
    """One collective of a step, or the sum of several with the same kind, axes and group."""

    kind: str
    axes: str  # mesh axes, 'data+fsdp'; 'part of ...' if a group does not cover whole axes
    group: int  # devices per group
    count: int  # times per step
    bytes: int  # per device and step, of the larger of operand and result: the array that is gathered, reduced or sent

    @property
    def wire(self) -> float:
        """Bytes that a device sends per step, assuming ring algorithms, which are optimal for large messages."""
        if self.kind in ("collective-permute", BETWEEN_SLICES):
            return self.bytes
        return self.bytes * (self.group - 1) / self.group * (2 if self.kind == "all-reduce" else 1)


def collectives(hlo: str, mesh: Mapping[str, int]) -> tuple[list[Collective], int]:
    """(collectives of a step, number of collectives inside loops of unknown length, which count once).

    Args:
      hlo: the text of a compiled program that is partitioned over all devices of a mesh, in mesh order.
      mesh: {axis: size}.

    An asynchronous start/done pair is one collective. A collective in a loop counts as often as the loop runs. All branches of
    conditionals count. Traffic between slices has kind 'send' and axes 'slices': TPUs split a collective over slices into one
    within each slice and a send. Collectives with the same kind, axes and group are summed; the largest comes first.
    """
    computations, entry = parse_computations(hlo)
    runs, endless = count_runs(computations, entry)
    counts, sizes, unknown = collections.Counter(), collections.Counter(), 0
    for name, lines in computations.items():
        for line in lines if runs[name] else ():
            match = _COLLECTIVE.search(line)
            if not match and (sent := _SEND.search(line)):
                key = BETWEEN_SLICES, "slices", 1 + sent[2].count(",")
                counts[key] += runs[name]
                sizes[key] += runs[name] * sum(shape_bytes(sent[1]))
                unknown += name in endless
            if not match:
                continue
            kind = "reduce-scatter" if name.startswith("all-reduce-scatter") else match[2]  # TPU: a fusion of sum and slice
            groups = device_groups(line, math.prod(mesh.values()))
            key = kind, mesh_axes(groups, mesh), groups.shape[1]
            counts[key] += runs[name]
            sizes[key] += runs[name] * _bytes(match, groups.shape[1])
            unknown += name in endless
    found = [Collective(*key, counts[key], sizes[key]) for key in counts if key[2] > 1]
    return sorted(found, key=lambda x: -x.wire), unknown


def _bytes(match: re.Match, group: int) -> int:
    """Bytes of one collective, as in `Collective.bytes`."""
    started = match[3] and match[2] != "all-reduce"  # its type lists operands, results and context scalars
    total = sum(shape_bytes(match[1], scalars=not started))
    if started:
        # Operand and result have the same size, or one is 1/group of the other.
        return total // 2 if match[2] in SAME_SIZE else total * group // (group + 1)
    return total * group if match[2] == "reduce-scatter" else total


def table(found: list[Collective]) -> list[dict]:
    """`collectives` as JSON types."""
    return [{**x._asdict(), "wire_bytes": x.wire} for x in found]



"""Collectives of a compiled program: their kinds, mesh axes, counts and bytes, read from its HLO text."""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Mapping
from typing import NamedTuple

from ssl_jax.rehearsal.hlo import computations_of, runs_of, sizes_of
from ssl_jax.rehearsal.replicas import axes_of, groups_of

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
SAME_SIZE = ("all-to-all", "ragged-all-to-all", "collective-permute")  # both sides of them
BETWEEN_SLICES = "send"  # to the other slices of a job, over the network of hosts

_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
_SEND = re.compile(r"= \((.*?), u32\[\].*? send\(.*_xla_megascale_target=\"\{([\d,]+)\}x")


class Collective(NamedTuple):
    """What one instruction, or several alike, do in a step.

    `bytes`: on one device and all `count` times together, of the larger side: what is gathered, what is reduced, what is sent.
    """

    kind: str
    axes: str  # of the mesh, 'data+fsdp'; 'part of ...' where the groups are no whole axes
    group: int  # devices that take part together
    count: int
    bytes: int

    @property
    def wire(self) -> float:
        """Bytes that a device sends, in the rings that are optimal for long messages; between slices those that it hands over."""
        if self.kind in ("collective-permute", BETWEEN_SLICES):
            return self.bytes
        return self.bytes * (self.group - 1) / self.group * (2 if self.kind == "all-reduce" else 1)


def collectives(hlo: str, mesh: Mapping[str, int]) -> tuple[list[Collective], int]:
    """(collectives of a step, loops of unknown length around some of them, which are counted once).

    Args:
      hlo: the text of a compiled program that was partitioned over all devices of a mesh, in its order.
      mesh: {axis: size}.

    An asynchronous pair is one collective, one within a loop counts as often as the loop runs; all branches of conditionals count.
    What is sent between slices is of kind 'send' along 'slices'; of a collective over slices TPUs make one within each, and a send.
    Lines that are alike in kind, axes and group are added up, the largest comes first.
    """
    computations, entry = computations_of(hlo)
    runs, endless = runs_of(computations, entry)
    counts, sizes, unknown = collections.Counter(), collections.Counter(), 0
    for name, lines in computations.items():
        for line in lines if runs[name] else ():
            match = _COLLECTIVE.search(line)
            if not match and (sent := _SEND.search(line)):
                key = BETWEEN_SLICES, "slices", 1 + sent[2].count(",")
                counts[key] += runs[name]
                sizes[key] += runs[name] * sum(sizes_of(sent[1]))
                unknown += name in endless
            if not match:
                continue
            kind = "reduce-scatter" if name.startswith("all-reduce-scatter") else match[2]  # TPU: a fusion of sum and slice
            groups = groups_of(line, math.prod(mesh.values()))
            key = kind, axes_of(groups, mesh), groups.shape[1]
            counts[key] += runs[name]
            sizes[key] += runs[name] * _bytes(match, groups.shape[1])
            unknown += name in endless
    found = [Collective(*key, counts[key], sizes[key]) for key in counts if key[2] > 1]
    return sorted(found, key=lambda x: -x.wire), unknown


def _bytes(match: re.Match, group: int) -> int:
    """Of one collective, as in `Collective.bytes`."""
    started = match[3] and match[2] != "all-reduce"  # gives (operands, results, scalars of the context)
    total = sum(sizes_of(match[1], scalars=not started))
    if started:
        return total // 2 if match[2] in SAME_SIZE else total * group // (group + 1)  # one side is the other's size, or part of it
    return total * group if match[2] == "reduce-scatter" else total


def table(found: list[Collective]) -> list[dict]:
    """As JSON types."""
    return [{**x._asdict(), "wire_bytes": x.wire} for x in found]



"""Collectives of a compiled program: their kinds, mesh axes, counts and bytes, read from its HLO text."""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from ssl_jax.rehearsal.replicas import axes_of, groups_of

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
SAME_SIZE = ("all-to-all", "ragged-all-to-all", "collective-permute")  # both sides of them
BETWEEN_SLICES = "send"  # to the other slices of a job, over the network of hosts
BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "c64": 64, "c128": 128}  # others say it: f32, s8, f8e4m3fn

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$")
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
_SEND = re.compile(r"= \((.*?), u32\[\].*? send\(.*_xla_megascale_target=\"\{([\d,]+)\}x")
_CALL = re.compile(r"(?:body|to_apply|calls|\w+_computations?)=(\{[^}]*\}|%?[\w.\-]+)")
_SHAPE = re.compile(r"\b(pred|bf16|[a-z]+\d+(?:e\d+m\d+\w*)?)\[([\d,]*)\]")


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
    computations, entry = _computations(hlo)
    runs, endless = _runs(computations, entry)
    counts, sizes, unknown = collections.Counter(), collections.Counter(), 0
    for name, lines in computations.items():
        for line in lines if runs[name] else ():
            match = _COLLECTIVE.search(line)
            if not match and (sent := _SEND.search(line)):
                key = BETWEEN_SLICES, "slices", 1 + sent[2].count(",")
                counts[key] += runs[name]
                sizes[key] += runs[name] * sum(_sizes(sent[1]))
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


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """({name: lines of a computation}, name of the entry)."""
    found, entry, lines = {}, "", []
    for line in hlo.splitlines():
        match = None if line.startswith(" ") else _COMPUTATION.match(line)
        if match:
            lines = found.setdefault(match[2], [])
            entry = match[2] if match[1] else entry
        elif line.startswith(" "):
            lines.append(line)
    return found, entry


def _runs(computations: Mapping[str, list[str]], entry: str) -> tuple[collections.Counter, set[str]]:
    """({computation: how often it runs}, those within loops of unknown length)."""
    runs, endless = collections.Counter(), set()
    calls = {name: list(_calls(lines, computations)) for name, lines in computations.items()}

    def visit(name: str, times: int, unknown: bool) -> None:
        runs[name] += times
        if unknown:
            endless.add(name)
        for callee, trips in calls.get(name, ()):
            visit(callee, times * (trips or 1), unknown or trips is None)

    visit(entry, 1, False)
    return runs, endless


def _calls(lines: list[str], computations: Mapping[str, list[str]]) -> Iterator[tuple[str, int | None]]:
    """(computation, how often) of what the lines call and may hold a collective; None: a loop of unknown length."""
    for line in lines:
        for match in _CALL.finditer(line):
            trips = _trips(line, computations) if match[0].startswith("body=") else 1
            for callee in re.findall(r"[\w.\-]+", match[1]):
                if callee in computations:
                    yield callee, trips


def _trips(line: str, computations: Mapping[str, list[str]]) -> int | None:
    """The trip count of a loop: XLA's own, or the constant that the counter is compared with (TPU)."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', line):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    bounds = re.findall(r"s32\[\][^=]* constant\((\d+)\)", "\n".join(computations.get(condition[1], ()))) if condition else ()
    return int(bounds[0]) if len(bounds) == 1 else None


def _bytes(match: re.Match, group: int) -> int:
    """Of one collective, as in `Collective.bytes`."""
    started = match[3] and match[2] != "all-reduce"  # gives (operands, results, scalars of the context)
    total = sum(_sizes(match[1], scalars=not started))
    if started:
        return total // 2 if match[2] in SAME_SIZE else total * group // (group + 1)  # one side is the other's size, or part of it
    return total * group if match[2] == "reduce-scatter" else total


def _sizes(shapes: str, scalars: bool = True) -> list[int]:
    """Bytes of each of some shapes, 'bf16[8,128]'."""
    found = [(kind, [int(n) for n in dims.split(",") if n]) for kind, dims in _SHAPE.findall(shapes)]
    return [bits_of(kind) * math.prod(dims) // 8 for kind, dims in found if dims or scalars]


def bits_of(kind: str) -> int:
    """Of a number of an HLO type."""
    return BITS.get(kind) or int(re.search(r"\d+", kind)[0])


def table(found: list[Collective]) -> list[dict]:
    """As JSON types."""
    return [{**x._asdict(), "wire_bytes": x.wire} for x in found]



"""Parses the HLO text of a compiled program: its computations, how often each runs, and the sizes of arrays."""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Iterator, Mapping

BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "c64": 64, "c128": 128}  # other names contain the number: f32, s8, f8e4m3fn

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$")
_CALL = re.compile(r"(?:body|to_apply|calls|\w+_computations?)=(\{[^}]*\}|%?[\w.\-]+)")
_SHAPE = re.compile(r"\b(pred|bf16|[a-z]+\d+(?:e\d+m\d+\w*)?)\[([\d,]*)\]")


def parse_computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """({computation: its lines}, name of the entry computation)."""
    found, entry, lines = {}, "", []
    for line in hlo.splitlines():
        match = None if line.startswith(" ") else _COMPUTATION.match(line)
        if match:
            lines = found.setdefault(match[2], [])
            entry = match[2] if match[1] else entry
        elif line.startswith(" "):
            lines.append(line)
    return found, entry


def count_runs(computations: Mapping[str, list[str]], entry: str) -> tuple[collections.Counter, set[str]]:
    """({computation: how often it runs per step}, {computations inside loops of unknown length, which count once})."""
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
    """(called computation, how often a call runs it); None for a loop of unknown length."""
    for line in lines:
        for match in _CALL.finditer(line):
            trips = _trips(line, computations) if match[0].startswith("body=") else 1
            for callee in re.findall(r"[\w.\-]+", match[1]):
                if callee in computations:
                    yield callee, trips


def _trips(line: str, computations: Mapping[str, list[str]]) -> int | None:
    """The trip count of a loop: XLA's annotation, or (on TPUs) the constant that the loop counter is compared with."""
    if annotated := re.search(r'known_trip_count":\{"n":"(\d+)"', line):
        return int(annotated[1])
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    bounds = re.findall(r"s32\[\][^=]* constant\((\d+)\)", "\n".join(computations.get(condition[1], ()))) if condition else ()
    return int(bounds[0]) if len(bounds) == 1 else None


def shape_bytes(shapes: str, scalars: bool = True) -> list[int]:
    """Bytes of each array type in the text `shapes`, such as 'bf16[8,128]'; without 0-dimensional ones unless `scalars`."""
    found = [(kind, [int(n) for n in dims.split(",") if n]) for kind, dims in _SHAPE.findall(shapes)]
    return [type_bits(kind) * math.prod(dims) // 8 for kind, dims in found if dims or scalars]


def type_bits(kind: str) -> int:
    """Bits of one element of an HLO type."""
    return BITS.get(kind) or int(re.search(r"\d+", kind)[0])

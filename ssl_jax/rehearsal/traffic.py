"""Memory traffic of a compiled program, read from its HLO text, for compilers without a cost analysis."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from ssl_jax.rehearsal.hlo import count_runs, parse_computations, shape_bytes

# These move nothing themselves.
FREE = {"parameter", "tuple", "get-tuple-element", "constant", "bitcast", "while", "conditional", "call", "after-all", "opt-barrier",
        "partition-id", "replica-id"}  # fmt: skip
SLICES = {"dynamic-slice", "gather", "slice"}

_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?[\])}]) ([a-z][\w\-]*)\((.*?)\)(.*)$")
_INSIDE = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)")
_SOURCE = re.compile(r'op_name="([^"]*)"')


class Move(NamedTuple):
    """What one instruction reads and writes in a step."""

    opcodes: frozenset[str]  # its own, and those that it fuses
    shape: str  # the text of its result, such as 'bf16[8,128]{1,0}'
    source: str  # where in the model it comes from, by JAX's names; '' if unknown
    bytes: int  # read and written in all runs of a step
    runs: int  # per step


def traffic(hlo: str) -> int:
    """Bytes per step that instructions read and write: the sum of `moves`."""
    return sum(move.bytes for move in moves(hlo))


def moves(hlo: str) -> Iterator[Move]:
    """What each instruction of a compiled program reads and writes, where a fusion is one instruction.

    Bytes are upper estimates, since data that a cache keeps between two instructions counts, too. A fusion that only takes slices
    of an array reads those slices, and one that updates a part of an array in place writes that part. Loops of unknown length count
    once.
    """
    computations, entry = parse_computations(hlo)
    runs, _ = count_runs(computations, entry)
    parsed = {
        name: [match.groups() for line in lines if (match := _INSTRUCTION.match(line))]
        for name, lines in computations.items()
    }
    inner = {  # bodies of fusions and of reductions
        callee
        for lines in parsed.values()
        for *_, opcode, _, rest in lines
        if opcode != "call"
        for callee in _INSIDE.findall(rest)
    }
    for name, lines in parsed.items():
        if runs[name] and name not in inner:
            yield from _moves_of(lines, parsed, runs[name])


def _moves_of(lines: list[tuple], parsed: Mapping[str, list[tuple]], runs: int) -> Iterator[Move]:
    """The moves of one computation."""
    shapes = {name: shape for name, shape, *_ in lines}
    for _, shape, opcode, operands, rest in lines:
        if opcode in FREE or opcode.endswith("-done"):
            continue
        read = [_total(shapes.get(name, "")) for name in _names(operands)]
        wrote, opcodes, source = _total(shape), {opcode}, _SOURCE.search(rest)
        if opcode == "fusion":
            fused = parsed[_INSIDE.search(rest)[1]]
            opcodes |= {inside for _, _, inside, *_ in fused}
            source = source or next((found for *_, last in reversed(fused) if (found := _SOURCE.search(last))), None)
            sliced, update = _fusion_traffic(fused)
            read = [min(whole, sliced.get(index, whole)) for index, whole in enumerate(read)]
            wrote = wrote if update is None else update
        elif opcode in SLICES:
            read = [wrote]
        elif opcode == "dynamic-update-slice":
            read, wrote = read[1:2], read[1]
        yield Move(frozenset(opcodes), shape, source[1] if source else "", runs * (sum(read) + wrote), runs)


def _fusion_traffic(lines: list[tuple]) -> tuple[dict[int, int], int | None]:
    """({index of a parameter that is read in part: bytes read}, bytes written in place, or None if the whole result is written)."""
    instructions = {name: (shape, opcode, _names(operands)) for name, shape, opcode, operands, _ in lines}
    parameters = {name: int(operands) for name, _, opcode, operands, _ in lines if opcode == "parameter"}

    def source(name: str) -> str:
        while instructions[name][1] in ("bitcast", "copy", "convert") and instructions[name][2]:
            name = instructions[name][2][0]
        return name

    sliced, update = {}, None
    root = source(lines[-1][0])
    if instructions[root][1] == "dynamic-update-slice":
        target, piece = instructions[root][2][:2]
        update = _total(instructions[piece][0])
        if source(target) in parameters:
            sliced[parameters[source(target)]] = 0
    for name, index in parameters.items():
        users = [(shape, opcode) for shape, opcode, operands in instructions.values() if name in operands]
        if users and all(opcode in SLICES for _, opcode in users):
            sliced[index] = sum(_total(shape) for shape, _ in users)
    return sliced, update


def _names(operands: str) -> list[str]:
    return re.findall(r"%([\w.\-]+)", operands)


def _total(shapes: str) -> int:
    return sum(shape_bytes(shapes))

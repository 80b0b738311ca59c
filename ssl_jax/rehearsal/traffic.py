"""Memory traffic of a compiled program, read from its HLO text, for compilers without a cost analysis."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ssl_jax.rehearsal.hlo import count_runs, parse_computations, shape_bytes

# These move nothing themselves.
FREE = {"parameter", "tuple", "get-tuple-element", "constant", "bitcast", "while", "conditional", "call", "after-all", "opt-barrier",
        "partition-id", "replica-id"}  # fmt: skip
SLICES = {"dynamic-slice", "gather", "slice"}

_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?[\])}]) ([a-z][\w\-]*)\((.*?)\)(.*)$")
_INSIDE = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)")


def traffic(hlo: str) -> int:
    """Bytes per step that instructions read and write, where a fusion is one instruction.

    It is an upper estimate, since data that a cache keeps between two instructions counts, too. A fusion that only takes slices of
    an array reads those slices, and one that updates a part of an array in place writes that part. Loops of unknown length count
    once.
    """
    computations, entry = parse_computations(hlo)
    runs, _ = count_runs(computations, entry)
    parsed = {name: [match.groups() for line in lines if (match := _INSTRUCTION.match(line))] for name, lines in computations.items()}
    inner = {  # bodies of fusions and of reductions
        callee for lines in parsed.values() for *_, opcode, _, rest in lines if opcode != "call" for callee in _INSIDE.findall(rest)
    }
    return sum(runs[name] * _bytes(lines, parsed) for name, lines in parsed.items() if runs[name] and name not in inner)


def _bytes(lines: list[tuple], parsed: Mapping[str, list[tuple]]) -> int:
    """Bytes that one run of a computation reads and writes."""
    shapes, total = {name: shape for name, shape, *_ in lines}, 0
    for _, shape, opcode, operands, rest in lines:
        if opcode in FREE or opcode.endswith("-done"):
            continue
        read = [_total(shapes.get(name, "")) for name in _names(operands)]
        wrote = _total(shape)
        if opcode == "fusion":
            sliced, update = _fusion_traffic(parsed[_INSIDE.search(rest)[1]])
            read = [min(whole, sliced.get(index, whole)) for index, whole in enumerate(read)]
            wrote = wrote if update is None else update
        elif opcode in SLICES:
            read = [wrote]
        elif opcode == "dynamic-update-slice":
            read, wrote = read[1:2], read[1]
        total += sum(read) + wrote
    return total


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

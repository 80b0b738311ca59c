"""What a compiled program moves through the memory of a device, read from its HLO text: for compilers that do not tell."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ssl_jax.rehearsal.hlo import computations_of, runs_of, sizes_of

# They move nothing, or what they call does.
FREE = {"parameter", "tuple", "get-tuple-element", "constant", "bitcast", "while", "conditional", "call", "after-all", "opt-barrier",
        "partition-id", "replica-id"}  # fmt: skip
SLICES = {"dynamic-slice", "gather", "slice"}

_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?[\])}]) ([a-z][\w\-]*)\((.*?)\)(.*)$")
_INSIDE = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)")


def traffic(hlo: str) -> int:
    """Bytes of a step that instructions read and write, each on its own; those within a fusion are one. What a cache keeps between two
    of them counts, too: it is an estimate from above. A fusion that only takes slices of an array reads those, and one that updates a
    part of an array in its place writes the part. Loops count as often as they run, where that is known, else once.
    """
    computations, entry = computations_of(hlo)
    runs, _ = runs_of(computations, entry)
    parsed = {name: [match.groups() for line in lines if (match := _INSTRUCTION.match(line))] for name, lines in computations.items()}
    inner = {  # bodies of fusions, and what reductions apply
        callee for lines in parsed.values() for *_, opcode, _, rest in lines if opcode != "call" for callee in _INSIDE.findall(rest)
    }
    return sum(runs[name] * _bytes(lines, parsed) for name, lines in parsed.items() if runs[name] and name not in inner)


def _bytes(lines: list[tuple], parsed: Mapping[str, list[tuple]]) -> int:
    """Of one computation, run once."""
    shapes, total = {name: shape for name, shape, *_ in lines}, 0
    for _, shape, opcode, operands, rest in lines:
        if opcode in FREE or opcode.endswith("-done"):
            continue
        read = [_total(shapes.get(name, "")) for name in _names(operands)]
        wrote = _total(shape)
        if opcode == "fusion":
            sliced, update = _of_fusion(parsed[_INSIDE.search(rest)[1]])
            read = [min(whole, sliced.get(index, whole)) for index, whole in enumerate(read)]
            wrote = wrote if update is None else update
        elif opcode in SLICES:
            read = [wrote]
        elif opcode == "dynamic-update-slice":
            read, wrote = read[1:2], read[1]
        total += sum(read) + wrote
    return total


def _of_fusion(lines: list[tuple]) -> tuple[dict[int, int], int | None]:
    """({index of a parameter: bytes that are read of it, where less than all is}, bytes that are written, None: the whole result)."""
    made = {name: (shape, opcode, _names(operands)) for name, shape, opcode, operands, _ in lines}
    parameters = {name: int(operands) for name, _, opcode, operands, _ in lines if opcode == "parameter"}

    def source(name: str) -> str:
        while made[name][1] in ("bitcast", "copy", "convert") and made[name][2]:
            name = made[name][2][0]
        return name

    sliced, update = {}, None
    root = source(lines[-1][0])
    if made[root][1] == "dynamic-update-slice":
        target, piece = made[root][2][:2]
        update = _total(made[piece][0])
        if source(target) in parameters:
            sliced[parameters[source(target)]] = 0
    for name, index in parameters.items():
        users = [(shape, opcode) for shape, opcode, operands in made.values() if name in operands]
        if users and all(opcode in SLICES for _, opcode in users):
            sliced[index] = sum(_total(shape) for shape, _ in users)
    return sliced, update


def _names(operands: str) -> list[str]:
    return re.findall(r"%([\w.\-]+)", operands)


def _total(shapes: str) -> int:
    return sum(sizes_of(shapes))

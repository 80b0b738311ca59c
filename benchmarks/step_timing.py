"""Where the time of a compiled step goes, from XLA's own trace of a few runs."""

from __future__ import annotations

import re
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import jax
from jax.profiler import ProfileData, ProfileOptions

# The first of these opcodes in an instruction, or in the computation that it fuses, sets its kind.
KINDS = (
    ("convolution", "convolution"),
    ("custom-call", "oneDNN and other libraries"),
    ("dot", "matrix product"),
    ("reduce", "reduction"),
    ("reduce-window", "pooling"),
    ("select-and-scatter", "pooling"),
    ("transpose", "transposition"),
    ("concatenate", "unfolding (pad, slice, concatenate)"),
    ("pad", "unfolding (pad, slice, concatenate)"),
    ("slice", "unfolding (pad, slice, concatenate)"),
    ("dynamic-slice", "unfolding (pad, slice, concatenate)"),
    ("copy", "copy"),
)
CONTAINERS = {"while", "call", "conditional"}  # the instructions of their bodies are listed instead
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = .*?[\])}] ([a-z][\w-]*)\(")
COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
FUSED = re.compile(r"calls=%?([\w.-]+)")
SOURCE = re.compile(r'op_name="([^"]*)"')


def instructions(text: str) -> dict[str, tuple[str, str]]:
    """Compiled HLO text -> {instruction: (kind, source in the model)}, without containers."""
    opcodes, sources, current = defaultdict(set), defaultdict(str), ""
    found = {}
    for line in text.splitlines():
        if header := COMPUTATION.match(line):
            current = header[1]
        elif match := INSTRUCTION.match(line):
            name, opcode = match.groups()
            source, fused = SOURCE.search(line), FUSED.search(line)
            opcodes[current].add(opcode)
            sources[current] = source[1] if source else sources[current]
            found[name] = (opcode, source[1] if source else "", fused[1] if fused else "")
    result = {}
    for name, (opcode, source, fused) in found.items():
        if opcode not in CONTAINERS:
            inside = opcodes[fused] | {opcode}
            kind = next((kind for key, kind in KINDS if key in inside), "elementwise and other")
            result[name] = (kind, source or sources[fused])
    return result


def report(step: Callable[[], object], text: str, runs: int = 3, longest: int = 20) -> str:
    """A table of milliseconds per call of `step`, whose compiled HLO is `text`.

    The time of an operation includes waits for helper threads, which are not traced.
    """
    by_name = instructions(text)
    options = ProfileOptions()
    options.python_tracer_level, options.host_tracer_level = 0, 3
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            for _ in range(runs):
                step()
        (path,) = Path(folder).rglob("*.xplane.pb")
        data = ProfileData.from_file(str(path))
    times = defaultdict(float)
    for plane in data.planes:
        for line in plane.lines:
            for event in line.events:
                # GPU kernels have names of their own.
                name = event.name if event.name in by_name else dict(event.stats).get("hlo_op")
                if name in by_name:
                    times[name] += event.duration_ns / 1e6 / runs
    kinds = defaultdict(float)
    for name, spent in times.items():
        kinds[by_name[name][0]] += spent
    total = sum(times.values())
    rows = [f"{total:9.1f} ms  100 %  all operations, including overlaps"]
    rows += [
        f"{t:9.1f} ms {100 * t / total:4.0f} %  {kind}" for kind, t in sorted(kinds.items(), key=lambda kv: -kv[1])
    ]
    rows += ["", "the longest"]
    for name, spent in sorted(times.items(), key=lambda kv: -kv[1])[:longest]:
        kind, source = by_name[name]
        rows.append(f"{spent:9.1f} ms {100 * spent / total:4.0f} %  {name}: {kind}; {source}")
    return "\n".join(rows) + "\n"

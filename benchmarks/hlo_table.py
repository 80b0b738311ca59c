"""What the compiled train steps of `accelerator_cases.py` multiply, move, copy and keep in float32, without an accelerator.

    pip install -r requirements-rehearse-gpu.txt        # or requirements-rehearse.txt for TPUs
    JAX_PLATFORMS=cpu PYTHONPATH=. python benchmarks/hlo_table.py [--topology h200:1x1] [--cases vit_b16] [--rows FILE]

Prints a table, and for each case what costs most. `--rows` appends to a CSV file of the columns of docs/results/speed.csv.
Nothing runs, so no number is a time. The program is that of `launch.py train`, on GPUs with cuDNN's attention (see `pretend_gpu`).

  gflop_half, gflop_wide  of products whose operands are bfloat16, or float32. A product of both types counts as bfloat16
  moved_gb                bytes that instructions read and write, without caches (`rehearsal.traffic`)
  copies, copies_gb       instructions that only change the layout of an array of 1 MB or more (copies, transpositions), and bytes
                          that they read and write
  wide_gb                 bytes of float32 arrays of 1 MB or more that are written though they have no shape of the state: results
                          that might have been bfloat16
  memory_gib              arguments, temporaries and code of the program
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import jax
from accelerator_cases import CASES, ROOT, run_of

from ssl_jax.rehearsal import flops, memory
from ssl_jax.rehearsal.hlo import shape_bytes
from ssl_jax.rehearsal.topology import open_topology
from ssl_jax.rehearsal.traffic import Move, moves

LARGE = 10**6  # bytes
LAYOUT = {
    "copy",
    "transpose",
    "copy-start",
    "fusion",
    "bitcast",
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "convert",
}
OPTIONS = {"tpu": {"exec_time_optimization_effort": -1.0}}  # else minutes
COLUMNS = ("gflop_half", "gflop_wide", "moved_gb", "copies", "copies_gb", "wide_gb", "memory_gib")


def only_layout(move: Move) -> bool:
    return move.opcodes <= LAYOUT and bool(move.opcodes & {"copy", "transpose", "copy-start"})


def wide_bytes(move: Move, state: Iterable[tuple[int, ...]]) -> int:
    """Bytes of the large float32 arrays that an instruction writes, without those of a shape in `state`."""
    arrays = [
        (kind, tuple(int(n) for n in dims.split(",") if n))
        for kind, dims in re.findall(r"(\w+)\[([\d,]*)\]", move.shape)
    ]
    wide = [4 * _size(shape) for kind, shape in arrays if kind == "f32" and tuple(sorted(shape)) not in state]
    return move.runs * sum(size for size in wide if size >= LARGE)


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size


def where(source: str) -> str:
    """The name of an operation without numbers of blocks and wrappers: 'transpose(jvp(ViT))/block*/mlp/fc1/dot_general'."""
    return re.sub(r"\d+", "*", re.sub(r"jit\([\w<>]*\)/|jit\(\w+\)|checkpoint/|closed_call/", "", source)) or "no name"


def account(found: Iterable[Move], state: set) -> tuple[dict[str, float], dict[str, Counter]]:
    """({column: value} of a program, {'moved', 'copied', 'wide': bytes by place})."""
    total, places = Counter(), {kind: Counter() for kind in ("moved", "copied", "wide")}
    for move in found:
        wide, place = wide_bytes(move, state), where(move.source)
        total["moved_gb"] += move.bytes / 1e9
        total["wide_gb"] += wide / 1e9
        places["moved"][place] += move.bytes
        places["wide"][place] += wide
        if only_layout(move) and max(shape_bytes(move.shape), default=0) >= LARGE:
            total["copies"] += move.runs
            total["copies_gb"] += move.bytes / 1e9
            places["copied"][place] += move.bytes
    return dict(total), places


def pretend_gpu() -> None:
    """Let JAX trace cuDNN's attention without a GPU. The compiler needs none for it, but JAX asks one for its version."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    jax.default_backend = lambda: "gpu"  # which `models.common.attention` asks
    cudnn.check_cudnn_version = lambda: 91000
    cudnn.check_compute_capability = lambda capability: capability == "9.0"
    cudnn.is_cuda_compute_capability_equal = lambda capability: capability == "9.0"


def count(name: str, devices, platform: str, texts: Path | None) -> tuple[dict[str, float], dict[str, Counter]]:
    """`account` of a case compiled for the first of `devices`."""
    run, example = run_of(name, CASES[name].size, devices[0], platform, abstract=True)
    traced = run.trace(run.abstract, example, run.root)
    counted = flops.count(traced.jaxpr)
    compiled = traced.lower().compile(compiler_options=OPTIONS.get(platform))
    text = compiled.as_text()
    if texts:
        (texts / f"{name}.txt").write_text(text)
    state = {tuple(sorted(x.shape)) for x in jax.tree.leaves(run.abstract)}
    total, places = account(moves(text), state)
    found = {"gflop_half": (counted.flops - counted.wide) / 1e9, "gflop_wide": counted.wide / 1e9, **total}
    return {**found, "memory_gib": memory.needed(memory.of_program(compiled), platform) / 2**30}, places


def rows(name: str, topology: str, found: Mapping[str, float], commit: str, machine: str) -> list[dict]:
    """Rows of docs/results/speed.csv."""
    case = CASES[name]
    common = dict(method=case.recipe.partition(".")[0], config="benchmarks/hlo_table.py", variant=topology,
                  subject=f"{case.title}, batch {case.size.batch}", protocol="hlo-table", commit=commit, machine=machine)  # fmt: skip
    return [{**common, "metric": metric, "value": f"{float(f'{found.get(metric, 0):.4g}'):g}"} for metric in COLUMNS]


def append(path: Path, new: list[dict]) -> None:
    """Append rows to a CSV file; its first line names the columns. A new file gets that of docs/results/speed.csv."""
    if not path.exists():
        with (ROOT / "docs" / "results" / "speed.csv").open() as file:
            path.write_text(file.readline())
    with path.open(newline="") as file:
        columns = next(csv.reader(file))
    with path.open("a", newline="") as file:
        csv.DictWriter(file, columns, restval="", lineterminator="\n").writerows(new)


def commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short=7", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--topology", default="h200:1x1", help="of one device; its compiler must be installed")
    parser.add_argument("--rows", type=Path, default=None, help="append to this CSV file")
    parser.add_argument("--texts", type=Path, default=None, help="folder for the texts of the compiled programs")
    parser.add_argument("--longest", type=int, default=6, help="lines about what moves, copies and is float32")
    arguments = parser.parse_args()
    device = open_topology(arguments.topology, 1)
    if device.platform == "gpu":
        pretend_gpu()
    print(f"{'case':18}" + "".join(f"{column:>20}" for column in COLUMNS))
    for name in arguments.cases:
        start = time.perf_counter()
        found, places = count(name, device.devices, device.platform, arguments.texts)
        print(f"{name:18}" + "".join(f"{found.get(column, 0):20,.1f}" for column in COLUMNS), flush=True)
        for kind, counter in places.items():
            for place, size in counter.most_common(arguments.longest):
                print(f"    {kind:7}{size / 1e9:9.2f} GB  {place}")
        print(f"    {time.perf_counter() - start:.0f} s", flush=True)
        if arguments.rows:
            machine = {"gpu": "gpu-compiler", "tpu": "libtpu"}.get(device.platform, "rehearsal")
            append(arguments.rows, rows(name, arguments.topology, found, commit(), machine))


if __name__ == "__main__":
    main()

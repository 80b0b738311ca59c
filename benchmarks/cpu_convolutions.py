"""Convolutions of ResNets and dense layers of a ViT on the CPU: oneDNN against the rules for XLA, forward and both gradients.

    JAX_PLATFORMS=cpu PYTHONPATH=. python benchmarks/cpu_convolutions.py [--dtype bfloat16] [--rows FILE.csv]

Prints GFLOP/s, the best of four runs each. The rules of ssl_jax/models/conv.py for what oneDNN computes come from this table.
Quote figures of a quiet machine only. `--rows` adds them to a CSV file of docs/results/.
"""

from __future__ import annotations

import argparse
import csv
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import lax

from ssl_jax.models import conv, onednn

# images, side in pixels, channels, features, kernel, stride; side 0: that many rows of a dense layer
SHAPES = (
    (256, 32, 64, 64, 3, 1), (256, 32, 64, 128, 3, 2), (256, 16, 128, 128, 3, 1), (256, 16, 128, 256, 3, 2),
    (256, 8, 256, 256, 3, 1), (256, 8, 256, 512, 3, 2), (256, 4, 512, 512, 3, 1), (256, 32, 64, 128, 1, 2), (256, 32, 3, 64, 3, 1),
    (16, 224, 3, 64, 7, 2), (16, 56, 64, 64, 3, 1), (16, 56, 256, 64, 1, 1), (16, 56, 64, 256, 1, 1), (16, 28, 128, 128, 3, 1),
    (16, 14, 256, 256, 3, 1), (16, 14, 1024, 256, 1, 1), (16, 7, 512, 512, 3, 1),
    (3152, 0, 384, 1152, 1, 1), (3152, 0, 384, 384, 1, 1), (3152, 0, 384, 1536, 1, 1), (3152, 0, 1536, 384, 1, 1),
)  # fmt: skip
ROLES = {onednn.FORWARD: "forward", onednn.INPUT: "gradient of the input", onednn.KERNEL: "gradient of the kernel"}


def seconds(function, *operands) -> float:
    """The best of four runs, after one that compiles."""
    function, times = jax.jit(function), []
    jax.block_until_ready(function(*operands))
    for _ in range(4):
        start = time.perf_counter()
        jax.block_until_ready(function(*operands))
        times.append(time.perf_counter() - start)
    return min(times)


def measure(images, side, channels, features, kernel, stride, dtype):
    """For each role (GFLOP/s of oneDNN, of XLA); nan where oneDNN has none."""
    batch, height, width = (images, side, side) if side else (1, 1, images)
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (batch, height, width, channels), dtype)
    k = jax.random.normal(keys[1], (kernel, kernel, channels, features), dtype) / 20
    strides, padding = (stride, stride), tuple(lax.padtype_to_pads((height, width), k.shape[:2], (stride, stride), "SAME"))
    y = jax.random.normal(keys[2], (batch, -(-height // stride), -(-width // stride), features), dtype)
    flops = 2 * y.size * kernel**2 * channels
    for role, (a, b, like) in enumerate(((x, k, y), (y, k, x), (x, y, k))):
        options = dict(shape=like.shape, strides=strides, padding=padding)
        by_xla = seconds(lambda a, b, role=role, o=options: conv._by_xla_on_cpu(role, a, b, **o, precision=None), a, b)
        if onednn.can_convolve(role, a, b, **options):
            by_onednn = seconds(lambda a, b, role=role, o=options: onednn.convolve(role, a, b, **o), a, b)
        else:
            by_onednn = float("nan")
        yield role, flops / by_onednn / 1e9, flops / by_xla / 1e9


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--commit", default="")
    parser.add_argument("--machine", default="")
    arguments = parser.parse_args()
    if isinstance(reason := onednn.load(), str):
        parser.error(reason)
    rows = []
    for images, side, channels, features, kernel, stride in SHAPES:
        what = f"{kernel}x{kernel}, stride {stride}, {side} px" if side else "dense"
        case = f"{what}, {channels} to {features} channels"
        pairs = []
        for role, ours, xla in measure(images, side, channels, features, kernel, stride, jnp.dtype(arguments.dtype)):
            pairs.append(f"{ours:4.0f} {xla:4.0f}")
            rows += [(case, f"{name}, {ROLES[role]}", f"{value:.0f}") for name, value in (("oneDNN", ours), ("XLA", xla))]
        print(f"{case:45} {'   '.join(pairs)}", flush=True)
    if arguments.rows:
        with arguments.rows.open("a", newline="") as file:
            write = csv.writer(file, lineterminator="\n").writerow
            for case, metric, value in rows:
                write(["", "benchmarks/cpu_convolutions.py", arguments.dtype, case, "", "", metric, value, "", "",
                       "cpu-convolutions", arguments.commit, arguments.machine, ""])  # fmt: skip


if __name__ == "__main__":
    main()

"""Sampling images token by token: with a cache of keys and values, without it, and against the limits of the machine.

    PYTHONPATH=. python benchmarks/token_sampling.py [--sizes mini] [--batches 1 8 32] [--rounds 5] [--dtype float32]

mini: six blocks of width 256, 64 tokens of 1024 codes (configs/vq_prior.py:cifar10_small). base, large: VIM-Base and VIM-Large,
1024 tokens of 8192 codes, for accelerators (--skip-uncached: without the cache an image costs 520 times the arithmetic).
Weights are random; temperature 1, no top-k or top-p. Both loops sample with the same noise and must agree, except for ties
within rounding.

Columns: tokens per second of all images with and without the cache (medians over rounds, in turns), and their ratio with its
range; arithmetic and memory per token of the cached loop; and `of bound`, the time that this machine needs at least for the
larger of both, over the measured time. A step of B images reads all matrices once and the whole cache of each image, and writes
one position. Its arithmetic is 2 per weight and image, plus 4 x depth x width x length for attention over the whole cache. The
limits of the machine are measured first: a large matrix product, and the sum of an array larger than the caches of the
processor. Matrices that fit in these caches are read faster; then `of bound` can exceed 1. Quote figures of a quiet machine
only. Ends with a line of JSON.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import pathlib
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from ssl_jax.models.common import create, run
from ssl_jax.models.tokenizers.prior import CausalPrior
from ssl_jax.sampling.tokens import autoregress, autoregress_uncached


class Size(NamedTuple):
    codes: int
    length: int
    depth: int
    width: int
    heads: int


SIZES = {
    "mini": Size(1024, 64, 6, 256, 4),
    "base": Size(8192, 1024, 24, 1536, 16),
    "large": Size(8192, 1024, 36, 2048, 32),
}


class Need(NamedTuple):
    """Arithmetic and memory traffic of one step of the cached loop."""

    flop: float
    bytes: float


def need(size: Size, batch: int, itemsize: int) -> Need:
    """As in the module docstring."""
    weights = size.depth * 12 * size.width**2 + size.width * size.codes
    attention = size.depth * 4 * size.width * size.length
    cache = size.depth * 2 * size.width * (size.length + 1)
    return Need(batch * (2 * weights + attention), itemsize * (weights + batch * cache))


def loops(size: Size, batch: int, dtype: str):
    """(cached, uncached): keys [B] -> tokens [B, length]."""
    module = CausalPrior(**size._asdict(), hidden=4 * size.width, dropout=0.0, dtype=dtype)

    @jax.jit
    def weights():
        params, _ = create(module, jax.random.key(0), jnp.zeros((1, size.length), jnp.int32), train=False)
        params["head"]["kernel"] = jax.random.normal(jax.random.key(1), params["head"]["kernel"].shape) / size.width**0.5
        kernels = lambda path, x: x.astype(dtype) if "kernel" in jax.tree_util.keystr(path) else x  # noqa: E731
        return jax.tree_util.tree_map_with_path(kernels, params)

    params, prefix = weights(), jnp.zeros((batch, 0), jnp.int32)

    @jax.jit
    def cached(params, keys):
        def call(method, *args):
            return run(module, params, {}, *args, train=False, method=method)[0]

        return autoregress(functools.partial(call, "prefill"), functools.partial(call, "decode"), prefix, size.length, keys)

    @jax.jit
    def uncached(params, keys):
        def logits_of(tokens):
            return run(module, params, {}, tokens, train=False)[0][0]

        return autoregress_uncached(logits_of, prefix, size.length, keys)

    return tuple(functools.partial(loop, params) for loop in (cached, uncached))


def seconds(function, *args) -> float:
    began = time.perf_counter()
    jax.block_until_ready(function(*args))
    return time.perf_counter() - began


def best(function, *args, rounds: int = 5) -> float:
    """Seconds of the fastest of `rounds` runs, after one that compiles."""
    jax.block_until_ready(function(*args))
    return min(seconds(function, *args) for _ in range(rounds))


def machine(dtype: str) -> tuple[float, float]:
    """(FLOP per second of a matrix product, bytes read per second)"""
    side, length = (8192, 2**30) if jax.default_backend() != "cpu" else (2048, 2**27)
    square = jnp.ones((side, side), dtype)
    flop = 2 * side**3 / best(jax.jit(lambda x: jax.lax.dot(x, x, preferred_element_type=jnp.float32)), square)
    return flop, length / best(jax.jit(jnp.sum), jnp.ones(length // 4, jnp.float32))


def measure(name: str, batch: int, rounds: int, dtype: str, skip_uncached: bool, peak: tuple[float, float]) -> dict:
    size = SIZES[name]
    cached, uncached = loops(size, batch, dtype)
    keys = jax.random.split(jax.random.key(2), batch)
    tokens = np.asarray(cached(keys))
    took = {"cached": [], "uncached": []}
    equal = None
    if not skip_uncached:
        equal = float(np.mean(tokens == np.asarray(uncached(keys))))
        assert equal > 0.9 or dtype != "float32", f"{name}: the loops agree in {equal:.4%} of the tokens"
    for _ in range(rounds):
        took["cached"].append(seconds(cached, keys))
        if not skip_uncached:
            took["uncached"].append(seconds(uncached, keys))
    rate = {loop: batch * size.length / np.array(times) for loop, times in took.items() if times}
    step = np.median(took["cached"]) / size.length
    needed = need(size, batch, jnp.dtype(dtype).itemsize)
    bounds = {"flop": needed.flop / peak[0], "bytes": needed.bytes / peak[1]}
    row = {
        "size": name,
        "batch": batch,
        **{f"tokens_per_second_{loop}": float(np.median(r)) for loop, r in rate.items()},
        "mflop_per_token": needed.flop / batch / 1e6,
        "mbyte_per_token": needed.bytes / batch / 1e6,
        "bound_by": max(bounds, key=bounds.get),
        "of_bound": float(max(bounds.values()) / step),
    }
    if equal is not None:
        ratios = rate["cached"] / rate["uncached"]
        row |= {"equal_tokens": equal, "ratio": float(np.median(ratios)), "ratio_range": [float(min(ratios)), float(max(ratios))]}
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", nargs="+", default=["mini"], choices=list(SIZES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--skip-uncached", action="store_true")
    arguments = parser.parse_args()
    load, peak = os.getloadavg()[0], machine(arguments.dtype)
    print(f"{jax.devices()[0].device_kind}: {peak[0] / 1e9:.1f} GFLOP/s, {peak[1] / 1e9:.1f} GB/s; load {load:.1f}")
    print(f"{'size':6}{'batch':>6}{'cached':>10}{'without':>10}{'ratio':>8}{'(range)':>16}{'MFLOP':>9}{'MB':>8}{'of bound':>10}")
    rows = []
    for name in arguments.sizes:
        for batch in arguments.batches:
            row = measure(name, batch, arguments.rounds, arguments.dtype, arguments.skip_uncached, peak)
            rows.append(row)
            low, high = row.get("ratio_range", (np.nan, np.nan))
            print(
                f"{name:6}{batch:6}{row['tokens_per_second_cached']:10.0f}{row.get('tokens_per_second_uncached', np.nan):10.0f}"
                f"{row.get('ratio', np.nan):8.1f}{f'{low:.1f}..{high:.1f}':>16}{row['mflop_per_token']:9.2f}"
                f"{row['mbyte_per_token']:8.2f}{row['of_bound']:10.2f} ({row['bound_by']})",
                flush=True,
            )
    result = dict(benchmark="token_sampling", device=jax.devices()[0].device_kind, dtype=arguments.dtype, load=load,
                  gflop_per_second=peak[0] / 1e9, gbyte_per_second=peak[1] / 1e9, rounds=arguments.rounds, rows=rows)  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()

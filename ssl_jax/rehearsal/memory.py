"""Memory per device: of trees of shapes, and of compiled programs."""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax


def size(tree) -> int:
    """The number of elements in a tree of arrays or shapes."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def bytes_of_device(tree) -> int:
    """Bytes of a tree of shapes with shardings on one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def largest(tree, most: int = 5) -> list[dict]:
    """[{'bytes', 'shape', 'of'}] of the leaves that are largest per device, in the format of `exhausted`."""
    found = [
        {
            "bytes": bytes_of_device(x),
            "shape": f"{x.dtype}{list(x.sharding.shard_shape(x.shape))}",
            "of": "state" + jax.tree_util.keystr(path),
        }
        for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]
    ]
    return sorted(found, key=lambda x: -x["bytes"])[:most]


def needed(program: Mapping[str, int], platform: str) -> int:
    """Bytes of device memory that a program needs; `program` is the result of `of_program`.

    On TPUs it is the peak, since their compiler accepts programs whose total exceeds the memory of a chip. Elsewhere it is the
    total.
    """
    return (platform == "tpu" and program["peak"]) or program["total"]


def of_program(compiled: jax.stages.Compiled) -> dict[str, int] | None:
    """Bytes per device of a running program; None if the compiler has no memory analysis.

    'aliased' are outputs that reuse the memory of donated arguments. 'total' is an upper bound: arguments, outputs that are not
    aliased, temporaries and code. 'peak' is XLA's own figure for its schedule (0 if unknown).
    """
    analysis = compiled.memory_analysis()
    if analysis is None:
        return None
    found = {
        "arguments": analysis.argument_size_in_bytes,
        "outputs": analysis.output_size_in_bytes,
        "aliased": analysis.alias_size_in_bytes,
        "temporaries": analysis.temp_size_in_bytes,
        "code": analysis.generated_code_size_in_bytes,
    }
    found["total"] = found["arguments"] + found["outputs"] - found["aliased"] + found["temporaries"] + found["code"]
    found["peak"] = getattr(analysis, "peak_memory_in_bytes", 0)
    return found

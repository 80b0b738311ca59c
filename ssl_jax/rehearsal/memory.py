"""Bytes: of trees of shapes on each device, and of a compiled program."""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax


def size(tree) -> int:
    """Numbers in a tree of arrays or shapes."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def bytes_of_device(tree) -> int:
    """Bytes that a tree of shapes with shardings takes on one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def largest(tree, most: int = 5) -> list[dict]:
    """[{'bytes', 'shape', 'of'}] of what takes most on one device of a tree of shapes with shardings, in the form of `exhausted`."""
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
    """Bytes that a device has to have for a program, `of_program`: the peak on TPUs, whose compiler fits that into a chip though the
    total may be more than a chip has; else the total.
    """
    return (platform == "tpu" and program["peak"]) or program["total"]


def of_program(compiled: jax.stages.Compiled) -> dict[str, int] | None:
    """Bytes of each device while a compiled program runs; None where the compiler does not tell.

    'aliased' are outputs that lie where arguments lay (donated state); 'total' is what has to be there at once, at most: arguments,
    outputs that are not aliased, temporaries and the code. 'peak' is XLA's own figure, of its schedule (0: unknown).
    """
    told = compiled.memory_analysis()
    if told is None:
        return None
    found = {
        "arguments": told.argument_size_in_bytes,
        "outputs": told.output_size_in_bytes,
        "aliased": told.alias_size_in_bytes,
        "temporaries": told.temp_size_in_bytes,
        "code": told.generated_code_size_in_bytes,
    }
    found["total"] = found["arguments"] + found["outputs"] - found["aliased"] + found["temporaries"] + found["code"]
    found["peak"] = getattr(told, "peak_memory_in_bytes", 0)
    return found

"""The largest arrays of a traced program, for compilers that report exhausted memory without naming buffers."""

from __future__ import annotations

import math
from collections.abc import Iterator

from jax.extend.core import ClosedJaxpr, Jaxpr


def largest(program: ClosedJaxpr, devices: int, most: int = 5) -> list[dict]:
    """[{'bytes', 'shape', 'of'}] of up to `most` results of `program` with distinct shapes, the largest first.

    'shape' is the global shape, 'bytes' are per device if it is sharded evenly over `devices`, and 'of' is the operation, as JAX
    names it. A compiler may fuse some of these arrays away.
    """
    found = {}
    for equation in _equations(program.jaxpr):
        for out in equation.outvars:
            if not hasattr(out.aval, "dtype"):
                continue
            bytes_ = math.prod(out.aval.shape) * getattr(out.aval.dtype, "itemsize", 1) // devices
            name = "/".join(part for part in (str(equation.source_info.name_stack), equation.primitive.name) if part)
            found.setdefault(out.aval.str_short(True), {"bytes": bytes_, "shape": out.aval.str_short(True), "of": name})
    return sorted(found.values(), key=lambda x: -x["bytes"])[:most]


def _equations(jaxpr: Jaxpr) -> Iterator:
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for x in value if isinstance(value, tuple | list) else (value,):
                if isinstance(x, ClosedJaxpr | Jaxpr):
                    yield from _equations(getattr(x, "jaxpr", x))

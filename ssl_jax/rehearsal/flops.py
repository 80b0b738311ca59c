"""Floating-point operations of a traced program: those of its matrix products and convolutions, a multiplication and an addition each.

XLA's own count has the body of a loop once; here it is counted as often as it runs. The count is of the whole program, before it is
divided over devices.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.interpreters import partial_eval

# Matrix products of cuDNN's attention, and those that it computes again.
CUDNN_ATTENTION = {"dot_product_attention_fwd_wrapper": (2, 0), "dot_product_attention_bwd_wrapper": (4, 1)}


class Count(NamedTuple):
    """`flops` of a program, `repeated` of them by rematerialization; `endless`: loops of unknown length, whose bodies count once."""

    flops: int = 0
    repeated: int = 0
    endless: int = 0

    def plus(self, other: Count, times: int = 1) -> Count:
        return Count(self.flops + times * other.flops, self.repeated + times * other.repeated, self.endless + other.endless)


def count(program: ClosedJaxpr) -> Count:
    """FLOPs of one run of `program`. What no output needs is not counted; what rematerialization computes again is.

    Of the branches of a conditional the dearest counts. A convolution is counted for each place of its output and each element of its
    kernel, padding included, as published counts are; the zeros between the elements of a dilated input are left out.
    """
    jaxpr, _ = partial_eval.dce_jaxpr(program.jaxpr, [True] * len(program.jaxpr.outvars))
    return _jaxpr(jaxpr)


def _jaxpr(jaxpr: Jaxpr) -> Count:
    total = Count()
    for equation in jaxpr.eqns:
        found = _equation(equation)
        again = "rematted_computation" in str(equation.source_info.name_stack)  # so JAX names what it computes once more
        total = total.plus(found._replace(repeated=found.flops) if again else found)
    return total


def _equation(equation) -> Count:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        return Count(_dot(equation))
    if name == "conv_general_dilated":
        return Count(_conv(equation))
    if name in CUDNN_ATTENTION:
        products, again = CUDNN_ATTENTION[name]
        return Count((products + again) * _attention(equation), again * _attention(equation))
    inner = [_jaxpr(jaxpr) for jaxpr in _programs(params)]
    if name == "cond":
        return max(inner)
    total = Count(endless=int(name == "while" and any(part.flops for part in inner)))
    for part in inner:
        total = total.plus(part, _times(name, params))
    return total


def _times(name: str, params: dict) -> int:
    """How often the program within an equation runs, on all devices together."""
    if name == "scan":
        return params["length"]
    if name == "shard_map":  # a program of one device along the axes that it names
        return math.prod(params["mesh"].shape[axis] for axis in params.get("newly_manual_axes", params.get("manual_axes")))
    return 1


def _programs(params: dict) -> Iterator[Jaxpr]:
    for value in params.values():
        for x in value if isinstance(value, tuple | list) else (value,):
            if isinstance(x, ClosedJaxpr | Jaxpr):
                yield getattr(x, "jaxpr", x)


def _dot(equation) -> int:
    """2 x (elements of the result) x (length of the sums)."""
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[d] for d in contracted)


def _conv(equation) -> int:
    """2 x (elements of the result) x (elements of the kernel for one of them), without the holes in a dilated input."""
    kernel = equation.invars[1].aval.shape
    features = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
    whole = 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) // features
    return whole // math.prod(equation.params["lhs_dilation"])


def _attention(equation) -> int:
    """Of one of the products: 2 x batch x heads x queries x keys x width."""
    query, key = (x.aval.shape for x in equation.invars[:2])
    assert equation.params["layout"] == 0, "jax.nn.dot_product_attention gives [B, N, heads, D]"
    return 2 * math.prod(query) * key[1]

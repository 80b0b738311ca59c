"""FLOPs of the matrix products and convolutions of a traced program; a multiply-add is two.

XLA counts the body of a loop once; here it counts as often as it runs. The count is for the whole program, before partitioning.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.interpreters import partial_eval

# {custom call of cuDNN's attention: (its matrix products, those that it recomputes)}
CUDNN_ATTENTION = {"dot_product_attention_fwd_wrapper": (2, 0), "dot_product_attention_bwd_wrapper": (4, 1)}


class Count(NamedTuple):
    """FLOPs of a program."""

    flops: int = 0
    repeated: int = 0  # those of `flops` that are due to rematerialization
    endless: int = 0  # number of loops of unknown length, whose bodies count once
    wide: int = 0  # those of `flops` whose operands have more than 16 bits

    def plus(self, other: Count, times: int = 1) -> Count:
        return Count(
            self.flops + times * other.flops,
            self.repeated + times * other.repeated,
            self.endless + other.endless,
            self.wide + times * other.wide,
        )


def count(program: ClosedJaxpr) -> Count:
    """FLOPs of one run of `program`, without dead code and with rematerialized operations.

    The most expensive branch of a conditional counts. A convolution counts every output position times every kernel element,
    including padding, as published counts do. Zeros between the elements of a dilated input do not count.
    """
    jaxpr, _ = partial_eval.dce_jaxpr(program.jaxpr, [True] * len(program.jaxpr.outvars))
    return _jaxpr(jaxpr)


def _jaxpr(jaxpr: Jaxpr) -> Count:
    total = Count()
    for equation in jaxpr.eqns:
        found = _equation(equation)
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            found = found._replace(wide=found.flops * (min(x.aval.dtype.itemsize for x in equation.invars[:2]) > 2))
        repeated = "rematted_computation" in str(equation.source_info.name_stack)  # JAX's name for rematerialized code
        total = total.plus(found._replace(repeated=found.flops) if repeated else found)
    return total


def _equation(equation) -> Count:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        return Count(_dot(equation))
    if name == "conv_general_dilated":
        return Count(_conv(equation))
    if name in CUDNN_ATTENTION:
        products, recomputed = CUDNN_ATTENTION[name]
        return Count((products + recomputed) * _attention(equation), recomputed * _attention(equation))
    inner = [_jaxpr(jaxpr) for jaxpr in _programs(params)]
    if name == "cond":
        return max(inner)
    total = Count(endless=int(name == "while" and any(part.flops for part in inner)))
    for part in inner:
        total = total.plus(part, _times(name, params))
    return total


def _times(name: str, params: dict) -> int:
    """How often the inner program of an equation runs, summed over all devices."""
    if name == "scan":
        return params["length"]
    if name == "shard_map":  # the inner program runs on every device along the manual axes
        return math.prod(
            params["mesh"].shape[axis] for axis in params.get("newly_manual_axes", params.get("manual_axes"))
        )
    return 1


def _programs(params: dict) -> Iterator[Jaxpr]:
    for value in params.values():
        for x in value if isinstance(value, tuple | list) else (value,):
            if isinstance(x, ClosedJaxpr | Jaxpr):
                yield getattr(x, "jaxpr", x)


def _dot(equation) -> int:
    """2 x (elements of the result) x (contracted size)."""
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[d] for d in contracted)


def _conv(equation) -> int:
    """2 x (elements of the result) x (kernel elements per output feature), without the zeros in a dilated input."""
    kernel = equation.invars[1].aval.shape
    features = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
    whole = 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) // features
    return whole // math.prod(equation.params["lhs_dilation"])


def _attention(equation) -> int:
    """One product of attention: 2 x batch x heads x queries x keys x width."""
    query, key = (x.aval.shape for x in equation.invars[:2])
    assert equation.params["layout"] == 0, "jax.nn.dot_product_attention gives [B, N, heads, D]"
    return 2 * math.prod(query) * key[1]

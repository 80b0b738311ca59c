"""What every module shares, and the two calls through which the layers above run a module without importing Flax."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict  # noqa: F401  for layers that do not import Flax
from jax.sharding import PartitionSpec

from ssl_jax.models.conv import conv

Tree = Any

BATCH_AXES = ("data", "fsdp")

# The one convolution and the one batch normalization here. Statistics are always float32 and, because the step
# is one global program, always over the global batch. Decay 0.9 is PyTorch's momentum 0.1; the running variance is the
# biased one, where PyTorch keeps the unbiased one (it differs by n / (n - 1), n = batch * height * width).
Conv = functools.partial(nn.Conv, conv_general_dilated=conv)
BatchNorm = functools.partial(nn.BatchNorm, momentum=0.9, epsilon=1e-5)


def shard_batch(x: jax.Array) -> jax.Array:
    """Pin axis 0 of `x` [B, ...] to the mesh axes ('data', 'fsdp') of the ambient mesh; identity where there is none, and for
    batches that do not divide over them (a row of pictures).

    With sharded parameters and no such pin, XLA is free to shard the features instead and to all-reduce activations.
    Also the identity inside `shard_map`, where axes are not the compiler's, and outside of a trace, without compiler.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not set(BATCH_AXES) <= set(mesh.auto_axes) or not isinstance(x, jax.core.Tracer):
        return x
    if x.shape[0] % math.prod(mesh.shape[axis] for axis in BATCH_AXES):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES))


_portable = contextvars.ContextVar("portable", default=False)


@contextlib.contextmanager
def portable():
    """What is traced inside has no kernels of one platform: for programs that are exported to several."""
    token = _portable.set(True)
    try:
        yield
    finally:
        _portable.reset(token)


def attention(query: jax.Array, key: jax.Array, value: jax.Array, causal: bool = False) -> jax.Array:
    """Softmax attention: [B, N, heads, D], [B, M, heads, D] twice -> [B, N, heads, D]; `causal`: place n sees places up to n.

    On GPUs it is cuDNN's, which never writes the [N, M] tables to memory, for the types and widths that it has; elsewhere, and where
    programs are to be `portable`, XLA's.
    """
    half, width = query.dtype in (jnp.bfloat16, jnp.float16), query.shape[-1]
    gpu = jax.default_backend() == "gpu" and not _portable.get()
    if not (gpu and half and width <= 128 and width % 8 == 0):
        return jax.nn.dot_product_attention(query, key, value, is_causal=causal, implementation="xla")
    return even_lengths(functools.partial(jax.nn.dot_product_attention, is_causal=causal, implementation="cudnn"), query, key, value)


def even_lengths(attend: Callable[..., jax.Array], query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """`attend` of arrays whose odd lengths (the 197 of a ViT with a class token) have a masked place more: JAX refuses the gradient of
    cuDNN's attention for odd ones."""
    batch, n, m = len(query), query.shape[1], key.shape[1]
    if n % 2 == m % 2 == 0:
        return attend(query, key, value)
    query, key, value = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (query, key, value))
    lengths = dict(query_seq_lengths=jnp.full(batch, n, jnp.int32), key_value_seq_lengths=jnp.full(batch, m, jnp.int32))
    return attend(query, key, value, **lengths)[:, :n]


def create(module: nn.Module, key: jax.Array, *args, train: bool = True, **kwargs) -> tuple[Tree, Tree]:
    """Make the variables of `module` for inputs like `args`; returns (params, state), state = {collection: tree}.

    State is what moves without a gradient: 'batch_stats', 'spectral'; {} where a module has none.
    """
    state = dict(module.init(key, *args, train=train, **kwargs))
    return state.pop("params", {}), state


def run(module: nn.Module, params: Tree, state: Tree, *args, train: bool, **kwargs) -> tuple[Any, Tree]:
    """Run `module`; returns (its output, its new state).

    With train=True batches are normalized by their own statistics and all state moves; with train=False it is used and comes
    back as it was.
    """
    variables = {"params": params, **state}
    if not train:
        return module.apply(variables, *args, train=False, **kwargs), state
    out, updates = module.apply(variables, *args, train=True, mutable=list(state), **kwargs)
    return out, {**state, **updates}


def init_variables(module: nn.Module, key: jax.Array, x: jax.Array, train: bool = True) -> tuple[Tree, Tree]:
    """`create` for a module whose only state is batch statistics: (params, batch_stats), the second {} without norms."""
    params, state = create(module, key, x, train=train)
    batch_stats = state.pop("batch_stats", {})
    assert not state, f"unexpected variable collections {sorted(state)}"
    return params, batch_stats


def apply(module: nn.Module, params: Tree, batch_stats: Tree, x: jax.Array, train: bool) -> tuple[Any, Tree]:
    """`run` for a module whose only state is batch statistics: (its output, the new ones)."""
    out, state = run(module, params, {"batch_stats": batch_stats}, x, train=train)
    return out, state["batch_stats"]

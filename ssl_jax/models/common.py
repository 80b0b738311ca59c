"""Shared layers, and `create` and `run`, with which methods use modules without importing Flax."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict  # noqa: F401  for layers that do not import Flax
from jax.sharding import PartitionSpec

from ssl_jax.models.conv import conv, dense
from ssl_jax.models.portable import is_portable

Tree = Any

BATCH_AXES = ("data", "fsdp")

# All modules use these, which are fast on CPUs.
Conv = functools.partial(nn.Conv, conv_general_dilated=conv)
Dense = functools.partial(nn.Dense, dot_general=dense)


def shard_batch(x: jax.Array) -> jax.Array:
    """Constrain axis 0 of `x` [B, ...] to the axes ('data', 'fsdp') of the ambient mesh.

    Without the constraint and with sharded parameters, XLA may shard the features instead and all-reduce activations. Identity
    without a mesh, for batches that these axes do not divide, inside `shard_map` (manual axes), and outside of a trace.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not set(BATCH_AXES) <= set(mesh.auto_axes) or not isinstance(x, jax.core.Tracer):
        return x
    if x.shape[0] % math.prod(mesh.shape[axis] for axis in BATCH_AXES):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES))


def attention(query: jax.Array, key: jax.Array, value: jax.Array, causal: bool = False) -> jax.Array:
    """Softmax attention: query [B, N, heads, D], key and value [B, M, heads, D] -> [B, N, heads, D].

    `causal`: position n attends to positions up to n. On GPUs, for the types and widths that cuDNN supports, this is cuDNN's flash
    attention, which does not write the [N, M] scores to memory; otherwise, and inside `portable`, XLA's.
    """
    half, width = query.dtype in (jnp.bfloat16, jnp.float16), query.shape[-1]
    gpu = jax.default_backend() == "gpu" and not is_portable()
    if not (gpu and half and width <= 128 and width % 8 == 0):
        return jax.nn.dot_product_attention(query, key, value, is_causal=causal, implementation="xla")
    cudnn = functools.partial(jax.nn.dot_product_attention, is_causal=causal, implementation="cudnn")
    return even_lengths(cudnn, query, key, value)


def even_lengths(attend: Callable[..., jax.Array], query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """`attend` with odd lengths (such as the 197 tokens of a ViT) padded by one masked position.

    JAX refuses the gradient of cuDNN's attention for odd lengths.
    """
    batch, n, m = len(query), query.shape[1], key.shape[1]
    if n % 2 == m % 2 == 0:
        return attend(query, key, value)
    query, key, value = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (query, key, value))
    lengths = dict(query_seq_lengths=jnp.full(batch, n, jnp.int32), key_value_seq_lengths=jnp.full(batch, m, jnp.int32))
    return attend(query, key, value, **lengths)[:, :n]


def create(module: nn.Module, key: jax.Array, *args, train: bool = True, **kwargs) -> tuple[Tree, Tree]:
    """Initialize `module` for inputs like `args`; returns (params, state), state = {collection: tree}.

    State holds the variables that change without a gradient: 'batch_stats', 'spectral'; {} if there are none.
    """
    state = dict(module.init(key, *args, train=train, **kwargs))
    return state.pop("params", {}), state


def run(
    module: nn.Module, params: Tree, state: Tree, *args, train: bool, key: jax.Array | None = None, **kwargs
) -> tuple[Any, Tree]:
    """Run `module`; returns (output, new state).

    With train=True batches are normalized by their own statistics and the state is updated; with train=False the state is used and
    returned unchanged.

    Args:
        key: for modules that drop units or paths at random when they train.
    """
    variables = {"params": params, **state}
    if not train:
        return module.apply(variables, *args, train=False, **kwargs), state
    rngs = {} if key is None else {"dropout": key}
    out, updates = module.apply(variables, *args, train=True, mutable=list(state), rngs=rngs, **kwargs)
    return out, {**state, **updates}


def init_variables(module: nn.Module, key: jax.Array, x: jax.Array, train: bool = True) -> tuple[Tree, Tree]:
    """`create` for a module whose only state is batch statistics: (params, batch_stats), with {} if it has none."""
    params, state = create(module, key, x, train=train)
    batch_stats = state.pop("batch_stats", {})
    assert not state, f"unexpected variable collections {sorted(state)}"
    return params, batch_stats


def apply(
    module: nn.Module, params: Tree, batch_stats: Tree, x: jax.Array, train: bool, key: jax.Array | None = None
) -> tuple[Any, Tree]:
    """`run` for a module whose only state is batch statistics: (output, new batch_stats)."""
    out, state = run(module, params, {"batch_stats": batch_stats}, x, train=train, key=key)
    return out, state["batch_stats"]

"""Sampling of tokens from logits: temperature, top-k and top-p, guidance, and autoregressive loops.

Each sample has its own key, and its token i uses fold_in(key, i). A sample therefore depends neither on the rest of its batch
nor on the use of a cache. Gumbel-max trick: the argmax of logits + Gumbel noise is a sample of the softmax.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ssl_jax.errors import UserError


class SamplingConfig(NamedTuple):
    """Filters of logits, applied in this order."""

    temperature: float = 1.0  # divides the logits
    top_k: int = 0  # keep the k most probable tokens; 0: all
    top_p: float = 1.0  # keep the most probable tokens with this total probability, at least one (Holtzman et al. 2020)


DEFAULT_SAMPLING = SamplingConfig()


def check(config: SamplingConfig) -> SamplingConfig:
    """Return `config`; raises UserError for values out of range."""
    temperature, top_k, top_p = config
    if not temperature > 0:
        raise UserError(f"config.model.sampling.temperature={temperature} must be positive; top_k=1 takes the most probable token")
    if top_k < 0 or not 0 < top_p <= 1:
        raise UserError(f"config.model.sampling: top_k={top_k} must be 0 (all) or more, top_p={top_p} above 0 and at most 1")
    return config


def filter_logits(logits: jax.Array, config: SamplingConfig) -> jax.Array:
    """Logits [..., K] with temperature applied and -inf for dropped tokens; equal logits are kept or dropped together."""
    temperature, top_k, top_p = config
    logits = logits / temperature
    if top_k:
        least = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][..., -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if top_p < 1:
        sorted_logits = jnp.sort(logits, descending=True)
        p = jax.nn.softmax(sorted_logits)
        inside = jnp.cumsum(p, -1) - p < top_p  # the total before the token is below top_p; always true for the first
        least = jnp.min(jnp.where(inside, sorted_logits, jnp.inf), -1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


def guided(logits: jax.Array, scale: float) -> jax.Array:
    """Classifier-free guidance (Ho & Salimans 2021): l + scale (l_class - l), [2 B, K] -> [B, K].

    Rows alternate between conditional and unconditional logits, so that both rows of a sample are on the same device.
    """
    conditional, unconditional = jnp.moveaxis(logits.reshape(-1, 2, logits.shape[-1]), 1, 0)
    return unconditional + scale * (conditional - unconditional)


def gumbel(keys: jax.Array, index: jax.Array | int, shape: tuple[int, ...]) -> jax.Array:
    """Gumbel noise [B, *shape] from keys [B] for token (or step) `index`."""
    return jax.vmap(lambda key: jax.random.gumbel(jax.random.fold_in(key, index), shape))(keys)


def sample_token(logits: jax.Array, keys: jax.Array, index: jax.Array | int, config: SamplingConfig) -> jax.Array:
    """A sample of softmax(filter_logits(logits)): [B, ..., K], keys [B] -> int32 [B, ...]."""
    return jnp.argmax(filter_logits(logits, config) + gumbel(keys, index, logits.shape[1:]), -1).astype(jnp.int32)


def autoregress(
    prefill: Callable[[jax.Array], tuple[jax.Array, Any]],
    decode: Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, Any]],
    prefix: jax.Array,
    length: int,
    keys: jax.Array,
    config: SamplingConfig = DEFAULT_SAMPLING,
) -> jax.Array:
    """Sample sequences int32 [B, length] that continue `prefix` [B, n], n < length, with a cache; keys [B].

    prefill: prefix -> (logits [B, K] of token n, cache).
    decode: (token index - 1 [B], index, cache) -> (logits [B, K] of token `index`, cache).
    """
    begin = prefix.shape[1]
    logits, cache = prefill(prefix)
    first = sample_token(logits, keys, begin, config)

    def step(carry, index):
        token, cache = carry
        logits, cache = decode(token, index, cache)
        token = sample_token(logits, keys, index, config)
        return (token, cache), token

    _, rest = jax.lax.scan(step, (first, cache), jnp.arange(begin + 1, length))
    return jnp.concatenate([prefix, first[:, None], rest.T], 1)


def autoregress_uncached(
    logits_of: Callable[[jax.Array], jax.Array],
    prefix: jax.Array,
    length: int,
    keys: jax.Array,
    config: SamplingConfig = DEFAULT_SAMPLING,
) -> jax.Array:
    """`autoregress` with a full forward pass per token, the reference for tests of the cache.

    logits_of: tokens [B, length] -> logits [B, length, K].
    """
    begin = prefix.shape[1]

    def step(tokens, index):
        logits = jax.lax.dynamic_index_in_dim(logits_of(tokens), index, 1, keepdims=False)
        token = sample_token(logits, keys, index, config)
        return jax.lax.dynamic_update_index_in_dim(tokens, token, index, 1), None

    tokens = jnp.pad(prefix, ((0, 0), (0, length - begin)))
    return jax.lax.scan(step, tokens, jnp.arange(begin, length))[0]

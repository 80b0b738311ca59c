"""Tokens out of logits: how a distribution is sharpened, and the loops that draw one token after another, or many at once.

Every picture has its own key, and token i of it is drawn with fold_in(key, i): a sample depends neither on the others of its batch nor
on how it was computed (Gumbel's maximum: argmax of logits + noise is a draw of the softmax).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ssl_jax.errors import UserError


class SamplingConfig(NamedTuple):
    """temperature: divides the logits. top_k: only the k most probable tokens, 0 for all. top_p: only the most probable ones that
    together have this probability (Holtzman et al. 2020), at least one. In this order.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


DEFAULT_SAMPLING = SamplingConfig()


def check(sharpening: SamplingConfig) -> SamplingConfig:
    """Raises UserError for values that leave no token or are none."""
    temperature, top_k, top_p = sharpening
    if not temperature > 0:
        raise UserError(f"config.model.sampling.temperature={temperature} must be positive; top_k=1 takes the most probable token")
    if top_k < 0 or not 0 < top_p <= 1:
        raise UserError(f"config.model.sampling: top_k={top_k} must be 0 (all) or more, top_p={top_p} above 0 and at most 1")
    return sharpening


def sharpened(logits: jax.Array, sharpening: SamplingConfig) -> jax.Array:
    """Logits [..., K] of the distribution that is drawn from; -inf for tokens that are left out. Equal ones stay or go together."""
    temperature, top_k, top_p = sharpening
    logits = logits / temperature
    if top_k:
        least = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][..., -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if top_p < 1:
        down = jnp.sort(logits, descending=True)
        p = jax.nn.softmax(down)
        inside = jnp.cumsum(p, -1) - p < top_p  # what comes before does not make it yet; always true of the first
        least = jnp.min(jnp.where(inside, down, jnp.inf), -1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


def guided(logits: jax.Array, scale: float) -> jax.Array:
    """[2 B, K], in turns with the class and without -> [B, K]: l + scale (l_class - l), classifier-free guidance (Ho & Salimans 2021).

    In turns, so that both of a picture lie on one device.
    """
    told, untold = jnp.moveaxis(logits.reshape(-1, 2, logits.shape[-1]), 1, 0)
    return untold + scale * (told - untold)


def gumbel(keys: jax.Array, index: jax.Array | int, shape: tuple[int, ...]) -> jax.Array:
    """Noise [B, *shape] of keys [B] for token, or step, `index`."""
    return jax.vmap(lambda key: jax.random.gumbel(jax.random.fold_in(key, index), shape))(keys)


def sample_token(logits: jax.Array, keys: jax.Array, index: jax.Array | int, sharpening: SamplingConfig) -> jax.Array:
    """A token of softmax(sharpened(logits)): [B, ..., K], keys [B] -> int32 [B, ...]."""
    return jnp.argmax(sharpened(logits, sharpening) + gumbel(keys, index, logits.shape[1:]), -1).astype(jnp.int32)


def autoregress(
    prefill: Callable[[jax.Array], tuple[jax.Array, Any]],
    decode: Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, Any]],
    prefix: jax.Array,
    length: int,
    keys: jax.Array,
    sharpening: SamplingConfig = DEFAULT_SAMPLING,
) -> jax.Array:
    """Sequences int32 [B, length] that go on from `prefix` [B, n], n < length, with a cache.

    prefill: prefix -> (logits [B, K] of token n, cache). decode: (token [B], index, cache) -> (logits of token `index`, cache), where
    `token` is number index - 1. keys [B].
    """
    begin = prefix.shape[1]
    logits, cache = prefill(prefix)
    first = sample_token(logits, keys, begin, sharpening)

    def step(carry, index):
        token, cache = carry
        logits, cache = decode(token, index, cache)
        token = sample_token(logits, keys, index, sharpening)
        return (token, cache), token

    _, rest = jax.lax.scan(step, (first, cache), jnp.arange(begin + 1, length))
    return jnp.concatenate([prefix, first[:, None], rest.T], 1)


def autoregress_uncached(
    logits_of: Callable[[jax.Array], jax.Array],
    prefix: jax.Array,
    length: int,
    keys: jax.Array,
    sharpening: SamplingConfig = DEFAULT_SAMPLING,
) -> jax.Array:
    """What `autoregress` gives, with a whole forward pass for each token; `logits_of`: [B, length] -> [B, length, K].

    This is what the cache is measured against.
    """
    begin = prefix.shape[1]

    def step(tokens, index):
        logits = jax.lax.dynamic_index_in_dim(logits_of(tokens), index, 1, keepdims=False)
        token = sample_token(logits, keys, index, sharpening)
        return jax.lax.dynamic_update_index_in_dim(tokens, token, index, 1), None

    tokens = jnp.pad(prefix, ((0, 0), (0, length - begin)))
    return jax.lax.scan(step, tokens, jnp.arange(begin, length))[0]

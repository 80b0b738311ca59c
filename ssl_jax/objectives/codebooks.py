"""Vector quantizers by name in a config: codebook, assignment of codes, and training loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ssl_jax.errors import UserError
from ssl_jax.objectives import quantizers as q

Tree = Any


class Quantized(NamedTuple):
    """The result of quantizing a batch in training."""

    codes: jax.Array  # float32 [..., D], the decoder input; gradients pass through
    tokens: jax.Array  # int32 [...]
    loss: jax.Array  # float32 scalar
    state: Tree
    logs: dict[str, jax.Array]


class Quantizer(NamedTuple):
    """K codes of D dimensions. Gradients train `params`; statistics of batches update `state`. Either may be {}."""

    size: int
    dim: int
    init: Callable[[jax.Array], tuple[Tree, Tree]]  # key -> (params, state)
    train: Callable[..., Quantized]  # (params, state, z [..., D], key, step)
    tokens: Callable[[Tree, Tree, jax.Array], jax.Array]  # (params, state, z) -> int32 [...]
    embed: Callable[[Tree, Tree, jax.Array], jax.Array]  # (params, state, tokens) -> float32 [..., D]
    couples_batch: bool = False  # True if the loss or the state mixes the vectors of a batch

    def codebook(self, params: Tree, state: Tree) -> jax.Array:
        """All codes [K, D], as the decoder receives them."""
        return self.embed(params, state, jnp.arange(self.size, dtype=jnp.int32))


LEARNED = dict(
    size=512, dim=64, normalize=False, straight_through="plain", codebook_update="gradient", decay=0.99, debias=False,
    commitment=0.25, entropy=0.0, temperature=0.01, revive=0.0, init="normal",
)  # fmt: skip
DEFAULTS = {
    "learned": dict(LEARNED, codebook_weight=1.0),  # apart, since runs of earlier versions do not have it
    "fsq": dict(levels=(8, 5, 5, 5)),
    "lfq": dict(bits=10, commitment=0.25, entropy=0.1, temperature=0.01),
}
CHOICES = {
    "straight_through": tuple(q.STRAIGHT_THROUGH),
    "codebook_update": ("gradient", "average"),
    "init": ("normal", "uniform", "fan_in", "k_means"),
}


def build_quantizer(spec: Mapping[str, Any]) -> Quantizer:
    """The quantizer of `spec` {'name': ..., option: value}; defaults are in `DEFAULTS`.

    learned: nearest neighbor among `size` codes of `dim` dimensions.
      normalize: normalize vectors and codes to norm 1 first.
      straight_through: 'plain', 'normalized' (unit codes only) or 'rotation' (see `quantizers`).
      codebook_update: 'gradient' of the codebook loss, or 'average': moving averages of the assigned vectors with `decay`; `debias`
        removes the bias toward the initial codes.
      commitment: weight beta of the commitment loss.
      codebook_weight: of the codebook loss, with 'gradient'. VQGAN's code has 0.25 here and 1 for the commitment.
      entropy, temperature: weight of the entropy loss and temperature of its softmax; 0: no entropy loss.
      revive: a code whose moving count of vectors per batch falls below this value restarts at a vector of the batch; 0: never.
      init: 'normal' N(0, 1), 'uniform' in [-1/K, 1/K], 'fan_in', uniform of variance 1/D as in Sonnet, or 'k_means' of the vectors
        of the first step.
    fsq: finite scalar quantization with `levels` per dimension. lfq: the signs of `bits` dimensions.

    Raises UserError for an unknown name, option or choice, for levels that fsq cannot use, and for more than 2^24 codes.
    """
    options = dict(spec)
    name = options.pop("name", None)
    if name not in DEFAULTS:
        raise UserError(f"config.model.quantizer.name={name!r} is unknown; choose {', '.join(DEFAULTS)}")
    unknown = sorted(set(options) - set(DEFAULTS[name]))
    if unknown:
        valid = ", ".join(sorted(DEFAULTS[name]))
        raise UserError(f"config.model.quantizer.{unknown[0]} is no option of {name!r}; options: {valid}")
    options = {**DEFAULTS[name], **options}
    for option, valid in CHOICES.items():
        if options.get(option, valid[0]) not in valid:
            raise UserError(f"config.model.quantizer.{option}={options[option]!r} is unknown; choose {', '.join(valid)}")
    check_size(name, options)
    quantizer = {"learned": _learned, "fsq": _fsq, "lfq": _lfq}[name](**options)
    return quantizer._replace(embed=_refusing(quantizer.embed, quantizer.size))


def _refusing(embed: Callable, size: int) -> Callable:
    """`embed` that takes tokens in [0, size) only: others are a UserError, and in traced functions, which cannot raise, NaN.

    A look-up would take another code for them, and the picture would look like any other.
    """

    def checked(params, state, tokens):
        if not isinstance(tokens, jax.core.Tracer) and tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < size:
            raise UserError(f"tokens from {tokens.min()} to {tokens.max()} are out of range; this codebook has tokens 0 to {size - 1}")
        known = (tokens >= 0) & (tokens < size)
        return jnp.where(known[..., None], embed(params, state, jnp.where(known, tokens, 0)), jnp.nan)

    return checked


MOST_CODES = 2**24  # evaluations read tokens as float32, which holds whole numbers up to this one; counts of codes fill the memory


def check_size(name: str, options: Mapping[str, Any]) -> None:
    """Raises UserError for levels of fsq outside 3 to 1000, no dimension or code, or more than 2^24 codes."""
    key = {"learned": "size", "fsq": "levels", "lfq": "bits"}[name]
    value = options[key]
    given = f"config.model.quantizer.{key}={value!r}"
    if name == "fsq":
        levels = value if isinstance(value, tuple | list) else ()
        if not levels or not all(isinstance(level, int) and 3 <= level <= 1000 for level in levels):
            raise UserError(f"{given}: give 3 to 1000 levels for each dimension; for codes of two levels, use name='lfq'")
        size = math.prod(value)
    else:
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{given} must be a whole number of at least 1")
        size = 2**value if name == "lfq" else value
    if size > MOST_CODES:
        raise UserError(f"{given}: {size:,} codes are more than {MOST_CODES:,}, the most that evaluations can count; give fewer")


def _measures(tokens, size):
    count = q.counts(tokens, size)
    return {"usage_of_batch": q.usage(count), "perplexity_of_batch": q.perplexity(count)}


def _learned(
    size, dim, normalize, straight_through, codebook_update, decay, debias, commitment, entropy, temperature, revive, init,
    codebook_weight,
) -> Quantizer:  # fmt: skip
    if straight_through == "normalized" and not normalize:
        raise UserError("config.model.quantizer.straight_through='normalized' is for unit codes; set normalize=True")
    average = codebook_update == "average"
    offsets = not average and (revive > 0 or init == "k_means")  # codes jump: jumps are kept in state

    def unit(x):
        return q.normalized(x) if normalize else x

    def raw(params, state):
        return state["codebook"] if average else params["codebook"] + (state["offset"] if offsets else 0.0)

    def initialize(key):
        if init in ("uniform", "fan_in"):
            bound = 1 / size if init == "uniform" else math.sqrt(3 / dim)
            codes = jax.random.uniform(key, (size, dim), minval=-bound, maxval=bound)
        else:
            codes = jax.random.normal(key, (size, dim))
        if average:
            statistics = {"count": jnp.zeros(size), "sum": jnp.zeros((size, dim)), "weight": jnp.zeros(())}
            if not debias:  # start as if each code had been assigned once
                statistics = {"count": jnp.ones(size), "sum": jnp.copy(codes), "weight": jnp.ones(())}
            return {}, {"codebook": codes, **statistics}
        state = {"offset": jnp.zeros((size, dim))} if offsets else {}
        return {"codebook": codes}, {**state, "count": jnp.ones(size)} if revive else state

    def replaced(params, state, codes, where):
        """The state with `codes` [K, D] at bool `where` [K]; their counts restart high enough to survive some steps."""
        new, at = dict(state), where[:, None]
        if average:
            new["codebook"] = jnp.where(at, codes, state["codebook"])
            new["sum"] = jnp.where(at, codes * max(revive, 1.0) * state["weight"], state["sum"])
        else:
            new["offset"] = jnp.where(at, codes - jax.lax.stop_gradient(params["codebook"]), state["offset"])
        if "count" in state:
            new["count"] = jnp.where(where, max(revive, 1.0) * state.get("weight", 1.0), state["count"])
        return new

    def train(params, state, z, key, step):
        z = z.astype(jnp.float32)
        target, (start_key, dead_key) = unit(z), jax.random.split(key)
        if init == "k_means":
            started = jax.lax.cond(step == 0, lambda: q.k_means(start_key, target, size), lambda: jnp.zeros((size, dim)))
            state = replaced(params, state, started, jnp.full(size, step == 0))
        codebook = unit(raw(params, state))
        tokens = q.nearest(target, codebook)
        code = q.rows(codebook, tokens)
        loss = commitment * q.commitment_loss(target, code)
        if not average:
            loss += codebook_weight * q.codebook_loss(target, code)
        logs = {**_measures(tokens, size), "distance_to_code": q.commitment_loss(target, code)}
        norms = jnp.linalg.norm(jax.lax.stop_gradient(z), axis=-1)
        logs |= {"norm_mean": norms.mean(), "norm_min": norms.min()}
        if entropy:
            logs["entropy"] = q.entropy_loss(target, codebook, temperature)
            loss += entropy * logs["entropy"]
        if average:
            state = q.moving_average(state, target, tokens, decay)
        elif revive:
            state = {**state, "count": decay * state["count"] + (1 - decay) * q.counts(tokens, size)}
        if revive:
            dead = state["count"] < revive * state.get("weight", 1.0)
            state = replaced(params, state, q.sample_vectors(dead_key, target, size), dead)
            logs["revived"] = dead.sum()
        return Quantized(q.STRAIGHT_THROUGH[straight_through](z, code), tokens, loss, state, logs)

    def find(params, state, z):
        return q.nearest(unit(z.astype(jnp.float32)), unit(raw(params, state)))

    def embed(params, state, tokens):
        return q.rows(unit(raw(params, state)), tokens)

    coupled = average or offsets or entropy > 0
    return Quantizer(size, dim, initialize, train, find, embed, coupled)


def _fsq(levels) -> Quantizer:
    levels, size = tuple(levels), math.prod(levels)

    def train(params, state, z, key, step):
        codes = q.fsq(z.astype(jnp.float32), levels)
        tokens = q.fsq_tokens(jax.lax.stop_gradient(codes), levels)
        return Quantized(codes, tokens, jnp.zeros(()), state, _measures(tokens, size))

    def find(params, state, z):
        return q.fsq_tokens(q.fsq(z.astype(jnp.float32), levels), levels)

    def embed(params, state, tokens):
        return q.fsq_codes(tokens, levels)

    return Quantizer(size, len(levels), lambda key: ({}, {}), train, find, embed)


def _lfq(bits, commitment, entropy, temperature) -> Quantizer:
    def train(params, state, z, key, step):
        z = z.astype(jnp.float32)
        codes, tokens = q.lfq(z), q.lfq_tokens(z)
        logs = {**_measures(tokens, 2**bits), "entropy": q.bit_entropy_loss(z, temperature)}
        loss = commitment * q.commitment_loss(z, codes) + entropy * logs["entropy"]
        return Quantized(codes, tokens, loss, state, logs)

    def find(params, state, z):
        return q.lfq_tokens(z.astype(jnp.float32))

    def embed(params, state, tokens):
        return q.lfq_codes(tokens, bits)

    return Quantizer(2**bits, bits, lambda key: ({}, {}), train, find, embed, entropy > 0)

"""Contrastive objectives: pure functions of embeddings, in float32.

Every objective compares each row of a batch with all rows of the global batch. Three ways give the same values and gradients: 'dense'
holds all similarities at once, [N, N]; 'chunked' a block of columns after the other, [N, 1024]; 'ring' passes the rows around the
devices (as Inf-CL does, Cheng et al. 2024, arXiv:2410.17243), so that a device holds a block of [N / devices, N / devices] and the
rows of two devices only. Blocks are computed again in the backward pass.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ssl_jax.errors import UserError

Way = Literal["dense", "chunked", "ring"]
WAYS = ("dense", "chunked", "ring")
CHUNK = 1024  # most columns of a block of 'chunked'
ROWS = ("data", "fsdp")  # axes of the mesh that a batch lies on


def check_way(way: str) -> Way:
    """Raises UserError for a way that there is not."""
    if way not in WAYS:
        raise UserError(f"config.model.similarities={way!r} is unknown; choose {', '.join(WAYS)}")
    return way


def unit(x: jax.Array, eps: float = 1e-12) -> jax.Array:
    """x / |x| along the last axis, with a finite gradient at 0 (the quotient by the norm has none)."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + eps)


def nt_xent(z: jax.Array, temperature: float, way: Way = "dense") -> tuple[jax.Array, dict[str, jax.Array]]:
    """Normalized temperature-scaled cross-entropy of two views (Chen et al. 2020, SimCLR, eq. 1 and algorithm 1).

    Every other view in the global batch is a negative, and gradients flow through all of them: under one jit the similarities
    of a batch that is spread over devices are those of the whole batch.

    Args:
        z: [N, 2, D] projections of the two views, any length.
        temperature: tau > 0.

    Returns:
        (loss, {'accuracy': share of anchors whose nearest other view is their partner}). The loss is the mean over the 2N
        anchors, as in the paper; the official code returns twice that value.
    """
    z = unit(z)
    positive = jnp.repeat(jnp.sum(z[:, 0] * z[:, 1], -1) / temperature, 2)
    rows = z.reshape(-1, z.shape[-1])  # both views of an image lie side by side, and on one device
    normalizer, rival = others(rows / temperature, rows, way, group=2)
    return jnp.mean(jnp.logaddexp(normalizer, positive) - positive), {"accuracy": jnp.mean(positive > rival)}


def info_nce(queries: jax.Array, keys: jax.Array, temperature: float, way: Way = "dense") -> tuple[jax.Array, dict[str, jax.Array]]:
    """Queries [N, D] against the keys [N, D] of the batch: key i is the positive of query i, all others are negatives (van den Oord
    et al. 2018, arXiv:1807.03748, eq. 4; Chen et al. 2021, MoCo v3, arXiv:2104.02057, algorithm 1, returns 2 temperature times this).

    Rows of any length; whether keys have a gradient is up to the caller. Returns (mean loss, {'accuracy'}).
    """
    queries, keys = unit(queries) / temperature, unit(keys)
    positive = jnp.sum(queries * keys, -1)
    normalizer, rival = others(queries, keys, way)
    return jnp.mean(jnp.logaddexp(normalizer, positive) - positive), {"accuracy": jnp.mean(positive > rival)}


def clip(images: jax.Array, texts: jax.Array, scale: jax.Array | float, way: Way = "dense") -> tuple[jax.Array, dict[str, jax.Array]]:
    """Radford et al. 2021 (arXiv:2103.00020, figure 3): the mean of both directions of `info_nce` with temperature 1 / scale."""
    first, told = info_nce(images, texts, 1 / scale, way)
    second, _ = info_nce(texts, images, 1 / scale, way)
    return (first + second) / 2, told


def _moco(z, temperature, way):
    """MoCo's: keys, which have no gradient, are the other view's projections, and each view is the query once (v3, algorithm 1)."""
    (first, told), (second, _) = (info_nce(z[:, i], jax.lax.stop_gradient(z[:, 1 - i]), temperature, way) for i in (0, 1))
    return (first + second) / 2, told


LOSSES = {"nt_xent": nt_xent, "moco": _moco, "clip": lambda z, temperature, way: clip(z[:, 0], z[:, 1], 1 / temperature, way)}


def loss_of_views(name: str, temperature: float, way: str) -> Callable[[jax.Array], tuple[jax.Array, dict[str, jax.Array]]]:
    """The function of two views' projections [N, 2, D]: 'nt_xent'; 'clip', which compares views of one kind with those of the other
    only; 'moco', which is 'clip' without a gradient of the keys. It returns (loss, {'accuracy'}) as `nt_xent` does.

    Raises UserError for a loss or a way that there is not.
    """
    if name not in LOSSES:
        raise UserError(f"config.model.loss={name!r} is unknown; choose {', '.join(LOSSES)}")
    return functools.partial(LOSSES[name], temperature=temperature, way=check_way(way))


def others(queries: jax.Array, keys: jax.Array, way: Way, group: int = 1) -> tuple[jax.Array, jax.Array]:
    """(log of the sum of exp(query . key), the largest query . key), [N] each: over all keys but those of the query's own group.

    A group are `group` rows one after the other: the row itself and its positives. Devices hold whole groups.
    """
    if way == "dense":
        return _finish(_block(_start(queries), _similarities(queries, keys, 0, 0, group)))
    if way == "chunked":
        return _chunked(queries, keys, group)
    mesh = jax.sharding.get_abstract_mesh()
    devices = math.prod(mesh.shape[axis] for axis in ROWS) if ROWS[0] in mesh.shape else 1
    if devices == 1:
        return others(queries, keys, "dense", group)
    rows = PartitionSpec(ROWS)
    around = functools.partial(_around, devices=devices, group=group)
    return jax.shard_map(around, in_specs=(rows, rows), out_specs=(rows, rows))(queries, keys)


def _blockwise(forward, backward, queries, keys):
    """`forward(queries, keys)`, whose gradient is that of the softmax: from the finished sums, not from those before each block, which
    would be kept for every block (and around a ring every device's keys with them).
    """
    run = jax.custom_vjp(forward)

    def begin(queries, keys):
        found = forward(queries, keys)
        return found, (queries, keys, found[0])

    def end(kept, cotangents):  # the second is that of the largest, which has no gradient
        return backward(*kept, cotangents[0])

    run.defvjp(begin, end)
    return run(queries, keys)


def _chunked(queries, keys, group: int):
    count = len(queries)
    size = max(n for n in range(1, min(CHUNK, count) + 1) if count % n == 0)
    columns = jnp.arange(0, count, size)

    def forward(queries, keys):
        def step(found, chunk):
            return _block(found, _similarities(queries, chunk[0], 0, chunk[1], group)), None

        return _finish(jax.lax.scan(step, _start(queries), (keys.reshape(count // size, size, -1), columns))[0])

    def backward(queries, keys, normalizer, weight):
        def step(of_queries, chunk):
            more, of_keys = _gradients(queries, chunk[0], normalizer, weight, _similarities(queries, chunk[0], 0, chunk[1], group))
            return of_queries + more, of_keys

        chunks = keys.reshape(count // size, size, -1), columns
        of_queries, of_keys = jax.lax.scan(step, jnp.zeros_like(queries), chunks)
        return of_queries, of_keys.reshape(keys.shape)

    return _blockwise(forward, backward, queries, keys)


def _around(queries, keys, devices: int, group: int):
    """Of one device: its queries meet the keys of each device, which go round in a ring; in the backward pass, with their gradients."""
    size = len(queries)
    to_next = [(i, (i + 1) % devices) for i in range(devices)]

    def similarities(queries, keys, turn):
        here = jax.lax.axis_index(ROWS)
        return _similarities(queries, keys, here * size, (here - turn) % devices * size, group)

    def forward(queries, keys):
        def step(carry, turn):
            found, keys = carry
            sent = jax.lax.ppermute(keys, ROWS, to_next)  # while this block is computed
            return (_block(found, similarities(queries, keys, turn)), sent), None

        start = jax.tree.map(lambda x: jax.lax.pcast(x, ROWS, to="varying"), _start(queries))
        return _finish(jax.lax.scan(step, (start, keys), jnp.arange(devices))[0][0])

    def backward(queries, keys, normalizer, weight):
        def step(carry, turn):
            of_queries, of_keys, keys = carry
            sent = jax.lax.ppermute(keys, ROWS, to_next)
            more, here = _gradients(queries, keys, normalizer, weight, similarities(queries, keys, turn))
            return (of_queries + more, jax.lax.ppermute(of_keys + here, ROWS, to_next), sent), None

        start = jnp.zeros_like(queries), jnp.zeros_like(keys), keys
        return jax.lax.scan(step, start, jnp.arange(devices))[0][:2]

    return _blockwise(forward, backward, queries, keys)


def _start(queries):
    """(largest so far, sum of the exponentials of what is less than it)"""
    return jnp.full(len(queries), -jnp.inf), jnp.zeros(len(queries))


def _similarities(queries, keys, row, column, group):
    """Of a block, minus infinity within a group; `row` and `column` are the numbers of its first query and key."""
    own = (row + jnp.arange(len(queries)))[:, None] // group == (column + jnp.arange(len(keys))) // group
    return jnp.where(own, -jnp.inf, queries @ keys.T)


def _block(found, similarities):
    """`found` and a block of similarities more."""
    largest, total = found
    now = jax.lax.stop_gradient(jnp.maximum(largest, similarities.max(1)))
    by = jnp.where(jnp.isneginf(now), 0.0, now)  # a block may hold nothing but the own group
    total = total * jnp.exp(largest - by) + jnp.exp(similarities - by[:, None]).sum(1)
    return now, total


def _gradients(queries, keys, normalizer, weight, similarities):
    """Of the sum of weight * normalizer: what a block adds to those of its queries and of its keys."""
    by = jnp.where(jnp.isneginf(normalizer), 0.0, normalizer)
    shares = jnp.exp(similarities - by[:, None]) * weight[:, None]
    return shares @ keys, shares.T @ queries


def _finish(found):
    largest, total = found
    return jnp.where(total > 0, jnp.log(jnp.where(total > 0, total, 1.0)) + largest, -jnp.inf), largest

"""Contrastive objectives: pure functions of embeddings, in float32 with products in full precision on every accelerator.

Each row of a batch is compared with all rows of the global batch. Three ways give the same values and gradients. 'dense' holds
all similarities [N, N] at once. 'chunked' computes one block of columns [N, 1024] at a time. 'ring' passes rows around the
devices (as Inf-CL, Cheng et al. 2024, arXiv:2410.17243): a device holds one block [N / devices, N / devices] and the rows of
two devices. The backward pass recomputes the blocks.
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
CHUNK = 1024  # most columns per block of 'chunked'
ROWS = ("data", "fsdp")  # mesh axes of the batch


def check_way(way: str) -> Way:
    """Raises UserError for an unknown way."""
    if way not in WAYS:
        raise UserError(f"config.model.similarities={way!r} is unknown; choose {', '.join(WAYS)}")
    return way


def unit(x: jax.Array, eps: float = 1e-12) -> jax.Array:
    """x / |x| along the last axis in float32, with a finite gradient at 0."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + eps)


def check_temperature(temperature: jax.Array | float) -> None:
    """Raises UserError for a number that is not positive; what is learned cannot be read here."""
    if isinstance(temperature, int | float) and not 0 < temperature < math.inf:
        raise UserError(f"config.model.temperature={temperature} must be a positive number; published values are 0.05 to 1")


def nt_xent(z: jax.Array, temperature: float, way: Way = "dense") -> tuple[jax.Array, dict[str, jax.Array]]:
    """Normalized temperature-scaled cross-entropy of two views (Chen et al. 2020, SimCLR, eq. 1 and algorithm 1).

    All other views in the global batch are negatives, and gradients flow through all of them, also for a batch sharded over
    devices.

    Args:
        z: [N, 2, D] projections of the two views, any length.
        temperature: tau > 0.

    Returns:
        (loss, {'accuracy': share of anchors whose nearest other view is their partner}). The loss is the mean over the 2N anchors,
        as in the paper; the official code returns twice that value.
    """
    check_temperature(temperature)
    z = unit(z)
    positive = jnp.repeat(jnp.sum(z[:, 0] * z[:, 1], -1) / temperature, 2)
    rows = z.reshape(-1, z.shape[-1])  # both views of an image lie side by side, and on one device
    normalizer, rival = others(rows / temperature, rows, way, group=2)
    return jnp.mean(jnp.logaddexp(normalizer, positive) - positive), {"accuracy": jnp.mean(positive > rival)}


def info_nce(queries: jax.Array, keys: jax.Array, temperature: float, way: Way = "dense") -> tuple[jax.Array, dict[str, jax.Array]]:
    """InfoNCE of queries [N, D] and keys [N, D]: key i is the positive of query i, all others are negatives.

    van den Oord et al. 2018 (arXiv:1807.03748), eq. 4. MoCo v3 (Chen et al. 2021, arXiv:2104.02057, algorithm 1) multiplies this by
    2 temperature. Rows may have any length. The caller decides whether keys have a gradient. Returns (mean loss, {'accuracy'}).
    """
    check_temperature(temperature)
    queries, keys = unit(queries) / temperature, unit(keys)
    positive = jnp.sum(queries * keys, -1)
    normalizer, rival = others(queries, keys, way)
    return jnp.mean(jnp.logaddexp(normalizer, positive) - positive), {"accuracy": jnp.mean(positive > rival)}


def queue_info_nce(
    queries: jax.Array, keys: jax.Array, queue: jax.Array, temperature: float
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """InfoNCE of queries [N, D] with their own keys [N, D] as positives and the rows of a queue [K, D] as negatives.

    He et al. 2020, "Momentum contrast" (arXiv:1911.05722), algorithm 1. Rows may have any length; the queue gets no gradient. Returns
    (mean loss, {'accuracy': share of queries nearer to their key than to all of the queue}). Equal similarities give ln(K + 1).
    """
    check_temperature(temperature)
    queries, keys, queue = unit(queries) / temperature, unit(keys), jax.lax.stop_gradient(unit(queue))
    positive = jnp.sum(queries * keys, -1)
    negatives = _product(queries, queue.T)
    normalizer = jax.nn.logsumexp(negatives, axis=-1)
    return jnp.mean(jnp.logaddexp(normalizer, positive) - positive), {"accuracy": jnp.mean(positive > negatives.max(-1))}


def patch_info_nce(predictions: jax.Array, targets: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """InfoNCE of predicted patches: each prediction against all patches of all images of the global batch.

    Contrastive predictive coding, for one offset and one direction: van den Oord et al. 2018 (arXiv:1807.03748), section 3.3; Henaff
    et al. 2020 (arXiv:1905.09272), section 2.1. Similarities are plain dot products. Gradients flow through all targets, also through
    those of rows that are never predicted, since they are negatives.

    Args:
        predictions: [B, rows - offset, columns, D], row by row for the last rows of `targets`.
        targets: [B, rows, columns, D], any length.

    Returns:
        (mean loss in nats, {'accuracy': share of predictions nearest to their own patch}). Equal similarities give
        ln(B rows columns).
    """
    rows, columns, width = targets.shape[1:]
    keys, queries = (x.astype(jnp.float32).reshape(-1, width) for x in (targets, predictions))
    positives = targets[:, rows - predictions.shape[1] :].astype(jnp.float32).reshape(-1, width)
    places = jnp.arange(len(keys)).reshape(-1, rows, columns)[:, rows - predictions.shape[1] :].reshape(-1)
    similarities = _product(queries, keys.T)
    positive = jnp.sum(queries * positives, -1)
    rival = jnp.max(jnp.where(places[:, None] == jnp.arange(len(keys)), -jnp.inf, similarities), -1)
    loss = jnp.mean(jax.nn.logsumexp(similarities, axis=-1) - positive)
    return loss, {"accuracy": jnp.mean(positive > rival)}


def clip(
    images: jax.Array, texts: jax.Array, scale: jax.Array | float, way: Way = "dense"
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean of `info_nce` in both directions with temperature 1 / scale (Radford et al. 2021, arXiv:2103.00020, figure 3)."""
    first, metrics = info_nce(images, texts, 1 / scale, way)
    second, _ = info_nce(texts, images, 1 / scale, way)
    return (first + second) / 2, metrics


def _moco(z, temperature, way):
    """MoCo v3, algorithm 1: each view is once the query; the projections of the other view are keys without a gradient."""
    (first, metrics), (second, _) = (info_nce(z[:, i], jax.lax.stop_gradient(z[:, 1 - i]), temperature, way) for i in (0, 1))
    return (first + second) / 2, metrics


def _nt_xent_sum(z, temperature, way):
    """Twice `nt_xent`: the official code adds the means over first and over second views."""
    loss, metrics = nt_xent(z, temperature, way)
    return 2 * loss, metrics


LOSSES = {
    "nt_xent": nt_xent,
    "nt_xent_sum": _nt_xent_sum,
    "moco": _moco,
    "clip": lambda z, temperature, way: clip(z[:, 0], z[:, 1], 1 / temperature, way),
}


def loss_of_views(name: str, temperature: float, way: str) -> Callable[[jax.Array], tuple[jax.Array, dict[str, jax.Array]]]:
    """The loss of projections [N, 2, D] of two views, which returns (loss, {'accuracy'}) as `nt_xent` does.

    'nt_xent' compares all views; 'nt_xent_sum' is twice that, which matters to LARS: it adapts the rate of weights to their
    gradients, but not that of BatchNorm's scales and offsets. 'clip' compares first views only with second views. 'moco' is 'clip'
    without a gradient of the keys. Raises UserError for an unknown loss or way, or a temperature that is not positive.
    """
    if name not in LOSSES:
        raise UserError(f"config.model.loss={name!r} is unknown; choose {', '.join(LOSSES)}")
    if not isinstance(temperature, int | float):
        raise UserError(f"config.model.temperature={temperature!r} must be a positive number")
    check_temperature(temperature)
    return functools.partial(LOSSES[name], temperature=temperature, way=check_way(way))


def others(queries: jax.Array, keys: jax.Array, way: Way, group: int = 1) -> tuple[jax.Array, jax.Array]:
    """(logsumexp of query . key, largest query . key), both [N], over all keys outside the group of the query.

    A group is `group` consecutive rows: the row itself and its positives. Devices hold complete groups.
    """
    if way == "dense":
        return _finish(_add_block(_start(queries), _similarities(queries, keys, 0, 0, group)))
    if way == "chunked":
        return _chunked(queries, keys, group)
    mesh = jax.sharding.get_abstract_mesh()
    devices = math.prod(mesh.shape[axis] for axis in ROWS) if ROWS[0] in mesh.shape else 1
    if devices == 1:
        return others(queries, keys, "dense", group)
    rows = PartitionSpec(ROWS)
    ring = functools.partial(_ring, devices=devices, group=group)
    return jax.shard_map(ring, in_specs=(rows, rows), out_specs=(rows, rows))(queries, keys)


def _blockwise(forward, backward, queries, keys):
    """`forward(queries, keys)` with `backward` as its gradient, which needs only the final sums.

    Automatic differentiation would store the partial sums of every block, and in a ring also the keys of every device.
    """
    run = jax.custom_vjp(forward)

    def begin(queries, keys):
        sums = forward(queries, keys)
        return sums, (queries, keys, sums[0])

    def end(residuals, cotangents):  # the maximum, the second output, has no gradient
        return backward(*residuals, cotangents[0])

    run.defvjp(begin, end)
    return run(queries, keys)


def _chunked(queries, keys, group: int):
    count = len(queries)
    size = max(n for n in range(1, min(CHUNK, count) + 1) if count % n == 0)
    columns = jnp.arange(0, count, size)

    def forward(queries, keys):
        def step(sums, chunk):
            return _add_block(sums, _similarities(queries, chunk[0], 0, chunk[1], group)), None

        return _finish(jax.lax.scan(step, _start(queries), (keys.reshape(count // size, size, -1), columns))[0])

    def backward(queries, keys, normalizer, weight):
        def step(query_grads, chunk):
            similarities = _similarities(queries, chunk[0], 0, chunk[1], group)
            more, key_grads = _gradients(queries, chunk[0], normalizer, weight, similarities)
            return query_grads + more, key_grads

        chunks = keys.reshape(count // size, size, -1), columns
        query_grads, key_grads = jax.lax.scan(step, jnp.zeros_like(queries), chunks)
        return query_grads, key_grads.reshape(keys.shape)

    return _blockwise(forward, backward, queries, keys)


def _ring(queries, keys, devices: int, group: int):
    """One device: its queries meet the keys of all devices, which move around a ring; gradients move with the keys."""
    size = len(queries)
    to_next = [(i, (i + 1) % devices) for i in range(devices)]

    def similarities(queries, keys, turn):
        here = jax.lax.axis_index(ROWS)
        return _similarities(queries, keys, here * size, (here - turn) % devices * size, group)

    def forward(queries, keys):
        def step(carry, turn):
            sums, keys = carry
            sent = jax.lax.ppermute(keys, ROWS, to_next)  # overlaps with the computation of this block
            return (_add_block(sums, similarities(queries, keys, turn)), sent), None

        start = jax.tree.map(lambda x: jax.lax.pcast(x, ROWS, to="varying"), _start(queries))
        return _finish(jax.lax.scan(step, (start, keys), jnp.arange(devices))[0][0])

    def backward(queries, keys, normalizer, weight):
        def step(carry, turn):
            query_grads, key_grads, keys = carry
            sent = jax.lax.ppermute(keys, ROWS, to_next)
            more, here = _gradients(queries, keys, normalizer, weight, similarities(queries, keys, turn))
            return (query_grads + more, jax.lax.ppermute(key_grads + here, ROWS, to_next), sent), None

        start = jnp.zeros_like(queries), jnp.zeros_like(keys), keys
        return jax.lax.scan(step, start, jnp.arange(devices))[0][:2]

    return _blockwise(forward, backward, queries, keys)


def _start(queries):
    """(running maximum, running sum of exp(similarity - maximum)), [N] each, before the first block."""
    return jnp.full(len(queries), -jnp.inf), jnp.zeros(len(queries))


def _similarities(queries, keys, row, column, group):
    """Similarities of a block, -inf within a group; `row` and `column` are the indices of its first query and key."""
    own = (row + jnp.arange(len(queries)))[:, None] // group == (column + jnp.arange(len(keys))) // group
    return jnp.where(own, -jnp.inf, _product(queries, keys.T))


def _add_block(sums, similarities):
    """Update the running maximum and sum with a block of similarities."""
    largest, total = sums
    now = jax.lax.stop_gradient(jnp.maximum(largest, similarities.max(1)))
    by = jnp.where(jnp.isneginf(now), 0.0, now)  # a block may hold only the own group
    total = total * jnp.exp(largest - by) + jnp.exp(similarities - by[:, None]).sum(1)
    return now, total


def _gradients(queries, keys, normalizer, weight, similarities):
    """Contribution of a block to the gradients of sum(weight * normalizer) with respect to queries and keys."""
    by = jnp.where(jnp.isneginf(normalizer), 0.0, normalizer)
    shares = jnp.exp(similarities - by[:, None]) * weight[:, None]
    return _product(shares, keys), _product(shares.T, queries)


_product = functools.partial(jnp.matmul, precision="highest")  # at tau = 0.1, bfloat16 would move a similarity by a few hundredths


def _finish(sums):
    largest, total = sums
    return jnp.where(total > 0, jnp.log(jnp.where(total > 0, total, 1.0)) + largest, -jnp.inf), largest

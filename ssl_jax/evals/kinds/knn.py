"""Weighted k-nearest-neighbor classification of frozen features, exact, in bounded device memory.

Wu et al. 2018, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", section 3.4:
score_c = sum over the k nearest of [y_i = c] exp(s_i / T).
"""

from __future__ import annotations

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ssl_jax.engine.sharding import put_global
from ssl_jax.errors import UserError
from ssl_jax.evals.context import Context, Result, require_labels
from ssl_jax.evals.evaluator import LAYER, Evaluator, Option
from ssl_jax.evals.lib.features import Features, chunks, flat_mesh, hits, moments, padded

BANK_CHUNK = 65536  # bank rows at a time, over all devices
QUERY_CHUNK = 1024  # queries at a time; each device holds QUERY_CHUNK x BANK_CHUNK / devices float32 similarities

Metric = Literal["cosine", "euclidean"]
Normalization = Literal["none", "center", "standardize"]


def evaluate(
    context: Context,
    *,
    k: int = 20,
    temperature: float = 0.07,
    metric: Metric = "cosine",
    normalization: Normalization = "none",
    layer: str = "pooled",
) -> Result:
    """The nearest training images vote for the class of each test image.

    top1, top5: percent of test images whose label has the most votes, or is among the five classes with the most votes.
    """
    bank, query = context.features("bank", layer), context.features("test", layer)
    require_labels(bank, "kNN")
    index, similarity = neighbors(bank.x, query.x, k, metric, normalization, context.mesh)
    metrics = vote(index, similarity, bank, query.y, temperature)
    rows = "l2-normalized" if metric == "cosine" else "unscaled"
    votes = f"T={temperature:g}" if temperature else "unweighted"
    protocol = (
        f"kNN k={k} {votes} {metric} {rows} normalization={normalization} layer={layer}"
        f" bank={context.name('bank')} query={context.name('test')}"
    )
    return Result(metrics, protocol)


EVALUATOR = Evaluator(
    evaluate,
    {
        "k": Option("neighbors that vote", least=1),
        "temperature": Option("T of the vote weights exp(similarity / T); 0: unweighted votes, as in scikit-learn", least=0),
        "metric": Option("similarity of features: cosine, or negative Euclidean distance"),
        "normalization": Option("normalization of features by statistics of the train split, before l2 normalization"),
        "layer": LAYER,
    },
    data=("label",),
    at_most={"k": ("bank", 0)},
)


def vote(index: np.ndarray, similarity: np.ndarray, bank: Features, labels: np.ndarray, temperature: float) -> dict:
    """Neighbors [Q, k] -> {'top1', 'top5'} in percent, against labels [Q].

    Weights are exp((s - max s) / T), which has the ratios of exp(s / T) and never overflows. With T = 0 all weights are 1.
    A class without votes is never a hit, not even in the top 5.
    """
    classes = int(bank.y.max()) + 1
    correct = np.zeros(2)
    for start, stop in chunks(len(index), 4096):
        s = similarity[start:stop].astype(np.float64)
        weight = np.exp((s - s.max(1, keepdims=True)) / temperature) if temperature else np.ones_like(s)
        cell = np.arange(stop - start)[:, None] * classes + bank.y[index[start:stop]]
        cells = (stop - start) * classes
        scores = np.bincount(cell.ravel(), weight.ravel(), cells).reshape(-1, classes)
        voted = np.bincount(cell.ravel(), minlength=cells).reshape(-1, classes) > 0
        scores = np.where(voted, scores, -np.inf)
        correct += [hits(scores, labels[start:stop], n).sum() for n in (1, 5)]
    top1, top5 = 100 * correct / len(labels)
    return {"top1": float(top1), "top5": float(top5)}


def neighbors(
    bank: np.ndarray,
    query: np.ndarray,
    k: int,
    metric: Metric = "cosine",
    normalization: Normalization = "none",
    mesh: Mesh | None = None,
    bank_chunk: int = BANK_CHUNK,
    query_chunk: int = QUERY_CHUNK,
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest bank rows of each query, nearest first, ties in order of index.

    bank [N, D], query [Q, D] -> indices int32 [Q, k], similarities float32 [Q, k] (cosine, or negative distance).
    Reads the bank once, `bank_chunk` rows at a time, sharded over the devices of `mesh`. Each device keeps its own best k; they
    are merged at the end.
    Raises UserError if the bank has fewer than k rows.
    """
    if k > len(bank):
        raise UserError(f"kNN k={k} needs a bank of at least {k} examples, it has {len(bank)}; lower k")
    mesh = flat_mesh(mesh)
    rows, group = _chunk_shape(min(bank_chunk, len(bank)), mesh.size, k)
    query_chunk = min(query_chunk, len(query))
    split, whole = NamedSharding(mesh, PartitionSpec("shard")), NamedSharding(mesh, PartitionSpec())
    mean, std = (put_global(statistic, whole) for statistic in _statistics(bank, normalization))
    best = [_start(query_chunk, k, mesh) for _ in chunks(len(query), query_chunk)]
    for start, stop in chunks(len(bank), rows * mesh.size):
        part = put_global(padded(bank[start:stop], rows * mesh.size), split)
        part = _prepare(part, mean, std, metric)
        jax.block_until_ready(best)  # at most two chunks on the devices: the host must not run ahead
        span = put_global(np.array([start, stop], np.int32), whole)
        for i, (first, last) in enumerate(chunks(len(query), query_chunk)):
            q = _prepare(put_global(padded(query[first:last], query_chunk), whole), mean, std, metric)
            best[i] = _search(*best[i], part, q, span, metric=metric, group=group, mesh=mesh)
    merged = jax.device_get([_finish(*pair, metric=metric, mesh=mesh) for pair in best])
    index, similarity = (np.concatenate(parts)[: len(query)] for parts in zip(*merged, strict=True))
    return index, similarity


def _chunk_shape(bank_chunk, devices, k):
    """(bank rows per device, group size g): `_grouped_top_k` searches n/g group maxima, then k*g members."""
    rows = math.ceil(bank_chunk / devices)
    group = 2 ** max(0, int(math.log2(max(1.0, rows / k)) / 2))
    return math.ceil(rows / group) * group, group


def _statistics(bank, normalization):
    if normalization == "none":
        return np.zeros(bank.shape[1], np.float32), np.ones(bank.shape[1], np.float32)
    mean, std = moments(bank)
    return mean, std if normalization == "standardize" else np.ones_like(std)


@functools.partial(jax.jit, static_argnames="metric")
def _prepare(x, mean, std, metric):
    x = (x.astype(jnp.float32) - mean) / std
    return x * jax.lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + 1e-24) if metric == "cosine" else x


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _start(queries, k, mesh):
    shape, sharding = (mesh.size, queries, k), NamedSharding(mesh, PartitionSpec("shard"))
    value, index = jnp.full(shape, -jnp.inf, jnp.float32), jnp.zeros(shape, jnp.int32)
    return jax.lax.with_sharding_constraint((value, index), sharding)


@functools.partial(jax.jit, static_argnames=("metric", "group", "mesh"))
def _search(value, index, bank, query, span, *, metric, group, mesh):
    """Merge one bank chunk [rows * devices, D] into the running best [devices, Q, k]; each device searches its own rows."""
    sharded, whole = PartitionSpec("shard"), PartitionSpec()

    def local(value, index, bank, query, span):
        rows, k = len(bank), value.shape[-1]
        row = span[0] + jax.lax.axis_index("shard") * rows + jnp.arange(rows, dtype=jnp.int32)
        s = jnp.matmul(query, bank.T, precision=jax.lax.Precision.HIGHEST)  # default on accelerators: bfloat16 or TF32
        if metric == "euclidean":  # negative squared distance
            s = 2 * s - jnp.sum(bank * bank, -1) - jnp.sum(query * query, -1)[:, None]
        s = jnp.where(row < span[1], s, -jnp.inf)
        new_value, index_in_chunk = _grouped_top_k(s, min(k, rows), group)
        both_value = jnp.concatenate([value[0], new_value], -1)  # earlier rows first: ties keep the smaller index
        both_index = jnp.concatenate([index[0], row[index_in_chunk]], -1)
        top, at = jax.lax.top_k(both_value, k)
        return top[None], jnp.take_along_axis(both_index, at, -1)[None]

    step = jax.shard_map(
        local, mesh=mesh, in_specs=(sharded, sharded, sharded, whole, whole), out_specs=(sharded, sharded)
    )
    return step(value, index, bank, query, span)


def _grouped_top_k(s, k, group):
    """lax.top_k of s [Q, n], exact and in the same order, from two searches of shorter lists.

    The k largest values lie in the k groups with the largest maxima. Groups are contiguous and visited in ascending order, so ties
    keep their order.
    """
    queries, n = s.shape
    if group == 1 or n // group <= k:
        return jax.lax.top_k(s, k)
    grouped = s.reshape(queries, n // group, group)
    _, best = jax.lax.top_k(grouped.max(-1), k)
    best = jnp.sort(best, -1)
    member = jnp.take_along_axis(grouped, best[..., None], 1).reshape(queries, k * group)
    value, at = jax.lax.top_k(member, k)
    return value, jnp.take_along_axis(best, at // group, -1) * group + at % group


@functools.partial(jax.jit, static_argnames=("metric", "mesh"))
def _finish(value, index, *, metric, mesh):
    """Merge the best k of all devices: ([devices, Q, k], [devices, Q, k]) -> indices [Q, k], similarities [Q, k]."""
    k = value.shape[-1]
    worst_first, index = (jnp.moveaxis(a, 0, 1).reshape(a.shape[1], -1) for a in (-value, index))
    worst_first, index = jax.lax.sort((worst_first, index), dimension=-1, num_keys=2)
    similarity = -worst_first[:, :k]
    if metric == "euclidean":
        similarity = -jnp.sqrt(jnp.maximum(-similarity, 0))
    return jax.lax.with_sharding_constraint((index[:, :k], similarity), NamedSharding(mesh, PartitionSpec()))

"""A checksum per leaf of a state, since Orbax restores flipped bits without an error."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from ssl_jax.engine.sharding import leaf_names


class Corrupt(Exception):
    """A checkpoint cannot be trusted; the message says why."""


def _checksum(x: jax.Array) -> jax.Array:
    """uint32 sum over elements of bits x odd weight of the index: any single flipped bit changes it.

    Integer sums are exact in any order, so the value does not depend on the sharding.
    """
    width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bits = x if x.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(x, width)
    index, stride = jnp.zeros(x.shape, jnp.uint32), 1
    for d in reversed(range(x.ndim)):
        index += jax.lax.broadcasted_iota(jnp.uint32, x.shape, d) * jnp.uint32(stride % 2**32)
        stride *= x.shape[d]
    return jnp.sum(bits.astype(jnp.uint32) * (2 * index + 1), dtype=jnp.uint32)


_checksum_tree = jax.jit(lambda tree: jax.tree.map(_checksum, tree))
_finite_tree = jax.jit(lambda tree: jax.tree.map(lambda x: jnp.all(jnp.isfinite(x)), tree))


def checksums(tree) -> dict[str, int]:
    """{leaf name: checksum} of a tree of arrays, computed on their devices."""
    values = jax.device_get(jax.tree.leaves(_checksum_tree(tree)))
    return {name: int(value) for name, value in zip(leaf_names(tree), values, strict=True)}


def nonfinite(tree) -> list[str]:
    """Names of the leaves with a NaN or an infinity."""
    finite = jax.device_get(jax.tree.leaves(_finite_tree(tree)))
    return [name for name, value in zip(leaf_names(tree), finite, strict=True) if not value]


def verify(tree, expected: Mapping[str, int]) -> None:
    """Raises Corrupt unless every leaf of `tree` has the checksum in `expected`, {leaf name: checksum}."""
    verify_named(dict(zip(leaf_names(tree), jax.tree.leaves(tree), strict=True)), expected)


def verify_named(leaves: Mapping[str, jax.Array], expected: Mapping[str, int]) -> None:
    """`verify` of {leaf name: array}."""
    found = jax.device_get(_checksum_tree(list(leaves.values())))
    bad = [name for name, value in zip(leaves, found, strict=True) if expected.get(name) != int(value)]
    if bad:
        raise Corrupt(f"{len(bad)} of {len(expected)} leaves differ from their checksums, first {bad[0]!r}")

"""Sets of permutations for jigsaw puzzles, made by rule on the host: no file of permutations is needed.

Noroozi and Favaro 2016 (arXiv:1603.09246), section 4.2: few permutations, as far from each other as possible. Two permutations
are as far apart as the number of slots in which they differ (Hamming distance).

    average      greedy: each has the largest mean distance to those before. The paper's algorithm. Slots are balanced, but two
                 permutations may differ in as few as 2 slots.
    min          greedy: each has the largest least distance to those before. The slots are not balanced.
    affine       all x -> ax + b over the field of as many elements as tiles: 72 for 9 tiles, 12 for 4; all but one slot differ
    projective   all x -> (ax + b) / (cx + d) on a projective line: 504 for 9 tiles, 24 for 4; all but two slots differ

The last two are groups, so each tile is in each slot equally often, and no larger set has their least distance. Every set begins
with the identity, the solved puzzle.
"""

from __future__ import annotations

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax.errors import UserError

KINDS = ("average", "min", "affine", "projective")
MOST_TILES = 9  # of the greedy sets, which look at all orders of the tiles: 362,880 for 9
# Size of a field -> (its prime, x^k in terms of 1, x, ..., x^(k-1)).
FIELDS = {
    2: (2, (1,)), 3: (3, (1,)), 5: (5, (1,)), 7: (7, (1,)),
    4: (2, (1, 1)), 8: (2, (1, 1, 0)), 9: (3, (2, 0)), 16: (2, (1, 1, 0, 0)),
}  # fmt: skip


def permutation_set(kind: str, count: int = 0, tiles: int = 9) -> np.ndarray:
    """int32 [count, tiles], distinct; row r puts tile `set[r, slot]` into each slot. Deterministic.

    kind: one of KINDS. count: how many; 0 is all of a group, and greedy sets need a number. 1,000 permutations of 9 tiles take
    some seconds. Raises UserError for an unknown kind, or a count or number of tiles that the kind does not have.
    """
    if kind not in KINDS:
        raise UserError(f"unknown permutation set {kind!r}; choose from {', '.join(KINDS)}")
    if kind in ("average", "min"):
        if not 2 <= tiles <= MOST_TILES:
            raise UserError(f"permutation set {kind!r} has 2 to {MOST_TILES} tiles, not {tiles}; 16 tiles have the set 'affine'")
        if not 2 <= count <= math.factorial(tiles):
            raise UserError(f"permutation set {kind!r}: give a count from 2 to {math.factorial(tiles)}, not {count}")
        return _greedy(kind, count, tiles)
    field = tiles if kind == "affine" else tiles - 1
    if field not in FIELDS:
        valid = sorted(f if kind == "affine" else f + 1 for f in FIELDS)
        raise UserError(f"permutation set {kind!r} has no {tiles} tiles, only {', '.join(map(str, valid))}; use another set")
    group = _affine(field) if kind == "affine" else _projective(field)
    if count not in (0, len(group)):
        raise UserError(f"permutation set {kind!r} of {tiles} tiles has {len(group)} permutations, not {count}; give 0 for all")
    return group


@functools.lru_cache(maxsize=4)
def _greedy(kind, count, tiles):
    orders = np.array(list(itertools.permutations(range(tiles))), np.uint8).T.copy()  # [tiles, tiles!], in lexicographic order
    score = np.zeros(orders.shape[1], np.int32) if kind == "average" else np.full(orders.shape[1], tiles, np.int32)
    chosen = [0]  # the identity
    for _ in range(count - 1):
        distance = sum((row != row[chosen[-1]]).view(np.uint8) for row in orders)
        score = score + distance if kind == "average" else np.minimum(score, distance)
        score[chosen[-1]] = -(2**30)
        chosen.append(int(np.argmax(score)))  # the first of equally good ones
    return orders[:, chosen].T.astype(np.int32)


def _field(size):
    """(sums, products), both int [size, size], of the field of `size` elements; 0 and 1 are its zero and one."""
    prime, top = FIELDS[size]
    degree = len(top)
    digits = np.arange(size)[:, None] // prime ** np.arange(degree) % prime  # coefficients of 1, x, x^2, ...
    place = prime ** np.arange(degree)
    sums = (digits[:, None] + digits[None]) % prime @ place
    if degree == 1:
        return sums, np.outer(np.arange(size), np.arange(size)) % prime
    products = np.zeros((size, size), int)
    for left, right in itertools.product(range(size), repeat=2):
        full = np.convolve(digits[left], digits[right])
        for power in range(len(full) - 1, degree - 1, -1):  # replace x^power
            full[power - degree : power] += full[power] * np.array(top)
        products[left, right] = full[:degree] % prime @ place
    return sums, products


def _affine(size):
    sums, products = _field(size)
    return np.array([sums[products[a], b] for a in range(1, size) for b in range(size)], np.int32)


def _projective(size):
    """Fractions on the field and a point at infinity, which is tile number `size`."""
    sums, products = _field(size)
    one, infinity = 1, size
    inverse = {x: int(np.flatnonzero(products[x] == one)[0]) for x in range(1, size)}

    def image(a, b, c, d, x):
        top, bottom = (a, c) if x == infinity else (sums[products[a, x], b], sums[products[c, x], d])
        return infinity if bottom == 0 else products[top, inverse[int(bottom)]]

    maps = [(a, b, 0, one) for a in range(1, size) for b in range(size)]
    maps += [
        (a, b, one, d) for a, b, d in itertools.product(range(size), repeat=3) if products[a, d] != b
    ]  # up to a common factor
    return np.array([[image(*m, x) for x in range(size + 1)] for m in maps], np.int32)


def hamming_distances(permutations: np.ndarray) -> tuple[int, float]:
    """(least, mean) number of slots in which two permutations of a set [count, tiles] differ."""
    differ = np.stack([(permutations != row).sum(1) for row in permutations])
    pairs = differ[np.triu_indices(len(permutations), 1)]
    return int(pairs.min()), float(pairs.mean())


def inverse_permutations(permutations: np.ndarray) -> np.ndarray:
    """[count, tiles]: `permute` with row r undoes `permute` with row r of `permutations`."""
    return np.argsort(permutations, axis=1).astype(np.int32)


def permute(tiles: jax.Array, permutations: jax.Array, labels: jax.Array) -> jax.Array:
    """Tiles, or features of tiles, [B, N, ...] in the order permutations[labels], for permutations [P, N] and labels int [B].

    Slot s of the result holds tile permutations[label, s].
    """
    order = jnp.asarray(permutations)[labels]
    return jnp.take_along_axis(tiles, order.reshape(order.shape + (1,) * (tiles.ndim - 2)), axis=1)

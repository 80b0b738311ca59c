"""Parts of the quantizers in `codebooks`: nearest-code look-up, straight-through gradients, losses, codebook updates.

van den Oord et al. 2017, "Neural discrete representation learning" (arXiv:1711.00937); Yu et al. 2022, "Vector-quantized image
modeling with improved VQGAN" (arXiv:2110.04627): codes of few dimensions and unit norm; Fifty et al. 2024 (arXiv:2410.06424):
the rotation trick; Mentzer et al. 2023 (arXiv:2309.15505): FSQ; Yu et al. 2023 (arXiv:2310.05737): LFQ. Vectors z are float32
[..., D], tokens int32 [...], a codebook is float32 [K, D].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

CHUNK = 2048  # codes per block: distances to all 8192 codes would be the largest array of a step
CODES_AXIS, BATCH_AXES = "tensor", ("data", "fsdp")


def normalized(x: jax.Array) -> jax.Array:
    """x / |x| over the last axis; 1e-12 under the root keeps value and gradient finite at zero (jnp.maximum would not)."""
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-12)


# --------------------------------------------------------------------------------------------------------- look-ups


def nearest(z: jax.Array, codebook: jax.Array) -> jax.Array:
    """Index of the nearest code in Euclidean distance, the first of equals: z [..., D], codebook [K, D] -> tokens [...].

    For unit vectors this is the code at the smallest angle. Under a mesh with a 'tensor' axis the codes are sharded, as in
    `nearest_sharded`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    parts = dict(mesh.shape).get(CODES_AXIS, 1)
    rows = math.prod(dict(mesh.shape).get(axis, 1) for axis in BATCH_AXES)
    if parts > 1 and set(mesh.axis_names) <= set(mesh.auto_axes) and len(codebook) % parts == 0 and z.shape[0] % rows == 0:
        return nearest_sharded(z, codebook, mesh)
    return _least(*_centered(z, codebook))[1]


def nearest_sharded(z: jax.Array, codebook: jax.Array, mesh: jax.sharding.AbstractMesh | jax.sharding.Mesh) -> jax.Array:
    """`nearest` with the codebook sharded over the mesh axis 'tensor' and z over ('data', 'fsdp').

    Each device finds the nearest of its codes, and the nearest of those is the token. Shards are compared in order, so the first of
    equals wins here too.
    """

    def local(z, codes):
        distance, token = _least(z, codes)
        token = token + jax.lax.axis_index(CODES_AXIS) * len(codes)
        distances, tokens = (jax.lax.all_gather(x, CODES_AXIS) for x in (distance, token))
        first = jnp.argmin(distances, axis=0)
        return jnp.take_along_axis(tokens, first[None], axis=0)[0]

    z, codebook = _centered(z, codebook)
    return jax.shard_map(
        local, mesh=mesh, in_specs=(P(BATCH_AXES), P(CODES_AXIS)), out_specs=P(BATCH_AXES), check_vma=False
    )(z, codebook)  # fmt: skip


def _centered(z, codebook):
    """Subtract the mean code from both: far from zero, |e|^2 - 2 z.e suffers from cancellation."""
    z, codebook = (jax.lax.stop_gradient(x.astype(jnp.float32)) for x in (z, codebook))
    center = jnp.mean(codebook, axis=0)
    return z - center, codebook - center


def _least(z, codebook):
    """(|z - e|^2 - |z|^2, index) of the nearest code, both [...]."""

    def against(codes):
        products = jnp.einsum("...d,kd->...k", z, codes, precision=jax.lax.Precision.HIGHEST)
        distances = jnp.sum(codes * codes, axis=-1) - 2 * products
        token = jnp.argmin(distances, axis=-1)
        return jnp.min(distances, axis=-1), token.astype(jnp.int32)

    best, token = against(codebook[:CHUNK])
    for start in range(CHUNK, len(codebook), CHUNK):
        distance, index = against(codebook[start : start + CHUNK])
        token = jnp.where(distance < best, index + start, token)
        best = jnp.minimum(distance, best)
    return best, token


def sums(z: jax.Array, tokens: jax.Array, size: int) -> jax.Array:
    """Sum of the vectors assigned to each code: z [..., D], tokens [...] -> [size, D].

    A product with one-hot rows. A scatter-add would serialize if many vectors share a code, as at the start of training
    (docs/performance.md, On an accelerator).
    """
    z, tokens = z.reshape(-1, z.shape[-1]).astype(jnp.float32), tokens.reshape(-1, 1)

    def sum_block(start):
        one_hot = (tokens == jnp.arange(start, min(start + CHUNK, size))).astype(jnp.float32)
        return jnp.einsum("nk,nd->kd", one_hot, z, precision=jax.lax.Precision.HIGHEST)

    return jnp.concatenate([sum_block(start) for start in range(0, size, CHUNK)])


def rows(codebook: jax.Array, tokens: jax.Array) -> jax.Array:
    """codebook[tokens]: [K, D], [...] -> [..., D]; the gradient for the codebook is `sums`."""
    size = len(codebook)
    take = jax.custom_vjp(lambda codebook, tokens: codebook[tokens])
    take.defvjp(lambda codebook, tokens: (codebook[tokens], tokens), lambda tokens, g: (sums(g, tokens, size), None))
    return take(codebook, tokens)


# -------------------------------------------------------------------------------------- gradients through a look-up


def plain(z: jax.Array, code: jax.Array) -> jax.Array:
    """The code, with the gradient of z."""
    return jax.lax.stop_gradient(code) + (z - jax.lax.stop_gradient(z))


def through_normalized(z: jax.Array, code: jax.Array) -> jax.Array:
    """The code, with the gradient of z / |z|. It is orthogonal to z and divided by |z|, so it explodes for small z."""
    return plain(normalized(z), code)


def rotation(z: jax.Array, code: jax.Array) -> jax.Array:
    """The code as a constant rotation and rescaling of z (Fifty et al. 2024, section 4.2).

    The gradient at z keeps the angle that the incoming gradient has to the code.
    """
    fixed = jax.lax.stop_gradient((z, code))
    u, v = (normalized(x) for x in fixed)
    half = normalized(u + v)
    scale = jnp.linalg.norm(fixed[1], axis=-1, keepdims=True) * jax.lax.rsqrt(jnp.sum(fixed[0] ** 2, -1, keepdims=True) + 1e-12)
    turned = z - 2 * half * jnp.sum(half * z, -1, keepdims=True) + 2 * v * jnp.sum(u * z, -1, keepdims=True)
    return plain(scale * turned, code)  # the exact code; `scale * turned` is the code up to rounding


STRAIGHT_THROUGH = {"plain": plain, "normalized": through_normalized, "rotation": rotation}


# ----------------------------------------------------------------------------------------------------------- losses


def codebook_loss(z: jax.Array, code: jax.Array) -> jax.Array:
    """|sg(z) - e|^2, which moves codes to vectors; the MEAN over elements (the paper sums over D)."""
    return jnp.mean((jax.lax.stop_gradient(z) - code) ** 2)


def commitment_loss(z: jax.Array, code: jax.Array) -> jax.Array:
    """|z - sg(e)|^2, which moves vectors to codes, to be weighted by beta; the MEAN over elements."""
    return jnp.mean((z - jax.lax.stop_gradient(code)) ** 2)


def entropy_loss(z: jax.Array, codebook: jax.Array, temperature: float) -> jax.Array:
    """E H(p(code | z)) - H(E p(code | z)) in nats, p = softmax(-|z - e|^2 / temperature): in [-log K, 0].

    Small if each vector has one clear code and all codes are used equally. Memory: vectors x K.
    """
    z = z.reshape(-1, z.shape[-1])
    products = jnp.dot(z, codebook.T, precision=jax.lax.Precision.HIGHEST)
    logits = (2 * products - jnp.sum(codebook**2, axis=-1)) / temperature
    log_p = jax.nn.log_softmax(logits)
    return -jnp.sum(jnp.exp(log_p) * log_p, -1).mean() - entropy(jnp.exp(log_p).mean(0))


def entropy(p: jax.Array) -> jax.Array:
    """-sum p log p over the last axis, in nats; p = 0 gives 0, also in the gradient."""
    return -jnp.sum(p * jnp.log(jnp.where(p > 0, p, 1.0)), axis=-1)


def bit_entropy_loss(z: jax.Array, temperature: float, group: int = 10) -> jax.Array:
    """`entropy_loss` of the 2^D codes {-1, 1}^D, without a matrix of 2^D columns.

    Given z the bits are independent with logits 4 z / temperature, so E H is exact. H(E p) is computed for groups of at most
    `group` bits and summed. The sum is an upper bound of the joint entropy, and equal to it for a single group.
    """
    logits = 4 * z.reshape(-1, z.shape[-1]) / temperature
    on, off = jax.nn.sigmoid(logits), jax.nn.sigmoid(-logits)
    # log_sigmoid, because p log p would be NaN for p that rounds to 0
    bit_entropy = -(on * jax.nn.log_sigmoid(logits) + off * jax.nn.log_sigmoid(-logits))
    mean_entropy = 0.0
    for bits in np.array_split(np.arange(z.shape[-1]), math.ceil(z.shape[-1] / group)):
        p = jnp.ones((len(logits), 1))
        for bit in bits:
            p = jnp.concatenate([p * off[:, bit, None], p * on[:, bit, None]], axis=-1)
        mean_entropy += entropy(p.mean(0))
    return bit_entropy.sum(-1).mean() - mean_entropy


# ------------------------------------------------------------------------------------ codebooks without a gradient


def counts(tokens: jax.Array, size: int) -> jax.Array:
    """Number of occurrences of each code in the global batch, float32 [K]."""
    return jnp.zeros(size, jnp.float32).at[tokens.reshape(-1)].add(1.0)


def moving_average(state: Mapping, z: jax.Array, tokens: jax.Array, decay: float, epsilon: float = 1e-5) -> dict:
    """One update of a codebook whose codes are moving averages of their vectors (van den Oord et al. 2017, appendix A.1).

    Args:
        state: 'codebook' [K, D]; 'count' [K] and 'sum' [K, D], moving averages of the number and the sum of the vectors of a code;
            'weight', the total weight of those averages: always 1, or started at 0 for averages without bias.
        epsilon: Laplace smoothing of the counts.

    Statistics are those of the global batch. A code without vectors keeps its place until its count is near `epsilon`. Then the
    smoothing pulls it to zero (with decay .99 half of it is left after 1,150 steps), as in the published implementations.
    """
    size = len(state["count"])
    count = decay * state["count"] + (1 - decay) * counts(tokens, size)
    total = decay * state["sum"] + (1 - decay) * sums(jax.lax.stop_gradient(z), tokens, size)
    weight = decay * state["weight"] + (1 - decay)
    n = count / weight
    smoothed = (n + epsilon) / (n.sum() + size * epsilon) * n.sum()
    return {"codebook": total / weight / smoothed[:, None], "count": count, "sum": total, "weight": weight}


def sample_vectors(key: jax.Array, z: jax.Array, count: int) -> jax.Array:
    """`count` random vectors of z [..., D], with replacement; the same on all devices."""
    z = jax.lax.stop_gradient(z).reshape(-1, z.shape[-1])
    return z[jax.random.randint(key, (count,), 0, len(z))]


def k_means(key: jax.Array, z: jax.Array, size: int, iterations: int = 10, per_code: int = 32) -> jax.Array:
    """Centers [size, D] of the vectors z [..., D]: k-means++ (Arthur and Vassilvitskii 2007), then Lloyd's iterations.

    Uses at most `per_code` x size randomly sampled vectors. A center without vectors keeps its place.
    """
    vectors_key, first_key, others_key = jax.random.split(key, 3)
    z = jax.lax.stop_gradient(z).reshape(-1, z.shape[-1])
    if len(z) > per_code * size:
        z = sample_vectors(vectors_key, z, per_code * size)

    def add_center(i, carry):
        centers, distance = carry
        chosen = jax.random.categorical(jax.random.fold_in(others_key, i), jnp.log(jnp.maximum(distance, 1e-20)))
        return centers.at[i].set(z[chosen]), jnp.minimum(distance, jnp.sum((z - z[chosen]) ** 2, -1))

    first = z[jax.random.randint(first_key, (), 0, len(z))]
    centers = jnp.zeros((size, z.shape[-1])).at[0].set(first)
    centers, _ = jax.lax.fori_loop(1, size, add_center, (centers, jnp.sum((z - first) ** 2, -1)))

    def lloyd(_, centers):
        tokens = _least(*_centered(z, centers))[1]
        n = counts(tokens, size)[:, None]
        return jnp.where(n > 0, sums(z, tokens, size) / jnp.maximum(n, 1), centers)

    return jax.lax.fori_loop(0, iterations, lloyd, centers)


# --------------------------------------------------------------------------------------------------------- measures


def usage(count: jax.Array) -> jax.Array:
    """Share of codes with a count above zero, in [0, 1]. It depends on the number of tokens counted, so report both."""
    return jnp.mean(count > 0)


def perplexity(count: jax.Array) -> jax.Array:
    """exp of the entropy of the code frequencies: 1 for a single code, K for uniform use; at most the number of tokens."""
    return jnp.exp(entropy(count / count.sum()))


# --------------------------------------------------------------------------------- quantizers without a codebook


def fsq(z: jax.Array, levels: Sequence[int]) -> jax.Array:
    """Finite scalar quantization: z [..., D] -> codes [..., D] in [-1, 1] with levels[d] values in dimension d; z = 0 gives 0.

    Bounded by tanh, rounded with a straight-through gradient, divided by half the levels, as in the code of Mentzer et al. 2023,
    appendix A.1. Widely used ports have (1 + epsilon) and atanh for (1 - epsilon) and tan. levels[d] is from 3 to 1000: with 2 the
    lower level starts at z = -1.5, and with more than 1000 the outermost levels are out of reach.
    """
    levels = np.asarray(levels)
    half = (levels - 1) * (1 - 1e-3) / 2
    offset = np.where(levels % 2 == 0, 0.5, 0.0)
    bounded = jnp.tanh(z + np.tan(offset / half).astype(np.float32)) * half.astype(np.float32) - offset.astype(np.float32)
    return plain(bounded, jnp.round(bounded)) / (levels // 2).astype(np.float32)


def fsq_tokens(codes: jax.Array, levels: Sequence[int]) -> jax.Array:
    """Codes of `fsq` [..., D] -> tokens [...]; the first dimension varies fastest."""
    half = np.asarray(levels) // 2
    digits = jnp.round(codes * half).astype(jnp.int32) + half
    return jnp.sum(digits * np.cumprod([1, *levels[:-1]]), axis=-1).astype(jnp.int32)


def fsq_codes(tokens: jax.Array, levels: Sequence[int]) -> jax.Array:
    """The inverse of `fsq_tokens`."""
    half = (np.asarray(levels) // 2).astype(np.int32)
    digits = tokens[..., None] // np.cumprod([1, *levels[:-1]]).astype(np.int32) % np.asarray(levels, np.int32)
    return (digits - half).astype(jnp.float32) / half.astype(np.float32)


def lfq(z: jax.Array) -> jax.Array:
    """The signs of z [..., D], -1 or 1 (0 is -1), with the gradient of z."""
    return plain(z, jnp.where(z > 0, 1.0, -1.0))


def lfq_tokens(z: jax.Array) -> jax.Array:
    """Bit d of the token is 1 where z[d] > 0: [..., D] -> [...]."""
    return jnp.sum((z > 0) * (1 << np.arange(z.shape[-1], dtype=np.int32)), axis=-1).astype(jnp.int32)


def lfq_codes(tokens: jax.Array, bits: int) -> jax.Array:
    """The inverse of `lfq_tokens`: [...] -> [..., bits]."""
    return jnp.where(tokens[..., None] >> np.arange(bits, dtype=np.int32) & 1, 1.0, -1.0)

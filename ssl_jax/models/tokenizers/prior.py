"""Transformers over image tokens: a causal one that samples token by token, and a bidirectional one that fills in masks.

Sources: Yu et al. 2022, ViT-VQGAN (arXiv:2110.04627), section 4 and table 2, for the causal model; its published parameter counts
imply three square matrices per attention, and this block has the usual four. Chang et al. 2022, MaskGIT (arXiv:2202.04200), for the
bidirectional one; `Trunk.flavor` 'maskgit' has the details of its code, google-research/maskgit.

The blocks are one `scan`: their parameters have a leading axis of depth, and a deep model compiles as fast as a shallow one.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssl_jax.errors import UserError
from ssl_jax.models.activations import gelu
from ssl_jax.models.backbones.vit import REMATS
from ssl_jax.models.common import Dense, attention, shard_batch

# 'tensor' shards attention heads, MLP channels and the output head's codes; 'fsdp' shards the other side of each matrix.
TENSOR_RULES = (
    (r"blocks/attention/qkv/kernel", ("fsdp", "tensor")),
    (r"blocks/attention/qkv/bias", ("tensor",)),
    (r"blocks/attention/proj/kernel", ("tensor", "fsdp")),
    (r"blocks/mlp/fc1/kernel", ("fsdp", "tensor")),
    (r"blocks/mlp/fc1/bias", ("tensor",)),
    (r"blocks/mlp/fc2/kernel", ("tensor", "fsdp")),
    (r"head/kernel", ("fsdp", "tensor")),
    (r"head/bias", ("tensor",)),
)



class Flavor(NamedTuple):
    """Details in which published transformers differ."""

    epsilon: float  # of the layer normalizations
    tanh: bool  # GELU by its tanh approximation
    init: nn.initializers.Initializer
    drop_weights: bool  # dropout of the attention weights, instead of the attention's output and the MLP's activations


FLAVORS = {
    "vim": Flavor(1e-6, False, nn.initializers.normal(0.02), False),
    "maskgit": Flavor(1e-12, True, nn.initializers.truncated_normal(0.02), True),
}
_f32 = dict(preferred_element_type=jnp.float32)


class Cache(NamedTuple):
    """Attention keys and values of all blocks at the positions so far; zeros elsewhere."""

    key: jax.Array  # [depth, B, heads, length, width / heads]
    value: jax.Array


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeros with probability `rate`, the rest divided by 1 - rate; the identity if `key` is None."""
    if key is None:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)


def mean_features(x: jax.Array, causal: bool) -> jax.Array:
    """Features of images, [B, N, D] -> float32 [B, D]: the mean over positions of the next layer's input (iGPT, Chen et al. 2020,
    section 2.4). In a causal model that input is `x` normalized, here without scale and shift, which do not affect a linear probe.
    """
    x = x.astype(jnp.float32)
    return (jax.nn.standardize(x, epsilon=1e-6) if causal else x).mean(1)


def by_layer(features: jax.Array, probe_block: int) -> dict[str, jax.Array]:
    """Features [1 + depth, B, D] of a prior -> {'embedding', 'block0', ...: [B, D]}; 'pooled' is block `probe_block`."""
    names = ("embedding", *(f"block{i}" for i in range(len(features) - 1)))
    return {"pooled": features[1 + probe_block], **dict(zip(names, features, strict=True))}


def cached_attention(q: jax.Array, k: jax.Array, v: jax.Array, past: Cache, index: jax.Array) -> jax.Array:
    """Causal attention of N new positions, from `index` on, to the cached positions before them and to themselves.

    q, k, v: [B, N, H, D]; past: cache of one block, [B, H, T, D]; index: int scalar. Returns [B, N, H, D]. New and cached keys stay
    separate, because concatenation would copy the cache for each token.
    """
    length, new = past.key.shape[2], q.shape[1]
    before = jnp.einsum("bnhd,bhtd->bhnt", q, past.key, **_f32)
    before = jnp.where(jnp.arange(length) < index, before, -jnp.inf)
    among = jnp.einsum("bnhd,bmhd->bhnm", q, k, **_f32)
    among = jnp.where(jnp.tri(new, dtype=bool), among, -jnp.inf)
    weights = jax.nn.softmax(jnp.concatenate([before, among], -1) * q.shape[-1] ** -0.5).astype(v.dtype)
    out = jnp.einsum("bhnt,bhtd->bnhd", weights[..., :length], past.value, **_f32)
    out += jnp.einsum("bhnm,bmhd->bnhd", weights[..., length:], v, **_f32)
    return out.astype(v.dtype)


def attention_with_dropout(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool, rate: float, key: jax.Array) -> jax.Array:
    """`attention`, [B, N, H, D] each, with dropout of its weights, which are [B, H, N, N] in memory."""
    scores = jnp.einsum("bnhd,bmhd->bhnm", q, k, **_f32) * q.shape[-1] ** -0.5
    if causal:
        scores = jnp.where(jnp.tri(q.shape[1], dtype=bool), scores, -jnp.inf)
    weights = dropout(jax.nn.softmax(scores).astype(v.dtype), rate, key)
    return jnp.einsum("bhnm,bmhd->bnhd", weights, v, **_f32).astype(v.dtype)


class Attention(nn.Module):
    """Multi-head self-attention. The columns of the joint projection are ordered (head, q|k|v, channel), as in `vit`."""

    heads: int
    causal: bool
    dropout: float
    flavor: str
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, key: jax.Array | None, past: Cache | None, index: jax.Array | None):
        """[B, N, D] -> (output [B, N, D], keys and values of these positions, a Cache of [B, H, N, D / H])."""
        batch, length, width = x.shape
        flavor = FLAVORS[self.flavor]
        qkv = Dense(3 * width, kernel_init=flavor.init, dtype=self.dtype, name="qkv")(x)
        qkv = qkv.reshape(batch, length, self.heads, 3, width // self.heads)
        q, k, v = (qkv[..., i, :] for i in range(3))
        if past is not None:
            x = cached_attention(q, k, v, past, index)
        elif flavor.drop_weights and key is not None:
            x = attention_with_dropout(q, k, v, self.causal, self.dropout, key)
        else:
            x = attention(q, k, v, self.causal)
        x = x.reshape(batch, length, width)
        x = x if flavor.drop_weights else dropout(x, self.dropout, key)
        x = Dense(width, kernel_init=flavor.init, dtype=self.dtype, name="proj")(x)
        return x, Cache(*(shard_batch(y.swapaxes(1, 2)) for y in (k, v)))


class Mlp(nn.Module):
    """Two linear layers with a GELU between them, and in flavor 'vim' dropout after it."""

    hidden: int
    dropout: float
    flavor: str
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """[B, N, D] -> [B, N, D]."""
        flavor = FLAVORS[self.flavor]
        y = Dense(self.hidden, kernel_init=flavor.init, dtype=self.dtype, name="fc1")(x)
        y = gelu(y, flavor.tanh)
        y = y if flavor.drop_weights else dropout(y, self.dropout, key)
        return Dense(x.shape[-1], kernel_init=flavor.init, dtype=self.dtype, name="fc2")(y)


class Block(nn.Module):
    """Attention and MLP, each with its residual. Causal: x + f(norm(x)); otherwise norm(x + f(x)), as in BERT.

    Dropout follows both branches, and by `flavor` the attention and the activation, or the attention's weights.
    """

    heads: int
    hidden: int
    causal: bool
    dropout: float
    flavor: str
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, key: jax.Array | None, past: Cache | None, index: jax.Array | None):
        """[B, N, D] -> (output [B, N, D], its `mean_features` [B, D], or with `past` the new entries of the cache)."""
        keys = [None] * 4 if key is None else jax.random.split(key, 4)
        norms = [nn.LayerNorm(epsilon=FLAVORS[self.flavor].epsilon, dtype=self.dtype, name=f"norm{i}") for i in (1, 2)]
        attention = Attention(self.heads, self.causal, self.dropout, self.flavor, self.dtype, name="attention")
        mlp = Mlp(self.hidden, self.dropout, self.flavor, self.dtype, name="mlp")

        y, cached = attention(norms[0](x) if self.causal else x, keys[0], past, index)
        x = x + dropout(y, self.dropout, keys[1])
        x = x if self.causal else norms[0](x)
        y = mlp(norms[1](x) if self.causal else x, keys[2])
        x = x + dropout(y, self.dropout, keys[3])
        x = shard_batch(x if self.causal else norms[1](x))
        return x, mean_features(x, self.causal) if past is None else cached


class Trunk(nn.Module):
    """Layers of both models.

    Fields:
      codes, length: size of the codebook and number of tokens.
      classes: number of classes; 1 for an unconditional model.
      null: add a null class, for "class unknown".
      depth, width, heads, hidden: of the blocks; `hidden` is the width of the MLP.
      dropout: probability, in training.
      flavor: a key of FLAVORS, the details of a published model.
      remat: a key of `models.backbones.vit.REMATS`: memory for recomputation.
      dtype: of the activations; parameters, softmax, normalization statistics and logits are float32.

    Raises UserError if `heads` does not divide `width`, for a dropout outside [0, 1), and for an unknown flavor or remat.
    """

    codes: int
    length: int
    classes: int = 1
    null: bool = False
    depth: int = 24
    width: int = 1536
    heads: int = 16
    hidden: int = 6144
    dropout: float = 0.1
    flavor: str = "vim"
    remat: str = "none"
    dtype: jnp.dtype = jnp.float32

    def __post_init__(self):
        if self.width % self.heads:
            raise UserError(f"config.model.transformer: heads={self.heads} do not divide width={self.width}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"config.model.transformer.dropout={self.dropout} must be at least 0 and below 1")
        if self.flavor not in FLAVORS:
            raise UserError(f"config.model.transformer.flavor={self.flavor!r} is unknown; choose one of {', '.join(FLAVORS)}")
        if self.remat not in REMATS:
            raise UserError(f"config.model.transformer.remat={self.remat!r} is unknown; choose one of {', '.join(REMATS)}")
        super().__post_init__()

    def create_layers(self, causal: bool, codes: int, positions: int) -> None:
        """Create the submodules; called from `setup`."""
        flavor = FLAVORS[self.flavor]
        block = Block if self.remat == "none" else nn.remat(Block, policy=REMATS[self.remat], prevent_cse=False)
        scanned = nn.scan(
            block, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=(0, 0, nn.broadcast), length=self.depth
        )
        self.tokens = nn.Embed(codes, self.width, embedding_init=flavor.init, dtype=self.dtype)
        self.labels = nn.Embed(self.classes + self.null, self.width, embedding_init=flavor.init, dtype=self.dtype)
        self.position = self.param("position", flavor.init, (positions, self.width))
        self.blocks = scanned(self.heads, self.hidden, causal, self.dropout, self.flavor, self.dtype)
        self.norm = nn.LayerNorm(epsilon=flavor.epsilon, dtype=self.dtype)

    def start(self, label: jax.Array | None, count: int) -> jax.Array:
        """Labels [B] -> class embeddings [B, 1, D]; for None that of the null class or, without one, the mean over all classes."""
        if label is not None:
            return self.labels(label)[:, None]
        table = self.labels.embedding.astype(self.dtype)
        row = table[-1] if self.null else table.mean(0)
        return jnp.broadcast_to(row, (count, 1, self.width))

    def keys(self, key: jax.Array | None, train: bool) -> jax.Array | None:
        """One key for each block; None without dropout."""
        return jax.random.split(key, self.depth) if train and self.dropout else None


class CausalPrior(Trunk):
    """p(tokens | class) as a product over the tokens in raster order.

    The input at position 0 is the class, at position i > 0 token i - 1; the output at position i is the distribution of token i.
    The last token is never an input. Logits are 0 at initialization.
    """

    def setup(self):
        self.create_layers(True, self.codes, self.length)
        # Operands have type `dtype`; accumulation and logits are float32.
        self.head = Dense(self.codes, kernel_init=nn.initializers.zeros, dtype=self.dtype, dot_general=_dot_f32)

    def __call__(self, tokens: jax.Array, label: jax.Array | None = None, key: jax.Array | None = None, *, train: bool):
        """Tokens int32 [B, length], labels [B] or None -> (logits float32 [B, length, codes], features [1 + depth, B, D]).

        Features are `mean_features` of the embedded input and of each block. `key` is for dropout, if `train`.
        """
        x = self.embed(jnp.concatenate([self.start(label, tokens.shape[0]), self.tokens(tokens[:, :-1])], 1), 0)
        first = mean_features(x, True)[None]
        x, features = self.blocks(x, self.keys(key, train), None, None)
        return self.head(self.norm(x)).astype(jnp.float32), jnp.concatenate([first, features])

    def prefill(self, prefix: jax.Array, label: jax.Array | None = None, *, train: bool = False) -> tuple[jax.Array, Cache]:
        """Tokens int32 [B, n], n >= 0 -> (logits [B, codes] of token n, cache with n + 1 positions)."""
        count = prefix.shape[0]
        shape = (self.depth, count, self.heads, self.length, self.width // self.heads)
        cache = Cache(jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype))
        return self.extend(jnp.concatenate([self.start(label, count), self.tokens(prefix)], 1), jnp.int32(0), cache)

    def decode(self, token: jax.Array, index: jax.Array, cache: Cache, *, train: bool = False) -> tuple[jax.Array, Cache]:
        """Token `index` - 1, int32 [B] -> (logits [B, codes] of token `index`, cache with one more position)."""
        return self.extend(self.tokens(token)[:, None], index, cache)

    def extend(self, x, index, cache):
        x, new = self.blocks(self.embed(x, index), None, cache, index)
        cache = jax.tree.map(lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, index, 3), cache, new)
        return self.head(self.norm(x[:, -1])).astype(jnp.float32), cache

    def embed(self, x, index):
        position = jax.lax.dynamic_slice_in_dim(self.position, index, x.shape[1])
        return shard_batch(x + position.astype(self.dtype))


class MaskedPrior(Trunk):
    """The distribution of every token, given the unmasked tokens and the class at position 0. The mask's id is `codes`.

    The output weights are the input embeddings of the codes, after one more layer (BERT's head). The mask has no logit, so it is
    never sampled.
    """

    def setup(self):
        self.create_layers(False, self.codes + 1, self.length + 1)
        flavor = FLAVORS[self.flavor]
        self.transform = Dense(self.width, kernel_init=flavor.init, dtype=self.dtype)
        self.transform_norm = nn.LayerNorm(epsilon=flavor.epsilon, dtype=self.dtype)
        self.bias = self.param("bias", nn.initializers.zeros, (self.codes,))

    def __call__(self, tokens: jax.Array, label: jax.Array | None = None, key: jax.Array | None = None, *, train: bool):
        """Tokens int32 [B, length] up to `codes`, labels [B] or None -> (logits, features) like `CausalPrior`."""
        input_key = jax.random.fold_in(key, self.depth) if train and self.dropout else None
        x = jnp.concatenate([self.start(label, tokens.shape[0]), self.tokens(tokens)], 1)
        x = self.norm(x + self.position.astype(self.dtype))
        first = mean_features(x, False)[None]
        x, features = self.blocks(shard_batch(dropout(x, self.dropout, input_key)), self.keys(key, train), None, None)
        x = self.transform_norm(gelu(self.transform(x[:, 1:]), FLAVORS[self.flavor].tanh))
        table = self.tokens.embedding[: self.codes].astype(self.dtype)
        return jnp.einsum("bnd,kd->bnk", x, table, **_f32) + self.bias, jnp.concatenate([first, features])


def _dot_f32(*args, preferred_element_type=None, **kwargs):
    return jax.lax.dot_general(*args, preferred_element_type=jnp.float32, **kwargs)

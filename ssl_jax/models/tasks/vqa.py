"""Networks that answer questions about images: encoders of questions, and two ways to read a grid of features with a question.

FiLM: Perez et al. 2018, arXiv:1709.07871. Stacked attention: Yang et al. 2016, arXiv:1511.02274.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssl_jax.models.common import Conv, Dense, shard_batch
from ssl_jax.models.heads import LinearHead
from ssl_jax.models.norm import BatchNorm

PADDING = 0  # token after the end of a question


class GruQuestion(nn.Module):
    """The state of a GRU (Cho et al. 2014, arXiv:1406.1078) after the last word; what follows the last word changes nothing.

    Fields: words in the vocabulary; embedding, the width of the vector of a word; width of the state; dtype of the computation.
    """

    words: int
    embedding: int = 200
    width: int = 4096
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, question: jax.Array, train: bool = False) -> jax.Array:
        """Token ids int32 [B, T], padded at the end with 0 -> [B, width]; `train` changes nothing."""
        x = nn.Embed(self.words, self.embedding, dtype=self.dtype, name="embed")(question)
        lengths = jnp.sum(question != PADDING, -1)
        cell = nn.GRUCell(self.width, dtype=self.dtype, name="cell")
        state, _ = nn.RNN(cell, return_carry=True, name="rnn")(shard_batch(x), seq_lengths=jnp.maximum(lengths, 1))
        return shard_batch(state)


class BagOfWords(nn.Module):
    """The mean of the vectors of the words, a linear layer and a ReLU: the order of the words is lost.

    Fields: see `GruQuestion`; width of the linear layer.
    """

    words: int
    embedding: int = 200
    width: int = 256
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, question: jax.Array, train: bool = False) -> jax.Array:
        """Token ids int32 [B, T], padded with 0 -> [B, width]; `train` changes nothing."""
        valid = (question != PADDING)[..., None]
        x = nn.Embed(self.words, self.embedding, dtype=self.dtype, name="embed")(question)
        mean = jnp.sum(jnp.where(valid, x, 0), 1) / jnp.maximum(jnp.sum(valid, 1), 1)
        return nn.relu(Dense(self.width, dtype=self.dtype, name="linear")(shard_batch(mean.astype(self.dtype))))


class Film(nn.Module):
    """Answers by residual blocks whose channels the question scales and shifts: gamma x + beta, gamma = 1 + dgamma.

    A 3x3 convolution with BatchNorm and ReLU reads the maps. Each block has a 1x1 convolution with ReLU of maps and coordinates, to
    whose result it adds: 3x3 convolution, BatchNorm without scale and offset, gamma and beta, ReLU. Then a 1x1 convolution with ReLU of
    maps and coordinates, the maximum over all places, a linear layer with BatchNorm and ReLU, and a linear layer to the answers.

    Fields: answers; width of the blocks; their number; projection, channels of the last maps; hidden, width of the linear layer; dtype.
    """

    answers: int
    width: int = 128
    blocks: int = 4
    projection: int = 512
    hidden: int = 1024
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, maps: jax.Array, question: jax.Array, train: bool) -> tuple[jax.Array, jax.Array]:
        """Maps [B, h, w, C] and questions [B, D] -> (logits [B, answers], attention [B, h, w]), both float32.

        Attention is where the maximum takes its values from: the share of the channels whose largest value is at a place. Places
        with equal values share a channel. It is not negative, and sums to 1 over all places.
        """

        def conv(x, features, kernel, name, bias=True):
            return Conv(features, (kernel, kernel), use_bias=bias, dtype=self.dtype, name=name)(x)

        norm = dict(use_running_average=not train, dtype=self.dtype)
        x = BatchNorm(**norm, relu=True, name="stem_bn")(conv(maps.astype(self.dtype), self.width, 3, "stem", bias=False))
        film = Dense(2 * self.blocks * self.width, dtype=self.dtype, name="film")(question)
        film = film.reshape(-1, self.blocks, 2, 1, 1, self.width)
        for block in range(self.blocks):
            x = nn.relu(conv(with_coordinates(x), self.width, 1, f"block{block}_in"))
            y = conv(x, self.width, 3, f"block{block}_conv", bias=False)
            y = BatchNorm(**norm, use_scale=False, use_bias=False, name=f"block{block}_bn")(y)
            x = shard_batch(x + nn.relu(modulate(y, film[:, block, 0], film[:, block, 1])))
        x = nn.relu(conv(with_coordinates(x), self.projection, 1, "projection"))
        attention = places_of_maxima(x)
        x = Dense(self.hidden, use_bias=False, dtype=self.dtype, name="hidden")(x.max((1, 2)))
        x = BatchNorm(**norm, relu=True, name="hidden_bn")(x)
        return LinearHead(self.answers, name="answers")(x), attention


class StackedAttention(nn.Module):
    """Answers by looking at the grid several times, each time with what was found before.

    One hop, of places v and a query u: p = softmax(W_p tanh(W_v v + W_u u + b)), then u + sum(p v) is the next query; the first is a
    linear layer of the question. A linear layer with ReLU and one to the answers follow.

    Fields: answers; width of places and queries; attended, width inside of the tanh; hops; hidden, width of the linear layer; dtype.
    """

    answers: int
    width: int = 256
    attended: int = 512
    hops: int = 2
    hidden: int = 1024
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, maps: jax.Array, question: jax.Array, train: bool = False) -> tuple[jax.Array, jax.Array]:
        """Maps [B, h, w, C] and questions [B, D] -> (logits [B, answers], attention [B, h, w] of the last hop), both float32."""

        def linear(x, width, name, bias=True):
            return Dense(width, use_bias=bias, dtype=self.dtype, name=name)(x)

        rows, columns = maps.shape[1:3]
        places = shard_batch(linear(maps.reshape(-1, rows * columns, maps.shape[-1]), self.width, "places"))
        query = linear(question, self.width, "query")
        for hop in range(self.hops):
            h = linear(places, self.attended, f"hop{hop}_places", bias=False) + linear(query, self.attended, f"hop{hop}_query")[:, None]
            scores = linear(jnp.tanh(h), 1, f"hop{hop}_scores", bias=False)[..., 0]
            attention = jax.nn.softmax(scores.astype(jnp.float32))
            query = query + jnp.sum(attention[..., None] * places.astype(jnp.float32), 1).astype(query.dtype)
        x = nn.relu(linear(query, self.hidden, "hidden"))
        return LinearHead(self.answers, name="answers")(x), attention.reshape(-1, rows, columns)


QUESTIONS = {"gru": GruQuestion, "bag_of_words": BagOfWords}
FUSIONS = {"film": Film, "attention": StackedAttention}


def modulate(x: jax.Array, dgamma: jax.Array, beta: jax.Array) -> jax.Array:
    """(1 + dgamma) x + beta; x [B, h, w, C], the others [B, 1, 1, C]. With zeros for both it is x."""
    return (1 + dgamma) * x + beta


def with_coordinates(x: jax.Array) -> jax.Array:
    """[B, h, w, C] -> [B, h, w, C + 2]: row and column of each place, from -1 to 1 (0 for a single one), follow its channels."""
    rows, columns = (jnp.linspace(-1, 1, n) if n > 1 else jnp.zeros(1) for n in x.shape[1:3])
    grid = jnp.stack(jnp.meshgrid(rows, columns, indexing="ij"), -1).astype(x.dtype)
    return jnp.concatenate([x, jnp.broadcast_to(grid, (*x.shape[:3], 2))], -1)


def places_of_maxima(x: jax.Array) -> jax.Array:
    """[B, h, w, C] -> float32 [B, h, w]: the share of channels whose maximum is at each place; equal values share one."""
    largest = (x == x.max((1, 2), keepdims=True)).astype(jnp.float32)
    return jnp.mean(largest / largest.sum((1, 2), keepdims=True), -1)

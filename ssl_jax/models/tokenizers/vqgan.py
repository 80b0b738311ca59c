"""The convolutional tokenizer of VQGAN and its discriminator (Esser, Rombach and Ommer 2021, arXiv:2012.09841, tables 7 and 8).

Group normalization and swish precede the convolutions; maps of chosen sizes have self-attention. Encoder and decoder have the
interface in `vqvae`.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssl_jax.models.common import Conv, Dense, attention, shard_batch
from ssl_jax.models.norm import BatchNorm

normal = nn.initializers.normal


def swish_norm(x: jax.Array, dtype: jnp.dtype, name: str) -> jax.Array:
    """Group normalization in 32 groups (one per channel if there are fewer channels), then swish."""
    return nn.swish(nn.GroupNorm(min(32, x.shape[-1]), epsilon=1e-6, dtype=dtype, name=name)(x))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions; the shortcut is a 1x1 convolution if the number of channels changes."""

    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, h, w, C] -> [B, h, w, features]."""
        y = Conv(self.features, (3, 3), dtype=self.dtype, name="conv1")(swish_norm(x, self.dtype, "norm1"))
        y = Conv(self.features, (3, 3), dtype=self.dtype, name="conv2")(swish_norm(y, self.dtype, "norm2"))
        if x.shape[-1] != self.features:
            x = Conv(self.features, (1, 1), dtype=self.dtype, name="shortcut")(x)
        return shard_batch(x + y)


class AttentionBlock(nn.Module):
    """x + attention(norm(x)) over all positions, with one head."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, h, w, C] -> the same shape."""
        channels = x.shape[-1]
        y = nn.GroupNorm(min(32, channels), epsilon=1e-6, dtype=self.dtype, name="norm")(x)
        y = y.reshape(y.shape[0], -1, 1, channels)  # [B, positions, heads, C]
        query, key, value = (Dense(channels, dtype=self.dtype, name=name)(y) for name in ("query", "key", "value"))
        y = attention(query, key, value).reshape(x.shape)
        return shard_batch(x + Dense(channels, dtype=self.dtype, name="proj")(y))


class _Middle(nn.Module):
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        x = ResidualBlock(x.shape[-1], self.dtype, name="block1")(x)
        x = AttentionBlock(self.dtype, name="attention")(x)
        return ResidualBlock(x.shape[-1], self.dtype, name="block2")(x)


class VQGANEncoder(nn.Module):
    """Levels of residual blocks; a strided convolution halves the maps between levels.

    Fields:
      dim: of the codes.
      width, multiples: level i has width * multiples[i] channels.
      blocks: residual blocks per level.
      attention: sides of maps with attention after each block; the middle always has attention.
      features: channels before the projection to codes.
    """

    dim: int
    width: int = 128
    multiples: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 2
    attention: tuple[int, ...] = (16,)
    features: int = 256
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> dict[str, jax.Array]:
        x, out = Conv(self.width, (3, 3), dtype=self.dtype, name="conv")(x.astype(self.dtype)), {}
        for level, multiple in enumerate(self.multiples, 1):
            for i in range(1, self.blocks + 1):
                x = ResidualBlock(self.width * multiple, self.dtype, name=f"level{level}_block{i}")(x)
                if x.shape[1] in self.attention:
                    x = AttentionBlock(self.dtype, name=f"level{level}_attention{i}")(x)
            out[f"layer{level}"] = x
            if level < len(self.multiples):
                padding = ((0, 1), (0, 1))
                x = Conv(x.shape[-1], (3, 3), strides=2, padding=padding, dtype=self.dtype, name=f"level{level}_down")(x)
        x = swish_norm(_Middle(self.dtype, name="middle")(x), self.dtype, "norm")
        out["features"] = shard_batch(Conv(self.features, (3, 3), dtype=self.dtype, name="features")(x))
        out["out"] = Dense(self.dim, precision="highest", name="to_code")(out["features"].astype(jnp.float32))
        return out


class VQGANDecoder(nn.Module):
    """Mirror of the encoder, with its fields: one more block per level, and nearest-neighbor upsampling between levels."""

    channels: int
    width: int = 128
    multiples: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 2
    attention: tuple[int, ...] = (16,)
    features: int = 256
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, codes: jax.Array, train: bool) -> jax.Array:
        x = Dense(self.features, dtype=self.dtype, name="of_code")(codes)
        x = Conv(self.width * self.multiples[-1], (3, 3), dtype=self.dtype, name="conv")(x)
        x = _Middle(self.dtype, name="middle")(x)
        for level, multiple in reversed(list(enumerate(self.multiples, 1))):
            for i in range(1, self.blocks + 2):
                x = ResidualBlock(self.width * multiple, self.dtype, name=f"level{level}_block{i}")(x)
                if x.shape[1] in self.attention:
                    x = AttentionBlock(self.dtype, name=f"level{level}_attention{i}")(x)
            if level > 1:
                x = x.repeat(2, 1).repeat(2, 2)
                x = shard_batch(Conv(x.shape[-1], (3, 3), dtype=self.dtype, name=f"level{level}_up")(x))
        x = Conv(self.channels, (3, 3), dtype=self.dtype, name="head")(swish_norm(x, self.dtype, "norm"))
        return x.astype(jnp.float32)


class PatchDiscriminator(nn.Module):
    """Scores of overlapping patches (Isola et al. 2017, arXiv:1611.07004): 4x4 convolutions, batch normalization, leaky ReLU.

    Fields: `width` of the first convolution, doubled per layer up to 8 width; `layers` that halve the sides (3: 70 x 70 patches).
    """

    width: int = 64
    layers: int = 3
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, dict]:
        """[B, H, W, 3] -> (logits float32 [B, h, w], {'layer1', ...})."""
        conv = functools.partial(Conv, kernel_size=(4, 4), padding=((1, 1), (1, 1)), kernel_init=normal(0.02), dtype=self.dtype)
        x, out = x.astype(self.dtype), {}
        for i in range(self.layers + 1):
            x = conv(self.width * min(2**i, 8), strides=2 if i < self.layers else 1, use_bias=i == 0, name=f"conv{i}")(x)
            if i:
                scale = lambda *a: 1 + normal(0.02)(*a)  # noqa: E731
                x = BatchNorm(use_running_average=not train, scale_init=scale, dtype=self.dtype, name=f"norm{i}")(x)
            x = out[f"layer{i + 1}"] = shard_batch(nn.leaky_relu(x, 0.2))
        return conv(1, name="score")(x)[..., 0].astype(jnp.float32), out

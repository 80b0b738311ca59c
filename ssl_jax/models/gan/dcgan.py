"""Generators and discriminators of the first GAN papers: maxout perceptrons, DCGAN, and SNGAN's network without residual blocks.

Generators map z [B, Z] to images [B, H, W, 3] in [-1, 1]. Discriminators map such images to (logits [B], features). Features are
'pooled' [B, D] and the maps 'layerN' [B, h, w, C] before each change of resolution.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssl_jax.errors import UserError
from ssl_jax.models.common import Conv, shard_batch
from ssl_jax.models.conv import conv_transpose
from ssl_jax.models.gan.spectral import SpectralConv, SpectralDense
from ssl_jax.models.norm import BatchNorm

Features = dict[str, jax.Array]
normal = nn.initializers.normal


def signed_uniform(scale: float) -> nn.initializers.Initializer:
    """Uniform in [-scale, scale]."""
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -scale, scale)


class MaxoutMLPGenerator(nn.Module):
    """Goodfellow et al. 2014 (arXiv:1406.2661), MNIST: two ReLU layers, sigmoid pixels (here rescaled to [-1, 1])."""

    size: int
    width: int = 1200
    layers: int = 2
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, z: jax.Array, train: bool) -> jax.Array:
        dense = functools.partial(nn.Dense, kernel_init=signed_uniform(0.05), dtype=self.dtype)
        for _ in range(self.layers):
            z = nn.relu(dense(self.width)(z))
        x = dense(self.size**2 * 3)(z).astype(jnp.float32)
        return jnp.tanh(x / 2).reshape(-1, self.size, self.size, 3)  # 2 sigmoid(x) - 1


class MaxoutMLPDiscriminator(nn.Module):
    """Discriminator of the same paper: maxout layers (Goodfellow et al. 2013) with dropout. Training needs the rng 'dropout'."""

    width: int = 240
    pieces: int = 5
    layers: int = 2
    dropout: float = 0.5
    input_dropout: float = 0.2
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, Features]:
        dense = functools.partial(nn.Dense, kernel_init=signed_uniform(0.005), dtype=self.dtype)
        h = nn.Dropout(self.input_dropout, deterministic=not train)(x.reshape(x.shape[0], -1))
        for _ in range(self.layers):
            h = dense(self.width * self.pieces)(h).reshape(x.shape[0], self.width, self.pieces).max(-1)
            h = nn.Dropout(self.dropout, deterministic=not train)(h)
        return dense(1)(h)[:, 0].astype(jnp.float32), {"pooled": h.astype(jnp.float32)}


class TransposedConv(nn.Module):
    """x [B, H, W, C] -> [B, stride H, stride W, features], without bias."""

    features: int
    kernel: int
    stride: int = 2
    kernel_init: nn.initializers.Initializer = normal(0.02)
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.kernel, self.kernel, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        return conv_transpose(x.astype(self.dtype), kernel.astype(self.dtype), self.stride)


class DCGANGenerator(nn.Module):
    """Radford et al. 2016 (arXiv:1511.06434), and with `final_kernel` the generator of Miyato et al. 2018, table 3.

    z is projected to size / 2^stages squared; each stage doubles the side and halves the channels, down to `channels`.
    final_kernel=0: the last stage outputs the image (DCGAN). Otherwise it outputs `channels` maps, and a convolution the image.
    """

    size: int
    stages: int
    channels: int = 64
    kernel: int = 4
    final_kernel: int = 0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, z: jax.Array, train: bool) -> jax.Array:
        if self.size % 2**self.stages:
            raise UserError(f"{self.size} pixels are no multiple of 2^{self.stages}; lower config.model.generator.stages")
        norm = functools.partial(
            BatchNorm, use_running_average=not train, scale_init=lambda *a: 1 + normal(0.02)(*a), dtype=self.dtype
        )
        start = self.size >> self.stages
        widths = [self.channels << n for n in reversed(range(self.stages + bool(self.final_kernel)))]
        x = nn.Dense(start * start * widths[0], use_bias=False, kernel_init=normal(0.02), dtype=self.dtype)(z)
        x = nn.relu(norm()(x.reshape(-1, start, start, widths[0])))
        for width in widths[1:]:
            x = shard_batch(nn.relu(norm()(TransposedConv(width, self.kernel, dtype=self.dtype)(x))))
        if self.final_kernel:
            x = Conv(3, (self.final_kernel,) * 2, kernel_init=normal(0.02), dtype=self.dtype)(x)
        else:
            x = TransposedConv(3, self.kernel, dtype=self.dtype)(x)
        return jnp.tanh(x.astype(jnp.float32))


class ConvDiscriminator(nn.Module):
    """A stack of (channels, kernel, stride) convolutions with leaky ReLU, and a linear score of the flattened maps.

    norm='batch': batch normalization after all but the first convolution (DCGAN); 'spectral': spectral normalization of every
    kernel (SNGAN); 'none' (with a gradient penalty).
    """

    layers: tuple[tuple[int, int, int], ...]
    norm: str = "batch"
    slope: float = 0.2
    head_bias: bool = True
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, Features]:
        if self.norm not in ("batch", "spectral", "none"):
            raise UserError(f"config.model.discriminator.norm={self.norm!r} is unknown; choose batch, spectral or none")
        features = {}
        for i, (channels, kernel, stride) in enumerate(self.layers):
            if stride > 1 and i:
                features[f"layer{len(features) + 1}"] = x
            if self.norm == "spectral":
                x = SpectralConv(channels, kernel=kernel, stride=stride, kernel_init=normal(0.02), dtype=self.dtype)(x, train)
            else:
                bias = self.norm == "none" or (i == 0 and self.head_bias)
                x = Conv(channels, (kernel, kernel), stride, use_bias=bias, kernel_init=normal(0.02), dtype=self.dtype)(x)
                if self.norm == "batch" and i:
                    scale = lambda *a: 1 + normal(0.02)(*a)  # noqa: E731
                    x = BatchNorm(use_running_average=not train, scale_init=scale, dtype=self.dtype)(x)
            x = shard_batch(nn.leaky_relu(x, self.slope))
        features[f"layer{len(features) + 1}"] = x
        features["pooled"] = x.mean((1, 2)).astype(jnp.float32)
        flat = x.reshape(x.shape[0], -1)
        head = dict(use_bias=self.head_bias, kernel_init=normal(0.02), dtype=self.dtype)
        logit = SpectralDense(1, **head)(flat, train) if self.norm == "spectral" else nn.Dense(1, **head)(flat)
        return logit[:, 0].astype(jnp.float32), features


def dcgan_layers(channels: int, stages: int, kernel: int) -> tuple[tuple[int, int, int], ...]:
    """DCGAN's (channels, kernel, stride): every convolution halves the side and doubles the channels."""
    return tuple((channels << n, kernel, 2) for n in range(stages))


def sndcgan_layers(channels: int, stages: int = 3) -> tuple[tuple[int, int, int], ...]:
    """Miyato et al. 2018, table 3: a 3x3 convolution, then pairs of a strided 4x4 (doubling the channels) and a 3x3 convolution."""
    pairs = [((channels << n, 4, 2), (channels << n, 3, 1)) for n in range(1, stages + 1)]
    return ((channels, 3, 1), *(layer for pair in pairs for layer in pair))

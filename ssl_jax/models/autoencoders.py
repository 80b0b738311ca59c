"""Encoders and decoders of images: perceptrons, strided and pooled convolutions, recurrent networks over rows, and any backbone.

An encoder maps [B, H, W, C] to {'layer1': ..., 'out': float32 [B, outputs]}. A decoder maps a code to float32 [B, H, W, C'] without
a last nonlinearity. The method decides what 'out' means (a code, or its mean and log-variance) and what the decoder's channels mean
(logits, or means and scales). Weights start with Glorot's uniform initialization, biases at zero.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssl_jax.errors import UserError
from ssl_jax.models.backbones.encoders import ENCODERS as BACKBONES
from ssl_jax.models.backbones.encoders import build_encoder as build_backbone
from ssl_jax.models.build import build, unknown
from ssl_jax.models.common import Conv, shard_batch
from ssl_jax.models.gan.dcgan import TransposedConv
from ssl_jax.models.pool import max_pool

glorot = nn.initializers.xavier_uniform()
Dense = functools.partial(nn.Dense, kernel_init=glorot)
ACTIVATIONS = {"linear": lambda x: x, "relu": nn.relu, "sigmoid": nn.sigmoid, "tanh": nn.tanh}


def to_channels(images: jax.Array, channels: int) -> jax.Array:
    """uint8 or float in [0, 1], [B, H, W, 3] -> float32 [B, H, W, channels] in [0, 1]; channels=1 takes the mean."""
    x = images.astype(jnp.float32) / (255 if images.dtype == jnp.uint8 else 1)
    return x.mean(-1, keepdims=True) if channels == 1 else x


def to_color(x: jax.Array) -> jax.Array:
    """[..., 1 or 3] -> [..., 3]."""
    return jnp.broadcast_to(x, (*x.shape[:-1], 3))


class MLPEncoder(nn.Module):
    """Linear layers over flattened pixels; `activation` (a key of ACTIVATIONS) follows all but the last one."""

    outputs: int
    widths: tuple[int, ...] = (512,)
    activation: str = "relu"
    dtype: jnp.dtype = jnp.float32

    def __post_init__(self):
        if self.activation not in ACTIVATIONS:
            raise UserError(unknown("config.model.encoder.activation", self.activation, ACTIVATIONS))
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> dict[str, jax.Array]:
        """[B, H, W, C] -> 'layer1' .. [B, widths[i]] after the activation, 'out' [B, outputs]."""
        h, out = x.reshape(x.shape[0], -1).astype(self.dtype), {}
        for i, width in enumerate(self.widths, 1):
            h = shard_batch(ACTIVATIONS[self.activation](Dense(width, dtype=self.dtype, name=f"linear{i}")(h)))
            out[f"layer{i}"] = h
        out["out"] = Dense(self.outputs, precision="highest", name="code")(h.astype(jnp.float32))
        return out


class MLPDecoder(nn.Module):
    """Mirror of `MLPEncoder`; `widths` start at the code. The biases of the image start at `image_bias`."""

    shape: tuple[int, int, int]
    widths: tuple[int, ...] = (512,)
    activation: str = "relu"
    image_bias: float = 0.0
    dtype: jnp.dtype = jnp.float32

    def __post_init__(self):
        if self.activation not in ACTIVATIONS:
            raise UserError(unknown("config.model.decoder.activation", self.activation, ACTIVATIONS))
        super().__post_init__()

    @nn.compact
    def __call__(self, z: jax.Array, train: bool) -> jax.Array:
        """[B, ...] -> [B, *shape]."""
        h = z.reshape(z.shape[0], -1)
        for i, width in enumerate(self.widths, 1):
            h = shard_batch(ACTIVATIONS[self.activation](Dense(width, dtype=self.dtype, name=f"linear{i}")(h)))
        bias = nn.initializers.constant(self.image_bias)
        x = Dense(math.prod(self.shape), bias_init=bias, dtype=self.dtype, name="image")(h)
        return x.astype(jnp.float32).reshape(-1, *self.shape)


class ConvEncoder(nn.Module):
    """Convolutions of stride 2 with ReLU, then linear layers. The defaults are the beta-VAE's for 64 pixels (Higgins et al. 2017;
    Locatello et al. 2019, arXiv:1811.12359)."""

    outputs: int
    widths: tuple[int, ...] = (32, 32, 64, 64)
    hidden: tuple[int, ...] = (256,)
    kernel: int = 4
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> dict[str, jax.Array]:
        """[B, H, W, C] -> 'layer1' .. [B, H / 2^i, W / 2^i, widths[i]] (rounded up) and [B, hidden[i]], 'out' [B, outputs]."""
        h, out = x.astype(self.dtype), {}
        for i, width in enumerate(self.widths, 1):
            h = Conv(width, (self.kernel, self.kernel), strides=2, kernel_init=glorot, dtype=self.dtype, name=f"conv{i}")(h)
            h = out[f"layer{i}"] = shard_batch(nn.relu(h))
        h = h.reshape(h.shape[0], -1)
        for i, width in enumerate(self.hidden, 1):
            h = shard_batch(nn.relu(Dense(width, dtype=self.dtype, name=f"linear{i}")(h)))
            out[f"layer{len(self.widths) + i}"] = h
        out["out"] = Dense(self.outputs, precision="highest", name="code")(h.astype(jnp.float32))
        return out


class ConvDecoder(nn.Module):
    """Linear layers to a small map, then transposed convolutions of stride 2; the `widths` of the maps start at the code.

    Raises UserError if height and width in `shape` are no multiples of 2^len(widths).
    """

    shape: tuple[int, int, int]
    widths: tuple[int, ...] = (64, 64, 32, 32)
    hidden: tuple[int, ...] = (256,)
    kernel: int = 4
    dtype: jnp.dtype = jnp.float32

    def __post_init__(self):
        if not self.widths or any(side % 2 ** len(self.widths) for side in self.shape[:2]):
            raise UserError(
                f"config.model.decoder.widths={tuple(self.widths)} double a map {len(self.widths)} times, which images of "
                f"{self.shape[0]} x {self.shape[1]} pixels do not allow; give other widths or images of another size"
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, z: jax.Array, train: bool) -> jax.Array:
        """[B, ...] -> [B, *shape]."""
        h, (height, width) = z.reshape(z.shape[0], -1), (side // 2 ** len(self.widths) for side in self.shape[:2])
        for i, features in enumerate((*self.hidden, height * width * self.widths[0]), 1):
            h = shard_batch(nn.relu(Dense(features, dtype=self.dtype, name=f"linear{i}")(h)))
        h = h.reshape(h.shape[0], height, width, self.widths[0])
        for i, features in enumerate((*self.widths[1:], self.shape[-1]), 1):
            h = TransposedConv(features, self.kernel, kernel_init=glorot, dtype=self.dtype, name=f"conv{i}")(h)
            h = h + self.param(f"bias{i}", nn.initializers.zeros, (features,), jnp.float32).astype(h.dtype)
            h = shard_batch(nn.relu(h) if i < len(self.widths) else h)
        return h.astype(jnp.float32)


class PooledEncoder(nn.Module):
    """3x3 convolutions with ReLU, each followed by a 2x2 max-pool, as in Keras's tutorial. The code is the flattened last map."""

    outputs: int
    widths: tuple[int, ...] = (16, 8, 8)
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> dict[str, jax.Array]:
        """[B, H, W, C] -> 'layer1' .. [B, H / 2^i, W / 2^i, widths[i]], rounded up; 'out' [B, outputs], the flattened last layer.

        Raises UserError if the last layer has not `outputs` values.
        """
        h, out = x.astype(self.dtype), {}
        for i, width in enumerate(self.widths, 1):
            h = nn.relu(Conv(width, (3, 3), kernel_init=glorot, dtype=self.dtype, name=f"conv{i}")(h))
            h = out[f"layer{i}"] = shard_batch(max_pool(h, (2, 2), (2, 2), padding="SAME"))
        size = math.prod(h.shape[1:])
        if size != self.outputs:
            raise UserError(f"config.model.code.size={self.outputs}: the last map has {size} values; set that size or other widths")
        out["out"] = h.reshape(h.shape[0], -1).astype(jnp.float32)
        return out


class PooledDecoder(nn.Module):
    """3x3 convolutions with ReLU, each followed by nearest-neighbor upsampling, and a last convolution to the image.

    valid: numbers, from 1, of the convolutions without padding, which remove two pixels (16 -> 14 -> 28 for MNIST).

    Raises UserError if the output has not the size of the images.
    """

    shape: tuple[int, int, int]
    widths: tuple[int, ...] = (8, 8, 16)
    valid: tuple[int, ...] = ()
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, z: jax.Array, train: bool) -> jax.Array:
        """[B, D] or [B, h, w, c] -> [B, *shape]."""
        height, width = (-(-side // 2 ** len(self.widths)) for side in self.shape[:2])
        h = z.reshape(z.shape[0], height, width, -1).astype(self.dtype)
        for i, features in enumerate(self.widths, 1):
            padding = "VALID" if i in self.valid else "SAME"
            h = nn.relu(Conv(features, (3, 3), padding=padding, kernel_init=glorot, dtype=self.dtype, name=f"conv{i}")(h))
            h = shard_batch(h.repeat(2, 1).repeat(2, 2))
        x = Conv(self.shape[-1], (3, 3), kernel_init=glorot, dtype=self.dtype, name="image")(h)
        if x.shape[1:] != tuple(self.shape):
            raise UserError(
                f"config.model.decoder.valid={tuple(self.valid)} gives images of {x.shape[1]} x {x.shape[2]} pixels, not "
                f"{self.shape[0]} x {self.shape[1]}; name other convolutions, or none"
            )
        return x.astype(jnp.float32)


class RecurrentEncoder(nn.Module):
    """An LSTM that reads an image row by row (Srivastava et al. 2015, arXiv:1502.04681, on frames); the code is its last state."""

    outputs: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> dict[str, jax.Array]:
        """[B, H, W, C] -> 'layer1' [B, H, outputs], the states after each row; 'out' [B, outputs], the last."""
        rows = shard_batch(x.reshape(*x.shape[:2], -1).astype(self.dtype))
        h = shard_batch(nn.RNN(nn.OptimizedLSTMCell(self.outputs, dtype=self.dtype), name="lstm")(rows))
        return {"layer1": h, "out": h[:, -1].astype(jnp.float32)}


class RecurrentDecoder(nn.Module):
    """An LSTM whose input at every row is the code, and a linear layer from its states to the rows.

    In the Keras tutorial the LSTM's states themselves, in (-1, 1), are the rows; logits need the linear layer.
    """

    shape: tuple[int, int, int]
    width: int = 128
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, z: jax.Array, train: bool) -> jax.Array:
        """[B, Z] -> [B, *shape]."""
        height, *row = self.shape
        codes = shard_batch(jnp.repeat(z[:, None].astype(self.dtype), height, 1))
        h = nn.RNN(nn.OptimizedLSTMCell(self.width, dtype=self.dtype), name="lstm")(codes)
        x = Dense(math.prod(row), dtype=self.dtype, name="row")(shard_batch(h))
        return x.astype(jnp.float32).reshape(-1, *self.shape)


class TiedDecoder(nn.Module):
    """x = W^T h + c with the weights W of a one-layer encoder; only the bias c is learned here."""

    shape: tuple[int, int, int]
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, z: jax.Array, kernel: jax.Array, train: bool) -> jax.Array:
        """z [B, Z] and the encoder's kernel [H W C, Z] -> [B, *shape]."""
        bias = self.param("bias", nn.initializers.zeros, (math.prod(self.shape),), jnp.float32)
        x = (z.astype(self.dtype) @ kernel.astype(self.dtype).T).astype(jnp.float32) + bias
        return x.reshape(-1, *self.shape)


class BackboneEncoder(nn.Module):
    """An encoder of `models.backbones`, and a linear layer from its pooled features to the code."""

    network: nn.Module
    outputs: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> dict[str, jax.Array]:
        """[B, H, W, C] -> the features of the encoder, and 'out' [B, outputs]."""
        out = self.network(x, train=train)
        return {**out, "out": Dense(self.outputs, precision="highest", name="code")(out["pooled"])}


ENCODERS = {"mlp": MLPEncoder, "conv": ConvEncoder, "pooled": PooledEncoder, "recurrent": RecurrentEncoder}
DECODERS = {"mlp": MLPDecoder, "conv": ConvDecoder, "pooled": PooledDecoder, "recurrent": RecurrentDecoder, "tied": TiedDecoder}


def build_encoder(spec: Mapping[str, Any], outputs: int, dtype: Any) -> nn.Module:
    """The encoder of dict(name='conv', field=value, ...), or of a backbone, dict(name='resnet', ...).

    Raises UserError for an unknown name or field.
    """
    if spec["name"] in BACKBONES.keys() - ENCODERS.keys():
        return BackboneEncoder(build_backbone(spec, dtype), outputs)
    if spec["name"] not in ENCODERS:
        raise UserError(unknown("config.model.encoder.name", spec["name"], (*ENCODERS, *BACKBONES)))
    return build(ENCODERS, "encoder", spec, outputs=outputs, dtype=dtype)


def build_decoder(spec: Mapping[str, Any], shape: Sequence[int], dtype: Any) -> nn.Module:
    """The decoder of dict(name='conv', field=value, ...) to [B, *shape]. Raises UserError for an unknown name or field."""
    return build(DECODERS, "decoder", spec, shape=tuple(shape), dtype=dtype)

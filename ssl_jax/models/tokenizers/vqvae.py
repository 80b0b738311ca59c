"""The convolutional networks of the VQ-VAE (van den Oord et al. 2017, arXiv:1711.00937, section 4.1), with Sonnet's sizes.

Encoders and decoders of tokens, here and in `vqgan` and `vit_vqgan`, have one interface. An encoder maps images [B, H, W, C] to
{'layer1': ..., 'features': [B, h, w, W], 'out': float32 [B, h, w, dim]}: 'out', a projection of 'features', is quantized. A decoder
maps codes [B, h, w, dim] to float32 [B, H, W, channels]; the parameters of its last linear layer are named 'head'.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssl_jax.errors import UserError
from ssl_jax.models.common import Conv, Dense, shard_batch
from ssl_jax.models.gan.dcgan import TransposedConv

lecun = nn.initializers.lecun_normal()


class ResidualStack(nn.Module):
    """Blocks x + conv1x1(relu(conv3x3(relu(x)))), and a ReLU after the last."""

    width: int
    blocks: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, h, w, C] -> the same shape."""
        for i in range(1, self.blocks + 1):
            y = Conv(self.width, (3, 3), dtype=self.dtype, name=f"block{i}_conv1")(nn.relu(x))
            x = x + Conv(x.shape[-1], (1, 1), dtype=self.dtype, name=f"block{i}_conv2")(nn.relu(y))
        return shard_batch(nn.relu(x))


class ResidualEncoder(nn.Module):
    """4x4 convolutions of stride 2, doubling the channels up to `width`; a 3x3 convolution; residual blocks.

    Fields: `stages`, number of strided convolutions; `blocks` and `block_width` of the stack; `dim` of the codes.
    """

    dim: int
    width: int = 128
    stages: int = 2
    blocks: int = 2
    block_width: int = 32
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> dict[str, jax.Array]:
        x, out = x.astype(self.dtype), {}
        if not self.width >> (self.stages - 1):
            raise UserError(f"config.model.encoder: width={self.width} cannot be halved in {self.stages} stages; give fewer stages")
        for i in range(1, self.stages + 1):
            x = Conv(self.width >> (self.stages - i), (4, 4), strides=2, dtype=self.dtype, name=f"conv{i}")(x)
            x = out[f"layer{i}"] = shard_batch(nn.relu(x))
        x = Conv(self.width, (3, 3), dtype=self.dtype, name="conv")(x)
        out["features"] = ResidualStack(self.block_width, self.blocks, self.dtype, name="stack")(x)
        out["out"] = Dense(self.dim, precision="highest", name="to_code")(out["features"].astype(jnp.float32))
        return out


class ResidualDecoder(nn.Module):
    """Mirror of the encoder with transposed convolutions; the last one outputs the image."""

    channels: int
    width: int = 128
    stages: int = 2
    blocks: int = 2
    block_width: int = 32
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, codes: jax.Array, train: bool) -> jax.Array:
        x = Conv(self.width, (3, 3), dtype=self.dtype, name="conv")(codes.astype(self.dtype))
        x = ResidualStack(self.block_width, self.blocks, self.dtype, name="stack")(x)
        for i in range(1, self.stages + 1):
            features, name = (self.channels, "head") if i == self.stages else (self.width >> i, f"conv{i}")
            x = TransposedConv(features, 4, kernel_init=lecun, dtype=self.dtype, name=name)(x)
            x = x + self.param(f"bias{i}", nn.initializers.zeros, (features,), jnp.float32).astype(x.dtype)
            x = shard_batch(nn.relu(x) if i < self.stages else x)
        return x.astype(jnp.float32)

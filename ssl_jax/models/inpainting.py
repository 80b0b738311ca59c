"""From the last map of an encoder to a whole picture, through a layer that connects all places of a channel.

Pathak et al. 2016, "Context encoders: feature learning by inpainting" (arXiv:1604.07379), section 3.1: a fully connected layer would
have C times as many weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssl_jax.models.common import Conv, shard_batch
from ssl_jax.models.gan.dcgan import TransposedConv
from ssl_jax.models.norm import BatchNorm


class ChannelwiseDense(nn.Module):
    """A fully connected layer of its own for each channel: kernel [C, h * w, h * w], bias [h * w, C]. It fixes the size of maps."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, h, w, C] -> [B, h, w, C]."""
        _, height, width, channels = x.shape
        places = height * width
        init = nn.initializers.variance_scaling(2.0, "fan_in", "normal", in_axis=1, out_axis=2, batch_axis=0)
        kernel = self.param("kernel", init, (channels, places, places), jnp.float32).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (places, channels), jnp.float32).astype(self.dtype)
        out = jnp.einsum("bnc,cnm->bmc", x.reshape(-1, places, channels).astype(self.dtype), kernel) + bias
        return out.reshape(x.shape)


class InpaintingDecoder(nn.Module):
    """`ChannelwiseDense`, a 1x1 convolution that mixes the channels, and transposed convolutions that double the size.

    Fields:
      widths: channels before each doubling; BatchNorm and ReLU follow all but the last one, which has 3 channels.
      dtype: of the computation; parameters, statistics and the picture are float32.
    """

    widths: tuple[int, ...] = (64, 32, 16)
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, size: Sequence[int], train: bool) -> jax.Array:
        """[B, h, w, C] -> [B, *size, 3], resized if h * 2^len(widths) is another size; about 0 at the start."""
        x = nn.relu(ChannelwiseDense(dtype=self.dtype, name="channelwise")(x))
        x = nn.relu(Conv(self.widths[0], (1, 1), dtype=self.dtype, name="mix")(x))
        for index, features in enumerate((*self.widths[1:], 3), 1):
            x = TransposedConv(features, 4, dtype=self.dtype, name=f"conv{index}")(shard_batch(x))
            if index < len(self.widths):
                x = BatchNorm(use_running_average=not train, relu=True, dtype=self.dtype, name=f"bn{index}")(x)
        x = x + self.param("bias", nn.initializers.zeros, (3,), jnp.float32)
        x = x.astype(jnp.float32)
        return x if x.shape[1:3] == tuple(size) else jax.image.resize(x, (len(x), *size, 3), "bilinear")

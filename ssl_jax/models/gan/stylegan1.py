"""StyleGAN (Karras et al. 2019, arXiv:1812.04948) at one fixed resolution.

There is no progressive growing: it needs one program and new Adam moments for each resolution, and StyleGAN2 trains better without
it. So there are no image heads at lower resolutions, which the published parameter counts include. Written from the paper and
published facts, without the authors' code. Channels as in `stylegan`; 16384 and 512 is the network of the paper.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssl_jax.errors import UserError
from ssl_jax.models.common import shard_batch
from ssl_jax.models.gan.stylegan import StyleGAN2
from ssl_jax.models.gan.stylegan_layers import (
    BLUR,
    EPSILON,
    ROOT2,
    EqualConv,
    EqualDense,
    leaky_relu,
    levels,
    minibatch_deviation,
    nearest,
    noises,
    smooth,
)


def instance_norm(x: jax.Array) -> jax.Array:
    """x [B, H, W, C] with mean 0 and variance 1 over the pixels of each channel of each example; computed in float32."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=(1, 2), keepdims=True)
    return (y * jax.lax.rsqrt(jnp.mean(y**2, axis=(1, 2), keepdims=True) + EPSILON)).astype(x.dtype)


class AdaptiveLayer(nn.Module):
    """Layers after each convolution: noise with a weight per channel (initially 0), bias, leaky ReLU, and the adaptive instance
    norm (equation 1 of the paper) with scale 1 + s(w)."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, w: jax.Array, noise: jax.Array | None) -> jax.Array:
        """x [B, H, W, C], w [B, D], noise [B, H, W, 1] or None -> [B, H, W, C]."""
        channels = x.shape[-1]
        strength = self.param("noise_strength", nn.initializers.zeros, (channels,), jnp.float32)
        if noise is not None:
            x = x + (strength * noise).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
        x = instance_norm(leaky_relu(x + bias.astype(self.dtype), gain=1))
        style = EqualDense(2 * channels, name="style")(w)[:, None, None].astype(self.dtype)
        return x * (1 + style[..., :channels]) + style[..., channels:]


class Synthesis(nn.Module):
    """Styles to images: a learned constant (initially 1), then two layers per resolution."""

    size: int
    channel_base: int = 16384
    channel_max: int = 512
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, ws: jax.Array, keys: jax.Array | None) -> jax.Array:
        """ws [B, layers, D], keys [B] -> float32 [B, R, R, 3]."""
        noise = noises(keys, [r for r in levels(self.size) for _ in range(2)])

        def adapt(x, index):
            return AdaptiveLayer(dtype=self.dtype, name=f"adapt{index}")(x, ws[:, index], noise[index])

        for number, r in enumerate(levels(self.size)):
            channels = min(self.channel_base // r, self.channel_max)
            if r == 4:
                x = self.param("constant", nn.initializers.ones, (4, 4, channels), jnp.float32)
                x = jnp.broadcast_to(x.astype(self.dtype), (len(ws), *x.shape))
            else:
                x = EqualConv(channels, gain=ROOT2, use_bias=False, dtype=self.dtype, name=f"block{r}_up")(nearest(x))
                x = smooth(x, BLUR, (1, 1))
            x = adapt(x, 2 * number)
            x = EqualConv(channels, gain=ROOT2, use_bias=False, dtype=self.dtype, name=f"block{r}")(x)
            x = shard_batch(adapt(x, 2 * number + 1))
        return EqualConv(3, 1, dtype=self.dtype, name="rgb")(x).astype(jnp.float32)


class StyleGAN1(StyleGAN2):
    """The generator, with the fields and methods of StyleGAN2."""

    channel_base: int = 16384

    synthesis_network = Synthesis


class StyleGAN1Discriminator(nn.Module):
    """Images to logits: StyleGAN2's discriminator without shortcuts, downsampling by a blur and 2x2 means.

    Fields: those of StyleGAN2Discriminator that apply.
    """

    size: int
    channel_base: int = 16384
    channel_max: int = 512
    group: int = 4
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, images: jax.Array, label: jax.Array | None = None, *, train: bool, score: bool = True
    ) -> tuple[jax.Array | None, dict]:
        """[B, R, R, 3] -> (logits [B], {'layer1' .. [B, h, w, C], 'pooled' [B, C]}); see StyleGAN2Discriminator."""
        if images.shape[1:3] != (self.size,) * 2:
            raise UserError(f"the discriminator is built for {self.size} pixels, the images have {images.shape[1:3]}; resize them")
        width = {r: min(self.channel_base // r, self.channel_max) for r in levels(self.size)}

        conv = functools.partial(EqualConv, gain=ROOT2, dtype=self.dtype)

        x = leaky_relu(conv(width[self.size], 1, name="rgb")(images), gain=1)
        out = {}
        for number, r in enumerate(reversed(levels(self.size)[1:]), start=1):
            x = smooth(leaky_relu(conv(width[r], name=f"block{r}")(x), gain=1), BLUR, (1, 1))
            x = nn.avg_pool(conv(width[r // 2], name=f"block{r}_down")(x), (2, 2), (2, 2))
            x = shard_batch(leaky_relu(x, gain=1))
            out[f"layer{number}"] = x
        x = x.astype(jnp.float32)
        out["pooled"] = jnp.mean(x, axis=(1, 2))
        if not score:
            return None, out
        x = minibatch_deviation(x, self.group)
        x = leaky_relu(EqualConv(width[4], gain=ROOT2, precision="highest", name="last")(x), gain=1)
        x = leaky_relu(EqualDense(width[4], gain=ROOT2, name="dense")(x.reshape(len(x), -1)), gain=1)
        return EqualDense(1, name="logits")(x)[:, 0], out

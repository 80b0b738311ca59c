"""StyleGAN2 (Karras et al. 2020a, arXiv:1912.04958), with the small-image networks of Karras et al. 2020b (arXiv:2006.06676).

Written from the papers and published facts, without the authors' code. Images are [B, R, R, 3] of about [-1, 1], R = 4, 8, 16, ...
Channels at resolution r are min(channel_base / r, channel_max). channel_base = 32768 and channel_max = 512 is configuration F at
1024 pixels; channel_base = 16384 is configuration E, and the half-width network at 256 pixels.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssl_jax.errors import UserError
from ssl_jax.models.common import shard_batch
from ssl_jax.models.gan.stylegan_layers import (
    EPSILON,
    ROOT2,
    EqualConv,
    EqualDense,
    Mapping,
    convolve,
    equalized,
    leaky_relu,
    levels,
    minibatch_deviation,
    noises,
    upsample,
    upsample_convolve,
)


def modulated_conv(x: jax.Array, kernel: jax.Array, style: jax.Array, up: bool = False, demodulate: bool = True) -> jax.Array:
    """Modulated convolution (section 2.2 of the paper).

    Each example scales the kernel's input channels by its style, then normalizes each output filter over space and input channels.

    This scales input and output instead of the kernel, which is equivalent and needs one kernel for the batch.

    Args:
        x: [B, H, W, C].
        kernel: [h, w, C, F] float32.
        style: [B, C] float32.
        up: double H and W (3x3 kernels).

    Returns [B, H, W, F] in the type of `x`; the norms are float32.
    """
    out = x * style.astype(x.dtype)[:, None, None, :]
    shared = kernel.astype(x.dtype)
    out = upsample_convolve(out, shared) if up else convolve(out, shared, padding=len(kernel) // 2)
    if demodulate:
        squares = jnp.matmul(style**2, jnp.sum(kernel**2, axis=(0, 1)), precision="highest")
        norm = jax.lax.rsqrt(squares + EPSILON)
        out = out * norm.astype(x.dtype)[:, None, None, :]
    return out


class _Modulated(nn.Module):
    """A modulated convolution, and the linear map from w to its style."""

    features: int
    size: int
    up: bool = False
    demodulate: bool = True
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, w: jax.Array) -> jax.Array:
        """x [B, H, W, C], w [B, D] -> [B, H, W, features] (twice H and W if `up`)."""
        channels = x.shape[-1]
        style = EqualDense(channels, bias_init=1.0, name="style")(w)
        kernel = self.param("kernel", nn.initializers.normal(1.0), (self.size, self.size, channels, self.features), jnp.float32)
        kernel = kernel * equalized(self.size**2 * channels)
        return modulated_conv(x.astype(self.dtype), kernel, style, self.up, self.demodulate)


class StyledLayer(nn.Module):
    """Modulated 3x3 convolution, noise with a learned strength (initially 0), bias, leaky ReLU."""

    features: int
    up: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, w: jax.Array, noise: jax.Array | None) -> jax.Array:
        """x [B, H, W, C], w [B, D], noise [B, H', W', 1] or None -> [B, H', W', features], twice H and W if `up`."""
        x = _Modulated(self.features, 3, self.up, dtype=self.dtype, name="conv")(x, w)
        strength = self.param("noise_strength", nn.initializers.zeros, (), jnp.float32)
        if noise is not None:
            x = x + (strength * noise).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        return leaky_relu(x + bias.astype(self.dtype))


class Synthesis(nn.Module):
    """Styles to images: a learned constant, two styled layers per resolution, and a sum of upsampled images (skip generator)."""

    size: int
    channel_base: int = 32768
    channel_max: int = 512
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, ws: jax.Array, keys: jax.Array | None) -> jax.Array:
        """ws [B, layers, D], keys [B] -> float32 [B, R, R, 3]. The image head of a resolution shares its w with the next layer."""
        index, image, sizes = 0, None, [r for r in levels(self.size) for _ in range(2)][1:]
        noise = noises(keys, sizes)
        for r in levels(self.size):
            channels = min(self.channel_base // r, self.channel_max)
            if r == 4:
                x = self.param("constant", nn.initializers.normal(1.0), (4, 4, channels), jnp.float32)
                x = jnp.broadcast_to(x.astype(self.dtype), (len(ws), *x.shape))
            else:
                x = StyledLayer(channels, up=True, dtype=self.dtype, name=f"block{r}_up")(x, ws[:, index], noise[index])
                index += 1
            x = StyledLayer(channels, dtype=self.dtype, name=f"block{r}")(x, ws[:, index], noise[index])
            index += 1
            x = shard_batch(x)
            colors = _Modulated(3, 1, demodulate=False, dtype=self.dtype, name=f"rgb{r}")(x, ws[:, index]).astype(jnp.float32)
            colors = colors + self.param(f"rgb{r}_bias", nn.initializers.zeros, (3,), jnp.float32)
            image = colors if image is None else upsample(image) + colors
        return image


class StyleGAN2(nn.Module):
    """The generator: `map`, then `synthesize`.

    Fields:
      size: of the images, a power of two from 4 up.
      features: size of w.
      mapping_layers: 8 by default; 2 in the published settings for small images.
      classes: number of classes; 0 for an unconditional generator.
      dtype: of the feature maps.
    """

    size: int
    channel_base: int = 32768
    channel_max: int = 512
    features: int = 512
    mapping_layers: int = 8
    classes: int = 0
    dtype: jnp.dtype = jnp.float32

    synthesis_network = Synthesis

    def setup(self):
        self.mapping = Mapping(self.features, self.mapping_layers, self.classes)
        self.synthesis = self.synthesis_network(self.size, self.channel_base, self.channel_max, self.dtype)

    @property
    def layers(self) -> int:
        """Number of styles w per image: 2 log2(size) - 2."""
        return 2 * len(levels(self.size))

    def map(self, z: jax.Array, label: jax.Array | None = None, *, train: bool) -> jax.Array:
        """z [N, Z], and label int [N] with classes -> w [N, D] float32, the same for all layers."""
        return self.mapping(z, label)

    def synthesize(self, ws: jax.Array, keys: jax.Array | None = None, *, train: bool) -> jax.Array:
        """ws [N, layers, D], noise keys [N] (None: no noise) -> images float32 [N, R, R, 3]."""
        return self.synthesis(ws, keys)

    def __call__(self, z, label=None, keys=None, *, train: bool) -> jax.Array:
        w = self.mapping(z, label)
        return self.synthesis(jnp.repeat(w[:, None], self.layers, axis=1), keys)


class StyleGAN2Discriminator(nn.Module):
    """Images to logits.

    Fields:
      residual: blocks with a downsampled shortcut and the sum divided by sqrt(2); False is the published CIFAR network.
      group: number of examples in a group of `minibatch_deviation`.
      classes: number of classes, or 0; the logit is then the product of the last features with a mapped label, over sqrt(D).
      dtype: of the feature maps; layers at 4 pixels are float32.
    """

    size: int
    channel_base: int = 32768
    channel_max: int = 512
    residual: bool = True
    group: int = 4
    classes: int = 0
    mapping_layers: int = 8
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, images: jax.Array, label: jax.Array | None = None, *, train: bool, score: bool = True
    ) -> tuple[jax.Array | None, dict]:
        """[B, R, R, 3] -> (logits [B], {'layer1' (after the first halving) .. [B, h, w, C], 'pooled' [B, C]}).

        'pooled' is the mean over space of the last layer before the minibatch deviation; it and the logits are float32. score=False
        leaves out the logits (None), and with them every dependence on other examples of the batch.
        """
        if images.shape[1:3] != (self.size,) * 2:
            raise UserError(f"the discriminator is built for {self.size} pixels, the images have {images.shape[1:3]}; resize them")
        width = {r: min(self.channel_base // r, self.channel_max) for r in levels(self.size)}
        x = shard_batch(leaky_relu(EqualConv(width[self.size], 1, dtype=self.dtype, name="rgb")(images)))
        out = {}
        for number, r in enumerate(reversed(levels(self.size)[1:]), start=1):
            y = shard_batch(leaky_relu(EqualConv(width[r], dtype=self.dtype, name=f"block{r}")(x)))
            y = leaky_relu(EqualConv(width[r // 2], down=True, dtype=self.dtype, name=f"block{r}_down")(y))
            if self.residual:
                shortcut = EqualConv(width[r // 2], 1, down=True, use_bias=False, dtype=self.dtype, name=f"block{r}_shortcut")
                y = (y + shortcut(x)) / ROOT2
            x = shard_batch(y)
            out[f"layer{number}"] = x
        x = x.astype(jnp.float32)
        out["pooled"] = jnp.mean(x, axis=(1, 2))
        if not score:
            return None, out
        x = shard_batch(minibatch_deviation(x, self.group))
        x = shard_batch(leaky_relu(EqualConv(width[4], precision="highest", name="last")(x)))
        x = shard_batch(leaky_relu(EqualDense(width[4], name="dense")(x.reshape(len(x), -1))))
        x = EqualDense(width[4] if self.classes else 1, name="logits")(x)
        if self.classes:
            mapped = Mapping(width[4], self.mapping_layers, self.classes, name="mapping")(None, label)
            x = jnp.sum(x * mapped, axis=-1, keepdims=True) / width[4] ** 0.5
        return x[:, 0], out

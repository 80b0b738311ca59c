"""Layers of StyleGAN 1 and 2: equalized learning rates, filters, the mapping network, noise, minibatch deviation.

Sources: Karras et al. 2018 (arXiv:1710.10196, section 4.1: equalized learning rate; section 3: minibatch deviation), Karras et al.
2019 (arXiv:1812.04948), Karras et al. 2020 (arXiv:1912.04958). Feature maps are [B, H, W, C]. Parameters, and results marked
float32, have that type for any `dtype`; their products are float32 in full precision on every accelerator.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssl_jax.errors import UserError
from ssl_jax.models.conv import LAYOUT, conv

SMOOTH = (1, 3, 3, 1)  # StyleGAN2's filter for changes of resolution
BLUR = (1, 2, 1)  # StyleGAN1's
EPSILON = 1e-8  # added under every square root
ROOT2 = 2**0.5


def levels(resolution: int) -> list[int]:
    """[4, 8, ..., resolution].

    Raises:
        UserError: the resolution is no power of two from 4 up.
    """
    if resolution < 4 or resolution & (resolution - 1):
        raise UserError(f"StyleGAN makes images of 4, 8, 16, ... pixels, not {resolution}; resize the data with config.data.ops")
    return [4 * 2**i for i in range(resolution.bit_length() - 2)]


def convolve(x: jax.Array, kernel: jax.Array, stride: int = 1, padding: int = 0, precision: str | None = None) -> jax.Array:
    """x [B, H, W, C] with kernel [k, k, C, F], padded by `padding` < k on every side; `precision` as in `jax.lax`."""
    return conv(
        x, kernel, (stride, stride), ((padding, padding),) * 2, lhs_dilation=(1, 1), rhs_dilation=(1, 1),
        dimension_numbers=jax.lax.conv_dimension_numbers(x.shape, kernel.shape, LAYOUT), feature_group_count=1,
        precision=precision,
    )  # fmt: skip


def smooth(x: jax.Array, taps: tuple[int, ...], padding: tuple[int, int], gain: float = 1.0) -> jax.Array:
    """Filter each channel with outer(taps, taps), scaled to the sum `gain`, with zero padding.

    H and W become H + sum(padding) - len(taps) + 1. Computed as sums of shifted maps, which XLA fuses into the next operation; a
    depthwise convolution is slow on CPUs.
    """
    weights = [tap * gain**0.5 / sum(taps) for tap in taps]
    for axis in (1, 2):
        width = [(0, 0)] * 4
        width[axis] = padding
        padded, size = jnp.pad(x, width), x.shape[axis] + sum(padding) - len(taps) + 1
        x = sum(w * jax.lax.slice_in_dim(padded, i, i + size, axis=axis) for i, w in enumerate(weights))
    return x


def interleave(phases: jax.Array) -> jax.Array:
    """Pixel shuffle: [B, H, W, 2, 2, C] -> [B, 2H, 2W, C]."""
    b, h, w, _, _, c = phases.shape
    return phases.transpose(0, 1, 3, 2, 4, 5).reshape(b, 2 * h, 2 * w, c)


def nearest(x: jax.Array) -> jax.Array:
    """Nearest-neighbor upsampling: [B, H, W, C] -> [B, 2H, 2W, C]."""
    b, h, w, c = x.shape
    return interleave(jnp.broadcast_to(x[:, :, :, None, None], (b, h, w, 2, 2, c)))


def upsample(x: jax.Array) -> jax.Array:
    """Insert zeros between pixels, then filter with `SMOOTH`: [B, H, W, C] -> [B, 2H, 2W, C].

    In each direction that is 3/4 of the nearest and 1/4 of the next pixel.
    """
    for axis in (1, 2):
        width = [(0, 0)] * 4
        width[axis] = (1, 1)
        padded, n = jnp.pad(x, width), x.shape[axis]
        before, after = (jax.lax.slice_in_dim(padded, i, i + n, axis=axis) for i in (0, 2))
        shape = list(x.shape)
        shape[axis] *= 2
        x = jnp.stack([0.25 * before + 0.75 * x, 0.75 * x + 0.25 * after], axis + 1).reshape(shape)
    return x


def downsample(x: jax.Array) -> jax.Array:
    """Filter with `SMOOTH`, then take every second pixel: [B, H, W, C] -> [B, H / 2, W / 2, C]."""
    return smooth(x, SMOOTH, (1, 1))[:, ::2, ::2]


def zero_insert_convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Insert zeros between pixels, then full convolution with a 3x3 `kernel`, and one more row and column of zeros:
    [B, 2H + 2, 2W + 2, F].

    Each of the four phases of the output uses a fixed subset of the kernel (in each direction k0 and k2, or k1). So the phases are
    features of one 2x2 convolution at the lower resolution.
    """
    order = jnp.array([0, 3, 2, 1])  # (tap, phase): x[m - 1] meets k0 at even positions, nothing at odd ones; x[m] meets k2, k1
    k = jnp.pad(kernel, ((0, 1), (0, 1), (0, 0), (0, 0)))[order][:, order]
    *_, c, f = k.shape
    k = k.reshape(2, 2, 2, 2, c, f).transpose(0, 2, 4, 1, 3, 5).reshape(2, 2, c, 4 * f)
    y = convolve(x, k, 1, 1)
    return interleave(y.reshape(*y.shape[:3], 2, 2, f))


def upsample_convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Insert zeros between pixels, convolve with a 3x3 `kernel`, filter with `SMOOTH`: [B, H, W, C] -> [B, 2H, 2W, F]."""
    return smooth(zero_insert_convolve(x, kernel), SMOOTH, (1, 0), gain=4)


def leaky_relu(x: jax.Array, gain: float = ROOT2) -> jax.Array:
    """Leaky ReLU of slope 0.2, times `gain`. StyleGAN2's sqrt(2) keeps the variance; StyleGAN1 scales the weights instead."""
    return gain * jax.nn.leaky_relu(x, 0.2)


def unit_second_moment(x: jax.Array) -> jax.Array:
    """x [N, D] float32 -> x scaled to length sqrt(D)."""
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + EPSILON)


def minibatch_deviation(x: jax.Array, group: int) -> jax.Array:
    """Append a channel, [B, H, W, C + 1]: the standard deviation over a group of examples, averaged over features and pixels.

    Groups are neighbors in the batch (0 .. G-1, G .. 2G-1, ...). So they never mix real and fake images, and stay on one device if
    G divides the examples per device. The published code groups examples B / G apart, which moves data between devices; in a
    shuffled batch both groupings have the same distribution. G is the largest divisor of B up to `group`.
    """
    size = next(g for g in range(min(group, len(x)), 0, -1) if len(x) % g == 0)
    grouped = x.astype(jnp.float32).reshape(-1, size, *x.shape[1:])
    deviation = jnp.sqrt(jnp.var(grouped, axis=1) + EPSILON).mean(axis=(1, 2, 3))  # one number for each group
    plane = jnp.broadcast_to(jnp.repeat(deviation, size)[:, None, None, None], (*x.shape[:3], 1))
    return jnp.concatenate([x, plane.astype(x.dtype)], axis=-1)


def noises(keys: jax.Array | None, sizes: Sequence[int]) -> list[jax.Array | None]:
    """Normal noise [B, r, r, 1] for each r in `sizes`, from one key for each example [B]; Nones without keys.

    One call of the random generator serves all layers, because each call takes long to compile.
    """
    if keys is None:
        return [None] * len(sizes)
    ends = list(itertools.accumulate(r * r for r in sizes))
    noise = jax.vmap(lambda key: jax.random.normal(key, (ends[-1],)))(keys)
    return [part.reshape(-1, r, r, 1) for part, r in zip(jnp.split(noise, ends[:-1], axis=1), sizes, strict=True)]


def equalized(fan_in: int, gain: float = 1.0) -> float:
    """Scale of a kernel stored as N(0, 1) at its use, so that Adam's relative steps are equal in all layers.

    Raises:
        UserError: a layer without inputs.
    """
    if not fan_in:
        raise UserError("config.model has a StyleGAN network with a layer without channels; give a larger channel_base")
    return gain / fan_in**0.5


class EqualDense(nn.Module):
    """x [..., C] -> [..., features] with equalized learning rate, in float32.

    The kernel is stored as N(0, 1 / lr_multiplier^2) and used times `gain * lr_multiplier / sqrt(C)`, the bias times lr_multiplier.
    """

    features: int
    gain: float = 1.0
    lr_multiplier: float = 1.0
    bias_init: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        normal = nn.initializers.normal(1 / self.lr_multiplier)
        kernel = self.param("kernel", normal, (x.shape[-1], self.features), jnp.float32)
        bias = self.param("bias", nn.initializers.constant(self.bias_init / self.lr_multiplier), (self.features,), jnp.float32)
        kernel = kernel * (equalized(x.shape[-1], self.gain) * self.lr_multiplier)
        return jnp.matmul(x.astype(jnp.float32), kernel, precision="highest") + bias * self.lr_multiplier


class EqualConv(nn.Module):
    """x [B, H, W, C] -> [B, H, W, features] with equalized learning rate; `down` halves H and W after `SMOOTH`.

    precision: that of the products; "highest" for layers that are float32 in every network.
    """

    features: int
    size: int = 3
    down: bool = False
    gain: float = 1.0
    use_bias: bool = True
    dtype: jnp.dtype = jnp.float32
    precision: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.normal(1.0), shape, jnp.float32)
        kernel = (kernel * equalized(self.size**2 * x.shape[-1], self.gain)).astype(self.dtype)
        x, pad = x.astype(self.dtype), self.size // 2
        if not self.down:
            x = convolve(x, kernel, padding=pad, precision=self.precision)
        elif self.size == 1:
            x = convolve(downsample(x), kernel, precision=self.precision)
        else:
            x = convolve(smooth(x, SMOOTH, (1 + pad, 1 + pad)), kernel, stride=2, precision=self.precision)
        if self.use_bias:
            x = x + self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32).astype(self.dtype)
        return x


class Mapping(nn.Module):
    """Latents (and labels) to styles: `layers` dense layers with a hundredth of the learning rate, in float32.

    Fields:
      features: width of w and of every layer.
      classes: number of classes, or 0; the label's embedding is normalized like z and concatenated to it.
    """

    features: int = 512
    layers: int = 8
    classes: int = 0
    lr_multiplier: float = 0.01

    @nn.compact
    def __call__(self, z: jax.Array | None, label: jax.Array | None = None) -> jax.Array:
        """z [N, D] (None: labels only), label int [N] -> w [N, features] float32."""
        parts = [] if z is None else [unit_second_moment(z.astype(jnp.float32))]
        if self.classes:
            one_hot = jax.nn.one_hot(label, self.classes, dtype=jnp.float32)
            parts.append(unit_second_moment(EqualDense(self.features, name="embed")(one_hot)))
        x = jnp.concatenate(parts, axis=-1)
        for i in range(self.layers):
            x = leaky_relu(EqualDense(self.features, lr_multiplier=self.lr_multiplier, name=f"dense{i}")(x))
        return x

"""What StyleGAN 1 and 2 are made of: equalized learning rates, filters, the mapping network, noise, minibatch deviation.

Sources: Karras et al. 2018 (arXiv:1710.10196, section 4.1: equalized learning rate; section 3: minibatch deviation), Karras et al. 2019
(arXiv:1812.04948), Karras et al. 2020 (arXiv:1912.04958). Feature maps are [B, H, W, C]; parameters and what is said to be are float32,
whatever `dtype` is.
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
EPSILON = 1e-8  # under every square root here
ROOT2 = 2**0.5


def levels(resolution: int) -> list[int]:
    """[4, 8, ..., resolution].

    Raises:
        UserError: the resolution is no power of two from 4 up.
    """
    if resolution < 4 or resolution & (resolution - 1):
        raise UserError(f"StyleGAN makes images of 4, 8, 16, ... pixels, not {resolution}; resize the data with config.data.ops")
    return [4 * 2**i for i in range(resolution.bit_length() - 2)]


def convolve(x: jax.Array, kernel: jax.Array, stride: int = 1, padding: int = 0) -> jax.Array:
    """x [B, H, W, C] with kernel [k, k, C, F], padded by `padding` < k on every side."""
    return conv(
        x, kernel, (stride, stride), ((padding, padding),) * 2, lhs_dilation=(1, 1), rhs_dilation=(1, 1),
        dimension_numbers=jax.lax.conv_dimension_numbers(x.shape, kernel.shape, LAYOUT), feature_group_count=1, precision=None,
    )  # fmt: skip


def smooth(x: jax.Array, taps: tuple[int, ...], padding: tuple[int, int], gain: float = 1.0) -> jax.Array:
    """Each channel filtered with outer(taps, taps) * gain / its sum, zeros around: H -> H + sum(padding) - len(taps) + 1.

    As sums of shifted maps: a depthwise convolution is slow on CPUs, and these are fused into what comes next.
    """
    weights = [tap * gain**0.5 / sum(taps) for tap in taps]
    for axis in (1, 2):
        width = [(0, 0)] * 4
        width[axis] = padding
        padded, size = jnp.pad(x, width), x.shape[axis] + sum(padding) - len(taps) + 1
        x = sum(w * jax.lax.slice_in_dim(padded, i, i + size, axis=axis) for i, w in enumerate(weights))
    return x


def interleave(phases: jax.Array) -> jax.Array:
    """[B, H, W, 2, 2, C], the four pixels of every cell -> [B, 2H, 2W, C]."""
    b, h, w, _, _, c = phases.shape
    return phases.transpose(0, 1, 3, 2, 4, 5).reshape(b, 2 * h, 2 * w, c)


def nearest(x: jax.Array) -> jax.Array:
    """Every pixel four times: [B, 2H, 2W, C]."""
    b, h, w, c = x.shape
    return interleave(jnp.broadcast_to(x[:, :, :, None, None], (b, h, w, 2, 2, c)))


def upsample(x: jax.Array) -> jax.Array:
    """Zeros between pixels, then `SMOOTH`: 1/4 of the neighbor and 3/4 of the nearest pixel, in both directions; [B, 2H, 2W, C]."""
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
    """`SMOOTH`, then every second pixel: [B, H / 2, W / 2, C]."""
    return smooth(x, SMOOTH, (1, 1))[:, ::2, ::2]


def spread_convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Zeros between pixels, then all places that a 3x3 `kernel` reaches, and a row and a column of zeros: [B, 2H + 2, 2W + 2, F].

    The kernel meets those zeros in a fixed pattern for each of the four phases of the output (in each direction k0, k2 or k1), so the
    four are features of one 2x2 convolution at the lower resolution.
    """
    order = jnp.array([0, 3, 2, 1])  # (tap, phase): x[m - 1] meets k0 in even places and nothing in odd ones; x[m] meets k2, k1
    k = jnp.pad(kernel, ((0, 1), (0, 1), (0, 0), (0, 0)))[order][:, order]
    *_, c, f = k.shape
    k = k.reshape(2, 2, 2, 2, c, f).transpose(0, 2, 4, 1, 3, 5).reshape(2, 2, c, 4 * f)
    y = convolve(x, k, 1, 1)
    return interleave(y.reshape(*y.shape[:3], 2, 2, f))


def upsample_convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Zeros between pixels, a 3x3 `kernel`, then `SMOOTH`: [B, 2H, 2W, F]."""
    return smooth(spread_convolve(x, kernel), SMOOTH, (1, 0), gain=4)


def leaky_relu(x: jax.Array, gain: float = ROOT2) -> jax.Array:
    """Slope 0.2, times `gain`: StyleGAN2's root of 2 keeps the variance of activations; StyleGAN1 has it in the weights."""
    return gain * jax.nn.leaky_relu(x, 0.2)


def unit_second_moment(x: jax.Array) -> jax.Array:
    """x [N, D] float32 -> the same directions, of length sqrt(D)."""
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + EPSILON)


def minibatch_deviation(x: jax.Array, group: int) -> jax.Array:
    """One more channel [B, H, W, C + 1]: the standard deviation over a group of examples, mean over features and places.

    Groups are neighbors in the batch (0 .. G-1, G .. 2G-1, ...), within one call and therefore never real with fake, and on one device
    if the examples of a device are a multiple of G. The published code takes examples B / G apart, for which every device
    needs those of the others; in a shuffled batch the two are equally distributed. G is the largest divisor of B up to `group`.
    """
    size = next(g for g in range(min(group, len(x)), 0, -1) if len(x) % g == 0)
    grouped = x.astype(jnp.float32).reshape(-1, size, *x.shape[1:])
    deviation = jnp.sqrt(jnp.var(grouped, axis=1) + EPSILON).mean(axis=(1, 2, 3))  # one number for each group
    plane = jnp.broadcast_to(jnp.repeat(deviation, size)[:, None, None, None], (*x.shape[:3], 1))
    return jnp.concatenate([x, plane.astype(x.dtype)], axis=-1)


def noises(keys: jax.Array | None, sizes: Sequence[int]) -> list[jax.Array | None]:
    """Normal noise [B, r, r, 1] for each r in `sizes`, from one key for each example: an image depends on its own key and on nobody
    else's. One draw for all layers, because calls of the generator take long to compile. None for None."""
    if keys is None:
        return [None] * len(sizes)
    ends = list(itertools.accumulate(r * r for r in sizes))
    drawn = jax.vmap(lambda key: jax.random.normal(key, (ends[-1],)))(keys)
    return [part.reshape(-1, r, r, 1) for part, r in zip(jnp.split(drawn, ends[:-1], axis=1), sizes, strict=True)]


def equalized(fan_in: int, gain: float = 1.0) -> float:
    """What a stored kernel ~ N(0, 1) is multiplied with where it is used, so that Adam's steps are alike in every layer."""
    return gain / fan_in**0.5


class EqualDense(nn.Module):
    """x [..., C] -> [..., features] with equalized learning rate.

    The kernel is stored as N(0, 1 / lr_multiplier^2) and used times `gain * lr_multiplier / sqrt(C)`, the bias times lr_multiplier.
    """

    features: int
    gain: float = 1.0
    lr_multiplier: float = 1.0
    bias_init: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        normal = nn.initializers.normal(1 / self.lr_multiplier)
        kernel = self.param("kernel", normal, (x.shape[-1], self.features), jnp.float32)
        bias = self.param("bias", nn.initializers.constant(self.bias_init / self.lr_multiplier), (self.features,), jnp.float32)
        kernel = kernel * (equalized(x.shape[-1], self.gain) * self.lr_multiplier)
        return x.astype(self.dtype) @ kernel.astype(self.dtype) + (bias * self.lr_multiplier).astype(self.dtype)


class EqualConv(nn.Module):
    """x [B, H, W, C] -> [B, H, W, features] with equalized learning rate; `down` halves H and W after `SMOOTH`."""

    features: int
    size: int = 3
    down: bool = False
    gain: float = 1.0
    use_bias: bool = True
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.normal(1.0), shape, jnp.float32)
        kernel = (kernel * equalized(self.size**2 * x.shape[-1], self.gain)).astype(self.dtype)
        x, pad = x.astype(self.dtype), self.size // 2
        if not self.down:
            x = convolve(x, kernel, padding=pad)
        elif self.size == 1:
            x = convolve(downsample(x), kernel)
        else:
            x = convolve(smooth(x, SMOOTH, (1 + pad, 1 + pad)), kernel, stride=2)
        if self.use_bias:
            x = x + self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32).astype(self.dtype)
        return x


class Mapping(nn.Module):
    """Latents (and labels) to styles: `layers` dense layers with a hundredth of the learning rate, in float32.

    Fields:
      features: of w and of every layer.
      classes: 0, or the number of classes: their embedding is normalized like z and joins it.
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

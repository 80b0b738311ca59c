"""Generators, encoders and joint discriminators of BiGAN (Donahue et al. 2017, arXiv:1605.09782, appendix C, and its code).

Encoder and discriminator each have a trunk: fully connected, strided convolutions, or AlexNet's. Generator and discriminator are
conditioned on the latent: before every normalization but the first, a linear map of the latent is added per channel. Only the
normalizations have biases; the fully connected ("permutation-invariant") networks normalize without scale and offset. Weights start
as N(0, 0.02). The discriminator's last layer starts at zero, so its first scores are exactly zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssl_jax.errors import UserError
from ssl_jax.models.build import build
from ssl_jax.models.common import Conv, shard_batch
from ssl_jax.models.gan.dcgan import TransposedConv
from ssl_jax.models.norm import BatchNorm
from ssl_jax.models.pool import max_pool

STD = 0.02
_init = nn.initializers.normal(STD)


def _dense(features: int, dtype, name: str, init=_init) -> nn.Dense:
    """float32 layers also multiply in float32; for lower types the precision has no meaning."""
    return nn.Dense(features, use_bias=False, kernel_init=init, dtype=dtype, precision="highest", name=name)


def _conditioned(h: jax.Array, z: jax.Array | None, std: float, dtype, name: str) -> jax.Array:
    """h [B, ..., C] plus a linear map of z [B, Z], whose weights start with standard deviation `std`."""
    if z is None:
        return h
    shift = _dense(h.shape[-1], dtype, name, nn.initializers.normal(std))(z)
    return h + shift.reshape(len(h), *(1,) * (h.ndim - 2), -1)


def _leaky(h: jax.Array) -> jax.Array:
    return shard_batch(nn.leaky_relu(h, 0.2))


class MLPTrunk(nn.Module):
    """Linear layers over flattened pixels; the first one is neither normalized nor conditioned on z."""

    widths: tuple[int, ...] = (1024, 1024)
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, z: jax.Array | None, train: bool) -> list[jax.Array]:
        """x [B, ...], z [B, Z] or None -> activations [B, widths[i]]."""
        h, out = x.reshape(x.shape[0], -1).astype(self.dtype), []
        for i, width in enumerate(self.widths, 1):
            h = _dense(width, self.dtype, f"linear{i}")(h)
            if i > 1:
                h = _conditioned(h, z, STD, self.dtype, f"condition{i}")
                h = _plain_norm(train, self.dtype, f"bn{i}")(h)
            h = _leaky(h)
            out.append(h)
        return out


class ConvTrunk(nn.Module):
    """Convolutions of stride 2; the first one is neither normalized nor conditioned on z.

    condition_std: standard deviation of the initial weights for z. With the published 0.02 x 25, z dominates the image forty times;
      use 0.02 for runs too short to correct that.
    """

    widths: tuple[int, ...] = (128, 256, 512, 1024)
    kernel: int = 5
    condition_std: float = STD * 25
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, z: jax.Array | None, train: bool) -> list[jax.Array]:
        """x [B, H, W, C], z [B, Z] or None -> maps [B, H / 2^i, W / 2^i, widths[i - 1]], i = 1, 2, ..., rounded up."""
        h, out = x.astype(self.dtype), []
        for i, width in enumerate(self.widths, 1):
            h = _conv(width, self.kernel, 2, 1, self.dtype, f"conv{i}")(h)
            if i > 1:
                h = _conditioned(h, z, self.condition_std, self.dtype, f"condition{i}")
                h = BatchNorm(use_running_average=not train, dtype=self.dtype, name=f"bn{i}")(h)
            h = _leaky(h)
            out.append(h)
        return out


class AlexNetTrunk(nn.Module):
    """conv1 to conv5 of AlexNet with groups and padded pools, without response normalization: the published ImageNet encoder."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, z: None, train: bool) -> list[jax.Array]:
        """x [B, H, W, 3] -> maps of conv1 (96 channels, H / 4), conv2 (256, H / 8), conv3, conv4 (384), conv5 (256, H / 16)."""
        h, out = x.astype(self.dtype), []
        layers = ((96, 11, 4, 1), (256, 5, 1, 2), (384, 3, 1, 1), (384, 3, 1, 2), (256, 3, 1, 2))  # width, kernel, stride, groups
        for i, (width, kernel, stride, groups) in enumerate(layers, 1):
            if i in (2, 3):
                h = max_pool(h, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
            h = _conv(width, kernel, stride, groups, self.dtype, f"conv{i}")(h)
            if i > 1:
                h = BatchNorm(use_running_average=not train, dtype=self.dtype, name=f"bn{i}")(h)
            h = _leaky(h)
            out.append(h)
        return out


class Encoder(nn.Module):
    """E: a trunk and a linear layer to the latent."""

    trunk: nn.Module
    latent: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> dict[str, jax.Array]:
        """x [B, ...] -> the trunk's 'layer1', ..., and float32 'pooled' [B, D], the last one's spatial mean, and 'latent' [B, Z]."""
        out = self.trunk(x, None, train)
        last = out[-1].astype(jnp.float32)
        return {
            **{f"layer{i}": h for i, h in enumerate(out, 1)},
            "pooled": last.mean(tuple(range(1, last.ndim - 1))),
            "latent": _dense(self.latent, jnp.float32, "latent")(last.reshape(last.shape[0], -1)),
        }


class JointDiscriminator(nn.Module):
    """D: a trunk over x, conditioned on z, and a linear layer that starts at zero."""

    trunk: nn.Module

    @nn.compact
    def __call__(self, x: jax.Array, z: jax.Array, train: bool) -> jax.Array:
        """x [B, ...], z [B, Z] -> logits [B] float32, positive for (x, E(x))."""
        h = self.trunk(x, z, train)[-1].astype(jnp.float32)
        return _dense(1, jnp.float32, "score", nn.initializers.zeros)(h.reshape(len(h), -1))[:, 0]


class MLPGenerator(nn.Module):
    """G of the permutation-invariant networks."""

    shape: tuple[int, int, int]
    widths: tuple[int, ...] = (1024, 1024)
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, z: jax.Array, train: bool) -> jax.Array:
        """z [B, Z] -> images [B, *shape] in [0, 1], float32."""
        h = z
        for i, width in enumerate(self.widths, 1):
            h = _dense(width, self.dtype, f"linear{i}")(h)
            h = _conditioned(h, z if i > 1 else None, STD, self.dtype, f"condition{i}")
            h = shard_batch(nn.relu(_plain_norm(train, self.dtype, f"bn{i}")(h)))
        h = _dense(math.prod(self.shape), self.dtype, "image")(h)
        return nn.sigmoid(h.astype(jnp.float32)).reshape(len(z), *self.shape)


class ConvGenerator(nn.Module):
    """G: a linear layer to a small map (normalized per unit, as in DCGAN), then transposed convolutions of stride 2.

    condition_std: see `ConvTrunk`; if z dominates, the first images have no spatial structure.

    Raises UserError if height and width in `shape` are no multiples of 2^len(widths).
    """

    shape: tuple[int, int, int]
    widths: tuple[int, ...] = (1024, 512, 256, 128)  # of the inputs of the transposed convolutions
    kernel: int = 5
    condition_std: float = STD * 25
    dtype: jnp.dtype = jnp.float32

    def __post_init__(self):
        if not self.widths or any(side % 2 ** len(self.widths) for side in self.shape[:2]):
            raise UserError(
                f"generator of shape {tuple(self.shape)} with widths {tuple(self.widths)}: height and width must be multiples of "
                f"{2 ** len(self.widths)}; give other widths or another shape"
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, z: jax.Array, train: bool) -> jax.Array:
        """z [B, Z] -> images [B, *shape] in [0, 1], float32."""
        *sides, channels = self.shape
        height, width = (side // 2 ** len(self.widths) for side in sides)
        h = _dense(height * width * self.widths[0], self.dtype, "linear")(z)
        h = BatchNorm(use_running_average=not train, dtype=self.dtype, name="bn0", relu=True)(h)
        h = shard_batch(h.reshape(len(z), height, width, self.widths[0]))
        for i, features in enumerate((*self.widths[1:], channels), 1):
            h = TransposedConv(features, self.kernel, dtype=self.dtype, name=f"conv{i}")(h)
            if i < len(self.widths):
                h = _conditioned(h, z, self.condition_std, self.dtype, f"condition{i}")
                h = BatchNorm(use_running_average=not train, dtype=self.dtype, name=f"bn{i}", relu=True)(h)
            h = shard_batch(h)
        return nn.sigmoid(h.astype(jnp.float32))


def _plain_norm(train: bool, dtype, name: str) -> nn.Module:
    return BatchNorm(use_running_average=not train, use_bias=False, use_scale=False, dtype=dtype, name=name)


def _conv(features, kernel, stride, groups, dtype, name):
    return Conv(
        features, (kernel, kernel), strides=stride, padding=kernel // 2, use_bias=False, feature_group_count=groups,
        kernel_init=_init, dtype=dtype, name=name,
    )  # fmt: skip


TRUNKS = {"mlp": MLPTrunk, "conv": ConvTrunk, "alexnet": AlexNetTrunk}
GENERATORS = {"mlp": MLPGenerator, "conv": ConvGenerator}


def build_nets(model: Mapping[str, Any], dtype: Any) -> tuple[nn.Module, nn.Module, nn.Module]:
    """(generator, encoder, discriminator) of a `config.model` with these keys: dict(name='conv', field=value, ...).

    The generator's `shape` is also that of the discriminator's images. Raises UserError for an unknown name or field.
    """
    generator = build(GENERATORS, "generator", model["generator"], dtype=dtype)
    encoder, discriminator = (build(TRUNKS, part, model[part], dtype=dtype) for part in ("encoder", "discriminator"))
    return generator, Encoder(encoder, model["latent"]["size"]), JointDiscriminator(discriminator)

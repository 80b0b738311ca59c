"""Heads that give each pixel a class, from the maps of an encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssl_jax.models.build import build
from ssl_jax.models.common import Conv
from ssl_jax.models.heads import LinearHead
from ssl_jax.models.hypercolumns import on_grid
from ssl_jax.models.norm import BatchNorm


def side_by_side(maps: Sequence[jax.Array]) -> jax.Array:
    """Maps [B, h, w, C] of any sizes -> [B, h, w, sum of C] at the size of the finest one, resized bilinearly."""
    finest = max(maps, key=lambda x: x.shape[1] * x.shape[2])
    return on_grid(maps, finest.shape[1:3]) if len(maps) > 1 else finest


def upsample(logits: jax.Array, size: tuple[int, int]) -> jax.Array:
    """[B, h, w, C] -> [B, *size, C], bilinearly; pixel i of n is at (i + 0.5) / n, and the outermost pixels are repeated."""
    return jax.image.resize(logits, (logits.shape[0], *size, logits.shape[-1]), "bilinear", antialias=False)


class LinearSegmenter(nn.Module):
    """BatchNorm, dropout of channels and a 1x1 convolution: DINOv2's linear head (Oquab et al. 2023, arXiv:2304.07193).

    Fields:
      dropout: share of the channels that are zero in an image of a training batch.
    """

    classes: int
    dropout: float = 0.1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, noise: jax.Array | None = None) -> jax.Array:
        """[B, h, w, C] -> logits [B, h, w, classes] float32, 0 at the start. `noise`: a key for the dropout; None drops nothing."""
        x = BatchNorm(use_running_average=not train, name="bn")(x)
        if noise is not None and self.dropout:
            kept = jax.random.bernoulli(noise, 1 - self.dropout, (x.shape[0], 1, 1, x.shape[-1]))
            x = jnp.where(kept, x / (1 - self.dropout), 0)
        return LinearHead(self.classes, name="classifier")(x)


class FcnHead(nn.Module):
    """3x3 convolutions with BatchNorm and ReLU, then a 1x1 convolution (Long et al. 2015, arXiv:1411.4038; MoCo's and mmselfsup's).

    Fields:
      channels: of the convolutions.
      depth: their number.
      dtype: of the convolutions; parameters, statistics and logits are float32.
    """

    classes: int
    channels: int = 256
    depth: int = 2
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, noise: jax.Array | None = None) -> jax.Array:
        """[B, h, w, C] -> logits [B, h, w, classes] float32, 0 at the start; `noise` is not used."""
        x = x.astype(self.dtype)
        for index in range(1, self.depth + 1):
            x = Conv(self.channels, (3, 3), use_bias=False, dtype=self.dtype, name=f"conv{index}")(x)
            x = BatchNorm(use_running_average=not train, relu=True, dtype=self.dtype, name=f"bn{index}")(x)
        return LinearHead(self.classes, name="classifier")(x)


HEADS = {"linear": LinearSegmenter, "fcn": FcnHead}


def build_head(spec: Mapping[str, Any], classes: int, dtype) -> nn.Module:
    """The head of `config.model.head`, dict(name='fcn', channels=256, ...). Raises UserError for an unknown name or field."""
    return build(HEADS, "head", spec, classes=classes, dtype=dtype)

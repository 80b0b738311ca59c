"""Reversible residual networks (Gomez et al. 2017, arXiv:1707.04585), in the form of Kolesnikov et al. 2019 (arXiv:1901.09005).

The channels form two halves (x1, x2). A unit outputs y = (x2, x1 + F(x2)), so its inverse is (y2 - F(y1), y1); two units are one
block of the first paper. F is the branch of a pre-activation bottleneck at half the width. Between groups, 2x2 pixels are averaged
and zeros double the channels, so only the pooling loses information.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssl_jax.errors import UserError
from ssl_jax.models.backbones.resnet import DEPTHS
from ssl_jax.models.common import Conv, shard_batch
from ssl_jax.models.norm import BatchNorm
from ssl_jax.models.pool import max_pool

_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class RevNet(nn.Module):
    """Images to feature maps; RevNet-50 with width 4 has 86 M parameters.

    Fields:
      depth: a key of DEPTHS, which sets the number of units per group; 50 is published. Units are bottlenecks at every depth.
      width: multiplies the channels of every layer (256 after the stem).
      stem: 'imagenet' is 7x7 stride 2 and a 3x3 max-pool; 'stride2' is one 3x3 stride 2, for thumbnails.
      remat: recompute the inside of every unit in the backward pass; memory then holds the units' outputs only.
      dtype: of the computation; parameters and statistics are float32.

    Raises UserError for impossible fields.
    """

    depth: int = 50
    width: float = 1.0
    stem: str = "imagenet"
    remat: bool = False
    dtype: jnp.dtype = jnp.float32

    def __post_init__(self):
        for field, value, valid in (("depth", self.depth, tuple(DEPTHS)), ("stem", self.stem, ("imagenet", "stride2"))):
            if value not in valid:
                raise UserError(f"revnet has no {field} {value!r}; choose one of {', '.join(map(str, valid))}")
        if self.width <= 0 or 256 * self.width % 8:
            raise UserError(f"revnet width {self.width} gives {256 * self.width} channels, no multiple of 8; take a multiple of 1/32")
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> dict[str, jax.Array]:
        """[B, H, W, 3] -> 'stem', 'layer1' .. 'layer4' [B, h, w, C] before the pooling of the next group, 'pooled' [B, D] float32.

        'pooled' is batch-normalized, without ReLU.
        """
        channels = round(256 * self.width)
        kernel = 7 if self.stem == "imagenet" else 3
        x = Conv(
            channels, (kernel, kernel), strides=2, padding=kernel // 2, use_bias=False, kernel_init=_init, dtype=self.dtype,
            name="stem_conv",
        )(images.astype(self.dtype))  # fmt: skip
        if self.stem == "imagenet":
            x = max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        out = {"stem": x}
        branch = nn.remat(Branch, static_argnums=(2,)) if self.remat else Branch
        for group, units in enumerate(DEPTHS[self.depth], 1):
            if group > 1:
                x = double(x)
            for index in range(units):
                x = couple(branch(x.shape[-1] // 2, self.dtype, name=f"layer{group}_{index}"), x, train)
                x = shard_batch(x)
            out[f"layer{group}"] = x
        x = BatchNorm(use_running_average=not train, dtype=self.dtype, name="bn")(x)
        out["pooled"] = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
        return out


class Branch(nn.Module):
    """F: normalization, ReLU and convolution, three times: 1x1 to a quarter of the channels, 3x3, 1x1 back."""

    channels: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[B, H, W, channels] -> the same shape."""
        inner = self.channels // 4
        for i, (features, kernel) in enumerate(((inner, 1), (inner, 3), (self.channels, 1)), 1):
            x = BatchNorm(use_running_average=not train, dtype=self.dtype, name=f"bn{i}", relu=True)(x)
            x = Conv(
                features, (kernel, kernel), padding=kernel // 2, use_bias=False, kernel_init=_init, dtype=self.dtype, name=f"conv{i}"
            )(x)
        return x


def couple(branch, x: jax.Array, *args) -> jax.Array:
    """A reversible unit on halves of the channels: (x1, x2) -> (x2, x1 + branch(x2, *args))."""
    x1, x2 = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([x2, x1 + branch(x2, *args)], axis=-1)


def double(x: jax.Array) -> jax.Array:
    """[B, H, W, C] -> [B, H / 2, W / 2, 2 C]: means of 2x2 pixels, padded with C / 2 zero channels on both sides."""
    half = x.shape[-1] // 2
    x = nn.avg_pool(x, (2, 2), (2, 2), padding="SAME", count_include_pad=False)
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (half, half)))

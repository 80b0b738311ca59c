"""Residual networks with pre-activation (He et al. 2016, arXiv:1603.05027), and the encoders of CPC.

CPC (van den Oord et al. 2018, arXiv:1807.03748) reads patches with the first three groups of a ResNet-v2-101 without
normalization: depth=101, groups=3, norm='none', last_norm=False. CPC v2 (Henaff et al. 2020, arXiv:1905.09272) has a larger third
group and layer normalization: depth=161, norm='layer', last_norm=False. With batch statistics the patches of a batch would tell
about each other.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssl_jax.errors import UserError
from ssl_jax.models.backbones.resnet import DEPTHS, STEMS, is_bottleneck
from ssl_jax.models.common import Conv, shard_batch
from ssl_jax.models.norm import BatchNorm
from ssl_jax.models.pool import max_pool

CPC_V2 = 161  # its third group has 46 blocks of 512 and 4096 channels
NORMS = ("batch", "layer", "none")

_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def group_sizes(depth: int) -> tuple[tuple[int, int, int], ...]:
    """(blocks, inner channels, output channels) of each group."""
    if depth == CPC_V2:
        return ((3, 64, 256), (4, 128, 512), (46, 512, 4096))
    expansion = 4 if is_bottleneck(depth) else 1
    return tuple((blocks, 64 * 2**i, 64 * 2**i * expansion) for i, blocks in enumerate(DEPTHS[depth]))


class ResNetV2(nn.Module):
    """Images to feature maps.

    Fields:
      depth: a key of `resnet.DEPTHS`, or 161 for CPC v2.
      width: multiplies the channels of every layer.
      stem: 'imagenet' is 7x7 stride 2 and a 3x3 max-pool; 'cifar' is 3x3 stride 1 and 'stride2' 3x3 stride 2, both without pool.
      norm: 'batch'; 'layer', which normalizes each image over space and channels, and scales every channel; or 'none', with biases
        in the convolutions and branches that start at zero, since their sum would double the variance in each block.
      groups: how many groups of blocks to keep, 0 for all.
      last_norm: normalization and ReLU after the last group. Without it the sum of the last block is the output.
      remat: recompute the inside of every block in the backward pass; memory then holds the outputs of blocks only.
      dtype: of the computation; parameters and statistics are float32.

    Raises UserError for impossible fields.
    """

    depth: int = 50
    width: float = 1.0
    stem: str = "imagenet"
    norm: str = "batch"
    groups: int = 0
    last_norm: bool = True
    remat: bool = False
    dtype: jnp.dtype = jnp.float32

    def __post_init__(self):
        for field, value, valid in (
            ("depth", self.depth, (*DEPTHS, CPC_V2)),
            ("stem", self.stem, STEMS),
            ("norm", self.norm, NORMS),
            ("groups", self.groups, range(len(group_sizes(self.depth)) + 1) if self.depth in (*DEPTHS, CPC_V2) else ()),
        ):
            if value not in valid:
                raise UserError(f"resnet_v2 has no {field} {value!r}; choose one of {', '.join(map(str, valid))}")
        if self.width <= 0 or 64 * self.width != round(64 * self.width):
            raise UserError(f"resnet_v2 width {self.width} gives {64 * self.width} channels; choose a multiple of 1/64")
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> dict[str, jax.Array]:
        """[B, H, W, C] -> 'stem' and sums 'layer1' .. [B, h, w, D] without ReLU, 'last' [B, h, w, D], 'pooled' [B, D] float32.

        'last' is the last sum after `last_norm`, and 'pooled' its mean.
        """
        kernel, stride = (7, 2) if self.stem == "imagenet" else (3, 2 if self.stem == "stride2" else 1)
        use_bias = self.norm == "none"
        x = images.astype(self.dtype)
        x = _conv(round(64 * self.width), kernel, stride, use_bias, _init, self.dtype, "stem_conv")(x)
        if self.stem == "imagenet":
            x = max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        out = {"stem": shard_batch(x)}
        block = nn.remat(Block, static_argnums=(2,)) if self.remat else Block
        sizes = group_sizes(self.depth)
        for group, (blocks, inner, outer) in enumerate(sizes[: self.groups or None], 1):
            for index in range(blocks):
                x = block(
                    round(inner * self.width),
                    round(outer * self.width),
                    stride=2 if group > 1 and index == 0 else 1,
                    bottleneck=is_bottleneck(self.depth),
                    norm=self.norm,
                    dtype=self.dtype,
                    name=f"layer{group}_{index}",
                )(x, train)
                x = shard_batch(x)
            out[f"layer{group}"] = x
        if self.last_norm:
            x = nn.relu(_normalize(x, self.norm, train, self.dtype, "norm"))
        return {**out, "last": x, "pooled": jnp.mean(x, axis=(1, 2), dtype=jnp.float32)}


class Block(nn.Module):
    """x + branch(x): normalization, ReLU and convolution, twice (3x3, 3x3) or three times (1x1, 3x3, 1x1 for bottlenecks).

    The first of a group also projects the shortcut, from its normalized input.
    """

    inner: int
    outer: int
    stride: int
    bottleneck: bool
    norm: str
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[B, H, W, C] -> [B, H / stride, W / stride, outer], rounded up."""
        use_bias = self.norm == "none"
        kernels = (1, 3, 1) if self.bottleneck else (3, 3)
        shortcut = x
        for index, kernel in enumerate(kernels, 1):
            last = index == len(kernels)
            x = nn.relu(_normalize(x, self.norm, train, self.dtype, f"norm{index}"))
            if index == 1 and (self.stride > 1 or shortcut.shape[-1] != self.outer):
                shortcut = _conv(self.outer, 1, self.stride, use_bias, _init, self.dtype, "shortcut_conv")(x)
            stride = self.stride if index == (2 if self.bottleneck else 1) else 1
            init = nn.initializers.zeros if last and self.norm == "none" else _init
            x = _conv(self.outer if last else self.inner, kernel, stride, use_bias, init, self.dtype, f"conv{index}")(x)
        return shortcut + x


def _conv(features, kernel, stride, use_bias, init, dtype, name):
    return Conv(
        features, (kernel, kernel), strides=stride, padding=kernel // 2, use_bias=use_bias, kernel_init=init, dtype=dtype, name=name
    )


def _normalize(x, norm, train, dtype, name):
    if norm == "batch":
        return BatchNorm(use_running_average=not train, dtype=dtype, name=name)(x)
    return nn.GroupNorm(num_groups=1, epsilon=1e-5, dtype=dtype, name=name)(x) if norm == "layer" else x

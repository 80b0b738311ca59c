"""Residual networks, in torchvision's and in SimCLR's flavor.

Sources: He et al. 2016 (arXiv:1512.03385) with the stride on the 3x3 convolution; SimCLR's variant and its selective
kernels (Li et al. 2019, arXiv:1903.06586, with the ResNet-D stem and shortcut of arXiv:1812.01187) follow
google-research/simclr.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssl_jax.errors import UserError
from ssl_jax.models.common import Conv, shard_batch
from ssl_jax.models.drop_path import drop_path
from ssl_jax.models.norm import BatchNorm
from ssl_jax.models.pool import max_pool

DEPTHS = {  # depth -> blocks per group; up to 34 the blocks are basic (two 3x3), beyond they are bottlenecks
    10: (1, 1, 1, 1),
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
}
STEMS = ("imagenet", "cifar", "stride2")
FLAVORS = ("torchvision", "simclr")
SK_RATIO, SK_MIN_CHANNELS = 0.0625, 32

KERNEL_INITS = {
    "torchvision": nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
    "simclr": nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal"),
}


def is_bottleneck(depth: int) -> bool:
    """Whether networks of this depth use bottleneck blocks, whose output has four times the channels."""
    return depth >= 50


class ResNet(nn.Module):
    """Images to feature maps.

    Fields:
      depth: a key of DEPTHS; 10 is for laptops.
      width: multiplies the channels of every layer (64 at the stem); 0.25 gives 16.
      stem: 'imagenet' is 7x7 stride 2 and a 3x3 max-pool; 'cifar' is 3x3 stride 1 without pool; 'stride2' is 3x3 stride 2
        without pool, for small images above CIFAR's size.
      flavor: 'simclr' projects the shortcut of every group's first block, even if shapes agree (group 1 of depths <= 34),
        pads the max-pool 'SAME' (at the end, for even sizes) and initializes with fan-in truncated normals;
        'torchvision' projects only if shapes differ, pads the pool by 1 on both sides and initializes with fan-out normals.
      sk: selective kernels with the ResNet-D stem and shortcut; bottlenecks in SimCLR's flavor only.
      zero_init_residual: the last scale of each block starts at zero, so blocks start as the identity.
      drop_path: stochastic depth in training (`models/drop_path.py`): the rate of the last block; rates rise linearly from 0.
      dtype: of the computation; parameters and statistics are float32.

    Raises UserError for impossible fields.
    """

    depth: int = 18
    width: float = 1.0
    stem: str = "imagenet"
    flavor: str = "torchvision"
    sk: bool = False
    zero_init_residual: bool = True
    drop_path: float = 0.0
    dtype: jnp.dtype = jnp.float32

    def __post_init__(self):
        for field, value, valid in (
            ("depth", self.depth, tuple(DEPTHS)),
            ("stem", self.stem, STEMS),
            ("flavor", self.flavor, FLAVORS),
        ):
            if value not in valid:
                raise UserError(f"resnet has no {field} {value!r}; choose one of {', '.join(map(str, valid))}")
        if self.width <= 0 or 64 * self.width != round(64 * self.width):
            raise UserError(f"resnet width {self.width} gives {64 * self.width} channels; choose a multiple of 1/64")
        if self.sk and (not is_bottleneck(self.depth) or self.flavor != "simclr"):
            raise UserError("resnet sk=True needs depth >= 50 and flavor='simclr'; set those or sk=False")
        if not 0 <= self.drop_path < 1:
            raise UserError(f"resnet drop_path {self.drop_path} is no rate; choose 0 or more and less than 1")
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> dict[str, jax.Array]:
        """[B, H, W, 3] -> 'stem' (input of group 1), 'layer1' .. 'layer4' [B, h, w, C], 'pooled' [B, D] float32."""
        channels = round(64 * self.width)
        x = self._stem(images.astype(self.dtype), channels, train)
        out, done, total = {"stem": x}, 0, sum(DEPTHS[self.depth])
        for group, blocks in enumerate(DEPTHS[self.depth], start=1):
            for index in range(blocks):
                x = Block(
                    channels * 2 ** (group - 1),
                    stride=2 if group > 1 and index == 0 else 1,
                    bottleneck=is_bottleneck(self.depth),
                    always_project=self.flavor == "simclr" and index == 0,
                    sk=self.sk,
                    zero_init_residual=self.zero_init_residual,
                    kernel_init=KERNEL_INITS[self.flavor],
                    drop_path=self.drop_path * done / (total - 1),
                    dtype=self.dtype,
                    name=f"layer{group}_{index}",
                )(x, train)
                done += 1
                x = shard_batch(x)
            out[f"layer{group}"] = x
        out["pooled"] = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
        return out

    def _stem(self, x, channels, train):
        def conv_bn_relu(x, features, kernel, stride, suffix):
            x = _conv(features, kernel, stride, KERNEL_INITS[self.flavor], self.dtype, f"stem_conv{suffix}")(x)
            return _norm(train, self.dtype, f"stem_bn{suffix}", relu=True)(x)

        if self.stem != "imagenet":
            return conv_bn_relu(x, channels, 3, 2 if self.stem == "stride2" else 1, "")
        if self.sk:
            x = conv_bn_relu(x, channels // 2, 3, 2, "_a")
            x = conv_bn_relu(x, channels // 2, 3, 1, "_b")
            x = conv_bn_relu(x, channels, 3, 1, "")
        else:
            x = conv_bn_relu(x, channels, 7, 2, "")
        return max_pool(x, (3, 3), (2, 2), padding="SAME" if self.flavor == "simclr" else ((1, 1), (1, 1)))


class Block(nn.Module):
    """One residual block: basic (3x3, 3x3) or bottleneck (1x1, 3x3, 1x1 to four times the channels).

    The shortcut is projected if its shape differs from the output's, or if `always_project`.
    """

    channels: int
    stride: int
    bottleneck: bool
    always_project: bool
    sk: bool
    zero_init_residual: bool
    kernel_init: nn.initializers.Initializer
    dtype: jnp.dtype
    drop_path: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[B, H, W, C] -> [B, H / stride, W / stride, channels (x 4 for bottlenecks)], rounded up."""
        last_scale = nn.initializers.zeros if self.zero_init_residual else nn.initializers.ones
        features = self.channels * (4 if self.bottleneck else 1)

        shortcut = x
        if self.always_project or self.stride > 1 or x.shape[-1] != features:
            stride = self.stride
            if self.sk:
                shortcut, stride = _average_pool(shortcut, stride), 1
            shortcut = self._conv(features, 1, stride, "shortcut_conv")(shortcut)
            shortcut = self._norm(train, "shortcut_bn")(shortcut)

        if self.bottleneck:
            x = self._norm(train, "bn1", relu=True)(self._conv(self.channels, 1, 1, "conv1")(x))
            if self.sk:
                x = self._selective_kernel(x, train)
            else:
                x = self._norm(train, "bn2", relu=True)(self._conv(self.channels, 3, self.stride, "conv2")(x))
            last, x = "bn3", self._conv(features, 1, 1, "conv3")(x)
        else:
            x = self._norm(train, "bn1", relu=True)(self._conv(self.channels, 3, self.stride, "conv1")(x))
            last, x = "bn2", self._conv(features, 3, 1, "conv2")(x)
        if train and self.drop_path and not self.is_initializing():
            x = self._norm(train, last, scale_init=last_scale)(x)
            return nn.relu(shortcut + drop_path(x, self.drop_path, self.make_rng("dropout")))
        return self._norm(train, last, scale_init=last_scale, relu=True)(x, shortcut)

    def _selective_kernel(self, x, train):
        """Two 3x3 streams, mixed per channel by a softmax of the global average of their sum."""
        x = self._norm(train, "bn2", relu=True)(self._conv(2 * self.channels, 3, self.stride, "conv2")(x))
        streams = jnp.stack(jnp.split(x, 2, axis=-1))  # [2, B, h, w, C]
        context = jnp.mean(streams.sum(0), axis=(1, 2), keepdims=True)
        squeezed = max(int(self.channels * SK_RATIO), SK_MIN_CHANNELS)
        context = self._norm(train, "sk_bn", relu=True)(self._conv(squeezed, 1, 1, "sk_squeeze")(context))
        logits = self._conv(2 * self.channels, 1, 1, "sk_mix")(context).astype(jnp.float32)
        weights = jax.nn.softmax(jnp.stack(jnp.split(logits, 2, axis=-1)), axis=0).astype(self.dtype)
        return (streams * weights).sum(0)

    def _conv(self, features, kernel, stride, name):
        return _conv(features, kernel, stride, self.kernel_init, self.dtype, name)

    def _norm(self, train, name, **fields):
        return _norm(train, self.dtype, name, **fields)


def _conv(features, kernel, stride, kernel_init, dtype, name):
    # Pads both sides equally; at stride 2 'SAME' would pad the end only.
    return Conv(
        features,
        (kernel, kernel),
        strides=stride,
        padding=kernel // 2,
        use_bias=False,
        kernel_init=kernel_init,
        dtype=dtype,
        name=name,
    )


def _norm(train, dtype, name, **fields):
    return BatchNorm(use_running_average=not train, dtype=dtype, name=name, **fields)


def _average_pool(x, stride):
    """2x2 average of the ResNet-D shortcut, padded by one zero at the end."""
    counted = stride > 1  # as in SimCLR's code: padding counts in the mean at stride 2 (odd sizes), not at stride 1
    return nn.avg_pool(x, (2, 2), (stride, stride), padding=((0, 1), (0, 1)), count_include_pad=counted)

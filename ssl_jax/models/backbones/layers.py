"""The layer of plain convolutional networks (AlexNet, Network in Network, VGG), and checks of their fields."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssl_jax.errors import UserError
from ssl_jax.models.common import Conv
from ssl_jax.models.norm import BatchNorm

kernel_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def conv_relu(
    x: jax.Array, features: int, kernel: int, *, name: str, train: bool, dtype: jnp.dtype, batch_norm: bool = True, stride: int = 1,
    padding: int | None = None, groups: int = 1,
) -> jax.Array:  # fmt: skip
    """Convolution, BatchNorm if `batch_norm`, ReLU: [B, H, W, C] -> [B, h, w, features]; for methods with `nn.compact`.

    The convolution `name` has a bias only without BatchNorm, which is `name`_bn. `padding` in pixels on all sides; None is kernel // 2.
    """
    x = Conv(
        features,
        (kernel, kernel),
        strides=stride,
        padding=kernel // 2 if padding is None else padding,
        feature_group_count=groups,
        use_bias=not batch_norm,
        kernel_init=kernel_init,
        dtype=dtype,
        name=name,
    )(x)
    if batch_norm:
        return BatchNorm(use_running_average=not train, relu=True, dtype=dtype, name=f"{name}_bn")(x)
    return nn.relu(x)


def require_size(x: jax.Array, least: int, network: str, images: jax.Array) -> None:
    """Raises UserError if maps [B, h, w, C] are smaller than the next window of `least` pixels."""
    if min(x.shape[1:3]) < least:
        height, width = images.shape[1:3]
        small = f"{max(x.shape[1], 0)}x{max(x.shape[2], 0)}"
        raise UserError(f"{network} shrinks images of {height}x{width} pixels to {small} before its end; use larger images")


def scaled(channels: tuple[int, ...], width: float, network: str, multiple: int = 1) -> tuple[int, ...]:
    """`channels` times `width`. Raises UserError unless all are positive multiples of `multiple`."""
    out = tuple(count * width for count in channels)
    wrong = [count for count in out if count <= 0 or count % multiple]
    if wrong:
        whole = f"multiple of {multiple}" if multiple > 1 else "whole number"
        raise UserError(f"{network} width {width} gives {wrong[0]:g} channels, no positive {whole}; choose another width, such as 0.5")
    return tuple(map(int, out))

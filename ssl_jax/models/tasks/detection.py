"""Detectors on the maps of a backbone: heat maps of centers, and FCOS on several strides. A pyramid joins the maps.

Lin et al. 2017 (arXiv:1612.03144) for the pyramid, Zhou et al. 2019 (arXiv:1904.07850) and Tian et al. 2019 (arXiv:1904.01355) for the
heads. BatchNorm after each convolution of the pyramid brings features of any scale to one scale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssl_jax.errors import UserError
from ssl_jax.models.common import Conv, shard_batch
from ssl_jax.models.norm import BatchNorm

GROUP = 8  # channels that are normalized together


def _prior(share: float):
    """The initial bias of logits whose probability is `share`, since most places are background."""
    return nn.initializers.constant(-math.log(1 / share - 1))


def _resize(x, shape):
    return x if x.shape[1:3] == tuple(shape) else jax.image.resize(x, (x.shape[0], *shape, x.shape[-1]), "bilinear")


def _conv_norm(x, width, kernel, name, train, dtype, relu=True):
    x = Conv(width, (kernel, kernel), use_bias=False, dtype=dtype, name=f"{name}_conv")(shard_batch(x))
    return BatchNorm(use_running_average=not train, relu=relu, dtype=dtype, name=f"{name}_norm")(x)


class Pyramid(nn.Module):
    """Maps from fine to coarse -> as many of `width` channels, each with what the coarser ones know."""

    width: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, maps: Sequence[jax.Array], train: bool) -> list[jax.Array]:
        """[[B, h, w, C], ...] -> [[B, h, w, width], ...]."""
        found, above = [], None
        for level, x in reversed(list(enumerate(maps))):
            x = _conv_norm(x, self.width, 1, f"lateral{level}", train, self.dtype, relu=False)
            above = x if above is None else x + _resize(above, x.shape[1:3])
            found.insert(0, _conv_norm(above, self.width, 3, f"out{level}", train, self.dtype))
        return found


class Points(nn.Module):
    """A heat map of the centers of each class, and for each place a size and an offset of the center in its cell.

    Fields:
      classes: number of classes.
      width: channels.
      stride: pixels of the image per cell. Coarser maps are doubled, each time followed by a convolution.
      dtype: of the computation; parameters, statistics and the output are float32.
    """

    classes: int
    width: int = 64
    stride: int = 4
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, maps: Sequence[jax.Array], size: tuple[int, int], train: bool) -> dict[str, jax.Array]:
        """[[B, h, w, C], ...] from fine to coarse -> {'heat': logits [B, H, W, classes], 'size' and 'offset': [B, H, W, 2], (y, x) in
        cells}. `size` is that of the images in pixels. Probabilities start at 0.1.

        Raises:
            UserError: the finest map is finer than `stride`.
        """
        shape = tuple(-(-side // self.stride) for side in size)
        finest = maps[0].shape[1:3]
        if finest[0] > shape[0] or finest[1] > shape[1]:
            raise UserError(f"config.model.head.stride={self.stride} makes a grid of {shape[0]} x {shape[1]} cells, and the finest of"
                            f" config.model.maps has {finest[0]} x {finest[1]}; give a smaller stride, or coarser maps")  # fmt: skip
        x, doubled = Pyramid(self.width, self.dtype, name="pyramid")(maps, train)[0], 0
        while x.shape[1:3] != shape:
            x = _resize(x, [min(2 * side, most) for side, most in zip(x.shape[1:3], shape, strict=True)])
            x, doubled = _conv_norm(x, self.width, 3, f"double{doubled}", train, self.dtype), doubled + 1
        found = {}
        for name, channels, bias in (("heat", self.classes, _prior(0.1)), ("size", 2, nn.initializers.zeros), ("offset", 2,
                                     nn.initializers.constant(0.5))):  # fmt: skip
            y = nn.relu(Conv(self.width, (3, 3), dtype=self.dtype, name=f"{name}_conv")(x))
            start = nn.initializers.normal(0.01)
            found[name] = Conv(channels, (1, 1), kernel_init=start, bias_init=bias, dtype=self.dtype, name=name)(y).astype(jnp.float32)
        return found


class Fcos(nn.Module):
    """Logits of each class and the distances to the sides of a box at each place of several maps, by the same two towers.

    Fields:
      classes: number of classes.
      width: channels, a multiple of 8.
      towers: convolutions of each tower, with group normalization and ReLU.
      dtype: of the computation; parameters, statistics and the output are float32.
    """

    classes: int
    width: int = 64
    towers: int = 2
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, maps: Sequence[jax.Array], size: tuple[int, int], train: bool) -> dict[str, jax.Array]:
        """[[B, h, w, C], ...] from fine to coarse -> {'class': logits [B, L, classes], 'distances': [B, L, 4] above 0, in cells}.

        The L places are those of all maps, one after the other. Probabilities start at 0.01. `size` changes nothing.

        Raises:
            UserError: `width` is no multiple of 8.
        """
        if self.width % GROUP:
            raise UserError(f"config.model.head.width={self.width} must be a multiple of {GROUP}, the channels normalized together")
        start, found = nn.initializers.normal(0.01), {}
        levels = Pyramid(self.width, self.dtype, name="pyramid")(maps, train)
        for name, channels, bias in (("class", self.classes, _prior(0.01)), ("distances", 4, nn.initializers.zeros)):
            tower = [Conv(self.width, (3, 3), dtype=self.dtype, kernel_init=start, name=f"{name}_conv{i}") for i in range(self.towers)]
            norms = [nn.GroupNorm(None, GROUP, dtype=self.dtype, name=f"{name}_norm{i}") for i in range(self.towers)]
            last, rows = Conv(channels, (3, 3), kernel_init=start, bias_init=bias, dtype=self.dtype, name=name), []
            for level, x in enumerate(levels):
                for conv, norm in zip(tower, norms, strict=True):
                    x = nn.relu(norm(conv(shard_batch(x))))
                y = last(x).astype(jnp.float32)
                if name == "distances":
                    y = jax.nn.softplus(y * self.param(f"scale{level}", nn.initializers.ones, (), jnp.float32))
                rows.append(y.reshape(y.shape[0], -1, channels))
            found[name] = jnp.concatenate(rows, 1)
        return found

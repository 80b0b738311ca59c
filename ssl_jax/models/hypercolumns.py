"""Hypercolumns: the activations of several layers above a pixel (Hariharan et al. 2015, arXiv:1411.5752).

Maps may have any sizes: each covers the whole image, and is read bilinearly at the same place. Colorization reads a few random
places (Larsson et al. 2016, arXiv:1603.06668) or a regular grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssl_jax.errors import UserError
from ssl_jax.models.common import Dense, shard_batch
from ssl_jax.models.heads import LinearHead


def read_maps(layers: Mapping[str, jax.Array], names: Sequence[str]) -> list[jax.Array]:
    """The layers [B, h, w, C] of an encoder by the names in config.model.maps. Raises UserError for a name that is no map."""
    maps = [name for name, x in layers.items() if x.ndim == 4]
    wrong = [name for name in names if name not in maps]
    if wrong:
        raise UserError(f"config.model.maps has {wrong[0]!r}, and the encoder has the maps {', '.join(maps) or 'none'}")
    return [layers[name] for name in names]


def at_points(maps: Sequence[jax.Array], points: jax.Array) -> jax.Array:
    """Maps [B, h, w, C] of any sizes -> [B, N, sum of C], read bilinearly at `points` [B, N, 2].

    A point is (row, column) in [0, 1], from the upper or left edge of the image to the other: pixel i of n is at (i + 0.5) / n.
    Within half a pixel of an edge the outermost pixel is repeated.
    """
    return jnp.concatenate([_bilinear(x, points) for x in maps], axis=-1)


def on_grid(maps: Sequence[jax.Array], size: tuple[int, int]) -> jax.Array:
    """Maps [B, h, w, C] of any sizes -> [B, *size, sum of C]: `at_points` for the pixel centers of a grid, without gathers."""
    grids = [jax.image.resize(x, (x.shape[0], *size, x.shape[-1]), "bilinear", antialias=False) for x in maps]
    return shard_batch(jnp.concatenate(grids, axis=-1))


def _bilinear(x, points):
    sides = jnp.array(x.shape[1:3], jnp.float32)
    place = jnp.clip(points.astype(jnp.float32) * sides - 0.5, 0, sides - 1)  # [B, N, 2]
    low = jnp.clip(jnp.floor(place), 0, jnp.maximum(sides - 2, 0))
    share, low = place - low, low.astype(jnp.int32)
    high = jnp.minimum(low + 1, jnp.array(x.shape[1:3]) - 1)

    def read(rows, columns):
        return jax.vmap(lambda x, rows, columns: x[rows, columns])(x, rows, columns)

    down, right = (share[..., i : i + 1].astype(x.dtype) for i in (0, 1))
    upper = (1 - right) * read(low[..., 0], low[..., 1]) + right * read(low[..., 0], high[..., 1])
    lower = (1 - right) * read(high[..., 0], low[..., 1]) + right * read(high[..., 0], high[..., 1])
    return (1 - down) * upper + down * lower


class HypercolumnHead(nn.Module):
    """Predictions for the pixels of a grid: the hypercolumn, a linear layer with ReLU, and a linear layer that starts at zero.

    Each map passes its part of the first layer before it is resized, which gives the same numbers as `on_grid` and one large layer,
    without the memory of a hypercolumn of thousands of channels.

    Fields:
      outputs: numbers per pixel, such as logits; 0 at the start, so a softmax starts uniform.
      width: of the hidden layer.
      dtype: of the hidden layer; parameters and outputs are float32.
    """

    outputs: int
    width: int = 128
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, maps: Sequence[jax.Array], size: tuple[int, int], train: bool = False) -> jax.Array:
        """Maps [B, h, w, C] of any sizes -> [B, *size, outputs], float32; `train` changes nothing."""
        total = self.param("bias", nn.initializers.zeros, (self.width,), jnp.float32).astype(self.dtype)
        channels = sum(x.shape[-1] for x in maps)
        for index, x in enumerate(maps, 1):
            init = nn.initializers.variance_scaling(2 * x.shape[-1] / channels, "fan_in", "normal")  # fan-in of the whole layer
            part = Dense(self.width, use_bias=False, kernel_init=init, dtype=self.dtype, name=f"map{index}")(x)
            total = total + jax.image.resize(part, (len(x), *size, self.width), "bilinear", antialias=False)
        return LinearHead(self.outputs, name="linear")(shard_batch(nn.relu(total)))

"""The decoder of masked autoencoders: a small ViT that sees codes of the visible patches and paints all."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax.models.backbones.vit import Block, sincos2d
from ssl_jax.models.common import Dense, shard_batch

_xavier = nn.initializers.xavier_uniform()


class MAEDecoder(nn.Module):
    """He et al. 2022 (arXiv:2111.06377), section 3: a linear map, mask tokens, fixed positions, blocks, a linear map to pixels.

    Fields:
      grid: rows and columns of patches. outputs: values of a patch.
      width, depth, heads: of the blocks, whose hidden layers are four times as wide.
    """

    grid: tuple[int, int]
    outputs: int
    width: int = 512
    depth: int = 8
    heads: int = 16
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array, order: jax.Array, visible: int, train: bool = False) -> jax.Array:
        """Codes [B, P + visible, D] of P extra tokens and the visible patches -> float32 [B, N, outputs] for all N patches.

        order: int32 [B, N], the numbers of the visible patches as they stand in `tokens`, then those of the others.
        """
        batch, count = order.shape
        prefix = tokens.shape[1] - visible
        x = Dense(self.width, kernel_init=_xavier, dtype=self.dtype, name="embed")(tokens)
        mask = self.param("mask_token", nn.initializers.normal(0.02), (1, 1, self.width)).astype(self.dtype)
        hidden = jnp.broadcast_to(mask, (batch, count - visible, self.width))
        patches = jnp.concatenate([x[:, prefix:], hidden], axis=1)
        patches = jnp.take_along_axis(patches, jnp.argsort(order, axis=1)[..., None], axis=1)  # back to their places
        positions = np.pad(sincos2d(self.grid, self.width), ((prefix, 0), (0, 0)))
        x = shard_batch(jnp.concatenate([x[:, :prefix], patches], axis=1) + positions.astype(self.dtype))
        for index in range(self.depth):
            x = shard_batch(Block(self.heads, 4 * self.width, self.dtype, name=f"block{index}")(x))
        x = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm")(x[:, prefix:])
        return Dense(self.outputs, kernel_init=_xavier, precision="highest", name="pixels")(x.astype(jnp.float32))

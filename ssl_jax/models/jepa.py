"""The predictor of I-JEPA: from codes of the context to codes of target blocks, by their positions."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssl_jax.models.backbones.vit import Block, sincos2d
from ssl_jax.models.common import Dense, shard_batch

_normal = nn.initializers.truncated_normal(0.02)


class JEPAPredictor(nn.Module):
    """Assran et al. 2023 (arXiv:2301.08243), section 3: a narrow ViT that sees the context, and a mask token with the position of each
    target patch. Each target block is a pass of its own.

    Fields:
      grid: rows and columns of patches. outputs: width of the codes.
      width, depth, heads: of the blocks, whose hidden layers are four times as wide.
    """

    grid: tuple[int, int]
    outputs: int
    width: int = 384
    depth: int = 12
    heads: int = 12
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, codes: jax.Array, places: jax.Array, targets: jax.Array, train: bool = False) -> jax.Array:
        """Codes [B, n, D] of the patches `places` [B, n] -> float32 [B, T, t, outputs] for the patches `targets` [B, T, t]."""
        batch, count, size = targets.shape
        positions = jnp.asarray(sincos2d(self.grid, self.width), self.dtype)
        x = Dense(self.width, kernel_init=_normal, dtype=self.dtype, name="embed")(codes) + positions[places]
        mask = self.param("mask_token", _normal, (1, 1, 1, self.width)).astype(self.dtype)
        queries = mask + positions[targets]
        x = jnp.broadcast_to(x[:, None], (batch, count, *x.shape[1:]))
        x = jnp.concatenate([x, queries], axis=2).reshape(batch * count, -1, self.width)
        for index in range(self.depth):
            x = shard_batch(Block(self.heads, 4 * self.width, self.dtype, name=f"block{index}")(x))
        x = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm")(x[:, -size:])
        x = Dense(self.outputs, kernel_init=_normal, precision="highest", name="codes")(x.astype(jnp.float32))
        return x.reshape(batch, count, size, -1)

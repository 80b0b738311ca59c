"""A fully connected encoder over flattened pixels."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssl_jax.errors import UserError
from ssl_jax.models.common import Dense, shard_batch
from ssl_jax.models.norm import BatchNorm


class MLP(nn.Module):
    """Flattened pixels to features: per width a linear layer, BatchNorm if `batch_norm`, and ReLU.

    Fields: `widths` of the layers, at least one; `dtype` of the computation (parameters are float32). Raises UserError without
      widths.
    """

    widths: tuple[int, ...] = (512, 512)
    batch_norm: bool = True
    dtype: jnp.dtype = jnp.float32

    def __post_init__(self):
        if not self.widths or min(self.widths) < 1:
            raise UserError(f"mlp widths {tuple(self.widths)} are not valid; give one or more positive widths")
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> dict[str, jax.Array]:
        """[B, H, W, C] -> 'layer1' .. [B, widths[i]] after the ReLU, and 'pooled', the last one in float32."""
        x = images.reshape(images.shape[0], -1).astype(self.dtype)
        out = {}
        for index, width in enumerate(self.widths, start=1):
            x = Dense(width, use_bias=not self.batch_norm, dtype=self.dtype, name=f"linear{index}")(x)
            if self.batch_norm:
                x = BatchNorm(use_running_average=not train, dtype=self.dtype, name=f"bn{index}")(x)
            x = shard_batch(nn.relu(x))
            out[f"layer{index}"] = x
        out["pooled"] = x.astype(jnp.float32)
        return out

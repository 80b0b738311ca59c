"""The context network of CPC v2 (Henaff et al. 2020, arXiv:1905.09272, appendix A.2), which reads a grid of patches row by row."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssl_jax.errors import UserError
from ssl_jax.models.common import Conv, shard_batch


class ContextNet(nn.Module):
    """Latents of patches to contexts, each from its own row and the rows above.

    Block: 1x1 convolution to `channels`, ReLU, 1x3, 2x1 with a row of zeros on top, ReLU, 1x1 back, added to the input. A context
    depends on as many rows above its own, and columns on either side, as there are blocks. Other directions turn the grid.

    Fields: `channels` inside the blocks; `blocks`, 5 in the paper, at least 1; `dtype` of the computation (parameters and the output
      are float32). Raises UserError for fields below 1.
    """

    channels: int = 256
    blocks: int = 5
    dtype: jnp.dtype = jnp.float32

    def __post_init__(self):
        if min(self.channels, self.blocks) < 1:
            raise UserError(f"context network with channels={self.channels}, blocks={self.blocks} is empty; give 1 or more of both")
        super().__post_init__()

    @nn.compact
    def __call__(self, latents: jax.Array, train: bool = False) -> jax.Array:
        """[B, rows, columns, D] -> contexts [B, rows, columns, D] float32, after a ReLU; `train` changes nothing."""
        x = latents.astype(self.dtype)
        for block in range(self.blocks):

            def conv(x, features, kernel, padding, name, block=block):
                return Conv(features, kernel, padding=padding, dtype=self.dtype, name=f"block{block}_{name}")(x)

            y = nn.relu(conv(x, self.channels, (1, 1), "VALID", "in"))
            y = conv(y, self.channels, (1, 3), "SAME", "row")
            y = nn.relu(conv(y, self.channels, (2, 1), ((1, 0), (0, 0)), "above"))  # at the bottom it would see the future
            x = shard_batch(x + conv(y, x.shape[-1], (1, 1), "VALID", "out"))
        return nn.relu(x).astype(jnp.float32)

"""Network in Network (Lin et al. 2014, arXiv:1312.4400) as RotNet uses it on CIFAR-10 (Gidaris et al. 2018, arXiv:1803.07728)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssl_jax.errors import UserError
from ssl_jax.models.backbones.layers import conv_relu, require_size, scaled
from ssl_jax.models.common import shard_batch
from ssl_jax.models.pool import max_pool

LEAST, MOST = 3, 5  # published numbers of blocks


class NIN(nn.Module):
    """Images of 32 pixels to feature maps: blocks of one spatial and two 1x1 convolutions, each with BatchNorm and ReLU.

    Block 1 has 5x5 kernels, 192, 160 and 96 channels and a 3x3 max-pool of stride 2; block 2 has 5x5 kernels, 192 channels and an
    average pool of the same size, which counts its padding; the others have 3x3 kernels, 192 channels and no pool.

    Fields: `blocks`, 3 to 5; `width` multiplies all channels, 0.25 for laptops; `dtype` of the computation (parameters and
      statistics are float32). Raises UserError for impossible fields.
    """

    blocks: int = 4
    width: float = 1.0
    dtype: jnp.dtype = jnp.float32

    def __post_init__(self):
        if self.blocks not in range(LEAST, MOST + 1):
            raise UserError(f"nin has no form with {self.blocks} blocks; choose {LEAST} to {MOST}")
        scaled((192, 160, 96), self.width, "nin")
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> dict[str, jax.Array]:
        """[B, H, W, C] -> 'block1' .. [B, h, w, D] with the pool of the block, at half, a quarter, .. of the side; 'pooled' [B, D]."""
        options = dict(train=train, dtype=self.dtype)
        out, x = {}, images.astype(self.dtype)
        for block in range(1, self.blocks + 1):
            channels = scaled((192, 160, 96) if block == 1 else (192,) * 3, self.width, "nin")
            for index, features in enumerate(channels, 1):
                kernel = 1 if index > 1 else 5 if block < 3 else 3
                x = conv_relu(x, features, kernel, name=f"block{block}_conv{index}", **options)
            if block < 3:
                require_size(x, 2, "nin", images)
                pool = max_pool if block == 1 else nn.avg_pool
                x = pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
            out[f"block{block}"] = x = shard_batch(x)
        return {**out, "pooled": jnp.mean(x, axis=(1, 2), dtype=jnp.float32)}

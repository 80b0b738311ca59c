"""The Transformer tokenizer of ViT-VQGAN (Yu et al. 2022, arXiv:2110.04627, section 3.1 and table 2).

Encoder and decoder are Transformer blocks of `vit` with a learned embedding for each position of the grid. A hidden layer with tanh
follows the blocks. Both have the interface in `vqvae`.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssl_jax.errors import UserError
from ssl_jax.models.backbones.vit import REMATS, Block, Size
from ssl_jax.models.common import Dense, shard_batch

xavier = nn.initializers.xavier_uniform()

SIZES = {
    "patches": Size(64, 0, 1, 256),  # no blocks: each code depends on its own patch only, like a palette
    "mu": Size(32, 1, 2, 64),  # for tests
    "tiny": Size(128, 2, 4, 512),  # for minutes on a CPU
    "mini": Size(192, 4, 3, 768),  # for images of 32 pixels
    "small": Size(512, 8, 8, 2048),
    "base": Size(768, 12, 12, 3072),
    "large": Size(1280, 32, 16, 5120),
}


def _check(size: str, remat: str) -> Size:
    if size not in SIZES:
        raise UserError(f"a ViT-VQGAN has no size {size!r}; choose {', '.join(SIZES)}")
    if remat not in REMATS:
        raise UserError(f"a ViT-VQGAN has no remat {remat!r}; choose {', '.join(REMATS)}")
    return SIZES[size]


class Trunk(nn.Module):
    """Position embeddings, blocks and a final normalization."""

    size: str
    remat: str
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        """[B, h, w, D] -> (output, [output of each block]), all [B, h, w, D]."""
        size, shape = SIZES[self.size], x.shape
        positions = self.param("positions", nn.initializers.normal(0.02), shape[1:], jnp.float32)
        x = shard_batch((x + positions.astype(self.dtype)).reshape(shape[0], -1, size.width))
        block = Block if self.remat == "none" else nn.remat(Block, policy=REMATS[self.remat])
        out = []
        for index in range(size.depth):
            x = shard_batch(block(size.heads, size.hidden, self.dtype, name=f"block{index}")(x))
            out.append(x.reshape(shape))
        x = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm")(x)
        return x.reshape(shape), out


class ViTEncoder(nn.Module):
    """Images to vectors (interface: see `vqvae`).

    Fields:
      dim: of the codes.
      size: key of SIZES. patch: its side in pixels.
      norm: LayerNorm without scale on the output; it keeps vectors that the quantizer normalizes away from zero.
      remat: key of `vit.REMATS`: trades recomputation for memory.
    """

    dim: int
    size: str = "small"
    patch: int = 8
    norm: bool = True
    remat: str = "none"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> dict[str, jax.Array]:
        size = _check(self.size, self.remat)
        if x.shape[1] % self.patch or x.shape[2] % self.patch:
            raise UserError(f"patches of {self.patch} pixels do not tile images of {x.shape[1]} x {x.shape[2]}; change one")
        rows, columns = x.shape[1] // self.patch, x.shape[2] // self.patch
        x = x.reshape(x.shape[0], rows, self.patch, columns, self.patch, -1).transpose(0, 1, 3, 2, 4, 5)
        x = x.reshape(x.shape[0], rows, columns, -1).astype(self.dtype)
        x = Dense(size.width, kernel_init=xavier, dtype=self.dtype, name="patch_embed")(x)
        x, blocks = Trunk(self.size, self.remat, self.dtype, name="trunk")(x)
        out = {f"layer{i}": block for i, block in enumerate(blocks, 1)}
        x = jnp.tanh(Dense(size.hidden, kernel_init=xavier, dtype=self.dtype, name="tanh")(x))
        out["features"] = shard_batch(Dense(size.width, kernel_init=xavier, dtype=self.dtype, name="features")(x))
        z = Dense(self.dim, kernel_init=xavier, precision="highest", name="to_code")(out["features"].astype(jnp.float32))
        out["out"] = nn.LayerNorm(epsilon=1e-6, use_scale=False, name="norm")(z) if self.norm else z
        return out


class ViTDecoder(nn.Module):
    """Mirror of the encoder, with its fields; no activation on the pixels."""

    channels: int
    size: str = "small"
    patch: int = 8
    remat: str = "none"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, codes: jax.Array, train: bool) -> jax.Array:
        size = _check(self.size, self.remat)
        x = Dense(size.width, kernel_init=xavier, dtype=self.dtype, name="of_code")(codes)
        x, _ = Trunk(self.size, self.remat, self.dtype, name="trunk")(x)
        x = jnp.tanh(Dense(size.hidden, kernel_init=xavier, dtype=self.dtype, name="tanh")(x))
        x = Dense(self.patch**2 * self.channels, kernel_init=xavier, dtype=self.dtype, name="head")(x).astype(jnp.float32)
        batch, rows, columns, _ = x.shape
        x = x.reshape(batch, rows, columns, self.patch, self.patch, self.channels).transpose(0, 1, 3, 2, 4, 5)
        return shard_batch(x.reshape(batch, rows * self.patch, columns * self.patch, self.channels))

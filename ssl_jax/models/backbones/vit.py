"""Vision Transformers with pre-normalization.

Sources: Dosovitskiy et al. 2021 (arXiv:2010.11929); sizes H from there and g from Zhai et al. 2022 (arXiv:2106.04560);
registers from Darcet et al. 2024 (arXiv:2309.16588); fixed positions in the layout of MAE and MoCo v3; LayerScale from Touvron et al.
2021 (arXiv:2103.17239) and gated MLPs from Shazeer 2020 (arXiv:2002.05202), as DINOv2 has them.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax.errors import UserError
from ssl_jax.models.activations import gelu
from ssl_jax.models.common import Conv, Dense, attention, shard_batch
from ssl_jax.models.drop_path import drop_path, rates


class Size(NamedTuple):
    width: int
    depth: int
    heads: int
    hidden: int  # of the MLP


SIZES = {
    "mu": Size(32, 1, 2, 128),  # for tests
    "mini": Size(96, 4, 3, 384),  # for minutes on a CPU
    "Ti": Size(192, 12, 3, 768),
    "S": Size(384, 12, 6, 1536),
    "S12": Size(384, 12, 12, 1536),  # the ViT-S of MoCo v3, whose heads have half the width
    "B": Size(768, 12, 12, 3072),
    "L": Size(1024, 24, 16, 4096),
    "H": Size(1280, 32, 16, 5120),
    "g": Size(1408, 40, 16, 6144),
    "g2": Size(1536, 40, 24, 4096),  # the giant of DINOv2, with mlp='swiglu'
}
POOLS = ("cls", "gap")
POSITIONS = ("learned", "sincos2d")
MLPS = ("gelu", "swiglu")
REMATS = {  # the activations of each block to keep for the backward pass
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}

# 'tensor' shards attention heads and MLP channels; 'fsdp' shards the other side of each matrix. Rules count dimensions from the
# last, so that they also fit stacked blocks.
TENSOR_RULES = (
    (r"block(s|\d+)/attention/qkv/kernel", ("fsdp", "tensor")),
    (r"block(s|\d+)/attention/qkv/bias", ("tensor",)),
    (r"block(s|\d+)/attention/proj/kernel", ("tensor", "fsdp")),
    (r"block(s|\d+)/mlp/fc1/kernel", ("fsdp", "tensor")),
    (r"block(s|\d+)/mlp/fc1/bias", ("tensor",)),
    (r"block(s|\d+)/mlp/fc2/kernel", ("tensor", "fsdp")),
)

_xavier = nn.initializers.xavier_uniform()
_normal = nn.initializers.normal(0.02)


def parse_variant(variant: str) -> tuple[Size, int]:
    """'S/16' -> (its Size, patch size 16). Raises UserError for anything else."""
    match = re.fullmatch(r"(\w+)/([1-9]\d*)", str(variant))
    if not match or match[1] not in SIZES:
        raise UserError(f"vit has no variant {variant!r}; write SIZE/PATCH like 'S/16', sizes are {', '.join(SIZES)}")
    return SIZES[match[1]], int(match[2])


class ViT(nn.Module):
    """Images to tokens.

    Fields:
      variant: 'SIZE/PATCH', a key of SIZES and the patch side in pixels.
      pool: 'cls' prepends a class token and returns it; 'gap' averages the patch tokens.
      registers: number of extra tokens, which the output drops. With registers, only patches have positions.
      position: 'learned' for the image size at initialization, with bicubic interpolation for other sizes; or fixed 'sincos2d'.
      layer_scale: initial value of a learned factor of each channel, at the end of each branch; None: no factors.
      mlp: 'gelu'; or 'swiglu', whose first layer is twice as wide and gates its second half by SiLU of the first.
      remat: a key of REMATS; trades recomputation for memory.
      scan: loop over the blocks, which compiles as fast as a single block. Parameters are then 'blocks/...' with a leading axis of
        depth instead of 'block0/...' (see `stack`, `unstack`), so per-array optimizer rules such as LARS's trust ratio see all
        blocks as one array. Without `remat` a loop keeps more activations than separate blocks.
      drop_path: stochastic depth in training (`models/drop_path.py`): the rate of the last block; rates rise linearly from 0.
      dtype: of the computation; parameters are float32.

    Raises UserError for impossible fields and for images that patches do not tile.
    """

    variant: str = "S/16"
    pool: str = "cls"
    registers: int = 0
    position: str = "learned"
    layer_scale: float | None = None
    mlp: str = "gelu"
    remat: str = "none"
    scan: bool = False
    drop_path: float = 0.0
    dtype: jnp.dtype = jnp.float32

    def __post_init__(self):
        parse_variant(self.variant)
        for field, value, valid in (
            ("pool", self.pool, POOLS),
            ("position", self.position, POSITIONS),
            ("mlp", self.mlp, MLPS),
            ("remat", self.remat, tuple(REMATS)),
        ):
            if value not in valid:
                raise UserError(f"vit has no {field} {value!r}; choose one of {', '.join(valid)}")
        if self.registers < 0:
            raise UserError(f"vit registers {self.registers} is negative; choose 0 or more")
        if not 0 <= self.drop_path < 1:
            raise UserError(f"vit drop_path {self.drop_path} is no rate; choose 0 or more and less than 1")
        super().__post_init__()

    @nn.compact
    def __call__(
        self, images: jax.Array, train: bool = False, visible: jax.Array | None = None, masked: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """[B, H, W, 3] -> features; `train` matters with `drop_path` only, since there are no batch statistics.

        visible: int32 [B, n], numbers of the patches that the blocks see, row by row; None: all. Then N counts these, and there is no
          'patches'.
        masked: bool [B, h * w], patches in whose place there is a learned token, with their positions; None: there is no such token.

        'block0', ...: [B, N, D], outputs of the blocks; the N tokens are class token (if any), registers, patches.
        'tokens': [B, N, D] after the final normalization; 'patches': [B, h, w, D], its patch tokens on their grid.
        'pooled': [B, D] float32.
        """
        size, patch = parse_variant(self.variant)
        batch, height, width, _ = images.shape
        if height % patch or width % patch:
            raise UserError(f"vit {self.variant} cannot tile {height}x{width} images; use multiples of {patch} pixels")
        grid = (height // patch, width // patch)

        x = Conv(
            size.width,
            (patch, patch),
            strides=patch,
            padding="VALID",
            kernel_init=_patch_init,
            dtype=self.dtype,
            name="patch_embed",
        )(images.astype(self.dtype))
        x = x.reshape(batch, grid[0] * grid[1], size.width)
        if masked is not None:
            x = jnp.where(masked[..., None], self.param("mask_token", _normal, (1, 1, size.width)).astype(self.dtype), x)

        prefix = [("cls_token", 1)] * (self.pool == "cls") + [("registers", self.registers)] * (self.registers > 0)
        tokens = [
            jnp.broadcast_to(
                self.param(name, _normal, (1, count, size.width)).astype(self.dtype), (batch, count, size.width)
            )
            for name, count in prefix
        ]
        positions = self._positions(grid, size.width).astype(self.dtype)
        of_tokens = positions.shape[1] - x.shape[1]  # a class token has a position, unless there are registers
        x = x + positions[:, of_tokens:]
        tokens = [tokens[0] + positions[:, :1], *tokens[1:]] if of_tokens else tokens
        if visible is not None:
            x = jnp.take_along_axis(x, visible[..., None], axis=1)
        x = shard_batch(jnp.concatenate([*tokens, x], axis=1))

        dropped = train and self.drop_path > 0 and not self.is_initializing()
        x, outputs = self._blocks(x, size, rates(self.drop_path, size.depth) if dropped else None)
        out = {f"block{index}": outputs[index] for index in range(size.depth)}
        x = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm")(x)
        patches = x[:, sum(count for _, count in prefix) :]
        out["tokens"] = x
        if visible is None:
            out["patches"] = patches.reshape(batch, *grid, size.width)
        out["pooled"] = x[:, 0].astype(jnp.float32) if self.pool == "cls" else patches.mean(axis=1, dtype=jnp.float32)
        return out

    def _blocks(self, x, size, dropped):
        """[B, N, D], rates [depth] or None -> (output [B, N, D], outputs of the blocks: a list, or [depth, B, N, D])."""
        block = Block if self.remat == "none" else nn.remat(Block, policy=REMATS[self.remat], prevent_cse=not self.scan)
        fields = (size.heads, size.hidden, self.dtype, self.layer_scale, self.mlp)
        if not self.scan:
            outputs = []
            for index in range(size.depth):
                rate = None if dropped is None else dropped[index]
                x = shard_batch(block(*fields, name=f"block{index}")(x, rate))
                outputs.append(x)
            return x, outputs

        def step(block, x, rate):
            x = shard_batch(block(x, rate))
            return x, x

        looped = nn.scan(step, variable_axes={"params": 0}, split_rngs={"params": True, "dropout": True}, length=size.depth)
        return looped(block(*fields, name="blocks"), x, dropped)

    def _positions(self, grid, width):
        """[1, N, D], with a row for the class token if there is one and no registers."""
        prefix = 1 if self.pool == "cls" and not self.registers else 0
        if self.position == "sincos2d":
            return jnp.asarray(np.pad(sincos2d(grid, width), ((prefix, 0), (0, 0)))[None])
        rows = prefix + grid[0] * grid[1]
        if self.is_initializing():
            return self.param("pos_embed", _normal, (1, rows, width))
        table = self.get_variable("params", "pos_embed")
        if table.shape[1] == rows:
            return table
        return jnp.concatenate([table[:, :prefix], resize_positions(table[:, prefix:], grid)], axis=1)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); with `layer_scale` each summand is scaled by channel."""

    heads: int
    hidden: int
    dtype: jnp.dtype
    layer_scale: float | None = None
    mlp: str = "gelu"

    @nn.compact
    def __call__(self, x: jax.Array, rate: jax.Array | None = None) -> jax.Array:
        """[B, N, D] -> [B, N, D]; both branches are dropped with probability `rate`, or never."""
        y = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm1")(x)
        x = x + self._branch(Attention(self.heads, self.dtype, name="attention")(y), "ls1", rate)
        y = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm2")(x)
        return x + self._branch(Mlp(self.hidden, self.dtype, self.mlp, name="mlp")(y), "ls2", rate)

    def _branch(self, x, name, rate):
        """What is added to the input: scaled if there is LayerScale, dropped if there is a rate."""
        x = x if self.layer_scale is None else LayerScale(self.layer_scale, name=name)(x)
        return x if rate is None else drop_path(x, rate, self.make_rng("dropout"))


class LayerScale(nn.Module):
    """A learned factor of each channel."""

    start: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D]."""
        return x * self.param("gamma", nn.initializers.constant(self.start), (x.shape[-1],)).astype(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention.

    The columns of the joint projection are ordered (head, q|k|v, channel), so that sharding them over 'tensor' shards the heads.
    """

    heads: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, N, D] -> [B, N, D]."""
        batch, length, width = x.shape
        qkv = Dense(3 * width, kernel_init=_qkv_init, dtype=self.dtype, name="qkv")(x)
        qkv = qkv.reshape(batch, length, self.heads, 3, width // self.heads)
        x = attention(qkv[..., 0, :], qkv[..., 1, :], qkv[..., 2, :])
        x = x.reshape(batch, length, width)
        return Dense(width, kernel_init=_xavier, dtype=self.dtype, name="proj")(x)


class Mlp(nn.Module):
    """Two linear layers with the exact GELU between them, or a gate: SiLU of the first half of the channels times the second."""

    hidden: int
    dtype: jnp.dtype
    kind: str = "gelu"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, N, D] -> [B, N, D]."""
        gated = self.kind == "swiglu"
        y = Dense(2 * self.hidden if gated else self.hidden, kernel_init=_xavier, dtype=self.dtype, name="fc1")(x)
        y = nn.silu(y[..., : self.hidden]) * y[..., self.hidden :] if gated else gelu(y)
        return Dense(x.shape[-1], kernel_init=_xavier, dtype=self.dtype, name="fc2")(y)


def unstack(params: dict) -> dict:
    """Convert parameters of a ViT from scan=True to scan=False: 'blocks/...' [depth, ...] -> 'block0/...', 'block1/...'."""
    rest, blocks = {name: tree for name, tree in params.items() if name != "blocks"}, params["blocks"]
    depth = len(jax.tree.leaves(blocks)[0])
    return rest | {f"block{index}": jax.tree.map(lambda x, index=index: x[index], blocks) for index in range(depth)}


def stack(params: dict) -> dict:
    """Inverse of `unstack`, in NumPy."""
    names = sorted((name for name in params if re.fullmatch(r"block\d+", name)), key=lambda name: int(name.removeprefix("block")))
    blocks = jax.tree.map(lambda *leaves: np.stack(leaves), *(params[name] for name in names))
    return {name: tree for name, tree in params.items() if name not in names} | {"blocks": blocks}


def sincos2d(grid: tuple[int, int], width: int) -> np.ndarray:
    """Fixed positions [rows * columns, width] float32: (sin column, cos column, sin row, cos row), a quarter of the width each.

    Frequency k is 10000^(-k / (width / 4)), as in MAE and MoCo v3; big_vision divides by width / 4 - 1 instead.
    Raises UserError if the width is no multiple of 4.
    """
    if width % 4:
        raise UserError(f"sincos2d positions need a width that is a multiple of 4, not {width}")
    frequency = 10000.0 ** (-np.arange(width // 4) / (width / 4))
    row, column = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij")
    angles = [position.reshape(-1, 1) * frequency for position in (column, row)]
    return np.concatenate([f(angle) for angle in angles for f in (np.sin, np.cos)], axis=1).astype(np.float32)


def resize_positions(table, grid):
    """[1, n, D] learned on a square grid -> [1, rows * columns, D], bicubic with antialiasing."""
    side = math.isqrt(table.shape[1])
    if side * side != table.shape[1]:
        raise UserError(f"{table.shape[1]} learned positions form no square; use the image size they were trained with")
    table = table.reshape(1, side, side, -1)
    table = jax.image.resize(table, (1, *grid, table.shape[-1]), "cubic")
    return table.reshape(1, grid[0] * grid[1], -1)


def _patch_init(key, shape, dtype=jnp.float32):
    """Xavier for a flattened patch: fan-in is the number of its values, fan-out the width."""
    return _xavier(key, (math.prod(shape[:-1]), shape[-1]), dtype).reshape(shape)


def _qkv_init(key, shape, dtype=jnp.float32):
    """Xavier for each of the three square matrices, not for the joint one."""
    bound = math.sqrt(6 / (shape[0] + shape[1] // 3))
    return jax.random.uniform(key, shape, dtype, -bound, bound)

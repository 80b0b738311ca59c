"""The tokenizer that a prior stands on: a finished run whose functions are called with its frozen weights."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ssl_jax.errors import UserError


class FrozenTokenizer(NamedTuple):
    """`weights` is {'params': ..., 'mutable': ...} everywhere.

    fns: what the method that made it offers (`engine.method.ModelFns`): `tokens`, `decode` and `codebook`.
    size: height and width of the images that become tokens.
    """

    fns: Any
    size: tuple[int, int]

    def tokens(self, weights: Any, images: jax.Array) -> jax.Array:
        """[B, H, W, 3] uint8 or in [0, 1] -> int32 [B, T] in raster order."""
        tokens = self.fns.tokens(weights["params"], weights["mutable"], images)
        return tokens.reshape(tokens.shape[0], math.prod(tokens.shape[1:]))

    def pictures(self, weights: Any, tokens: jax.Array) -> jax.Array:
        """int32 [B, T] -> float32 [B, h, w, 3] in [0, 1]."""
        return self.fns.decode(weights["params"], weights["mutable"], tokens.reshape(tokens.shape[0], *self.grid(weights)))

    def grid(self, weights: Any) -> tuple[int, int]:
        """Rows and columns of tokens; nothing is computed."""
        images = jax.ShapeDtypeStruct((1, *self.size, 3), jnp.float32)
        return jax.eval_shape(self.fns.tokens, weights["params"], weights["mutable"], images).shape[1:]

    def shape(self, weights: Any) -> tuple[int, int]:
        """(size of the codebook, number of tokens of an image); nothing is computed."""
        codes = jax.eval_shape(self.fns.codebook, weights["params"], weights["mutable"]).shape[0]
        return codes, math.prod(self.grid(weights))


def open_tokenizer(fns: Any, size: tuple[int, int], trained: tuple[int, int]) -> FrozenTokenizer:
    """`size`: of the images to come; `trained`: of those that it was made with, pixels both.

    Raises UserError unless the functions are those of a tokenizer, and the sizes are the same.
    """
    missing = [name for name in ("codebook", "decode", "tokens") if getattr(fns, name) is None]
    if missing:
        raise UserError(f"config.stages.tokenizer: its method gives no {missing[0]}; give a run of configs/vit_vqgan.py")
    if size != trained:
        raise UserError(
            f"config.stages.tokenizer was trained on images of {trained[0]} x {trained[1]} pixels, another size than the {size[0]} x "
            f"{size[1]} of these views; set config.data.ops, eval_ops and config.views as in its run, or give another tokenizer"
        )
    return FrozenTokenizer(fns, size)

"""The frozen tokenizer of a prior: functions of an earlier run, called with its weights."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ssl_jax.errors import UserError


class FrozenTokenizer(NamedTuple):
    """Functions of `weights` = {'params': ..., 'mutable': ...}."""

    fns: Any  # the tokenizer's `engine.method.ModelFns`, with `tokens`, `decode` and `codebook`
    size: tuple[int, int]  # height and width in pixels of the images to tokenize

    def tokens(self, weights: Any, images: jax.Array) -> jax.Array:
        """[B, H, W, 3] uint8 or in [0, 1] -> int32 [B, T] in raster order."""
        tokens = self.fns.tokens(weights["params"], weights["mutable"], images)
        return tokens.reshape(tokens.shape[0], math.prod(tokens.shape[1:]))

    def decode(self, weights: Any, tokens: jax.Array) -> jax.Array:
        """int32 [B, T] -> float32 [B, h, w, 3] in [0, 1]."""
        return self.fns.decode(weights["params"], weights["mutable"], tokens.reshape(tokens.shape[0], *self.grid(weights)))

    def grid(self, weights: Any) -> tuple[int, int]:
        """Rows and columns of tokens, by `jax.eval_shape`."""
        images = jax.ShapeDtypeStruct((1, *self.size, 3), jnp.float32)
        return jax.eval_shape(self.fns.tokens, weights["params"], weights["mutable"], images).shape[1:]

    def shape(self, weights: Any) -> tuple[int, int]:
        """(codebook size, tokens per image), by `jax.eval_shape`."""
        codes = jax.eval_shape(self.fns.codebook, weights["params"], weights["mutable"]).shape[0]
        return codes, math.prod(self.grid(weights))


def open_tokenizer(fns: Any, size: tuple[int, int], trained: tuple[int, int]) -> FrozenTokenizer:
    """Check and wrap a tokenizer for images of `size` (height, width), which was trained on images of size `trained`.

    Raises UserError if `fns` lack a function of a tokenizer, or if the sizes differ.
    """
    missing = [name for name in ("codebook", "decode", "tokens") if getattr(fns, name) is None]
    if missing:
        raise UserError(f"config.stages.tokenizer: its method has no function {missing[0]!r}; give a run of configs/vit_vqgan.py")
    if size != trained:
        raise UserError(
            f"config.stages.tokenizer was trained on images of {trained[0]} x {trained[1]} pixels, but these views have "
            f"{size[0]} x {size[1]}; set config.data.ops, eval_ops and config.views as in its run, or give another tokenizer"
        )
    return FrozenTokenizer(fns, size)

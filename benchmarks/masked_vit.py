"""A masked autoencoder on a Vision Transformer, as a `Method`: a workload for `accelerator.py`, not a recipe.

The encoder sees a quarter of the patches, a narrow decoder predicts the normalized pixels of the others (He et al. 2022,
arXiv:2111.06377, section 3). Positions are fixed.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax.augment.pixels import to_input
from ssl_jax.augment.views import make_views
from ssl_jax.engine.method import Method, Phase, Spec
from ssl_jax.models.backbones.vit import Block, parse_variant, sincos2d
from ssl_jax.models.common import create, run

KEPT = 0.25  # share of the patches
DECODER = dict(depth=8, width=512, heads=16)
SMALL = dict(depth=1, width=16, heads=2)  # for the ViT's size 'mu'


def decoder_of(variant: str) -> dict:
    return SMALL if variant.startswith("mu") else DECODER


class MaskedViT(nn.Module):
    variant: str
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, patches: jax.Array, order: jax.Array, train: bool) -> jax.Array:
        """patches [B, N, 3 P^2], order int32 [B, N], a permutation whose first quarter is seen -> pixels [B, N, 3 P^2] float32."""
        size, _ = parse_variant(self.variant)
        decoder, (batch, count, inputs) = decoder_of(self.variant), patches.shape
        grid, kept = (int(count**0.5),) * 2, int(KEPT * count)
        x = nn.Dense(size.width, dtype=self.dtype, name="embed")(patches) + _positions(grid, size.width, self.dtype)
        x = jnp.take_along_axis(x, order[:, :kept, None], axis=1)
        x = jnp.concatenate([self._row("cls", size.width, batch, 1), x], axis=1)
        for index in range(size.depth):
            x = Block(size.heads, size.hidden, self.dtype, name=f"block{index}")(x)
        x = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm")(x)

        width = decoder["width"]
        x = nn.Dense(width, dtype=self.dtype, name="decoder_embed")(x)
        shuffled = jnp.concatenate([x[:, 1:], self._row("mask", width, batch, count - kept)], axis=1)
        places = jnp.take_along_axis(shuffled, jnp.argsort(order, axis=1)[:, :, None], axis=1)
        x = jnp.concatenate([x[:, :1], places + _positions(grid, width, self.dtype)], axis=1)
        for index in range(decoder["depth"]):
            x = Block(decoder["heads"], 4 * width, self.dtype, name=f"decoder_block{index}")(x)
        x = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="decoder_norm")(x)
        return nn.Dense(inputs, dtype=self.dtype, name="pixels")(x[:, 1:]).astype(jnp.float32)

    def _row(self, name, width, batch, count):
        row = self.param(name, nn.initializers.normal(0.02), (1, 1, width)).astype(self.dtype)
        return jnp.broadcast_to(row, (batch, count, width))


def _positions(grid, width, dtype):
    return jnp.asarray(np.asarray(sincos2d(grid, width))[None], dtype)


def build(config) -> Method:
    """`config.model`: encoder.variant, mean and std."""
    variant, views = config.model.encoder.variant, make_views(config.views)
    patch = parse_variant(variant)[1]
    model = MaskedViT(variant, jnp.dtype(config.dtype))

    def patches(images, key):
        x = to_input(views(images, key)[:, 0], config.model.mean, config.model.std)
        b, h, w, _ = x.shape
        x = x.reshape(b, h // patch, patch, w // patch, patch, 3).swapaxes(2, 3)
        return x.reshape(b, h * w // patch**2, 3 * patch**2)

    def init(key, batch, frozen):
        x = patches(batch["image"], key)
        params, _ = create(model, key, x, jnp.zeros(x.shape[:2], jnp.int32))
        return {"net": params}, {}

    def loss(train, state, batch, key):
        x = patches(batch["image"], key)
        order = jnp.argsort(jax.random.uniform(key, x.shape[:2]), axis=1)
        predicted, _ = run(model, train["net"], {}, x, order, train=True)
        target = (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-6)
        hidden = jnp.argsort(order, axis=1) >= int(KEPT * x.shape[1])
        return jnp.sum(jnp.mean((predicted - target) ** 2, axis=-1) * hidden) / hidden.sum(), ({}, {})

    def encode(params, mutable, images):
        raise NotImplementedError("a workload for benchmarks")  # a Method needs the field; only the step is timed

    inputs = {"image": Spec(tuple(config.data.image_shape))}
    return Method(inputs=inputs, init=init, phases=(Phase("mae", ("net",), loss),), encode=encode, views=views)

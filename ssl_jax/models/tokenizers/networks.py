"""Encoders, decoders and discriminators of tokenizers, by the names in a config."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax

from ssl_jax.errors import UserError
from ssl_jax.models.build import build
from ssl_jax.models.gan.stylegan import StyleGAN2Discriminator
from ssl_jax.models.tokenizers.vit_vqgan import ViTDecoder, ViTEncoder
from ssl_jax.models.tokenizers.vqgan import PatchDiscriminator, VQGANDecoder, VQGANEncoder
from ssl_jax.models.tokenizers.vqvae import ResidualDecoder, ResidualEncoder

ENCODERS = {"residual": ResidualEncoder, "vqgan": VQGANEncoder, "vit": ViTEncoder}
DECODERS = {"residual": ResidualDecoder, "vqgan": VQGANDecoder, "vit": ViTDecoder}
DISCRIMINATORS = {
    "stylegan2": functools.partial(StyleGAN2Discriminator, group=1),  # by default without minibatch deviation
    "patch": PatchDiscriminator,
}


def build_encoder(spec: Mapping[str, Any], dim: int, dtype: str) -> nn.Module:
    """The encoder of dict(name='vit', field=value, ...) to vectors of `dim`. Raises UserError for an unknown name or field."""
    return build(ENCODERS, "encoder", spec, dim=dim, dtype=dtype)


def build_decoder(spec: Mapping[str, Any], channels: int, dtype: str) -> nn.Module:
    """The decoder of dict(name='vit', field=value, ...) to `channels` channels. Raises UserError for an unknown name or field."""
    return build(DECODERS, "decoder", spec, channels=channels, dtype=dtype)


def build_discriminator(spec: Mapping[str, Any], size: int, dtype: str) -> nn.Module:
    """A discriminator from images [B, size, size, 3] of about [-1, 1] to (logits [B] or [B, h, w], features)."""
    return build(DISCRIMINATORS, "discriminator", spec, size=size, resolution=size, dtype=dtype)


def check_decoder(decode: Callable[[jax.Array], jax.Array], codes: jax.Array, images: jax.Array) -> None:
    """Raises UserError unless `decode` makes images of the size of `images` from the encoder's `codes`. Computes nothing."""
    made = jax.eval_shape(decode, codes).shape
    if made[1:3] != images.shape[1:3]:
        raise UserError(
            f"config.model.decoder makes images of {made[1]} x {made[2]} pixels from codes of images of {images.shape[1]} x "
            f"{images.shape[2]}; give it the stages or patch of config.model.encoder"
        )

"""Generators and discriminators by the names in a config.

Generators in `NETWORKS` map (z [B, Z], train) to images [B, size, size, 3] in [-1, 1], discriminators (images, train) to (logits
[B], features). With classes, labels [B] come before `train`. `STYLE_NETWORKS` are StyleGAN's.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import flax.linen as nn

from ssl_jax.errors import UserError
from ssl_jax.models.build import build
from ssl_jax.models.gan.biggan import BigGANDiscriminator, BigGANGenerator
from ssl_jax.models.gan.biggan_deep import DeepDiscriminator, DeepGenerator
from ssl_jax.models.gan.dcgan import (
    ConvDiscriminator,
    DCGANGenerator,
    MaxoutMLPDiscriminator,
    MaxoutMLPGenerator,
    dcgan_layers,
    sndcgan_layers,
)
from ssl_jax.models.gan.sngan import SNGANDiscriminator, SNGANGenerator
from ssl_jax.models.gan.stylegan import StyleGAN2, StyleGAN2Discriminator
from ssl_jax.models.gan.stylegan1 import StyleGAN1, StyleGAN1Discriminator


def _dcgan(channels: int = 64, stages: int = 4, kernel: int = 4, norm: str = "batch", head_bias: bool = True, *, dtype):
    return ConvDiscriminator(dcgan_layers(channels, stages, kernel), norm=norm, head_bias=head_bias, dtype=dtype)


def _sndcgan(channels: int = 64, stages: int = 3, norm: str = "spectral", slope: float = 0.1, *, dtype):
    return ConvDiscriminator(sndcgan_layers(channels, stages), norm=norm, slope=slope, dtype=dtype)


NETWORKS = {
    "generator": {
        "mlp": MaxoutMLPGenerator, "dcgan": DCGANGenerator, "sngan": SNGANGenerator, "biggan": BigGANGenerator,
        "biggan_deep": DeepGenerator,
    },
    "discriminator": {
        "mlp": MaxoutMLPDiscriminator, "dcgan": _dcgan, "sndcgan": _sndcgan, "sngan": SNGANDiscriminator,
        "biggan": BigGANDiscriminator, "biggan_deep": DeepDiscriminator,
    },
}  # fmt: skip
STYLE_NETWORKS = {
    "generator": {"stylegan1": StyleGAN1, "stylegan2": StyleGAN2},
    "discriminator": {"stylegan1": StyleGAN1Discriminator, "stylegan2": StyleGAN2Discriminator},
}


def build_network(role: str, spec: Mapping, size: int, classes: int, dtype: str, networks: Mapping = NETWORKS) -> nn.Module:
    """The network of `role` 'generator' or 'discriminator' for `spec`, {'name': ..., field: value}.

    Raises:
        UserError: an unknown name or field, an impossible size, or classes for a network that takes no labels.
    """
    kind = networks[role].get(spec.get("name"))
    if classes and kind is not None and "classes" not in inspect.signature(kind).parameters:
        able = [name for name, other in networks[role].items() if "classes" in inspect.signature(other).parameters]
        raise UserError(
            f"config.model.{role}.name={spec['name']!r} takes no labels; choose {' or '.join(able)}, or config.model.conditional=False"
        )
    return build(networks[role], role, spec, size=size, classes=classes, dtype=dtype)

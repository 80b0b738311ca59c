"""Generators and discriminators by the name that a config gives."""

from __future__ import annotations

from collections.abc import Mapping

import flax.linen as nn

from ssl_jax.errors import UserError
from ssl_jax.models.dcgan import (
    ConvDiscriminator,
    DCGANGenerator,
    MaxoutMLPDiscriminator,
    MaxoutMLPGenerator,
    dcgan_layers,
    sndcgan_layers,
)
from ssl_jax.models.sngan import SNGANDiscriminator, SNGANGenerator


def _dcgan(channels: int = 64, stages: int = 4, kernel: int = 4, **fields):
    return ConvDiscriminator(dcgan_layers(channels, stages, kernel), **fields)


def _sndcgan(channels: int = 64, stages: int = 3, slope: float = 0.1, **fields):
    return ConvDiscriminator(sndcgan_layers(channels, stages), slope=slope, **fields)


GENERATORS = {"mlp": MaxoutMLPGenerator, "dcgan": DCGANGenerator, "sngan": SNGANGenerator}
DISCRIMINATORS = {"mlp": MaxoutMLPDiscriminator, "dcgan": _dcgan, "sndcgan": _sndcgan, "sngan": SNGANDiscriminator}


def _build(table: Mapping, role: str, spec: Mapping, **fields) -> nn.Module:
    options = dict(spec)
    name = options.pop("name", None)
    if name not in table:
        raise UserError(f"config.model.{role}.name={name!r} is unknown; choose {', '.join(table)}")
    try:
        return table[name](**options, **fields)
    except TypeError as error:
        raise UserError(f"config.model.{role}: {name!r}: {str(error).split('.__init__() ')[-1]}") from None


def build_generator(spec: Mapping, size: int, dtype: str) -> nn.Module:
    """`spec` is {'name': ..., field: value}; (z [B, Z], train) -> [B, size, size, 3] in [-1, 1].

    Raises:
        UserError: for an unknown name or field.
    """
    return _build(GENERATORS, "generator", spec, size=size, dtype=dtype)


def build_discriminator(spec: Mapping, dtype: str) -> nn.Module:
    """`spec` is {'name': ..., field: value}; (x [B, H, W, 3] in [-1, 1], train) -> (logits [B], features).

    Raises:
        UserError: for an unknown name or field.
    """
    return _build(DISCRIMINATORS, "discriminator", spec, dtype=dtype)

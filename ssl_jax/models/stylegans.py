"""The players of a StyleGAN by the name that a config gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import flax.linen as nn

from ssl_jax.errors import UserError
from ssl_jax.models.stylegan import StyleGAN2, StyleGAN2Discriminator
from ssl_jax.models.stylegan1 import StyleGAN1, StyleGAN1Discriminator

PLAYERS = {
    "generator": {"stylegan1": StyleGAN1, "stylegan2": StyleGAN2},
    "discriminator": {"stylegan1": StyleGAN1Discriminator, "stylegan2": StyleGAN2Discriminator},
}
GIVEN = {"resolution", "classes", "dtype", "name", "parent"}  # fields that are no one's to configure


def build_player(role: str, spec: Mapping, resolution: int, classes: int, dtype: str) -> nn.Module:
    """The 'generator' or 'discriminator' that `spec`, {'name': ..., field: value}, describes; fields as in its class.

    Raises UserError for an unknown name or field, an impossible resolution, and classes where the network has no place for them.
    """
    options = dict(spec)
    name = options.pop("name", None)
    if name not in PLAYERS[role]:
        raise UserError(f"config.model.{role}.name={name!r} is unknown; choose {', '.join(PLAYERS[role])}")
    player = PLAYERS[role][name]
    fields = {field.name for field in dataclasses.fields(player)}
    unknown = sorted(set(options) - (fields - GIVEN))
    if unknown:
        raise UserError(f"config.model.{role}.{unknown[0]} is no field of {name!r}; fields: {', '.join(sorted(fields - GIVEN))}")
    if classes:
        if "classes" not in fields:
            raise UserError(f"{name!r} has no conditional {role}; use stylegan2 or config.model.conditional=False")
        options["classes"] = classes
    return player(resolution=resolution, dtype=dtype, **options)

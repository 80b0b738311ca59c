"""The players of a game between residual networks by the name that a config gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import flax.linen as nn

from ssl_jax.errors import UserError
from ssl_jax.models.biggan import BigGANDiscriminator, BigGANGenerator
from ssl_jax.models.biggan_deep import DeepDiscriminator, DeepGenerator
from ssl_jax.models.sngan import SNGANDiscriminator, SNGANGenerator

PLAYERS = {
    "generator": {"biggan": BigGANGenerator, "biggan_deep": DeepGenerator, "sngan": SNGANGenerator},
    "discriminator": {"biggan": BigGANDiscriminator, "biggan_deep": DeepDiscriminator, "sngan": SNGANDiscriminator},
}


def build_player(role: str, spec: Mapping, size: int, classes: int, dtype: str) -> nn.Module:
    """The 'generator' or 'discriminator' that `spec`, {'name': ..., field: value}, describes; fields as in its class.

    Generators are called as (z [B, Z], label [B], train) -> images [B, size, size, 3] in [-1, 1], discriminators as
    (such images, label, train) -> (logits [B], features); without `classes` there are no labels.

    Raises:
        UserError: for an unknown name or field, an impossible size, and classes where the network has no place for them.
    """
    options = dict(spec)
    name = options.pop("name", None)
    if name not in PLAYERS[role]:
        raise UserError(f"config.model.{role}.name={name!r} is unknown; choose {', '.join(PLAYERS[role])}")
    player = PLAYERS[role][name]
    fields = {field.name for field in dataclasses.fields(player)}
    given = {"size": size, "classes": classes, "dtype": dtype}
    free = fields - set(given) - {"name", "parent"}
    unknown = sorted(set(options) - free)
    if unknown:
        raise UserError(f"config.model.{role}.{unknown[0]} is no field of {name!r}; fields: {', '.join(sorted(free))}")
    if classes and "classes" not in fields:
        raise UserError(f"config.model.{role}.name={name!r} takes no labels; use biggan or config.model.conditional=False")
    return player(**options, **{field: value for field, value in given.items() if field in fields})

"""From a config to an encoder, with messages for typing mistakes."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from ssl_jax.errors import UserError
from ssl_jax.models.mlp import MLP
from ssl_jax.models.resnet import ResNet
from ssl_jax.models.revnet import RevNet
from ssl_jax.models.vit import ViT

ENCODERS = {"resnet": ResNet, "revnet": RevNet, "vit": ViT, "mlp": MLP}


def build_encoder(spec: Mapping[str, Any], dtype: Any = jnp.float32) -> nn.Module:
    """The encoder that `spec` describes: dict(name='resnet', depth=18, ...), fields as in the class of that name.

    `module(images float [B, H, W, 3], train) -> {'pooled': [B, D] float32, intermediate features...}`.
    Raises UserError that names an unknown encoder or field with the nearest valid ones, or an impossible value.
    """
    fields = dict(spec)
    name = fields.pop("name", None)
    if name not in ENCODERS:
        raise UserError(_unknown("config.model.encoder.name", name, ENCODERS))
    encoder = ENCODERS[name]
    valid = [field.name for field in dataclasses.fields(encoder) if field.name not in ("name", "parent", "dtype")]
    for field in fields:
        if field not in valid:
            raise UserError(_unknown(f"config.model.encoder ({name})", field, valid))
    return encoder(**fields, dtype=dtype)


def _unknown(where: str, given: Any, valid: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(given), list(valid), n=2)
    hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
    return f"{where} has no {given!r}; {hint}valid: {', '.join(valid)}"

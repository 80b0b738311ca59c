"""Encoders by the names in a config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from ssl_jax.models.backbones.mlp import MLP
from ssl_jax.models.backbones.resnet import ResNet
from ssl_jax.models.backbones.revnet import RevNet
from ssl_jax.models.backbones.vit import ViT
from ssl_jax.models.build import build

ENCODERS = {"resnet": ResNet, "revnet": RevNet, "vit": ViT, "mlp": MLP}


def build_encoder(spec: Mapping[str, Any], dtype: Any = jnp.float32) -> nn.Module:
    """The encoder of `spec`, dict(name='resnet', depth=18, ...), with the fields of the class of that name.

    `module(images float [B, H, W, 3], train) -> {'pooled': [B, D] float32, intermediate features...}`.
    Raises UserError for an unknown encoder or field (names the nearest valid ones), or an impossible value.
    """
    return build(ENCODERS, "encoder", spec, dtype=dtype)

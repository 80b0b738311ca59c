"""Encoders by the names in a config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from ssl_jax.models.backbones.alexnet import AlexNet
from ssl_jax.models.backbones.mlp import MLP
from ssl_jax.models.backbones.nin import NIN
from ssl_jax.models.backbones.resnet import ResNet
from ssl_jax.models.backbones.resnet_v2 import ResNetV2
from ssl_jax.models.backbones.revnet import RevNet
from ssl_jax.models.backbones.vgg import VGG
from ssl_jax.models.backbones.vit import ViT
from ssl_jax.models.build import build

ENCODERS = {
    "resnet": ResNet, "resnet_v2": ResNetV2, "revnet": RevNet, "alexnet": AlexNet, "nin": NIN, "vgg": VGG, "vit": ViT, "mlp": MLP,
}  # fmt: skip


def build_encoder(spec: Mapping[str, Any], dtype: Any = jnp.float32) -> nn.Module:
    """The encoder of `spec`, dict(name='resnet', depth=18, ...), with the fields of the class of that name.

    `module(images float [B, H, W, C], train) -> {'pooled': [B, D] float32, intermediate features...}`. The number of channels C and,
    for some encoders, the image size are fixed when it is initialized. Names of intermediate features are in the classes: 'layer1',
    'block1', 'conv1', ... from input to output.
    Raises UserError for an unknown encoder or field (names the nearest valid ones), or an impossible value.
    """
    return build(ENCODERS, "encoder", spec, dtype=dtype)

"""Python source, for the card, that builds the PyTorch model of an encoder and loads its weights. ssl_jax never runs it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ssl_jax.models.backbones.encoders import build_encoder
from ssl_jax.models.backbones.resnet import DEPTHS, ResNet, is_bottleneck
from ssl_jax.models.backbones.vit import ViT, parse_variant

_USE = """
model.load_state_dict(load_file("weights.safetensors"), strict=True)
model.eval()


def encode(images):
    \"\"\"uint8 RGB [B, H, W, 3] -> [B, D].\"\"\"
    x = images.permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ({mean}, {std}))
    with torch.no_grad():
        return model((x - mean) / std)
"""

_SCALED = """

class ScaledResNet(ResNet):  # torchvision has no argument for the channels of every layer
    def _make_layer(self, block, planes, *args, **kwargs):
        if planes == 64:
            self.inplanes = {channels}
        return super()._make_layer(block, planes * {channels} // 64, *args, **kwargs)


"""


def torch_recipe(
    spec: Mapping[str, Any], mean: tuple[float, ...], std: tuple[float, ...], weights: Mapping[str, Any]
) -> dict[str, Any]:
    """{'needs': packages, 'constructor': call in torchvision or timm, or None, 'code': source} for `weights`.

    The code runs in the folder of the export; it defines `model`, without a classifier, and `encode`.
    """
    encoder = build_encoder(spec)
    package, constructor, code = {ResNet: _resnet, ViT: _vit}[type(encoder)](encoder, weights)
    code += _USE.format(mean=tuple(mean), std=tuple(std))
    return {"needs": ["torch", package, "safetensors"], "constructor": constructor, "code": code}


def _resnet(encoder, weights):
    block = "Bottleneck" if is_bottleneck(encoder.depth) else "BasicBlock"
    channels = weights["conv1.weight"].shape[0]
    scaled, small = channels != 64, encoder.stem != "imagenet"
    code = "import torch\nfrom safetensors.torch import load_file\n"
    code += f"from torchvision.models.resnet import {block}, ResNet\n"
    code += _SCALED.format(channels=channels) if scaled else "\n"
    code += f"model = {'Scaled' if scaled else ''}ResNet({block}, {list(DEPTHS[encoder.depth])})\n"
    if scaled or small:
        geometry = {"cifar": "3, 1, 1", "stride2": "3, 2, 1", "imagenet": "7, 2, 3"}[encoder.stem]
        code += f"model.conv1 = torch.nn.Conv2d(3, {channels}, {geometry}, bias=False)\n"
    if scaled:
        code += f"model.bn1 = torch.nn.BatchNorm2d({channels})\n"
    if small:
        code += "model.maxpool = torch.nn.Identity()\n"
    code += "model.fc = torch.nn.Identity()"
    exists = encoder.depth in (18, 34, 50, 101, 152) and not scaled and not small
    return "torchvision", f"torchvision.models.resnet{encoder.depth}()" if exists else None, code


def _vit(encoder, weights):
    size, patch = parse_variant(encoder.variant)
    positions = weights["pos_embed"].shape[1] - (encoder.pool == "cls" and not encoder.registers)
    arguments = {
        "img_size": math.isqrt(positions) * patch,
        "patch_size": patch,
        "embed_dim": size.width,
        "depth": size.depth,
        "num_heads": size.heads,
        "mlp_ratio": (2 if encoder.mlp == "swiglu" else 1) * size.hidden / size.width,
        "num_classes": 0,
        "dynamic_img_size": True,
    }
    if encoder.pool == "gap":
        arguments |= {"class_token": False, "global_pool": "avg", "fc_norm": False}
    if encoder.registers:
        arguments |= {"reg_tokens": encoder.registers, "no_embed_class": True}
    if encoder.layer_scale is not None:
        arguments |= {"init_values": encoder.layer_scale}
    words = [f"{name}={value!r}" for name, value in arguments.items()]
    code = "import torch\nfrom safetensors.torch import load_file\nfrom timm.models import VisionTransformer\n"
    if encoder.mlp == "swiglu":
        words += ["mlp_layer=SwiGLUPacked", "act_layer=torch.nn.SiLU"]
        code += "from timm.layers import SwiGLUPacked\n"
    call, code = f"VisionTransformer({', '.join(words)})", code + "\n"
    return "timm", f"timm.models.{call}", f"{code}model = {call}"

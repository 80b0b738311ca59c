"""Encoders that others have trained, read from their files of weights: torchvision, timm, DINO, DINOv2, MAE and MoCo.

Names and shapes decide which encoder it is. Every tensor of a file is taken, or left out by one of the rules below, or refused.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ssl_jax.errors import UserError
from ssl_jax.models.backbones.resnet import DEPTHS, is_bottleneck
from ssl_jax.models.backbones.vit import SIZES
from ssl_jax.models.common import flatten_dict
from ssl_jax.models.pretrained.arrays import read_arrays
from ssl_jax.models.pretrained.torch_file import is_state_dict, read_checkpoint
from ssl_jax.models.pretrained.torch_layout import fitted

log = logging.getLogger(__name__)
Tree = Any

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
LAYER_SCALE = 1e-5  # where DINOv2 starts; only untrained weights show it
RESNET, VIT = "conv1.weight", "patch_embed.proj.weight"  # each encoder has one of them, behind a prefix

# Where a checkpoint of a training program keeps the weights, first choice first: MoCo; MAE; DINO.
CONTAINERS = ("state_dict", "model", "teacher", "student")
# Prefixes of an encoder, of which several may follow each other, with `module.` between them. A file with two encoders gives the first.
PREFIXES = ("teacher.", "student.", "encoder_q.", "encoder_k.", "base_encoder.", "momentum_encoder.", "backbone.", "")
MOCO_V3 = ("base_encoder.", "momentum_encoder.")
# (what it is, regular expression): what is left out beside the encoder, and within it.
BESIDE = (
    ("the queue of MoCo", r"(module\.)?queue(_ptr)?"),
    ("the predictor of MoCo v3", r"(module\.)?predictor\..*"),
    ("heads and losses of DINO", r"((module|teacher|student)\.)*(head|dino_head|ibot_head|dino_loss|ibot_patch_loss)\..*"),
    ("the other encoder", r"(module\.)?(?P<own>teacher|student|encoder_q|encoder_k|base_encoder|momentum_encoder)\..*"),
)
WITHIN = {
    "resnet": (("a classifier or projection head", r"fc\..*"), ("counters of batches", r".*\.num_batches_tracked")),
    "vit": (
        ("a classifier or projection head", r"head\..*"),
        ("the token of masked patches", r"mask_token"),
        ("the decoder of MAE", r"decoder_.*"),
    ),
}
# Names of DINOv2 -> those of timm.
RENAMED = (
    (r"^register_tokens$", "reg_token"),
    (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),  # blocks in chunks keep their numbers
    (r"\.mlp\.w12\.", ".mlp.fc1."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
)


class ForeignEncoder(NamedTuple):
    """An encoder of `models.backbones` with the weights of a file."""

    spec: dict[str, Any]  # for `build_encoder`
    mean: tuple[float, ...]  # of the channels of pixels in [0, 1] that it expects
    std: tuple[float, ...]
    size: int  # side in pixels of the images of its training, as far as the weights tell
    params: Tree  # float32, NumPy
    batch_stats: Tree


def read_encoder(path: str | Path) -> ForeignEncoder:
    """The encoder in a file: .safetensors, .npz, or what `torch.save` wrote, whose pickle is not executed.

    Channels have the mean and std of ImageNet, unless a config.json of timm beside the file says otherwise.

    Raises:
        UserError: there is no such file, its layout is not known, or a tensor is missing, unexpected, misshapen or not finite.
    """
    path = Path(path)
    tensors, source = _tensors(path)
    kind, prefix = _find(path, tensors)
    names, left_out = _chosen(kind, prefix, tensors)
    tables = {name: np.asarray(tensors[original]) for name, original in names.items()}
    spec = _resnet(path, tables) if kind == "resnet" else _vit(path, tables, prefix)
    try:
        (params, batch_stats), problems = fitted(spec, tables)
    except UserError as error:
        raise UserError(f"{path}, read as {_words(spec)}: {error}") from None
    problems += [(name, "is not finite") for name, value in tables.items() if not np.isfinite(value).all()]
    if problems:
        shown = "; ".join(f"{names.get(name, prefix + name)} {what}" for name, what in problems[:4])
        more = f"; ... ({len(problems)} in all)" if len(problems) > 4 else ""
        raise UserError(f"{path}, read as {_words(spec)}: {shown}{more}; give the weights as their authors saved them")
    mean, std, where = _normalization(path)
    log.info(
        "%s: %s%s%s, %d tensors; channels with mean %s, std %s %s; left out: %s", path, _words(spec),
        f" of {prefix!r}" if prefix else "", source, len(flatten_dict(params)) + len(flatten_dict(batch_stats)), mean, std, where,
        ", ".join(f"{what} ({count})" for what, count in left_out.items()) or "nothing",
    )  # fmt: skip
    return ForeignEncoder(spec, mean, std, _side(spec, tables), params, batch_stats)


def _side(spec: Mapping[str, Any], tables: Mapping[str, np.ndarray]) -> int:
    """Pixels of a side: as many patches as learned positions; 224 for a ResNet, which takes any."""
    if spec["name"] == "resnet":
        return 224
    patch = int(spec["variant"].partition("/")[2])
    rows = tables["pos_embed"].shape[1] - (spec["pool"] == "cls" and not spec.get("registers"))
    return math.isqrt(rows) * patch


def _tensors(path: Path) -> tuple[dict[str, np.ndarray], str]:
    """({name: array}, where it was in the file, for the log)."""
    if path.suffix in (".safetensors", ".npz"):
        return read_arrays(path), ""
    saved = read_checkpoint(path)
    if is_state_dict(saved):
        return saved, ""
    found = [name for name in CONTAINERS if is_state_dict(saved.get(name)) and saved[name]]
    if not found:
        shown = ", ".join(list(saved)[:6]) or "nothing"
        raise UserError(f"{path} holds {shown}, and no state dict there or at {', '.join(CONTAINERS)}; save model.state_dict()")
    others = ", ".join(name for name in saved if name != found[0])
    return saved[found[0]], f" at {found[0]!r}" + (f" (not read: {others})" if others else "")


def _find(path: Path, tensors: Mapping) -> tuple[str, str]:
    """('resnet' or 'vit', the prefix of its names)."""
    known = "|".join(map(re.escape, filter(None, PREFIXES)))
    found = []
    for kind, anchor in (("resnet", RESNET), ("vit", VIT)):
        for name in tensors:
            prefix = name.removesuffix(anchor)
            if name.endswith(anchor) and re.fullmatch(f"(module\\.|{known})*", prefix):
                place = next(i for i, part in enumerate(PREFIXES) if part in prefix)
                found.append((place, len(prefix), kind, prefix))
    if not found:
        shown = ", ".join(map(repr, list(tensors)[:3])) or "none"
        raise UserError(
            f"{path} has no layout that is known (its names are {shown}, ...; {RESNET!r} or {VIT!r} is missing); give a ResNet of "
            "torchvision or MoCo, or a Vision Transformer of timm, DINO, DINOv2, MAE or MoCo v3"
        )
    return min(found)[2:]


def _chosen(kind: str, prefix: str, tensors: Mapping) -> tuple[dict[str, str], dict[str, int]]:
    """({name in the layout of torchvision or timm: name in the file}, {what is left out: number of tensors}).

    A name that no rule leaves out is taken, and refused later if the encoder has no place for it.
    """
    names, left_out = {}, {}
    for original in tensors:
        inside = original.startswith(prefix)
        name = original.removeprefix(prefix)
        rules = WITHIN[kind] if inside else BESIDE
        matches = ((what, match) for what, rule in rules if (match := re.fullmatch(rule, name)))
        what = next((what for what, match in matches if match.groupdict().get("own", " ") not in prefix), None)
        if what is not None:
            left_out[what] = left_out.get(what, 0) + 1
            continue
        if kind == "vit":
            for pattern, replacement in RENAMED:
                name = re.sub(pattern, replacement, name)
        names[name] = original
    return names, left_out


def _resnet(path: Path, tables: Mapping) -> dict[str, Any]:
    blocks = [0, 0, 0, 0]
    for name in tables:
        if match := re.match(r"layer([1-4])\.(\d+)\.", name):
            blocks[int(match[1]) - 1] = max(blocks[int(match[1]) - 1], int(match[2]) + 1)
    bottleneck = any(name.endswith(".conv3.weight") for name in tables)
    for depth, there in DEPTHS.items():
        if there == tuple(blocks) and is_bottleneck(depth) == bottleneck:
            return {"name": "resnet", "depth": depth}
    raise UserError(f"{path} is no ResNet of {', '.join(map(str, DEPTHS))} layers: its groups have {blocks} blocks")


def _vit(path: Path, tables: dict[str, np.ndarray], prefix: str) -> dict[str, Any]:
    """The spec of a Vision Transformer. Gives DINOv2's class token its position where patches alone have positions here."""
    shape = tables[VIT].shape
    sizes = [name for name, size in SIZES.items() if size.width == shape[0]]
    if not sizes or len(shape) != 4 or shape[1] != 3 or shape[2] != shape[3]:
        widths = ", ".join(f"{size.width} ({name})" for name, size in SIZES.items())
        raise UserError(
            f"{path}: {prefix}{VIT} has shape {list(shape)}, not [width, 3, patch, patch] with a width that is known: {widths}"
        )
    # MoCo v3 alone has a ViT-S with twelve heads, of which the shapes say nothing.
    size = "S12" if "S12" in sizes and any(part in prefix for part in MOCO_V3) else sizes[0]
    spec = {"name": "vit", "variant": f"{size}/{shape[2]}", "pool": "cls" if "cls_token" in tables else "gap"}
    rows = tables["pos_embed"].shape[1] if "pos_embed" in tables and tables["pos_embed"].ndim == 3 else 0
    if spec["pool"] == "gap" and not _is_square(rows) and _is_square(rows - 1):
        raise UserError(f"{path}, read as {_words(spec)}: {prefix}cls_token is missing, and {prefix}pos_embed has a row for it")
    if "reg_token" in tables:
        spec["registers"] = int(tables["reg_token"].shape[1]) if tables["reg_token"].ndim == 3 else 0
        if spec["pool"] == "cls" and not _is_square(rows) and _is_square(rows - 1):
            tables["cls_token"] = tables["cls_token"] + tables["pos_embed"][:, :1]
            tables["pos_embed"] = tables["pos_embed"][:, 1:]
    if any(name.endswith(".ls1.gamma") for name in tables):
        spec["layer_scale"] = LAYER_SCALE
    first, second = (tables.get(f"blocks.0.mlp.{name}.weight", np.zeros(())).shape for name in ("fc1", "fc2"))
    if len(first) == len(second) == 2 and first[0] == 2 * second[1]:
        spec["mlp"] = "swiglu"
    return spec


def _is_square(number: int) -> bool:
    return number > 0 and math.isqrt(number) ** 2 == number


def _words(spec: Mapping[str, Any]) -> str:
    """'ViT S/14 (registers=4)', 'ResNet-50'."""
    if spec["name"] == "resnet":
        return f"ResNet-{spec['depth']}"
    more = ", ".join(f"{name}={value}" for name, value in spec.items() if name not in ("name", "variant"))
    return f"ViT {spec['variant']} ({more})"


def _normalization(path: Path) -> tuple[tuple[float, ...], tuple[float, ...], str]:
    """(mean, std, where they are from), by `pretrained_cfg` of a config.json beside the file, as timm publishes its weights."""
    beside = path.with_name("config.json")
    try:
        timm_config = json.loads(beside.read_text()).get("pretrained_cfg", {}) if beside.is_file() else {}
        mean, std = (tuple(float(x) for x in timm_config.get(name, default)) for name, default in (("mean", MEAN), ("std", STD)))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{beside} cannot be read as the config of {path.name} ({error}); correct it, or move it away") from None
    if not (len(mean) == len(std) == 3 and all(map(math.isfinite, mean)) and all(0 < x < math.inf for x in std)):
        raise UserError(f"{beside}: pretrained_cfg has mean {mean} and std {std}; give three finite numbers each, std above 0")
    return mean, std, f"({beside.name})" if {"mean", "std"} & set(timm_config) else "(ImageNet)"

"""Convert parameters to and from PyTorch's names and layouts: torchvision's ResNets and timm's Vision Transformers.

One table of (path here, PyTorch name, array transposition) defines both directions, so they are inverses by construction.

ResNet: `torchvision.models.resnet.ResNet(Bottleneck, [3, 4, 6, 3])` and so on, with its `fc` or with `fc = Identity()`. For
stem='cifar' set `conv1 = Conv2d(3, 64, 3, 1, 1, bias=False)` and `maxpool = Identity()`; for stem='stride2' the same with stride 2.
Widths other than 1 keep the names and need a class with scaled channels.
ViT: `timm.models.VisionTransformer(global_pool='token')` for pool='cls'; for pool='gap'
`(class_token=False, global_pool='avg', fc_norm=False)`; with registers `(reg_tokens=n, no_embed_class=True)`; with layer_scale
`(init_values=x)`; for mlp='swiglu' `(mlp_layer=SwiGLUPacked, act_layer=SiLU)`.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax.errors import UserError
from ssl_jax.models import common
from ssl_jax.models.backbones.encoders import build_encoder
from ssl_jax.models.backbones.resnet import ResNet, is_bottleneck
from ssl_jax.models.backbones.vit import ViT, parse_variant, sincos2d, stack, unstack
from ssl_jax.models.common import flatten_dict, unflatten_dict

Tree = Any
StateDict = Mapping[str, Any]  # name -> array or CPU tensor

_RESNET_NAMES = (
    (r"^stem_conv/", "conv1."),
    (r"^stem_bn/", "bn1."),
    (r"^layer(\d)_(\d+)/", r"layer\1.\2."),
    (r"shortcut_conv/", "downsample.0."),
    (r"shortcut_bn/", "downsample.1."),
)
_VIT_NAMES = (
    (r"^registers$", "reg_token"),
    (r"^patch_embed/", "patch_embed.proj."),
    (r"^block(\d+)/", r"blocks.\1."),
    (r"attention/", "attn."),
)
_LEAF_NAMES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
_COUNTER = ".num_batches_tracked"
_HEADS = {ResNet: "fc", ViT: "head"}


class _Entry(NamedTuple):
    name: str  # in the PyTorch state dict
    to_torch: Callable[[np.ndarray], np.ndarray]
    from_torch: Callable[[np.ndarray], np.ndarray]


def to_torch(
    spec: Mapping[str, Any],
    params: Tree,
    batch_stats: Tree,
    head: Tree | None = None,
    image_size: int | None = None,
) -> dict[str, np.ndarray]:
    """Parameters and statistics as a state dict of torchvision (resnet) or timm (vit): float32 arrays, int64 counters of zero.

    Args:
        head: parameters of a LinearHead ('kernel' [D, classes], 'bias' [classes]); they become 'fc' or 'head'.
        image_size: in pixels; needed for vit with position='sincos2d', whose fixed table is a parameter in timm.

    Raises:
        UserError: PyTorch's model would compute something else, or the image size is missing.
    """
    module = _checked_encoder(spec)
    params = unstack(params) if _scans(module) else params
    state = {}
    for collection, tree in (("params", params), ("batch_stats", batch_stats)):
        for path, value in flatten_dict(tree, sep="/").items():
            entry = _entry(module, path)
            state[entry.name] = np.array(entry.to_torch(np.asarray(value)), order="C")
            if collection == "batch_stats" and path.endswith("/mean"):
                state[entry.name.removesuffix(".running_mean") + _COUNTER] = np.zeros((), np.int64)
    if isinstance(module, ViT) and module.position == "sincos2d":
        if image_size is None:
            raise UserError("export of a vit with position='sincos2d' needs the image size; pass image_size=PIXELS")
        state["pos_embed"] = _fixed_positions(module, image_size // parse_variant(module.variant)[1])
    if head is not None:
        name = _HEADS[type(module)]
        state[f"{name}.weight"] = np.array(np.asarray(head["kernel"]).T, order="C")
        state[f"{name}.bias"] = np.array(head["bias"])
    return state


def from_torch(spec: Mapping[str, Any], state_dict: StateDict) -> tuple[Tree, Tree]:
    """Inverse of `to_torch`: (params, batch_stats) as float32 NumPy arrays from a torchvision or timm state dict.

    Ignores the classifier ('fc.*' or 'head.*') and batch counters. Assumes a square image for learned positions. Raises UserError
    that lists missing, unexpected or misshapen entries.
    """
    head = _HEADS[type(_checked_encoder(spec))] + "."
    given = {
        name: np.asarray(value)
        for name, value in state_dict.items()
        if not name.endswith(_COUNTER) and not name.startswith(head)
    }
    variables, problems = fitted(spec, given)
    if problems:
        shown = "; ".join(f"{name} {what}" for name, what in problems[:4]) + ("; ..." if len(problems) > 4 else "")
        raise UserError(f"the weights do not fit {dict(spec)}: {shown} ({len(problems)} in all); correct the config")
    return variables


def fitted(spec: Mapping[str, Any], given: Mapping[str, np.ndarray]) -> tuple[tuple[Tree, Tree], list[tuple[str, str]]]:
    """((params, batch_stats), [(name, what is wrong with it)]) of the encoder of `spec` and arrays that should be exactly its own.

    Raises:
        UserError: the encoder has no PyTorch layout, or 'pos_embed' is missing or no table of it.
    """
    module, given = _checked_encoder(spec), dict(given)
    side = _image_side(module, given)
    if isinstance(module, ViT) and module.position == "sincos2d":
        fixed = _fixed_positions(module, side // parse_variant(module.variant)[1])
        if not np.allclose(given.pop("pos_embed"), fixed, atol=1e-5):
            raise UserError("'pos_embed' is not the fixed sincos2d table; import it with position='learned'")

    images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    single = module.clone(scan=False) if _scans(module) else module  # PyTorch has no stacked blocks
    expected = jax.eval_shape(functools.partial(common.init_variables, single), jax.random.key(0), images)
    trees, problems = [], []
    for tree in expected:
        flat = {}
        for path, leaf in flatten_dict(tree, sep="/").items():
            entry = _entry(module, path)
            if entry.name not in given:
                problems.append((entry.name, "is missing"))
                continue
            value = given.pop(entry.name)
            shape = entry.to_torch(np.broadcast_to(np.float32(0), leaf.shape)).shape
            if value.shape != shape:
                problems.append((entry.name, f"has shape {list(value.shape)}, not {list(shape)}"))
                continue
            flat[path] = np.array(entry.from_torch(value), np.float32, order="C")
        trees.append(unflatten_dict(flat, sep="/"))
    problems += [(name, "is unexpected") for name in given]
    params, batch_stats = trees
    return (stack(params) if _scans(module) and not problems else params, batch_stats), problems


def _scans(module):
    return isinstance(module, ViT) and module.scan


def _checked_encoder(spec):
    """The module of `spec`. Raises UserError if torchvision or timm has no equivalent model."""
    module = build_encoder(spec)
    if type(module) not in _HEADS:
        raise UserError(f"encoder {spec['name']!r} has no PyTorch layout; resnet and vit have one")
    if isinstance(module, ResNet):
        remedy = "train with flavor='torchvision' to exchange weights"
        if module.sk:
            raise UserError("torchvision has no selective-kernel ResNet; train with sk=False, flavor='torchvision'")
        if module.flavor == "simclr" and module.stem == "imagenet":
            raise UserError(f"the max-pool of flavor='simclr' pads other pixels than torchvision's; {remedy}")
        if module.flavor == "simclr" and not is_bottleneck(module.depth):
            raise UserError(f"flavor='simclr' projects the shortcut of layer1.0, torchvision does not; {remedy}")
    return module


def _entry(module, path):
    """PyTorch name and transpositions of the leaf at `path` ('layer1_0/conv1/kernel')."""
    is_vit = isinstance(module, ViT)
    name = path
    for pattern, replacement in _VIT_NAMES if is_vit else _RESNET_NAMES:
        name = re.sub(pattern, replacement, name)
    *parents, leaf = name.replace("/", ".").split(".")
    name = ".".join([*parents, _LEAF_NAMES.get(leaf, leaf)])

    if "/qkv/" in path:
        heads = parse_variant(module.variant)[0].heads
        to, back = functools.partial(_regroup, sizes=(heads, 3)), functools.partial(_regroup, sizes=(3, heads))
        if path.endswith("kernel"):
            return _Entry(name, lambda x: to(x).T, lambda x: back(x.T))
        return _Entry(name, to, back)
    if path.endswith("kernel"):
        if is_vit and not path.startswith("patch_embed"):
            return _Entry(name, np.transpose, np.transpose)
        return _Entry(name, lambda x: x.transpose(3, 2, 0, 1), lambda x: x.transpose(2, 3, 1, 0))
    return _Entry(name, np.asarray, np.asarray)


def _regroup(x, sizes):
    """Columns ordered (sizes[0], sizes[1], channel) -> (sizes[1], sizes[0], channel)."""
    grouped = x.reshape(*x.shape[:-1], *sizes, -1)
    return np.swapaxes(grouped, -3, -2).reshape(x.shape)


def _prefix_positions(module):
    return 1 if module.pool == "cls" and not module.registers else 0


def _fixed_positions(module, side):
    table = sincos2d((side, side), parse_variant(module.variant)[0].width)
    return np.pad(table, ((_prefix_positions(module), 0), (0, 0)))[None]


def _image_side(module, given):
    """Side in pixels of an image that fits the weights; arbitrary for a ResNet."""
    if isinstance(module, ResNet):
        return 64
    if "pos_embed" not in given:
        raise UserError("'pos_embed' is missing: these are not the weights of a timm Vision Transformer")
    count = given["pos_embed"].shape[1] - _prefix_positions(module)
    side = math.isqrt(max(count, 0))
    if side < 1 or side * side != count:
        raise UserError(
            f"'pos_embed' has {count} patch positions, which form no square; check pool= and registers= in the config"
        )
    return side * parse_variant(module.variant)[1]

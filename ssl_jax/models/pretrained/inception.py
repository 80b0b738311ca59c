"""The Inception network of 2015-12-05, whose features define Frechet and kernel inception distances. Inference only.

Szegedy et al. 2015 (arXiv:1512.00567) as TensorFlow released it: 1008 outputs, average pools that exclude padding, and a max-pool
instead of the average in the last block. torchvision's `inception_v3` differs in these and in its weights, so its distances differ.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from ssl_jax.errors import UserError
from ssl_jax.models import common
from ssl_jax.models.norm import BatchNorm

Tree = Any

SIZE = 299  # pixels of a side


class Unit(nn.Module):
    """Convolution, batch normalization, ReLU; in float32 precision on every accelerator."""

    features: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x):
        strides = (self.stride, self.stride)
        conv = common.Conv(self.features, self.kernel, strides, self.padding, use_bias=False, precision="highest", name="conv")
        return nn.relu(BatchNorm(use_running_average=True, epsilon=1e-3, name="bn")(conv(x)))


def _chain(x, name, *units):
    """Consecutive units, named NAME if there is one, otherwise NAME_1, NAME_2, ..."""
    for i, unit in enumerate(units, 1):
        x = Unit(*unit, name=name if len(units) == 1 else f"{name}_{i}")(x)
    return x


def _average(x):
    return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)


def _halve(x):
    return nn.max_pool(x, (3, 3), (2, 2), "VALID")


_3X3, _5X5, _1X7, _7X1, _1X3, _3X1 = (3, 3), (5, 5), (1, 7), (7, 1), (1, 3), (3, 1)
_STRIDED = (_3X3, 2, "VALID")


class Mixed5(nn.Module):
    """35 x 35: [B, H, W, C] -> [B, H, W, 224 + pool]."""

    pool: int

    @nn.compact
    def __call__(self, x):
        branches = [
            _chain(x, "branch1x1", (64,)),
            _chain(x, "branch5x5", (48,), (64, _5X5)),
            _chain(x, "branch3x3dbl", (64,), (96, _3X3), (96, _3X3)),
            _chain(_average(x), "branch_pool", (self.pool,)),
        ]
        return jnp.concatenate(branches, -1)


class Mixed6a(nn.Module):
    """35 x 35 to 17 x 17: [B, H, W, C] -> [B, h, w, 480 + C]."""

    @nn.compact
    def __call__(self, x):
        branches = [
            _chain(x, "branch3x3", (384, *_STRIDED)),
            _chain(x, "branch3x3dbl", (64,), (96, _3X3), (96, *_STRIDED)),
            _halve(x),
        ]
        return jnp.concatenate(branches, -1)


class Mixed6(nn.Module):
    """17 x 17: [B, H, W, C] -> [B, H, W, 768]."""

    inner: int

    @nn.compact
    def __call__(self, x):
        c = self.inner
        branches = [
            _chain(x, "branch1x1", (192,)),
            _chain(x, "branch7x7", (c,), (c, _1X7), (192, _7X1)),
            _chain(x, "branch7x7dbl", (c,), (c, _7X1), (c, _1X7), (c, _7X1), (192, _1X7)),
            _chain(_average(x), "branch_pool", (192,)),
        ]
        return jnp.concatenate(branches, -1)


class Mixed7a(nn.Module):
    """17 x 17 to 8 x 8: [B, H, W, C] -> [B, h, w, 512 + C]."""

    @nn.compact
    def __call__(self, x):
        branches = [
            _chain(x, "branch3x3", (192,), (320, *_STRIDED)),
            _chain(x, "branch7x7x3", (192,), (192, _1X7), (192, _7X1), (192, *_STRIDED)),
            _halve(x),
        ]
        return jnp.concatenate(branches, -1)


class Mixed7(nn.Module):
    """8 x 8: [B, H, W, C] -> [B, H, W, 2048]. pool: 'average', or 'max' in the last block."""

    pool: str

    @nn.compact
    def __call__(self, x):
        pooled = nn.max_pool(x, (3, 3), (1, 1), "SAME") if self.pool == "max" else _average(x)
        third = Unit(384, name="branch3x3_1")(x)
        double = Unit(384, _3X3, name="branch3x3dbl_2")(Unit(448, name="branch3x3dbl_1")(x))
        branches = [
            _chain(x, "branch1x1", (320,)),
            *(Unit(384, _1X3, name="branch3x3_2a")(third), Unit(384, _3X1, name="branch3x3_2b")(third)),
            *(Unit(384, _1X3, name="branch3x3dbl_3a")(double), Unit(384, _3X1, name="branch3x3dbl_3b")(double)),
            _chain(pooled, "branch_pool", (192,)),
        ]
        return jnp.concatenate(branches, -1)


class InceptionV3(nn.Module):
    """Float images [B, 299, 299, 3] in [-1, 1] -> {'pooled': [B, 2048], 'logits': [B, 1008]}.

    The logits, for the inception score, have no bias, as in the original graph.
    """

    @nn.compact
    def __call__(self, x, train: bool = False):
        if train:
            raise ValueError("InceptionV3 has no training mode")
        x = Unit(32, *_STRIDED, name="Conv2d_1a_3x3")(x)
        x = Unit(32, _3X3, 1, "VALID", name="Conv2d_2a_3x3")(x)
        x = _halve(Unit(64, _3X3, name="Conv2d_2b_3x3")(x))
        x = Unit(80, name="Conv2d_3b_1x1")(x)
        x = _halve(Unit(192, _3X3, 1, "VALID", name="Conv2d_4a_3x3")(x))
        for letter, pool in zip("bcd", (32, 64, 64), strict=True):
            x = Mixed5(pool, name=f"Mixed_5{letter}")(x)
        x = Mixed6a(name="Mixed_6a")(x)
        for letter, inner in zip("bcde", (128, 160, 160, 192), strict=True):
            x = Mixed6(inner, name=f"Mixed_6{letter}")(x)
        x = Mixed7a(name="Mixed_7a")(x)
        x = Mixed7("max", name="Mixed_7c")(Mixed7("average", name="Mixed_7b")(x))
        pooled = x.mean((1, 2))
        return {"pooled": pooled, "logits": nn.Dense(1008, use_bias=False, precision="highest", name="fc")(pooled)}


_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


def from_torch(state_dict: Mapping[str, np.ndarray]) -> Tree:
    """The variables of `InceptionV3` from a state dict of pytorch-fid or torch-fidelity ('Mixed_5b.branch1x1.conv.weight', ...).

    Ignores batch counters and the bias of 'fc'. Raises UserError for missing, misshapen or unexpected entries.
    """
    given = {name: value for name, value in state_dict.items() if not name.endswith("num_batches_tracked") and name != "fc.bias"}
    images = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32)
    expected = jax.eval_shape(functools.partial(InceptionV3().init), jax.random.key(0), images)
    flat, problems = {}, []
    for path, leaf in flatten_dict(expected, sep="/").items():
        _, *parents, last = path.split("/")
        name = ".".join([*parents, _LEAVES[last]])
        value = given.pop(name, None)
        if value is None:
            problems.append(f"{name} is missing")
            continue
        if last == "kernel":
            value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
        flat[path] = np.array(value, np.float32, order="C")
        if value.shape != leaf.shape:
            problems.append(f"{name} has shape {list(value.shape)}, not {list(leaf.shape)}")
    problems += [f"{name} is unexpected" for name in given]
    if problems:
        raise UserError(
            f"the weights are not those of the Inception network of 2015-12-05: {problems[0]} ({len(problems)} such entries); "
            "take the file that pytorch-fid or torch-fidelity downloads"
        )
    return unflatten_dict(flat, sep="/")

"""The source of an export: a method with its weights, and its features of two probe images."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax.augment.pixels import to_input
from ssl_jax.data.geometry import output_shape
from ssl_jax.engine.backbone import encoder_model
from ssl_jax.engine.method import Method, encoder_statistics, encoder_weights
from ssl_jax.errors import UserError
from ssl_jax.methods import build_method
from ssl_jax.models.backbones.encoders import build_encoder
from ssl_jax.models.common import apply, init_variables

Tree = Any

# Largest difference, relative to the largest feature, between two compilations of the same function.
TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2}


class Source(NamedTuple):
    """A trained method, ready to be written in any form."""

    config: Any  # resolved ConfigDict; `dtype` is the compute type of the exported function
    method: Method
    params: Tree
    mutable: Tree
    image_shape: tuple[int, int, int]  # (H, W, 3) in pixels
    probe: np.ndarray  # uint8 [2, H, W, 3]
    expected: Mapping[str, np.ndarray]  # encode(probe)


def make_source(config, params: Tree, mutable: Tree) -> Source:
    """Build the method of a resolved config, and encode two noise images, against which every form is checked.

    Raises:
        UserError: the config is invalid, or a feature is not finite.
    """
    method = build_method(config)
    shape = input_shape(config)
    probe = np.random.default_rng(0).integers(0, 256, (2, *shape), np.uint8)
    expected = jax.device_get(jax.jit(method.encode)(params, mutable, probe))
    broken = [name for name, value in expected.items() if not np.isfinite(np.asarray(value, np.float32)).all()]
    if broken:
        raise UserError(f"feature {broken[0]!r} of this checkpoint is not finite; export an earlier one with --step=N")
    return Source(config, method, params, mutable, shape, probe, expected)


def input_shape(config) -> tuple[int, int, int]:
    """(H, W, 3) of the images that evaluations feed to `encode`."""
    return tuple(int(n) for n in output_shape(config.data.eval_ops) or config.data.image_shape[-3:])


def normalization(config) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) per channel of pixels in [0, 1]; (0, 1) for a method without input normalization."""
    mean, std = (encoder_model(config).get(name, default) for name, default in (("mean", (0.0,) * 3), ("std", (1.0,) * 3)))
    return tuple(mean), tuple(std)


def plain(config) -> dict:
    """A config as JSON types."""
    return json.loads(config.to_json_best_effort())


def difference(features: Mapping[str, Any], expected: Mapping[str, Any]) -> float:
    """Largest difference over the common features, each relative to the feature's largest value.

    Infinite if a value is not finite, or if there is no common feature.
    """
    relative = []
    for name in set(features) & set(expected):
        target = np.asarray(expected[name], np.float32)
        error = np.max(np.abs(np.asarray(features[name], np.float32) - target))
        relative.append(float(error) / max(float(np.max(np.abs(target))), 1e-12))
    return max(relative) if relative and np.isfinite(relative).all() else float("inf")


def encoder_function(config) -> Callable[[Tree, Tree, Any], dict[str, jax.Array]]:
    """(params, batch_stats, uint8 [B, H, W, 3]) -> features of `config.model.encoder`; equal configs compile once."""
    recipe = [plain(encoder_model(config))["encoder"], config.dtype, *normalization(config)]
    return functools.partial(_encoder_features, json.dumps(recipe))


@functools.partial(jax.jit, static_argnums=0)
def _encoder_features(recipe: str, params: Tree, batch_stats: Tree, images: jax.Array) -> dict[str, jax.Array]:
    spec, dtype, mean, std = json.loads(recipe)
    return apply(build_encoder(spec, dtype), params, batch_stats, to_input(images, mean, std), train=False)[0]


def find_encoder(source: Source) -> tuple[Tree, Tree]:
    """(params, batch_stats) of `config.model.encoder`, at the places `Method.encoder` and `Method.encoder_stats`.

    The probe images verify them: the encoder must reproduce all features that it shares with the method's `encode`.

    Raises:
        UserError: the method declares no encoder (it has none, or a frozen one), or `encode` is not this encoder on normalized pixels.
    """
    method, config = source.method, source.config
    if method.encoder is None:
        raise UserError(f"method {config.method!r} has no separate encoder; export with --format=orbax or --format=stablehlo")
    encoder = build_encoder(encoder_model(config).encoder, config.dtype)
    images = jax.ShapeDtypeStruct((1, *source.image_shape), jnp.float32)
    expected = jax.eval_shape(lambda key, x: init_variables(encoder, key, x), jax.random.key(0), images)
    params = encoder_weights(method, source.params, source.mutable)
    stats = encoder_statistics(method, source.mutable) if expected[1] else {}
    if _shapes((params, stats)) == _shapes(expected):  # others have another input (colorization) or several encoders (split-brain)
        features = encoder_function(config)(params, stats, source.probe)
        if _same(features, source.expected, TOLERANCES[config.dtype]):
            return params, stats
    raise UserError(
        f"the features of method {config.method!r} are not those of config.model.encoder alone, so PyTorch's "
        f"{encoder_model(config).encoder.name} cannot compute them; export with --format=orbax or --format=stablehlo"
    )


def _shapes(tree: Tree) -> Tree:
    return jax.tree.map(jnp.shape, tree)


def _same(features: Mapping[str, Any], expected: Mapping[str, Any], tolerance: float) -> bool:
    """Whether both have 'pooled' features, and all common features have the same shape and agree."""
    common = set(features) & set(expected)
    if "pooled" not in common or any(features[name].shape != expected[name].shape for name in common):
        return False
    return difference(features, expected) <= tolerance

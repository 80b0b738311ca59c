"""How each form is written and read: `write(folder, source) -> fields of the card`, `read(folder, card) -> encode`."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
from jax import export as jax_export
from safetensors.numpy import load_file, save_file

from ssl_jax.engine.sharding import leaf_names
from ssl_jax.errors import UserError
from ssl_jax.export.source import Source, encoder_function, find_encoder, normalisation
from ssl_jax.export.torch_recipe import torch_recipe
from ssl_jax.methods import build_method
from ssl_jax.models.torch_layout import from_torch, to_torch

Encode = Callable[[jax.Array | np.ndarray], dict[str, jax.Array]]

WEIGHTS, PROGRAM, PARAMS = "weights.safetensors", "encode.stablehlo", "params"
PLATFORMS = ("cpu", "cuda", "tpu")
# A custom call is a jump to native code by name; a program that we did not write could ask for a dangerous one.
HARMLESS_CALLS = re.compile(r"shape_assertion|Sharding|stablehlo\.\w+")


class NoTorchLayout(UserError):
    """This encoder has no counterpart in torchvision or timm."""


def write_safetensors(folder: Path, source: Source) -> dict[str, Any]:
    """The encoder under torchvision's or timm's names. Raises NoTorchLayout where those compute something else."""
    spec = source.config.model.get("encoder", {})
    if "name" not in spec:
        raise NoTorchLayout(
            f"method {source.config.method!r} has no config.model.encoder; export as orbax or stablehlo"
        )
    try:
        params, stats = find_encoder(source)
        weights = to_torch(spec, *jax.device_get((params, stats)), image_size=source.image_shape[0])
    except UserError as error:
        raise NoTorchLayout(str(error)) from error
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    return {"torch": torch_recipe(spec, *normalisation(source.config), weights)}


def read_safetensors(folder: Path, card: Mapping) -> Encode:
    """The encoder of the card's config on the weights; any image size that it takes."""
    config = ml_collections.ConfigDict(card["config"])
    variables = jax.device_put(from_torch(config.model.encoder, load_file(folder / WEIGHTS)))
    return functools.partial(encoder_function(config), *variables)


def write_orbax(folder: Path, source: Source) -> dict[str, Any]:
    """Parameters and statistics of the whole method (heads and teachers too), as in its checkpoints."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((folder / PARAMS).absolute(), {"params": source.params, "mutable": source.mutable})
    return {}


def read_orbax(folder: Path, card: Mapping) -> Encode:
    """The method of the card's config on its parameters."""
    method = build_method(ml_collections.ConfigDict(card["config"]))
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    with ocp.StandardCheckpointer() as checkpointer:
        path = (folder / PARAMS).absolute()
        tree = checkpointer.metadata(path).item_metadata.tree
        target = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=device), tree)
        weights = checkpointer.restore(path, target)
    return functools.partial(jax.jit(method.encode), weights["params"], weights["mutable"])


def write_stablehlo(folder: Path, source: Source) -> dict[str, Any]:
    """The function ({name: weight}, images) -> features with a free batch, and beside it the weights that it uses."""
    tree = {"params": source.params, "mutable": source.mutable}
    structure = jax.tree.structure(tree)
    weights = dict(zip(leaf_names(tree), jax.tree.leaves(tree), strict=True))

    def encode(given, images):  # what is not given is not used, and its zeros vanish
        leaves = [given[name] if name in given else jnp.zeros(x.shape, x.dtype) for name, x in weights.items()]
        tree = jax.tree.unflatten(structure, leaves)
        return source.method.encode(tree["params"], tree["mutable"], images)

    def export(names, batch, platforms=None):
        given = {name: jax.ShapeDtypeStruct(weights[name].shape, weights[name].dtype) for name in names}
        images = jax.ShapeDtypeStruct((batch, *source.image_shape), jnp.uint8)
        return jax_export.export(jax.jit(encode), platforms=platforms)(given, images)

    in_order = sorted(weights)  # as dicts are flattened
    kept = export(weights, batch=1).module_kept_var_idx  # a program with a free batch keeps all its arguments
    used = [in_order[i] for i in kept if i < len(in_order)]
    exported = export(used, *jax_export.symbolic_shape("b"), PLATFORMS)
    _check_calls(exported)

    values = jax.device_get({name: weights[name] for name in used})
    save_file({name: np.asarray(value, order="C") for name, value in values.items()}, folder / WEIGHTS)
    (folder / PROGRAM).write_bytes(exported.serialize())
    return {
        "stablehlo": {
            "function": f"jax.export.deserialize({PROGRAM}).call({{name: array of {WEIGHTS}}}, images) -> features",
            "platforms": list(exported.platforms),
            "calling_convention": exported.calling_convention_version,
            "jax": jax.__version__,
        }
    }


def read_stablehlo(folder: Path, card: Mapping) -> Encode:
    """The program with its weights bound; no model code runs."""
    try:
        exported = jax_export.deserialize(bytearray((folder / PROGRAM).read_bytes()))
    except Exception as error:  # flatbuffers and MLIR each raise their own: all mean not readable
        written = card.get("stablehlo", {}).get("jax", "of another version")
        raise UserError(
            f"{folder / PROGRAM} was written by jax {written} and cannot be read by jax {jax.__version__} "
            f"({type(error).__name__}); install that version, or load the orbax or safetensors form"
        ) from error
    _check_calls(exported)
    here = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    if here not in exported.platforms:
        raise UserError(f"{folder} runs on {', '.join(exported.platforms)}, not on {here}; load another of its forms")
    weights = jax.device_put(load_file(folder / WEIGHTS), jax.local_devices()[0])
    return functools.partial(jax.jit(exported.call), weights)


def _check_calls(exported: jax_export.Exported) -> None:
    """Raises UserError if the program calls native code that an encoder has no need of."""
    targets = re.findall(r"custom_call\b(?: @\"?([^\s(\"]+))?", exported.mlir_module())
    odd = sorted({target for target in targets if not HARMLESS_CALLS.fullmatch(target)})
    if odd:
        raise UserError(
            f"the StableHLO program calls native code ({', '.join(odd)}), which is refused; use --format=orbax"
        )


FORMATS: dict[str, tuple[Callable, Callable]] = {
    "safetensors": (write_safetensors, read_safetensors),
    "orbax": (write_orbax, read_orbax),
    "stablehlo": (write_stablehlo, read_stablehlo),
}

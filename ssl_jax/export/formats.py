"""How each form is written and read: `write(folder, source) -> fields of the card`, `read(folder, card) -> functions`."""

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

from ssl_jax.engine.renamed_keys import MODULES, rename
from ssl_jax.engine.sharding import leaf_names
from ssl_jax.errors import UserError
from ssl_jax.export.source import Source, encoder_function, find_encoder, normalization
from ssl_jax.export.torch_layout import from_torch, to_torch
from ssl_jax.export.torch_recipe import torch_recipe
from ssl_jax.methods import build_method
from ssl_jax.models.common import portable

# 'encode': images -> features; of a tokenizer 'tokens': images -> tokens, and 'decode': tokens -> images
Functions = Mapping[str, Callable]

WEIGHTS, PROGRAM, PARAMS = "weights.safetensors", "{}.stablehlo", "params"
EXPORTED = ("encode", "tokens", "decode")
PLATFORMS = ("cpu", "cuda", "tpu")
# A custom call is a jump to native code by name; a program that we did not write could ask for a dangerous one.
HARMLESS_CALLS = re.compile(r"shape_assertion|Sharding|stablehlo\.\w+")


class NoTorchLayout(UserError):
    """This encoder has no counterpart in torchvision or timm."""


def write_safetensors(folder: Path, source: Source) -> dict[str, Any]:
    """The encoder under torchvision's or timm's names. Raises NoTorchLayout where those compute something else."""
    try:
        params, stats = find_encoder(source)
        spec = source.config.model.encoder
        weights = to_torch(spec, *jax.device_get((params, stats)), image_size=source.image_shape[0])
    except UserError as error:
        raise NoTorchLayout(str(error)) from error
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    return {"torch": torch_recipe(spec, *normalization(source.config), weights)}


def functions_of(method) -> dict[str, Callable]:
    """Those of EXPORTED that `method` has: (params, mutable, images or tokens) -> what they give."""
    offered = {"encode": method.encode, **method.fns._asdict()}
    return {name: offered[name] for name in EXPORTED if offered[name]}


def read_safetensors(folder: Path, card: Mapping) -> Functions:
    """The encoder of the card's config on the weights; any image size that it takes."""
    config = ml_collections.ConfigDict(card["config"])
    variables = jax.device_put(from_torch(config.model.encoder, load_file(folder / WEIGHTS)))
    return {"encode": functools.partial(encoder_function(config), *variables)}


def write_orbax(folder: Path, source: Source) -> dict[str, Any]:
    """Parameters and statistics of the whole method (heads and teachers too), as in its checkpoints."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((folder / PARAMS).absolute(), {"params": source.params, "mutable": source.mutable})
    return {}


def read_orbax(folder: Path, card: Mapping) -> Functions:
    """The method of the card's config on its parameters."""
    method = build_method(ml_collections.ConfigDict(card["config"]))
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    with ocp.StandardCheckpointer() as checkpointer:
        path = (folder / PARAMS).absolute()
        tree = checkpointer.metadata(path).item_metadata.tree
        target = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=device), tree)
        weights = rename(checkpointer.restore(path, target), MODULES)
    bind = functools.partial
    return {name: bind(jax.jit(f), weights["params"], weights["mutable"]) for name, f in functions_of(method).items()}


def write_stablehlo(folder: Path, source: Source) -> dict[str, Any]:
    """A program for each of EXPORTED, ({name: weight}, images) -> features with a free batch, and beside them the weights in use."""
    images = jax.ShapeDtypeStruct((1, *source.image_shape), jnp.uint8)
    programs, used = {}, set()
    for name, function in functions_of(source.method).items():
        example = images
        if name == "decode":
            example = jax.eval_shape(source.method.fns.tokens, source.params, source.mutable, images)
        programs[name], weights = _program(function, {"params": source.params, "mutable": source.mutable}, example)
        used |= weights.keys()
        (folder / PROGRAM.format(name)).write_bytes(programs[name].serialize())
    tree = {"params": source.params, "mutable": source.mutable}
    values = jax.device_get({name: x for name, x in _by_name(tree).items() if name in used})
    save_file({name: np.asarray(value, order="C") for name, value in values.items()}, folder / WEIGHTS)
    written = programs["encode"]
    return {
        "stablehlo": {
            "function": f"jax.export.deserialize({PROGRAM.format('encode')}).call({{name: array of {WEIGHTS}}}, images) -> features",
            "platforms": list(written.platforms),
            "calling_convention": written.calling_convention_version,
            "jax": jax.__version__,
        }
    }


def _by_name(tree) -> dict[str, Any]:
    return dict(zip(leaf_names(tree), jax.tree.leaves(tree), strict=True))


def _program(function: Callable, tree, example: jax.ShapeDtypeStruct) -> tuple[jax_export.Exported, dict]:
    """(`function` of ({name: weight}, x) for every platform, with the batch of `example` [1, ...] free; the weights that it uses)"""
    structure, weights = jax.tree.structure(tree), _by_name(tree)

    def call(given, x):  # what is not given is not used, and its zeros vanish
        leaves = [given[name] if name in given else jnp.zeros(x.shape, x.dtype) for name, x in weights.items()]
        tree = jax.tree.unflatten(structure, leaves)
        return function(tree["params"], tree["mutable"], x)

    def export(names, batch, platforms=None):
        given = {name: jax.ShapeDtypeStruct(weights[name].shape, weights[name].dtype) for name in names}
        x = jax.ShapeDtypeStruct((batch, *example.shape[1:]), example.dtype)
        with portable():
            return jax_export.export(jax.jit(call), platforms=platforms)(given, x)

    in_order = sorted(weights)  # as dicts are flattened
    kept = export(weights, batch=1).module_kept_var_idx  # a program with a free batch keeps all its arguments
    used = [in_order[i] for i in kept if i < len(in_order)]
    exported = export(used, *jax_export.symbolic_shape("b"), PLATFORMS)
    _check_calls(exported)
    return exported, {name: weights[name] for name in used}


def read_stablehlo(folder: Path, card: Mapping) -> Functions:
    """The programs with their weights bound; no model code runs."""
    weights = jax.device_put(load_file(folder / WEIGHTS), jax.local_devices()[0])
    functions = {}
    for name in EXPORTED:
        path = folder / PROGRAM.format(name)
        if path.is_file():
            exported = _read_program(path, card)
            (given, _), _ = jax.tree.unflatten(exported.in_tree, exported.in_avals)
            functions[name] = functools.partial(jax.jit(exported.call), {name: weights[name] for name in given})
    return functions


def _read_program(path: Path, card: Mapping) -> jax_export.Exported:
    try:
        exported = jax_export.deserialize(bytearray(path.read_bytes()))
    except Exception as error:  # flatbuffers and MLIR each raise their own: all mean not readable
        written = card.get("stablehlo", {}).get("jax", "of another version")
        raise UserError(
            f"{path} was written by jax {written} and cannot be read by jax {jax.__version__} "
            f"({type(error).__name__}); install that version, or load the orbax or safetensors form"
        ) from error
    _check_calls(exported)
    here = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    if here not in exported.platforms:
        raise UserError(f"{path.parent} runs on {', '.join(exported.platforms)}, not on {here}; load another of its forms")
    return exported


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

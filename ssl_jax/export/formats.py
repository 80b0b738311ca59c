"""Writer and reader of each form: `write(folder, source) -> fields of the card`, `read(folder, card) -> functions`."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
from jax import export as jax_export
from safetensors.numpy import save_file

from ssl_jax.engine.backbone import encoder_model
from ssl_jax.engine.orbax_paths import openable
from ssl_jax.engine.renamed_keys import MODULES, rename
from ssl_jax.engine.sharding import leaf_names
from ssl_jax.errors import UserError
from ssl_jax.export.program import bounded, check_calls, check_signature, described, read_program, signature
from ssl_jax.export.source import (
    TOLERANCES,
    Source,
    difference,
    encoder_function,
    find_encoder,
    normalization,
)
from ssl_jax.export.torch_recipe import torch_recipe
from ssl_jax.methods import build_method
from ssl_jax.models.portable import portable
from ssl_jax.models.pretrained.arrays import read_arrays
from ssl_jax.models.pretrained.torch_layout import from_torch, to_torch

# 'encode': images -> features. Tokenizers also have 'tokens': images -> tokens, and 'decode': tokens -> images. A task on top of an
# encoder has its own function, one of TASKS; the card describes what it takes and gives.
Functions = Mapping[str, Callable]

WEIGHTS, PROGRAM, PARAMS = "weights.safetensors", "{}.stablehlo", "params"
# {field of `ModelFns`: None if it takes images; else the inputs in the batch that it takes, such as ("image", "question")}
TASKS: dict[str, tuple[str, ...] | None] = {"segment": None, "detect": None, "answer": ("image", "question")}
PLATFORMS = ("cpu", "cuda", "tpu")
INFLATED = 1000  # largest size of the arrays by that of their compressed files


class NoTorchLayout(UserError):
    """This encoder has no counterpart in torchvision or timm."""


def write_safetensors(folder: Path, source: Source) -> dict[str, Any]:
    """The encoder with torchvision's or timm's names. Raises NoTorchLayout if their model would compute something else."""
    try:
        params, stats = find_encoder(source)
        spec = encoder_model(source.config).encoder
        weights = to_torch(spec, *jax.device_get((params, stats)), image_size=source.image_shape[0])
    except UserError as error:
        raise NoTorchLayout(str(error)) from error
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    return {"torch": torch_recipe(spec, *normalization(source.config), weights)}


def exported_functions(method) -> dict[str, Callable]:
    """The functions of `names()` that `method` has, each (params, mutable, images or tokens or a batch) -> output."""
    offered = {"encode": method.encode, **method.fns._asdict()}
    return {name: offered[name] for name in names() if offered[name]}


def names() -> tuple[str, ...]:
    """All functions that an export may have."""
    return ("encode", "tokens", "decode", *TASKS)


def example_of(name: str, source: Source) -> Any:
    """Shapes and types of what the function `name` takes, for a batch of 1."""
    images = jax.ShapeDtypeStruct((1, *source.image_shape), jnp.uint8)
    if name == "decode":
        return jax.eval_shape(source.method.fns.tokens, source.params, source.mutable, images)
    if TASKS.get(name) is None:
        return images
    return {each: images if each == "image" else source.method.inputs[each].batch(1) for each in TASKS[name]}


def compare_tasks(functions: Functions, source: Source) -> dict[str, dict]:
    """{task: {'takes', 'gives'}} for the card. Asserts that outputs for the probe images are those of the method.

    Other inputs than images are ones.
    """
    found = {}
    for name in (name for name in TASKS if name in functions):
        example = example_of(name, source)
        probe = jax.tree.map(lambda x: source.probe if x.dtype == np.uint8 else np.ones((2, *x.shape[1:]), x.dtype), example)
        outputs = functions[name](probe), jax.jit(getattr(source.method.fns, name))(source.params, source.mutable, probe)
        error = difference(*(x if isinstance(x, dict) else {"": x} for x in jax.device_get(outputs)))
        assert error <= TOLERANCES[source.config.dtype], f"{name!r} differs from the method by {error:.1e}"
        found[name] = {"takes": described(example), "gives": described(outputs[0])}
    return found


def read_safetensors(folder: Path, card: Mapping) -> Functions:
    """The encoder of the card's config with the file's weights, for any image size that it accepts."""
    config = ml_collections.ConfigDict(card["config"])
    variables = jax.device_put(from_torch(encoder_model(config).encoder, read_arrays(folder / WEIGHTS)))
    return {"encode": functools.partial(encoder_function(config), *variables)}


def write_orbax(folder: Path, source: Source) -> dict[str, Any]:
    """Parameters and statistics of the whole method (heads and teachers too), as in its checkpoints."""
    with openable(folder / PARAMS) as path, ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, {"params": source.params, "mutable": source.mutable})
    return {}


def read_orbax(folder: Path, card: Mapping) -> Functions:
    """The method of the card's config with its parameters."""
    method = build_method(ml_collections.ConfigDict(card["config"]))
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    with openable(folder / PARAMS) as path, ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.metadata(path).item_metadata.tree
        needed = sum(m.dtype.itemsize * math.prod(m.shape) for m in jax.tree.leaves(tree))
        stored = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        if needed > INFLATED * stored:
            raise UserError(f"{path} has {stored:,} bytes and would inflate to {needed:,}, which is refused; export again")
        target = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=device), tree)
        weights = rename(checkpointer.restore(path, target), MODULES)
    bind = functools.partial
    return {name: bind(jax.jit(f), weights["params"], weights["mutable"]) for name, f in exported_functions(method).items()}


def write_stablehlo(folder: Path, source: Source) -> dict[str, Any]:
    """A program ({name: weight}, images) -> output with a free batch size for each of `names()`, and the weights that they use."""
    programs, used = {}, set()
    for name, function in exported_functions(source.method).items():
        tree = {"params": source.params, "mutable": source.mutable}
        programs[name], weights = _program(function, tree, example_of(name, source))
        used |= weights.keys()
        (folder / PROGRAM.format(name)).write_bytes(programs[name].serialize())
    tree = {"params": source.params, "mutable": source.mutable}
    values = jax.device_get({name: x for name, x in _by_name(tree).items() if name in used})
    save_file({name: np.asarray(value, order="C") for name, value in values.items()}, folder / WEIGHTS)
    encode = programs["encode"]
    return {
        "stablehlo": {
            "function": f"jax.export.deserialize({PROGRAM.format('encode')}).call("
            f"{{name: array of {WEIGHTS}}}, images) -> features",
            "platforms": list(encode.platforms),
            "calling_convention": encode.calling_convention_version,
            "jax": jax.__version__,
        }
    }


def _by_name(tree) -> dict[str, Any]:
    return dict(zip(leaf_names(tree), jax.tree.leaves(tree), strict=True))


def _program(function: Callable, tree, example: Any) -> tuple[jax_export.Exported, dict]:
    """(exported ({name: weight}, x) -> function(tree, x) with a free batch size, for all PLATFORMS; {name: weight} that it uses)

    example: shape and type of x for a batch of 1.
    """
    structure, weights = jax.tree.structure(tree), _by_name(tree)

    def call(given, x):  # weights that are not given are unused; their zeros are eliminated
        leaves = [given[name] if name in given else jnp.zeros(x.shape, x.dtype) for name, x in weights.items()]
        tree = jax.tree.unflatten(structure, leaves)
        return function(tree["params"], tree["mutable"], x)

    def export(names, batch, platforms=None):
        given = {name: jax.ShapeDtypeStruct(weights[name].shape, weights[name].dtype) for name in names}
        x = jax.tree.map(lambda one: jax.ShapeDtypeStruct((batch, *one.shape[1:]), one.dtype), example)
        with portable():
            return jax_export.export(jax.jit(call), platforms=platforms)(given, x)

    in_order = sorted(weights)  # the order in which JAX flattens dicts
    kept = export(weights, batch=1).module_kept_var_idx  # found at batch 1, since a program with a free batch keeps all arguments
    used = [in_order[i] for i in kept if i < len(in_order)]
    exported = export(used, *jax_export.symbolic_shape("b"), PLATFORMS)
    check_calls(exported.mlir_module())
    return exported, {name: weights[name] for name in used}


def read_stablehlo(folder: Path, card: Mapping) -> Functions:
    """The programs with their weights bound; no model code runs."""
    weights = jax.device_put(read_arrays(folder / WEIGHTS), jax.local_devices()[0])
    functions = {}
    for name in names():
        path = folder / PROGRAM.format(name)
        if path.is_file():
            exported = read_program(path, card)
            if "features" in card:  # absent while an export is written
                check_signature(name, path, exported, card, weights)
            functions[name] = bounded(path, exported, {name: weights[name] for name in signature(exported)[0]})
    if "encode" not in functions:
        raise UserError(f"{folder} has no {PROGRAM.format('encode')}; copy the whole folder or export again")
    return functions


FORMATS: dict[str, tuple[Callable, Callable]] = {
    "safetensors": (write_safetensors, read_safetensors),
    "orbax": (write_orbax, read_orbax),
    "stablehlo": (write_stablehlo, read_stablehlo),
}

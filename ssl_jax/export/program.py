"""Reads a StableHLO program of an export. It may come from anyone, so it is compared with its card and bounded before it runs."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export as jax_export

from ssl_jax.errors import UserError
from ssl_jax.rehearsal.hlo import count_runs, parse_computations

# Custom calls run native code by name; an untrusted program could name a dangerous one.
HARMLESS_CALLS = re.compile(r"shape_assertion|Sharding|stablehlo\.\w+")
TENSOR = re.compile(r"tensor<((?:[\d?]+x)+)(\w+)")
LOOP = re.compile(r"= .* while\(.*")
TRIPS = re.compile(r'known_trip_count":\{"n":"\d+"')
MOST_TRIPS = 10_000  # of a loop; the deepest network has some hundred layers
LARGEST = 1 << 30  # bytes of an array for one image
MEMORY = 4 << 30  # bytes that a call may allocate, besides LARGEST for each image


def read_program(path: Path, card: Mapping) -> jax_export.Exported:
    """The program in `path`, which calls no native code and holds no array larger than LARGEST.

    Raises:
        UserError: the file cannot be read by this JAX, runs on other devices, or is refused.
    """
    try:
        exported = jax_export.deserialize(bytearray(path.read_bytes()))
        text = exported.mlir_module()
    except Exception as error:  # flatbuffers and MLIR raise various types; all mean that the file is not readable
        written = card.get("stablehlo", {}).get("jax", "of another version")
        cause = f"({type(error).__name__}); load the orbax or safetensors form"
        if written == jax.__version__:
            raise UserError(f"{path} is damaged or no StableHLO program {cause}, or export again") from error
        raise UserError(f"{path} was written by jax {written} and cannot be read by jax {jax.__version__} {cause}, or install "
                        "that version") from error  # fmt: skip
    check_calls(text)
    platform = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    if platform not in exported.platforms:
        raise UserError(f"{path.parent} runs on {', '.join(exported.platforms)}, not on {platform}; load another form")
    for sides, dtype in set(TENSOR.findall(text)):
        count = math.prod(int(side) for side in sides.split("x") if side.isdigit())
        if count * max(1, int((re.search(r"\d+", dtype) or ["8"])[0]) // 8) > LARGEST:
            raise UserError(f"{path} computes an array of {sides[:-1]} {dtype}, which is refused as too large; export again")
    return exported


def check_calls(text: str) -> None:
    """Raises UserError if the program `text` calls native code other than HARMLESS_CALLS."""
    targets = re.findall(r"custom_call\b(?: @\"?([^\s(\"]+))?", text)
    odd = sorted({target for target in targets if not HARMLESS_CALLS.fullmatch(target)})
    if odd:
        raise UserError(f"the StableHLO program calls native code ({', '.join(odd)}), which is refused; use --format=orbax")


def signature(exported: jax_export.Exported) -> tuple[Mapping[str, Any], Any, Any]:
    """(weights {name: type}, type of the input, tree of output types) of a program. Raises ValueError or TypeError for another one."""
    (given, x), keywords = jax.tree.unflatten(exported.in_tree, exported.in_avals)
    if keywords or not isinstance(given, dict):
        raise TypeError("its arguments are not weights by name and a batch")
    return given, x, jax.tree.unflatten(exported.out_tree, exported.out_avals)


def check_signature(name: str, path: Path, exported: jax_export.Exported, card: Mapping, weights: Mapping) -> None:
    """Raises UserError unless the program is the function `name` of the card: its input, weights and outputs."""
    try:
        given, x, out = signature(exported)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} is no function of weights and a batch ({error}); export again") from None
    wrong = [key for key, aval in given.items() if key not in weights or _type(weights[key]) != _type(aval)]
    size, tasks = (card["input"]["height"], card["input"]["width"]), card.get("tasks", {})
    problem = f"weight {wrong[0]!r} is missing or has another shape" if wrong else ""
    if name == "decode":
        problem = problem or _differs("takes", x, 3, np.int32, x.shape[1:])
        problem = problem or _differs("gives", out, 4, np.float32, (*size, 3))
    elif name not in tasks:
        problem = problem or _differs("takes", x, 4, np.uint8, (*size, 3))
    if name == "tokens":
        problem = problem or _differs("gives", out, 3, np.int32, getattr(out, "shape", ())[1:])
    for what, tree in (("takes", x), ("gives", out)) if name in tasks else ():
        fixed = any(not aval.shape or isinstance(aval.shape[0], int) for aval in jax.tree.leaves(tree))
        if fixed or described(tree) != tasks[name].get(what):
            problem = problem or f"it {what} {described(tree) or 'nothing'}, its card lists {tasks[name].get(what)}"
    if name == "encode":
        found = {key: list(aval.shape[1:]) for key, aval in out.items()} if isinstance(out, dict) and out else None
        listed = {key: list(shape[1:]) for key, shape in card.get("features", {}).items()}
        if found is None or found != listed:
            problem = problem or f"it gives the features {found or 'none'}, its card lists {listed}"
    if problem:
        raise UserError(f"{path} is not the function of its card: {problem}; copy or export it again")


def described(tree: Any) -> dict[str, list]:
    """{name of an array: [dtype, 'b', sizes of one example]} of arrays by name; the name of a single one is ''."""
    entries = tree if isinstance(tree, dict) else {"": tree}
    return {name: [str(x.dtype), "b", *x.shape[1:]] for name, x in entries.items() if hasattr(x, "shape")}


def bounded(path: Path, exported: jax_export.Exported, weights: Mapping[str, jax.Array]) -> Callable:
    """x -> program(weights, x). Each shape is compiled once, and then refused if it would allocate too much or loop without end."""
    device, compiled = jax.local_devices()[0], {}
    run = jax.jit(exported.call)

    def call(x):
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(x)):
            return run(weights, x)  # inside of another program, whose memory is not ours to bound
        x = jax.device_put(x, device)
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(x))
        if shapes not in compiled:
            program = run.lower(weights, x).compile()
            _check_compiled(path, program, max(1, shapes[0][0]))
            compiled[shapes] = program
        return compiled[shapes](weights, x)

    return call


def _check_compiled(path: Path, program, batch: int) -> None:
    text = program.as_text()
    runs, endless = count_runs(*parse_computations(text))
    if jax.default_backend() != "tpu":  # which does not annotate loops
        endless |= {loop for loop in LOOP.findall(text) if not TRIPS.search(loop)}
    if endless or max(runs.values()) > MOST_TRIPS:
        rounds = "unknown" if endless else f"{max(runs.values()):,}"
        raise UserError(f"{path} has a loop of {rounds} rounds, which is refused; export again")
    memory = program.memory_analysis()
    needed = memory.temp_size_in_bytes + memory.output_size_in_bytes if memory else 0
    if needed > MEMORY + batch * LARGEST:
        raise UserError(f"{path} would allocate {needed / 2**30:,.1f} GiB for {batch} images, which is refused; export again")


def _differs(what: str, aval: Any, rank: int, dtype: Any, sides: tuple) -> str:
    shape = getattr(aval, "shape", None)
    if shape is None or len(shape) != rank or isinstance(shape[0], int) or aval.dtype != dtype or tuple(shape[1:]) != tuple(sides):
        wanted = ", ".join(["b", *map(str, sides)])
        return f"it {what} {getattr(aval, 'dtype', 'several')} {list(shape or ())}, not {np.dtype(dtype)} [{wanted}]"
    return ""


def _type(x: Any) -> tuple:
    return tuple(x.shape), np.dtype(x.dtype)

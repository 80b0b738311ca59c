"""Compiles the train step of a config for devices that are not there, and measures what it needs."""

from __future__ import annotations

import time
from collections.abc import Sequence

import jax

from ssl_jax.experiment import config as configs
from ssl_jax.experiment.abstract import AbstractExperiment, build_abstract
from ssl_jax.experiment.fit import fit
from ssl_jax.rehearsal import flops, gpus, memory, roofline
from ssl_jax.rehearsal.chips import DECODED
from ssl_jax.rehearsal.collectives import collectives, table
from ssl_jax.rehearsal.exhausted import exhausted
from ssl_jax.rehearsal.largest import largest
from ssl_jax.rehearsal.topology import Slice, open_topology
from ssl_jax.rehearsal.traffic import traffic

# With less optimization compilers take seconds instead of minutes. In four TPU programs compiled both ways, temporaries and bytes
# of collectives differed by at most 3 %, and counts of collectives were equal.
QUICK = {"cpu": {"xla_backend_optimization_level": 0}, "tpu": {"exec_time_optimization_effort": -1.0}, "gpu": {}}
REMEDIES = {
    "fit": "this does not fit; add --fit to search for what fits, or use more or larger chips",
    "share": f"this does not fit into JAX's share of a GPU's memory; {gpus.VARIABLES[0]}=0.95, here and for `train`, gives it "
    "more, or add --fit to search for what fits",
    "by hand": "this does not fit; lower config.batch_size, raise config.accumulate, recompute activations (remat in "
    "config.model), shard the state (config.mesh.fsdp, config.sharding), or use more or larger devices",
}


def rehearse_config(
    path_and_variant: str, overrides: Sequence[str], topology: str, slices: int, search: bool, quick: bool, decode_rate: float
) -> tuple[dict, str | None]:
    """Compile the step of a config for `slices` times `topology`.

    Args:
        search: try other meshes, batches and rematerializations (`fit`).
        quick: compile with less optimization.
        decode_rate: images per second that one CPU core decodes.

    Returns:
        (facts as JSON types, the remedy where the config does not fit, else None).

    Raises:
        UserError: a mistake in the config or the topology.
    """
    where = open_topology(topology, slices)
    config = configs.load(path_and_variant, overrides)
    named = f"cpu:{len(where.devices)}" if where.platform == "cpu" else topology  # fake devices where libtpu is missing
    facts = {"config": path_and_variant, "overrides": list(overrides), "topology": named, "slices": where.slices}
    options = QUICK[where.platform] if quick else {}
    if search:
        facts |= fit(config, where, lambda experiment: rehearse(experiment, where, options, decode_rate))
        return facts, None if facts["flags"] else "no candidate fits; use more or larger chips"
    facts |= rehearse(build_abstract(config, where.devices, where.platform), where, options, decode_rate)
    return facts, None if facts["fits"] else REMEDIES[_remedy(facts)]


def rehearse(experiment: AbstractExperiment, where: Slice, options: dict, decode_rate: float = DECODED) -> dict:
    """Facts of the compiled step, as JSON types. Bytes are per device, FLOPs of all devices together, times in seconds."""
    facts, clock = describe(experiment), time.perf_counter
    facts |= {"chip_bytes": int(where.chip.memory), "usable_bytes": where.chip.usable} if where.chip else {"chip_bytes": None}
    start = clock()
    traced = experiment.run.trace(experiment.run.abstract, experiment.example, experiment.run.root)
    counted = flops.count(traced.jaxpr)
    facts["flops"] = {**counted._asdict(), "image": counted.flops / experiment.config.batch_size}
    lowered = traced.lower()
    facts["seconds"] = {"lowering": clock() - start}
    start = clock()
    try:
        compiled = lowered.compile(compiler_options=options or None)
    except jax.errors.JaxRuntimeError as error:
        found = exhausted(str(error))
        if found is None:
            raise
        return {**facts, "fits": False, "exhausted": _with_largest(found, traced, experiment)}
    finally:
        facts["seconds"]["compiling"] = clock() - start
    facts["compiled_bytes"] = memory.of_program(compiled)
    text = compiled.as_text()
    found, endless = collectives(text, experiment.run.mesh.shape)
    facts["collectives"], facts["collectives_in_endless_loops"] = table(found), endless
    if where.chip:
        devices, cost = len(where.devices), compiled.cost_analysis() or {}
        flops_per_device = counted.flops / devices
        if where.platform == "gpu":  # whose compiler gives no cost analysis
            bytes_moved = traffic(text)
        else:
            bytes_moved = roofline.moved_bytes(cost.get("bytes accessed", 0.0), cost.get("flops", 0.0), flops_per_device)
        facts["busy_seconds"] = busy = roofline.times(where.chip, flops_per_device, bytes_moved, found)
        facts["moved_bytes"] = bytes_moved
        facts["xla"] = {name: cost.get(name) for name in ("flops", "bytes accessed", "optimal_seconds")}  # counts a loop body once
        facts["prediction"] = roofline.predict(
            busy, experiment.total, experiment.config.batch_size, devices, where.chips, counted.flops - counted.repeated, where.chip
        )
        facts["prediction"]["chips"] = where.chips
        facts["hosts"] = roofline.hosts_need(facts["prediction"]["bound"]["images_per_second"], where.hosts, decode_rate)
        used = facts["needed_bytes"] = memory.needed(facts["compiled_bytes"], where.platform)
        if where.platform != "tpu" and used > where.chip.usable:  # the TPU compiler raises by itself
            found = {"message": "memory of the compiled step", "used": used, "limit": where.chip.usable, "largest": []}
            return {**facts, "fits": False, "exhausted": _with_largest(found, traced, experiment)}
    return {**facts, "fits": True}


def _remedy(facts: dict) -> str:
    """The key of REMEDIES for a config that does not fit."""
    if facts["chip_bytes"] is None:
        return "by hand"  # `fit` needs devices of known memory
    used = (facts.get("exhausted") or {}).get("used") or 0
    return "share" if facts["usable_bytes"] < used <= facts["chip_bytes"] else "fit"


def _with_largest(found: dict, traced, experiment: AbstractExperiment) -> dict:
    """`found` with the largest arrays of the trace, where the compiler names no buffers."""
    if found["largest"]:
        return found
    shards = experiment.run.mesh.shape["data"] * experiment.run.mesh.shape["fsdp"]
    return {**found, "largest": largest(traced.jaxpr, shards), "traced": True}


def describe(experiment: AbstractExperiment) -> dict:
    """The facts that need no compilation."""
    state = experiment.run.abstract
    return {
        "mesh": dict(experiment.run.mesh.shape),
        "batch_size": experiment.config.batch_size,
        "dtype": experiment.config.dtype,
        "steps": experiment.total,
        "parameters": {**networks(state.params), **{f"frozen {name}": memory.size(stage) for name, stage in state.frozen.items()}},
        "trained": memory.size(state.params),
        "state_bytes": {
            "parameters": memory.bytes_of_device(state.params),
            "optimizer": memory.bytes_of_device(state.opt),
            "mutable": memory.bytes_of_device(state.mutable),
            "frozen": memory.bytes_of_device(state.frozen),
        },
    }


def networks(params: dict) -> dict[str, int]:
    """{'group': count, 'group/network': count} of parameters; networks only where a group has 2 to 8."""
    found = {}
    for group, tree in params.items():
        found[group] = memory.size(tree)
        if isinstance(tree, dict) and 1 < len(tree) <= 8:
            found |= {f"{group}/{name}": memory.size(network) for name, network in tree.items()}
    return found

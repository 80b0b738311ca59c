"""Compiles the train step of a config for devices that are not there, and finds out what it needs."""

from __future__ import annotations

import time
from collections.abc import Sequence

import jax

from ssl_jax.experiment import config as configs
from ssl_jax.experiment.abstract import Abstract, build_abstract
from ssl_jax.experiment.fit import fit
from ssl_jax.rehearsal import flops, gpus, memory, roofline
from ssl_jax.rehearsal.chips import DECODED
from ssl_jax.rehearsal.collectives import collectives, table
from ssl_jax.rehearsal.exhausted import exhausted
from ssl_jax.rehearsal.largest import largest
from ssl_jax.rehearsal.topology import Slice, open_topology
from ssl_jax.rehearsal.traffic import traffic

# With less optimization compilers take seconds instead of minutes. On TPUs, in four programs that were compiled both ways, temporaries
# and bytes of collectives were within 3 % of each other, and counts of collectives equal.
QUICK = {"cpu": {"xla_backend_optimization_level": 0}, "tpu": {"exec_time_optimization_effort": -1.0}, "gpu": {}}
REMEDIES = {
    "fit": "this does not fit; the same with --fit looks for what does, or use more or larger chips",
    "share": f"this does not fit into what JAX takes of a GPU's memory; {gpus.VARIABLES[0]}=0.95, here and for `train`, gives it more, "
    "or the same with --fit looks for what fits",
    "by hand": "this does not fit; lower config.batch_size, raise config.accumulate, recompute activations (a remat of config.model), "
    "spread the state (config.mesh.fsdp, config.sharding), or use more or larger devices",
}


def rehearse_config(
    path_and_variant: str, overrides: Sequence[str], topology: str, slices: int, search: bool, quick: bool, decode_rate: float
) -> tuple[dict, str | None]:
    """Compile the step of a config for `slices` times `topology`; with `search` try what else would fit. `quick`: with less optimization.

    Returns:
        (what was found, as JSON types, what to do about a config that does not fit; None where it does).

    Raises:
        UserError: a mistake in the config or the topology.
    """
    where = open_topology(topology, slices)
    config = configs.load(path_and_variant, overrides)
    named = f"cpu:{len(where.devices)}" if where.platform == "cpu" else topology  # without libtpu fake devices take its place
    facts = {"config": path_and_variant, "overrides": list(overrides), "topology": named, "slices": where.slices}
    options = QUICK[where.platform] if quick else {}
    if search:
        facts |= fit(config, where, lambda this: rehearse(this, where, options, decode_rate))
        return facts, None if facts["flags"] else "nothing that was tried fits; use more or larger chips"
    facts |= rehearse(build_abstract(config, where.devices, where.platform), where, options, decode_rate)
    return facts, None if facts["fits"] else REMEDIES[_remedy(facts)]


def rehearse(this: Abstract, where: Slice, options: dict, decode_rate: float = DECODED) -> dict:
    """Everything that is found out, as JSON types. Bytes are of each device, FLOPs of all devices together; times are in seconds."""
    told, clock = describe(this), time.perf_counter
    told |= {"chip_bytes": int(where.chip.memory), "usable_bytes": where.chip.usable} if where.chip else {"chip_bytes": None}
    start = clock()
    traced = this.run.trace(this.run.abstract, this.example, this.run.root)
    counted = flops.count(traced.jaxpr)
    told["flops"] = {**counted._asdict(), "image": counted.flops / this.config.batch_size}
    lowered = traced.lower()
    told["seconds"] = {"lowering": clock() - start}
    start = clock()
    try:
        compiled = lowered.compile(compiler_options=options or None)
    except jax.errors.JaxRuntimeError as error:
        found = exhausted(str(error))
        if found is None:
            raise
        return {**told, "fits": False, "exhausted": _with_largest(found, traced, this)}
    finally:
        told["seconds"]["compiling"] = clock() - start
    told["compiled_bytes"] = memory.of_program(compiled)
    text = compiled.as_text()
    found, endless = collectives(text, this.run.mesh.shape)
    told["collectives"], told["collectives_in_endless_loops"] = table(found), endless
    if where.chip:
        devices, cost = len(where.devices), compiled.cost_analysis() or {}
        each = counted.flops / devices
        if where.platform == "gpu":  # this compiler does not tell
            moved = traffic(text)
        else:
            moved = roofline.moved_bytes(cost.get("bytes accessed", 0.0), cost.get("flops", 0.0), each)
        told["busy_seconds"] = busy = roofline.times(where.chip, each, moved, found)
        told["moved_bytes"] = moved
        told["xla"] = {name: cost.get(name) for name in ("flops", "bytes accessed", "optimal_seconds")}  # the body of a loop once
        told["prediction"] = roofline.predict(
            busy, this.total, this.config.batch_size, devices, where.chips, counted.flops - counted.repeated, where.chip
        )
        told["prediction"]["chips"] = where.chips
        told["hosts"] = roofline.hosts_need(told["prediction"]["bound"]["images_per_second"], where.hosts, decode_rate)
        used = told["needed_bytes"] = memory.needed(told["compiled_bytes"], where.platform)
        if where.platform != "tpu" and used > where.chip.usable:  # TPUs' compiler says so itself
            found = {"message": "memory of the compiled step", "used": used, "limit": where.chip.usable, "largest": []}
            return {**told, "fits": False, "exhausted": _with_largest(found, traced, this)}
    return {**told, "fits": True}


def _remedy(told: dict) -> str:
    """Of REMEDIES, for what does not fit."""
    if told["chip_bytes"] is None:
        return "by hand"  # `fit` knows nothing of such devices
    used = (told.get("exhausted") or {}).get("used") or 0
    return "share" if told["usable_bytes"] < used <= told["chip_bytes"] else "fit"


def _with_largest(found: dict, traced, this: Abstract) -> dict:
    """Where the compiler names no buffers, those of the trace."""
    if found["largest"]:
        return found
    spread = this.run.mesh.shape["data"] * this.run.mesh.shape["fsdp"]
    return {**found, "largest": largest(traced.jaxpr, spread), "traced": True}


def describe(this: Abstract) -> dict:
    """What is known before anything is compiled."""
    state = this.run.abstract
    return {
        "mesh": dict(this.run.mesh.shape),
        "batch_size": this.config.batch_size,
        "dtype": this.config.dtype,
        "steps": this.total,
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
    """{'group': parameters, 'group/network': parameters} for groups that are made of a few."""
    found = {}
    for group, tree in params.items():
        found[group] = memory.size(tree)
        if isinstance(tree, dict) and 1 < len(tree) <= 8:
            found |= {f"{group}/{name}": memory.size(network) for name, network in tree.items()}
    return found

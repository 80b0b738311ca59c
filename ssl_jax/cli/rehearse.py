"""Compile the train step of a config for devices that are not there, and tell what it needs; no data, no weights, no accelerator.

  python launch.py rehearse --config=configs/simclr.py:imagenet --topology=cpu:8
  python launch.py rehearse --config=configs/vq_prior.py:imagenet256_base --topology=v5e:16x16 --output=rehearsal.json

It is the step that `train` runs: the same method, optimizers, shardings and donated state, for `config.mesh` over all devices of the
topology. A stage without a workdir is that of its recipe. Sizes of data are known for common datasets; say --config.data.examples=N
(and data.num_classes, data.image_shape) of others. Exit code 1: it does not fit into the memory.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from ssl_jax.cli import config as configs
from ssl_jax.cli.abstract import Abstract, assemble_abstract
from ssl_jax.cli.rehearsal_tables import show
from ssl_jax.engine.checkpoint import write_json
from ssl_jax.rehearsal import flops, memory
from ssl_jax.rehearsal.topology import EXAMPLES, Slice, open_topology

# Compilers do less at these: seconds instead of minutes, and about the same memory and collectives (tests/test_rehearse.py).
QUICK = {"cpu": {"xla_backend_optimization_level": 0}, "tpu": {"exec_time_optimization_effort": -1.0}}


def add_arguments(sub) -> None:
    sub.add_argument("--config", required=True, help="configs/NAME.py or configs/NAME.py:VARIANT; --config.KEY=VALUE overrides")
    sub.add_argument("--topology", required=True, help=f"devices to compile for: {EXAMPLES}")
    sub.add_argument("--effort", choices=("quick", "full"), default="quick", help="of the compiler (default: quick)")
    sub.add_argument("--output", type=Path, help="file to write what was found to, as JSON")


def main(args, overrides) -> int:
    slice_ = open_topology(args.topology)
    this = assemble_abstract(configs.load(args.config, overrides), slice_.devices, slice_.platform)
    told = {"config": args.config, "overrides": list(overrides), "topology": args.topology, **rehearse(this, slice_, args.effort)}
    show(told, sys.stdout)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.output, told)
    return 0


def rehearse(this: Abstract, where: Slice, effort: str) -> dict:
    """Everything that is found out, as JSON types. Bytes are of each device, FLOPs of all devices together; times are in seconds."""
    state, clock = this.run.abstract, time.perf_counter
    told = {
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
    start = clock()
    traced = this.run.trace(state, this.example, this.run.root)
    counted = flops.count(traced.jaxpr)
    told["flops"] = {"step": counted.flops, "image": counted.flops / this.config.batch_size, "endless_loops": counted.endless}
    lowered = traced.lower()
    told["seconds"] = {"lowering": clock() - start}
    start = clock()
    compiled = lowered.compile(compiler_options=QUICK[where.platform] if effort == "quick" else None)
    told["seconds"]["compiling"] = clock() - start
    told["compiled_bytes"] = memory.of_program(compiled)
    return told


def networks(params: dict) -> dict[str, int]:
    """{'group': parameters, 'group/network': parameters} for groups that are made of a few."""
    found = {}
    for group, tree in params.items():
        found[group] = memory.size(tree)
        if isinstance(tree, dict) and 1 < len(tree) <= 8:
            found |= {f"{group}/{name}": memory.size(network) for name, network in tree.items()}
    return found

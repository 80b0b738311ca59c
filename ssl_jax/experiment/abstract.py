"""A run described without data, weights or devices: the assembly of `train`, of shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from ssl_jax.data.catalog import facts
from ssl_jax.data.pipeline import check_size
from ssl_jax.engine import loop, sharding
from ssl_jax.engine.method import Method
from ssl_jax.errors import UserError
from ssl_jax.experiment import config as configs
from ssl_jax.experiment.build import check_inputs, fill_in, make_run
from ssl_jax.experiment.workdir import read_config
from ssl_jax.methods import build_method


class Abstract(NamedTuple):
    """What `assemble` returns, as far as it is known without anything to run."""

    config: Any  # resolved
    method: Method
    run: loop.CompiledRun  # `abstract` and `trace` are for use
    example: Mapping[str, jax.ShapeDtypeStruct]  # a global batch
    total: int  # steps


def build_abstract(config, devices, platform: str) -> Abstract:
    """The run of `config` on `devices`, which may be descriptions of some. `platform` decides what dtype='auto' is.

    Raises:
        UserError: as `assemble`.
    """
    mesh, known = sharding.make_mesh(config.mesh, devices), facts(config.data)
    config = fill_in(config, known, platform)
    total = configs.resolve(config, known.examples)["total"]
    config, frozen = abstract_stages(config, platform)
    method = build_method(config)
    frozen |= {name: jax.eval_shape(read) for name, read in method.frozen.items()}
    check_inputs(config, method, known, mesh)
    check_size(config.batch_size, config.data.name, config.data.train_split, known.examples)
    run, _, example = make_run(config, method, mesh, total, frozen, abstract=True)
    return Abstract(config, method, run, example, total)


def abstract_stages(config, platform: str) -> tuple[Any, dict]:
    """`open_stages` of shapes: a stage is the config of its workdir, or of its recipe where it has none; no weights are read."""
    config, frozen = config.copy_and_resolve_references(), {}
    with config.unlocked():
        for name, stage in config.get("stages", {}).items():
            if stage.workdir:
                below = read_config(Path(stage.workdir))
            else:
                if not Path(stage.recipe.partition(":")[0]).is_file():
                    raise UserError(f"config.stages.{name}.recipe={stage.recipe}: no such file; run this where the configs are")
                below = configs.load(stage.recipe)
                below = fill_in(below, facts(below.data), platform)
            config.stages[name].config, frozen[name] = _weights(below, platform)
    return config, frozen


def _weights(config, platform: str) -> tuple[Any, dict]:
    """(a config that is filled in with its stages, {'params': shapes, 'mutable': shapes})."""
    config, frozen = abstract_stages(config, platform)
    method = build_method(config)
    batch = {name: spec.batch(8) for name, spec in method.inputs.items()}
    params, mutable = jax.eval_shape(method.init, jax.random.key(0), batch, frozen)
    return config, {"params": params, "mutable": {**mutable, **frozen}}

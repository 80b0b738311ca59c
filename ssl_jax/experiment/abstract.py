"""An experiment of shapes alone, without data, weights or devices, built by the functions that `train` uses."""

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
from ssl_jax.experiment.stages import check_source, foreign_config
from ssl_jax.experiment.workdir import read_config
from ssl_jax.methods import build_method
from ssl_jax.models.conv import use_convolutions
from ssl_jax.models.pretrained.foreign import read_encoder


class AbstractExperiment(NamedTuple):
    """The fields of an `Experiment` that are known from shapes."""

    config: Any  # resolved
    method: Method
    run: loop.CompiledRun  # only `abstract`, `trace` and `root` may be used
    example: Mapping[str, jax.ShapeDtypeStruct]  # a global batch
    total: int  # steps


def build_abstract(config, devices, platform: str) -> AbstractExperiment:
    """Describe the run of `config` on `devices`.

    Args:
        devices: real ones, or descriptions such as those of `jax.experimental.topologies`.
        platform: decides what dtype='auto' is.

    Raises:
        UserError: as `build_experiment`.
    """
    use_convolutions("xla")  # what XLA knows of a program it plans, too
    mesh, data = sharding.make_mesh(config.mesh, devices), facts(config.data)
    config = fill_in(config, data, platform)
    total = configs.resolve(config, data.examples)["total"]
    config, frozen = abstract_stages(config, platform)
    method = build_method(config)
    frozen |= {name: jax.eval_shape(read) for name, read in method.frozen.items()}
    check_inputs(config, method, data, mesh)
    check_size(config.batch_size, config.data.name, config.data.train_split, data.examples)
    run, _, example = make_run(config, method, mesh, total, frozen, abstract=True)
    return AbstractExperiment(config, method, run, example, total)


def abstract_stages(config, platform: str) -> tuple[Any, dict]:
    """As `open_stages`, with shapes for weights. A stage without a workdir or a file takes the config of its recipe."""
    config, frozen = config.copy_and_resolve_references(), {}
    with config.unlocked():
        for name, stage in config.get("stages", {}).items():
            if stage.get("weights"):
                check_source(name, stage)
                stage_config = foreign_config(read_encoder(stage.weights), config)
            elif stage.workdir:
                stage_config = read_config(Path(stage.workdir))
            else:
                if not Path(stage.recipe.partition(":")[0]).is_file():
                    raise UserError(f"config.stages.{name}.recipe={stage.recipe}: no such file; run this where configs/ is")
                stage_config = configs.load(stage.recipe)
                stage_config = fill_in(stage_config, facts(stage_config.data), platform)
            config.stages[name].config, frozen[name] = _weights(stage_config, platform)
    return config, frozen


def _weights(config, platform: str) -> tuple[Any, dict]:
    """(`config` with its stages filled in, {'params': shapes, 'mutable': shapes})."""
    config, frozen = abstract_stages(config, platform)
    method = build_method(config)
    batch = {name: spec.batch(8) for name, spec in method.inputs.items()}
    params, mutable = jax.eval_shape(method.init, jax.random.key(0), batch, frozen)
    return config, {"params": params, "mutable": {**mutable, **frozen}}

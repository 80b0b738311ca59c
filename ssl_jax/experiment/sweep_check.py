"""Checks every variation of a sweep before the first run starts, and says how long and how large the runs are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ssl_jax.errors import UserError


class Size(NamedTuple):
    """What a run of a variation takes."""

    steps: int
    bytes: int  # of all checkpoints that it keeps


def check_configs(plan: Mapping[str, Any]) -> None:
    """Check what needs neither data nor devices: keys, values, names of evaluations.

    Raises:
        UserError: the first mistake, with the variation that has it.
    """
    from ssl_jax.experiment import training  # imports JAX

    for variation in plan["variations"]:
        for seed in plan["seeds"] if variation is plan["variations"][0] else plan["seeds"][:1]:
            _of(variation, training.load_config, variation["config"], (*variation["overrides"], f"--config.seed={seed}"))


def check_shapes(plan: Mapping[str, Any], names: Sequence[str]) -> dict[str, Size]:
    """Check the data and the shapes of the variations `names` on one CPU, so that accelerators stay free for the runs.

    So the mesh is left to the runs. Compiles nothing.

    Raises:
        UserError: the first mistake, with the variation that has it.
    """
    import jax

    from ssl_jax.experiment import training
    from ssl_jax.experiment.build import build_experiment

    jax.config.update("jax_platforms", "cpu")
    device = jax.devices("cpu")[:1]
    sizes: dict[str, Size] = {}
    for variation in plan["variations"]:
        if variation["name"] not in names:
            continue
        config = training.load_config(variation["config"], variation["overrides"])
        with config.unlocked():
            config.mesh = dict(data=-1, fsdp=1, tensor=1)
        experiment = _of(variation, build_experiment, config, device)
        leaves = [leaf for leaf in jax.tree.leaves(experiment.run.abstract) if hasattr(leaf, "dtype")]
        saved = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
        kept = config.keep_checkpoints + bool(config.best_metric)
        sizes[variation["name"]] = Size(experiment.durations["total"], saved * kept)
    return sizes


def _of(variation: Mapping[str, Any], function, *arguments):
    try:
        return function(*arguments)
    except UserError as error:
        raise UserError(f"variation {variation['name']!r}: {error}") from None

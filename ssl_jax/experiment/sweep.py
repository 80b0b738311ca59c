"""What a sweep is: named variations of configs, each trained with the same seeds. Imports no JAX.

A file `sweeps/NAME.py` defines `get_sweep()`:

    from ssl_jax.experiment.sweep import Sweep, product

    def get_sweep():
        return Sweep(product("configs/simclr.py", {"model.temperature": (0.1, 0.2, 0.5)}), seeds=(0, 1, 2))
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ssl_jax.errors import UserError, control_characters
from ssl_jax.experiment import config as configs


class Variation(NamedTuple):
    """A config with some keys changed."""

    name: str  # in tables and messages
    config: str  # 'configs/NAME.py:VARIANT'
    overrides: Mapping[str, Any] = {}  # {'model.temperature': 0.1}


class Sweep(NamedTuple):
    """What to train: every variation with every seed."""

    variations: Sequence[Variation]
    seeds: Sequence[int] = (0,)
    baseline: str | None = None  # the name of a variation that others are compared with
    common: Mapping[str, Any] = {}  # overrides of every run, which are part of no name
    name: str = ""  # filled in from the file or the workdir


def product(config: str | Sequence[str], *axes: Mapping[str, Sequence[Any]]) -> list[Variation]:
    """Every config with every combination of the axes, in order.

    Args:
        config: a config, or several.
        axes: {dotted key: values}. The keys of one axis move together, so they have the same number of values.

    Raises:
        UserError: an axis without values, or keys of one axis with different numbers of values.
    """
    steps = [_together(axis) for axis in axes]
    return [
        Variation(named(each, changes := {key: value for step in chosen for key, value in step.items()}), each, changes)
        for each in ([config] if isinstance(config, str) else config)
        for chosen in itertools.product(*steps)
    ]


def named(config: str, overrides: Mapping[str, Any]) -> str:
    """'simclr:smoke model.temperature=0.1, optim.net.lr=0.001'"""
    path, _, variant = config.partition(":")
    base = Path(path).stem + (f":{variant}" if variant else "")
    return f"{base} {', '.join(f'{key}={written(value)}' for key, value in overrides.items())}".strip()


def written(value: Any) -> str:
    """A value as it is typed after `--config.KEY=`."""
    return value if isinstance(value, str) else repr(value)


def _together(axis: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    lengths = {key: len(values) for key, values in axis.items()}
    empty = [key for key, length in lengths.items() if not length]
    if empty or not axis:
        raise UserError(f"the axis {', '.join(empty) or 'without a key'} has no values, so the sweep has no runs; give at least one")
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{key} has {length}" for key, length in lengths.items())
        raise UserError(f"keys that move together need the same number of values; {counts}")
    return [dict(zip(axis, values, strict=True)) for values in zip(*axis.values(), strict=True)]


def read_file(path: str) -> Sweep:
    """The sweep of a file.

    Raises:
        UserError: no such file, or its `get_sweep()` returns no Sweep. What its own code raises keeps its traceback.
    """
    with configs.import_file(path, "--sweep") as module:
        if not callable(getattr(module, "get_sweep", None)):
            raise UserError(f"--sweep={path} defines no function get_sweep; give a file like those in sweeps/")
        sweep = module.get_sweep()
    if not isinstance(sweep, Sweep) or not all(isinstance(each, Variation) for each in sweep.variations):
        raise UserError(f"--sweep={path}: get_sweep must return a Sweep of Variations; see ssl_jax/experiment/sweep.py")
    if not all(isinstance(seed, int) and not isinstance(seed, bool) for seed in sweep.seeds):
        raise UserError(f"--sweep={path}: its seeds are {tuple(sweep.seeds)!r}; give whole numbers")
    return sweep._replace(name=Path(path).stem)


def check(sweep: Sweep) -> None:
    """Check what needs no config.

    Raises:
        UserError: no variation or seed, one that is given twice, a name that is none, or a baseline that does not exist.
    """
    if not sweep.variations or not sweep.seeds:
        raise UserError(f"the sweep has no {'seeds' if sweep.variations else 'variations'}, so it has no runs; give at least one")
    names = [variation.name for variation in sweep.variations]
    for what, given in (("variation", names), ("seed", list(sweep.seeds))):
        twice = [each for number, each in enumerate(given) if each in given[:number]]
        if twice:
            raise UserError(f"the {what} {twice[0]!r} is given twice; give each once")
    for name in names:
        if not isinstance(name, str) or not name.strip() or control_characters(name):
            raise UserError(f"the variation {name!r} has no name that can be printed; give it words")
    if sweep.baseline is not None and sweep.baseline not in names:
        raise UserError(f"the baseline {sweep.baseline!r} is no variation of the sweep; choose of {', '.join(map(repr, names))}")
    for variation in sweep.variations:
        if "seed" in (*variation.overrides, *sweep.common):
            raise UserError(f"the variation {variation.name!r} sets config.seed, which --seeds gives; leave it out")
        twice = [key for key in variation.overrides if key in sweep.common]
        if twice:
            raise UserError(f"the key {twice[0]} is common to all runs, and the variation {variation.name!r} sets it; leave one out")

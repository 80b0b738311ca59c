"""One file per method. `config.method` is the name of the file; there is no registry."""

from __future__ import annotations

import difflib
import importlib
import pkgutil

import ml_collections

from ssl_jax.engine.method import Method, Stage
from ssl_jax.engine.online_probe import with_online_probe
from ssl_jax.errors import UserError


def build_method(config) -> Method:
    """Call `build` of ssl_jax/methods/<config.method>.py, after building its earlier stages from `config.stages[name].config`.

    Raises:
        UserError: the method does not exist, or `config` lacks a field that the method reads. Coding mistakes keep their traceback.
    """
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    if config.method not in names:
        near = difflib.get_close_matches(str(config.method), names, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names)}"
        raise UserError(f"config.method={config.method!r} does not exist; {hint}")
    stages = _Stages({name: Stage(stage.config, build_method(stage.config)) for name, stage in config.get("stages", {}).items()})
    try:
        method = importlib.import_module(f"ssl_jax.methods.{config.method}").build(config, stages)
    except AttributeError as error:
        if not isinstance(error.obj, ml_collections.ConfigDict):  # a coding mistake
            raise
        fields = list(error.obj)
        near = difflib.get_close_matches(str(error.name), fields, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(fields)}"
        where = _path(config, error.obj) or "a part of the config"
        raise UserError(f"{where} has no {error.name!r}, which method {config.method!r} needs; {hint}") from error
    return with_online_probe(method, config.data.num_classes) if config.get("online_probe") else method


class _Stages(dict):
    """{name: stage}; one that the config lacks is a UserError."""

    def __missing__(self, name: str):
        raise UserError(f"config.stages has no {name!r}, which this method needs; give dict({name}=configs.common.stage(RECIPE))")


def _path(config: ml_collections.ConfigDict, part: ml_collections.ConfigDict, name: str = "config") -> str | None:
    """The dotted path of `part` in `config`, such as 'config.model.latent'; None if `config` does not hold it."""
    if config is part:
        return name
    children = ((key, child) for key, child in config.items() if isinstance(child, ml_collections.ConfigDict))
    return next((found for key, child in children if (found := _path(child, part, f"{name}.{key}"))), None)

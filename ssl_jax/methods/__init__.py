"""One file per method. A method is found by the name of its file; there is nothing to register."""

from __future__ import annotations

import difflib
import importlib
import pkgutil

import ml_collections

from ssl_jax.engine.method import Method, Stage
from ssl_jax.errors import UserError


def build_method(config) -> Method:
    """`build` of ssl_jax/methods/<config.method>.py, with the stages that it stands on: `config.stages[name].config` is the resolved
    config of each.

    Raises:
        UserError: no such method, or a field that it reads and `config` does not have. Mistakes of its code keep their traceback.
    """
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    if config.method not in names:
        near = difflib.get_close_matches(str(config.method), names, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names)}"
        raise UserError(f"config.method={config.method!r} does not exist; {hint}")
    stages = {name: Stage(stage.config, build_method(stage.config)) for name, stage in config.get("stages", {}).items()}
    try:
        return importlib.import_module(f"ssl_jax.methods.{config.method}").build(config, stages)
    except AttributeError as error:
        if not isinstance(error.obj, ml_collections.ConfigDict):  # a mistake of the code
            raise
        fields = list(error.obj)
        near = difflib.get_close_matches(str(error.name), fields, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(fields)}"
        where = _path(config, error.obj) or "a part of the config"
        raise UserError(f"{where} has no {error.name!r}, which method {config.method!r} needs; {hint}") from error


def _path(config: ml_collections.ConfigDict, part: ml_collections.ConfigDict, name: str = "config") -> str | None:
    """'config.model.latent': where `part` is in `config`; None where it is not."""
    if config is part:
        return name
    children = ((key, child) for key, child in config.items() if isinstance(child, ml_collections.ConfigDict))
    return next((found for key, child in children if (found := _path(child, part, f"{name}.{key}"))), None)

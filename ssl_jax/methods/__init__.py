"""One file per method. A method is found by the name of its file; there is nothing to register."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import traceback

from ssl_jax.engine.method import Method, Stage
from ssl_jax.errors import UserError


def build_method(config) -> Method:
    """`build` of ssl_jax/methods/<config.method>.py, with the stages that it stands on: `config.stages[name].config` is the resolved
    config of each.

    Raises:
        UserError: no such method, or a field of `config` that it needs or does not have.
    """
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    if config.method not in names:
        near = difflib.get_close_matches(str(config.method), names, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names)}"
        raise UserError(f"config.method={config.method!r} does not exist; {hint}")
    stages = {name: Stage(stage.config, build_method(stage.config)) for name, stage in config.get("stages", {}).items()}
    try:
        return importlib.import_module(f"ssl_jax.methods.{config.method}").build(config, stages)
    except (AttributeError, TypeError) as error:
        if _of_a_field(error):
            raise UserError(f"config of {config.method!r}: {error}") from error
        raise


def _of_a_field(error: Exception) -> bool:
    """Whether the config lacks a field that the method needs, or has one that its modules do not take."""
    where = traceback.extract_tb(error.__traceback__)[-1].filename
    return "ml_collections" in where if isinstance(error, AttributeError) else " argument" in str(error)

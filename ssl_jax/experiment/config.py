"""Load `--config=FILE.py[:variant] --config.a.b=value` as a locked config; every mistake is one line."""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import inspect
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType

import ml_collections

from ssl_jax.engine import durations
from ssl_jax.engine.renamed_keys import refuse_old_names, translate
from ssl_jax.errors import UserError
from ssl_jax.experiment.config_values import LARGEST, check_keys
from ssl_jax.experiment.overrides import apply_overrides
from ssl_jax.where import RECIPES, find_config

# Keys that may differ when a run resumes in its workdir. They say where and how often, never what is trained. Another
# eval_batch_size, for another number of devices, evaluates a generator on other samples, as another seed would. `workdir` and
# `weights` are those of a stage, whose numbers are checked by fingerprint.
MAY_CHANGE = (
    "mesh", "data.workers", "data.data_dir", "log_every_steps", "checkpoint_every", "keep_checkpoints", "best_metric", "evals",
    "eval_batch_size", "workdir", "weights", "data.bank_split", "convolutions",
)  # fmt: skip
STAGE = re.compile(r"^(stages\.[^.]+\.(config\.)?)+")
DURATION = re.compile(r"total|evaluate_every|checkpoint_every|optim\.[^.]+\.warmup")


def load(path_and_variant: str, overrides: Sequence[str] = ()) -> ml_collections.ConfigDict:
    """The config of `FILE.py[:variant]` with `--config.a.b=value` overrides applied, locked.

    Raises:
        UserError: no such file or variant, no `get_config`, an unknown or renamed key, or a wrong value.
    """
    path, _, variant = path_and_variant.partition(":")
    path = str(find_config(path)) if path else path
    with import_file(path) as module:
        if not callable(getattr(module, "get_config", None)):
            raise UserError(f"--config={path} defines no function get_config; give a file like those in configs/")
        try:
            inspect.signature(module.get_config).bind(variant)
        except TypeError:
            raise UserError(f"--config={path}: get_config must take the name of a variant; write get_config(variant='')") from None
        config = module.get_config(variant)  # what the file's own code raises keeps its traceback
    if not isinstance(config, ml_collections.ConfigDict):
        kind = "None" if config is None else f"a {type(config).__name__}"
        raise UserError(f"--config={path}: get_config returns {kind}; return an ml_collections.ConfigDict, as configs.common.base does")
    refuse_old_names(config)
    check_keys(config)
    config.lock()
    return apply_overrides(config, overrides)


@contextlib.contextmanager
def import_file(path: str, flag: str = "--config") -> Iterator[ModuleType]:
    """Context in which the file `path` of configs/ (or of sweeps/, for `flag` --sweep) is imported and may import configs.common.

    Raises:
        UserError: there is no such Python file. What its own code raises keeps its traceback.
    """
    folder = f"{flag.removeprefix('--')}s"
    if not os.path.isfile(path):
        recipes = [f"{folder}/{file.name}" for top in (Path(), RECIPES) for file in sorted((top / folder).glob("*.py"))]
        near = difflib.get_close_matches(path, recipes, 1)
        what = "is a directory" if path and os.path.isdir(path) else "no such file"
        raise UserError(f"{flag}={path}: {what}" + (f"; did you mean {near[0]}?" if near else f"; give a file like those in {folder}/"))
    if Path(path).suffix != ".py":
        raise UserError(f"{flag}={path} is no Python file; give a file like those in {folder}/")
    if not os.access(path, os.R_OK):
        raise UserError(f"{flag}={path} cannot be read; change its permissions")
    spec = importlib.util.spec_from_file_location("ssl_jax_config", path)
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    sys.path[:] = [str(Path(path).resolve().parent.parent), *before, str(RECIPES)]  # configs import configs.common
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path[:] = before


def resolve(config: ml_collections.ConfigDict, examples: int) -> dict[str, int]:
    """{'total', 'evaluate', 'checkpoint'} in steps, for a dataset of `examples`; an interval of 0 becomes the whole run.

    Raises:
        UserError: a run of zero steps, or an interval that is no duration.
    """
    if examples is None:
        raise UserError("config.data.examples is not set, so epochs have no length; give the number of examples of the train split")
    total = durations.to_steps(config.total, "config.total", config.batch_size, examples)
    evaluate, checkpoint = (
        durations.to_steps(config[name], f"config.{name}", config.batch_size, examples, up=True)
        for name in ("evaluate_every", "checkpoint_every")
    )
    if total < 1:
        raise UserError(
            f"the run has zero steps ({examples} examples, batch {config.batch_size}); raise config.total or lower batch_size"
        )
    if total > LARGEST:
        raise UserError(f"config.total={config.total} is {total} steps; a run has at most {LARGEST}")
    return {"total": total, "evaluate": evaluate or total, "checkpoint": checkpoint or total}


def plain(config) -> dict:
    """A config as JSON types, as the workdir and checkpoints store it."""
    return json.loads(config.to_json_best_effort() if hasattr(config, "to_json_best_effort") else json.dumps(config))


def from_plain(values: Mapping) -> ml_collections.ConfigDict:
    """The inverse of `plain`, locked; `values` may have the keys of an earlier version."""
    return ml_collections.ConfigDict(translate(values)).lock()


def differences(old: Mapping, new: Mapping, prefix: str = "") -> list[str]:
    """'model.temperature: 0.5 -> 0.1' for every key that differs but those of MAY_CHANGE; both have the keys of this version."""
    lines = []
    for key in sorted(set(old) | set(new)):
        name = f"{prefix}{key}"
        if STAGE.sub("", name).startswith(MAY_CHANGE):
            continue
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += differences(a, b, f"{name}.")
        elif key not in old and not b:
            continue  # a table or an option that earlier versions did not have, and that is off
        elif a != b and not _same_duration(name, a, b):
            lines.append(f"{name}: {a} -> {b}")
    return lines


def _same_duration(name: str, a, b) -> bool:
    """Whether both are the same duration in the same unit, such as '45 epochs' and '45.0 epochs'."""
    if not DURATION.fullmatch(STAGE.sub("", name)):
        return False
    try:
        return durations.parse(a, name) == durations.parse(b, name)
    except UserError:
        return False

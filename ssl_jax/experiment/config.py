"""From `--config=FILE.py[:variant] --config.a.b=value` to a locked, resolved config; every mistake is one line."""

from __future__ import annotations

import ast
import difflib
import importlib.util
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import ml_collections
from absl import flags
from ml_collections import config_flags

from ssl_jax.engine.optim import duration
from ssl_jax.errors import UserError

# What may differ when a run goes on in its workdir: where and how often, never what is trained. With another eval_batch_size, which has
# to divide over other devices, a sampler is measured on other samples of the same distribution, as with another seed. The same goes for
# a stage, whose weights have a fingerprint wherever they lie.
MAY_CHANGE = (
    "mesh", "data.workers", "data.data_dir", "log_every_steps", "checkpoint_every", "keep_checkpoints", "best_metric", "evals",
    "eval_batch_size", "workdir",
)  # fmt: skip
OPEN = ("data.features", "data.kinds", "data.vocabulary", "data.specs")  # whose keys are names of features, so that any may be added
STAGE = re.compile(r"^(stages\.[^.]+\.(config\.)?)+")


def load(path_and_variant: str, overrides: Sequence[str] = ()) -> ml_collections.ConfigDict:
    """The config of `FILE.py[:variant]` with `--config.a.b=value` overrides applied, locked.

    Raises:
        UserError: no such file or variant, an unknown key, a value of the wrong type.
    """
    path, _, variant = path_and_variant.partition(":")
    if not Path(path).is_file():
        near = difflib.get_close_matches(path, [str(p) for p in Path("configs").glob("*.py")], 1)
        raise UserError(f"--config={path}: no such file" + (f"; did you mean {near[0]}?" if near else ""))
    spec = importlib.util.spec_from_file_location("ssl_jax_config", path)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(Path(path).resolve().parent.parent))  # configs import configs.common
    try:
        spec.loader.exec_module(module)
        config = module.get_config(variant)
    except (SyntaxError, AttributeError, ImportError, TypeError) as error:
        raise UserError(f"--config={path_and_variant}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.pop(0)
    config.lock()
    return apply_overrides(config, overrides)


def apply_overrides(config: ml_collections.ConfigDict, overrides: Sequence[str]) -> ml_collections.ConfigDict:
    """Apply `--config.a.b=value` arguments with the types of the values they replace."""
    typed = []
    for argument in overrides:
        name, equals, value = argument.removeprefix("--config.").partition("=")
        if not argument.startswith("--config.") or not equals:
            raise UserError(f"argument {argument!r} is not understood; overrides look like --config.optim.net.lr=0.1")
        where, _, key = name.rpartition(".")
        if where in OPEN and where.removeprefix("data.") in config.data:
            with config.unlocked():
                config.data[where.removeprefix("data.")][key] = _literal(value)
            continue
        _check_key(config, name)
        typed.append(argument)
    overrides = typed
    if not overrides:
        return config
    values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=["launch.py", *overrides])
        values(["launch.py", *overrides])
    except (flags.Error, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"override: {str(error).splitlines()[0]}") from error
    return values.config


def _literal(text: str):
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):  # a plain string
        return text


def _check_key(config: Mapping, name: str) -> None:
    at, walked = config, []
    for part in name.split("."):
        part = part.partition("[")[0]
        keys = list(at.keys()) if isinstance(at, Mapping | ml_collections.ConfigDict) else []
        if part not in keys:
            near = difflib.get_close_matches(part, keys, 1)
            where = ".".join(["config", *walked])
            hint = f"did you mean {where}.{near[0]}?" if near else f"{where} has {', '.join(sorted(keys)) or 'no keys'}"
            raise UserError(f"unknown key {where}.{part}; {hint}")
        at = at[part]
        walked.append(part)


def resolve(config: ml_collections.ConfigDict, examples: int) -> dict[str, int]:
    """Durations in steps: {'total', 'evaluate', 'checkpoint'} for a dataset of `examples`.

    Raises:
        UserError: a run of zero steps, or an impossible interval.
    """
    told = {"total": duration(config, "total", config.batch_size, examples)}
    for interval in ("evaluate_every", "checkpoint_every"):
        told[interval] = duration(config, interval, config.batch_size, examples, default=0, up=True)
    if told["total"] < 1:
        raise UserError(
            f"the run has zero steps ({examples} examples, batch {config.batch_size}); raise config.total_* or lower batch_size"
        )
    if config.log_every_steps < 1:
        raise UserError(f"config.log_every_steps={config.log_every_steps} must be at least 1")
    never = told["total"]
    return {"total": never, "evaluate": told["evaluate_every"] or never, "checkpoint": told["checkpoint_every"] or never}


def plain(config) -> dict:
    """A config as JSON types: what is written to the workdir and into the checkpoint."""
    return json.loads(config.to_json_best_effort() if hasattr(config, "to_json_best_effort") else json.dumps(config))


def from_plain(values: Mapping) -> ml_collections.ConfigDict:
    """The inverse of `plain`, locked."""
    return ml_collections.ConfigDict(dict(values)).lock()


def differences(old: Mapping, new: Mapping, prefix: str = "") -> list[str]:
    """'model.temperature: 0.5 -> 0.1' for every key that differs and is not free to."""
    told = []
    for key in sorted(set(old) | set(new)):
        name = f"{prefix}{key}"
        if STAGE.sub("", name).startswith(MAY_CHANGE):
            continue
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            told += differences(a, b, f"{name}.")
        elif a != b and not (key not in old and b == {}):  # a table that runs of before do not have
            told.append(f"{name}: {a} -> {b}")
    return told

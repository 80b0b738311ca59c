"""Load `--config=FILE.py[:variant] --config.a.b=value` as a locked config; every mistake is one line."""

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

from ssl_jax.engine import durations
from ssl_jax.engine.renamed_keys import refuse_old_names, refuse_override, translate
from ssl_jax.errors import UserError

# Keys that may differ when a run resumes in its workdir. They say where and how often, never what is trained. Another
# eval_batch_size, for another number of devices, evaluates a generator on other samples, as another seed would. `workdir` is
# that of a stage, whose weights are checked by fingerprint.
MAY_CHANGE = (
    "mesh", "data.workers", "data.data_dir", "log_every_steps", "checkpoint_every", "keep_checkpoints", "best_metric", "evals",
    "eval_batch_size", "workdir", "data.bank_split",
)  # fmt: skip
OPEN = ("data.features", "data.kinds", "data.vocabulary", "data.specs")  # tables to which overrides may add names of features
STAGE = re.compile(r"^(stages\.[^.]+\.(config\.)?)+")
DURATION = re.compile(r"total|evaluate_every|checkpoint_every|optim\.[^.]+\.warmup")


def load(path_and_variant: str, overrides: Sequence[str] = ()) -> ml_collections.ConfigDict:
    """The config of `FILE.py[:variant]` with `--config.a.b=value` overrides applied, locked.

    Raises:
        UserError: no such file or variant, no `get_config`, an unknown or renamed key, or a value of the wrong type.
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
        if not hasattr(module, "get_config"):
            raise UserError(f"--config={path} defines no function get_config; give a file like those in configs/")
        config = module.get_config(variant)  # what the file's own code raises keeps its traceback
    finally:
        sys.path.pop(0)
    refuse_old_names(config)
    config.lock()
    return apply_overrides(config, overrides)


def apply_overrides(config: ml_collections.ConfigDict, overrides: Sequence[str]) -> ml_collections.ConfigDict:
    """Apply `--config.a.b=value` arguments with the types of the values they replace.

    `--config.evals.NAME.kind=KIND` adds an evaluation, and `--config.evals.NAME.option=value` an option of one. The tables of OPEN
    take any key.

    Raises:
        UserError: an unknown or renamed key, or a value of the wrong type.
    """
    for argument in overrides:
        name, equals, value = argument.removeprefix("--config.").partition("=")
        if not argument.startswith("--config.") or not equals:
            raise UserError(f"argument {argument!r} is not understood; overrides look like --config.optim.net.lr=0.1")
        refuse_override(name, value)
    added = _added_evaluations(config, overrides)
    rest = [argument for argument in overrides if argument not in added and not _add_feature(config, argument)]
    for argument in rest:
        _check_key(config, argument.removeprefix("--config.").partition("=")[0])
    if rest:
        values = flags.FlagValues()
        try:
            config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=["launch.py", *rest])
            values(["launch.py", *rest])
        except (flags.Error, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"override: {str(error).splitlines()[0]}") from error
        config = values.config
    if added:
        config = config.copy_and_resolve_references()
        with config.unlocked():
            for label, option, value in added.values():
                if label not in config.evals:
                    config.evals[label] = ml_collections.ConfigDict()
                config.evals[label][option] = value
    if overrides:
        refuse_old_names(config)
    return config


def _add_feature(config, argument: str) -> bool:
    """Set a key of a table in OPEN; returns False where `argument` is of another key."""
    name, _, value = argument.removeprefix("--config.").partition("=")
    where, _, key = name.rpartition(".")
    if where not in OPEN or where.removeprefix("data.") not in config.data:
        return False
    with config.unlocked():
        config.data[where.removeprefix("data.")][key] = literal(value)
    return True


def _added_evaluations(config: Mapping, overrides: Sequence[str]) -> dict[str, tuple]:
    """{argument: (label, option, value)} of the overrides that add an evaluation to config.evals, or an option to one."""
    own = config.get("evals", {})
    matches = {argument: re.match(r"--config\.evals\.(\w+)\.(\w+)=(.*)", argument, re.DOTALL) for argument in overrides}
    found = {argument: match.groups() for argument, match in matches.items() if match}
    new = {label for label, option, _ in found.values() if option == "kind" and label not in own}
    return {
        argument: (label, option, literal(value)) for argument, (label, option, value) in found.items()
        if label in new or (label in own and option not in own[label])
    }  # fmt: skip


def literal(text: str):
    """`text` as a Python literal, else as a word."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _check_key(config: Mapping, name: str) -> None:
    node, walked = config, []
    for part in name.split("."):
        part = part.partition("[")[0]
        keys = list(node.keys()) if isinstance(node, Mapping | ml_collections.ConfigDict) else []
        if part not in keys:
            near = difflib.get_close_matches(part, keys, 1)
            where = ".".join(["config", *walked])
            hint = f"did you mean {where}.{near[0]}?" if near else f"{where} has {', '.join(sorted(keys)) or 'no keys'}"
            hint += f"; --config.evals.{part}.kind=KIND adds one" if walked == ["evals"] else ""
            raise UserError(f"unknown key {where}.{part}; {hint}")
        node = node[part]
        walked.append(part)


def resolve(config: ml_collections.ConfigDict, examples: int) -> dict[str, int]:
    """{'total', 'evaluate', 'checkpoint'} in steps, for a dataset of `examples`; an interval of 0 becomes the whole run.

    Raises:
        UserError: a run of zero steps, or an interval that is no duration.
    """
    total = durations.to_steps(config.total, "config.total", config.batch_size, examples)
    evaluate, checkpoint = (
        durations.to_steps(config[name], f"config.{name}", config.batch_size, examples, up=True)
        for name in ("evaluate_every", "checkpoint_every")
    )
    if total < 1:
        raise UserError(
            f"the run has zero steps ({examples} examples, batch {config.batch_size}); raise config.total or lower batch_size"
        )
    if config.log_every_steps < 1:
        raise UserError(f"config.log_every_steps={config.log_every_steps} must be at least 1")
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
        elif key not in old and b == {}:
            continue  # a table that earlier versions did not have
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

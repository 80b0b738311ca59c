"""Old names of config keys, of their values, and of modules in parameter trees.

Configs that an earlier version wrote (config.json of a run, the card of an export) are translated on reading. Configs and overrides
that a person types are refused, with the new name in the message. Weights are renamed on reading.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from ssl_jax.errors import UserError

# A duration used to be one of three keys.
DURATIONS = re.compile(r"(total|evaluate_every|checkpoint_every|optim\.[^.]+\.warmup)_(steps|epochs|examples)")
# {regular expression of the whole dotted key: new name of its last part}
KEYS = {
    r"optim\.[^.]+\.rates": "lr_multipliers",
    r"optim\.[^.]+\.decay": "weight_decay_mask",
    r"model\.quantiser": "quantizer",
    r"model\.quanti[sz]er\.normalise": "normalize",
    r"model\.quanti[sz]er\.update": "codebook_update",  # `update` is a method of every config
    r"model\.(encoder|generator|discriminator)\.flavour": "flavor",
    r"evals\.[^.]+\.normalisation": "normalization",
}
EVALUATION_KINDS = {
    "depth": "linear_by_layer",
    "classified": "sample_class_accuracy",
    "judge": "discriminator_memorization",
    "reduction": "pca_baseline",
    "prior": "token_likelihood",
}
# {regular expression of the whole dotted key: {old value: new value}}
VALUES = {
    r"model\.quanti[sz]er\.straight_through": {"normalised": "normalized"},
    r"model\.likelihood": {"discretised_logistic": "discretized_logistic"},
    r"evals\.[^.]+\.layer": {"normalised": "normalized"},
    r"evals\.[^.]+\.kind": EVALUATION_KINDS,
}
# Old words in the protocols of evaluations. Translating them keeps numbers of earlier versions comparable.
PROTOCOLS = {
    "standardised": "standardized", "normalisation=": "normalization=", "normalised": "normalized", "neighbours": "neighbors",
    "uncentred": "uncentered",
}  # fmt: skip
MODULES = {"quantiser": "quantizer"}  # keys in trees of parameters and of optimizer states
STAGE = re.compile(r"^(stages\.[^.]+\.config\.)+")  # a run's config contains the configs of its stages


def translate(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `config` (JSON types, any version) with the keys and values of this version."""
    return _translate(config, "")


def _translate(config: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    new: dict[str, Any] = {}
    for key, value in config.items():
        name = STAGE.sub("", prefix + key)
        duration = DURATIONS.fullmatch(name)
        if duration:
            base = key.removesuffix(f"_{duration[2]}")
            if value is not None:
                new[base] = duration_text(value, duration[2])
            elif base != "warmup":
                new.setdefault(base, "0 steps")
        elif isinstance(value, Mapping):
            new[_new_part(name)] = _translate(value, f"{name}.")
        else:
            new[_new_part(name)] = _new_value(name, value)
    return new


def protocol(text: str) -> str:
    """The protocol of an evaluation (any version) in the words of this version."""
    for old, new in PROTOCOLS.items():
        text = text.replace(old, new)
    return text


def duration_text(value: Any, unit: str) -> str:
    """45.0, 'epochs' -> '45 epochs'."""
    return f"{int(value) if isinstance(value, float) and value.is_integer() else value} {unit}"


def _new_part(name: str) -> str:
    """The new name of the last part of a dotted key."""
    return next((new for old, new in KEYS.items() if re.fullmatch(old, name)), name.rpartition(".")[2])


def _new_value(name: str, value: Any) -> Any:
    for key, values in VALUES.items():
        if isinstance(value, str) and re.fullmatch(key, name):
            return values.get(value, value)
    return value


def new_name(name: str) -> str:
    """A dotted key with the new name of every part."""
    parts = name.split(".")
    return ".".join(_new_part(".".join(parts[: i + 1])) for i in range(len(parts)))


def refuse_override(name: str, value: str) -> None:
    """Raises UserError, with the new spelling, if `--config.NAME=VALUE` names an old key."""
    duration = DURATIONS.fullmatch(name)
    if duration:
        raise UserError(f"config.{name} was renamed: say --config.{duration[1]}={duration_text(value, duration[2])!r}")
    if new_name(name) != name:
        raise UserError(f"config.{name} was renamed: say --config.{new_name(name)}={value}")


def refuse_old_names(config: Mapping[str, Any]) -> None:
    """Raises UserError, with the new spelling, if a config file has an old key or value."""
    for name, value in _leaves(config, ""):
        duration = DURATIONS.fullmatch(name)
        if duration:
            raise UserError(f"config.{name} was renamed: say config.{duration[1]} = {duration_text(value, duration[2])!r}")
        if new_name(name) != name:
            raise UserError(f"config.{name} was renamed: say config.{new_name(name)}")
        if _new_value(name, value) is not value:
            raise UserError(f"config.{name}={value!r} was renamed: say {_new_value(name, value)!r}")


def rename(tree: Any, names: Mapping[str, str]) -> Any:
    """A tree of dicts, tuples and lists with renamed dict keys; `names` is {old: new}."""
    if isinstance(tree, Mapping):
        return {names.get(key, key): rename(value, names) for key, value in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(rename(value, names) for value in tree))
    return type(tree)(rename(value, names) for value in tree) if isinstance(tree, tuple | list) else tree


def old_names_in(tree: Any) -> dict[str, str]:
    """{new name: old name} for the MODULES that have old names in `tree`; {} for trees of this version."""
    if isinstance(tree, Mapping):
        found = {MODULES[key]: key for key in tree if key in MODULES}
        return found | {new: old for value in tree.values() for new, old in old_names_in(value).items()}
    return {new: old for value in tree for new, old in old_names_in(value).items()} if isinstance(tree, tuple | list) else {}


def first_names(tree: Any) -> Any:
    """`tree` with the original names of its modules, so that a fingerprint over names survives a renaming."""
    return rename(tree, {new: old for old, new in MODULES.items()})


def _leaves(config: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if hasattr(value, "items") and not prefix.startswith("stages."):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value

"""Old names of config keys, of their values, and of modules in parameter trees.

A config that an earlier version wrote (config.json of a run, the card of an export) is translated when it is read. A config or an
override that a person types is refused with the new name. Weights are renamed when they are read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from ssl_jax.errors import UserError

# A duration was three keys, of which one was given.
DURATIONS = re.compile(r"(total|evaluate_every|checkpoint_every|optim\.[^.]+\.warmup)_(steps|epochs|examples)")
# A regular expression of the whole dotted key -> the new name of its last part.
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
# A regular expression of the whole dotted key -> {old value: new value}.
VALUES = {
    r"model\.quanti[sz]er\.straight_through": {"normalised": "normalized"},
    r"model\.likelihood": {"discretised_logistic": "discretized_logistic"},
    r"evals\.[^.]+\.layer": {"normalised": "normalized"},
    r"evals\.[^.]+\.kind": EVALUATION_KINDS,
}
# Words in the protocols of evaluations, so that numbers of earlier versions stay comparable.
PROTOCOLS = {
    "standardised": "standardized", "normalisation=": "normalization=", "normalised": "normalized", "neighbours": "neighbors",
    "uncentred": "uncentered",
}  # fmt: skip
MODULES = {"quantiser": "quantizer"}  # keys of params, and of what optimizers keep of them
STAGE = re.compile(r"^(stages\.[^.]+\.config\.)+")  # a run's config holds the configs of the runs that it stands on


def translate(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config of JSON types, of any version, with the keys and values of this one. The argument is left as it is."""
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
    """The protocol of an evaluation, of any version, in the words of this one."""
    for old, new in PROTOCOLS.items():
        text = text.replace(old, new)
    return text


def duration_text(value: Any, unit: str) -> str:
    """'45 epochs' of 45.0 and 'epochs'."""
    return f"{int(value) if isinstance(value, float) and value.is_integer() else value} {unit}"


def _new_part(name: str) -> str:
    """The last part of a dotted key, as it is called now."""
    return next((new for old, new in KEYS.items() if re.fullmatch(old, name)), name.rpartition(".")[2])


def _new_value(name: str, value: Any) -> Any:
    for key, values in VALUES.items():
        if isinstance(value, str) and re.fullmatch(key, name):
            return values.get(value, value)
    return value


def new_name(name: str) -> str:
    """A dotted key, every part of which is called what it is called now."""
    parts = name.split(".")
    return ".".join(_new_part(".".join(parts[: i + 1])) for i in range(len(parts)))


def refuse_override(name: str, value: str) -> None:
    """Raises UserError, with what to say instead, if `--config.NAME=VALUE` names an old key."""
    duration = DURATIONS.fullmatch(name)
    if duration:
        raise UserError(f"config.{name} was renamed: say --config.{duration[1]}={duration_text(value, duration[2])!r}")
    if new_name(name) != name:
        raise UserError(f"config.{name} was renamed: say --config.{new_name(name)}={value}")


def refuse_old_names(config: Mapping[str, Any]) -> None:
    """Raises UserError, with what to say instead, if a config that somebody wrote has an old key or value."""
    for name, value in _leaves(config, ""):
        duration = DURATIONS.fullmatch(name)
        if duration:
            raise UserError(f"config.{name} was renamed: say config.{duration[1]} = {duration_text(value, duration[2])!r}")
        if new_name(name) != name:
            raise UserError(f"config.{name} was renamed: say config.{new_name(name)}")
        if _new_value(name, value) != value:
            raise UserError(f"config.{name}={value!r} was renamed: say {_new_value(name, value)!r}")


def rename(tree: Any, names: Mapping[str, str]) -> Any:
    """A tree of dicts, tuples and lists with other keys in its dicts; `names` are {old: new}."""
    if isinstance(tree, Mapping):
        return {names.get(key, key): rename(value, names) for key, value in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(rename(value, names) for value in tree))
    return type(tree)(rename(value, names) for value in tree) if isinstance(tree, tuple | list) else tree


def names_of(tree: Any) -> dict[str, str]:
    """{name of this version: name in `tree`} of the MODULES that have their old names there: {} of what this version wrote."""
    if isinstance(tree, Mapping):
        found = {MODULES[key]: key for key in tree if key in MODULES}
        return found | {new: old for value in tree.values() for new, old in names_of(value).items()}
    return {new: old for value in tree for new, old in names_of(value).items()} if isinstance(tree, tuple | list) else {}


def first_names(tree: Any) -> Any:
    """`tree` with the names that its modules had first: a fingerprint over names stays the same when a module is renamed."""
    return rename(tree, {new: old for old, new in MODULES.items()})


def _leaves(config: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if hasattr(value, "items") and not prefix.startswith("stages."):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value

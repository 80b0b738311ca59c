"""The vocabulary of a run's texts and of the names of classes: built once from the train split, then kept in the workdir."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ssl_jax.data.vocabulary import Vocabulary, build_vocabulary, from_json, to_json
from ssl_jax.engine.checkpoint import write_json
from ssl_jax.engine.method import Method
from ssl_jax.engine.records import read_json
from ssl_jax.errors import UserError


def open_vocabulary(config, train, workdir: Path | None) -> dict[str, Vocabulary]:
    """The vocabulary of each feature in `config.data.vocabulary`, from `workdir`, or built from the train split.

    Raises:
        UserError: the vocabulary has another number of words than the config says.
    """
    sizes, path = dict(config.data.get("vocabulary", {})), workdir and workdir / "vocabulary.json"
    if not sizes:
        return {}
    if path and path.exists():
        remedy = "restore it from a backup, or start again in another --workdir"
        values = read_json(path, dict, remedy=remedy)
        if wrong := [name for name, each in values.items() if not _is_vocabulary(each)]:
            raise UserError(f"{path} is damaged ({wrong[0]!r} is no vocabulary); {remedy}")
        found = from_json(values)
    else:
        found = build_vocabulary(train, list(sizes))
    for name, size in sizes.items():
        if name not in found or size not in (None, len(found[name].tokens)):
            there = f"{len(found[name].tokens)} words" if name in found else "no words"
            where = path if path and path.exists() else "the train split"
            raise UserError(f"config.data.vocabulary.{name}={size}, but {where} has {there}; leave the number out")
    return found


def keep_vocabulary(vocabulary: Mapping[str, Vocabulary], workdir: Path | None) -> None:
    """Write it to `workdir`, unless it is there; a start that was refused leaves none behind, which may be of other data."""
    if vocabulary and workdir and not (workdir / "vocabulary.json").exists():
        write_json(workdir / "vocabulary.json", to_json(vocabulary))


def _is_vocabulary(each) -> bool:
    tokens, longest = (each.get("tokens"), each.get("longest")) if isinstance(each, dict) else (None, None)
    return isinstance(tokens, list) and all(isinstance(token, str) for token in tokens) and type(longest) is int and longest >= 0


def check_lengths(method: Method, vocabulary: Mapping[str, Vocabulary]) -> None:
    """Raises UserError where a text of the train split is longer than the input that `method` declares."""
    for name, (shape, _) in method.inputs.items():
        if name in vocabulary and shape and shape[-1] < vocabulary[name].longest:
            raise UserError(f"input {name!r} has {shape[-1]} tokens; the longest text has {vocabulary[name].longest}")

"""Searches for the fastest mesh, batch and rematerialization of a config that fit into the memory of devices that are not there.

Each candidate is rehearsed: compiled, and its step time predicted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from ssl_jax.engine.sharding import AXES, make_mesh
from ssl_jax.errors import UserError
from ssl_jax.experiment.abstract import build_abstract
from ssl_jax.rehearsal import memory
from ssl_jax.rehearsal.topology import Slice

log = logging.getLogger(__name__)
REMATS = ("none", "dots", "full")  # from the fastest to the smallest; for models with a boolean, "dots" and "full" are True
TENSOR = 4  # size of the axis 'tensor', tried where the config has sharding rules for it
HALVINGS = 2  # how often a batch that does not fit is halved


class Candidate(NamedTuple):
    mesh: tuple[int, int, int]  # sizes of AXES
    batch_size: int
    remat: str | None  # one of REMATS; None: the model has no such field

    def changes(self, config) -> dict:
        """{dotted key of the config: value}"""
        found = {f"mesh.{axis}": size for axis, size in zip(AXES, self.mesh, strict=True)} | {"batch_size": self.batch_size}
        for key, value in choices(config.model):
            found[f"model.{key}"] = self.remat != "none" if isinstance(value, bool) else self.remat
        return found


def fit(config, where: Slice, rehearse: Callable[[object], dict]) -> dict:
    """Rehearse candidates and rank them.

    More rematerialization is tried only where less does not fit, twice the batch only where the batch fits, and half of it only
    where it does not. The mesh that shards the state most comes first: what does not fit there fits nowhere.

    Args:
        config: not yet filled in.
        rehearse: (AbstractExperiment) -> facts, `rehearse.rehearse` on the devices of `where`.

    Returns:
        JSON types: {'candidates': [...], 'own': the config as it stands, 'flags': overrides of the fastest, [] where nothing fits}.
        Candidates that fit come first, the fastest before the others, then the rest, the smallest first.

    Raises:
        UserError: devices of unknown memory and speed, or a config that is wrong on every mesh.
    """
    if not where.chip:
        raise UserError("--fit needs devices whose memory and speed are known; give TPUs or GPUs as --topology")
    tried: dict[Candidate, dict | None] = {}
    problems = []

    def attempt(candidate: Candidate) -> dict | None:
        """The facts of a candidate; None where the config is wrong with it."""
        if candidate not in tried:
            try:
                tried[candidate] = _rehearsed(config, candidate, where, rehearse)
            except UserError as error:
                problems.append(error)
                tried[candidate] = None
        return tried[candidate]

    own = _own(config, where)
    own_facts = attempt(own) if own else None
    levels = dict.fromkeys((mesh[2] for mesh in _meshes(config, where, own)), _levels(config))
    for mesh in _meshes(config, where, own):
        levels[mesh[2]] = _climb(mesh, config.batch_size, levels[mesh[2]], attempt)
    found = [row for row in tried.values() if row]
    if not found:
        raise problems[0]
    found.sort(key=lambda row: (not row["fits"], -_speed(row), row["bytes"]))
    device = {"chip_bytes": int(where.chip.memory), "usable_bytes": where.chip.usable}
    return {**device, "candidates": found, "own": own_facts, "flags": found[0]["flags"] if found[0]["fits"] else []}


def choices(model: Mapping, prefix: str = "") -> Iterator[tuple[str, object]]:
    """(dotted key, value) of every 'remat' in `config.model`."""
    for key, value in model.items():
        if key == "remat":
            yield prefix + key, value
        elif hasattr(value, "items"):
            yield from choices(value, f"{prefix}{key}.")


def _climb(mesh, batch_size: int, levels: tuple, attempt) -> tuple:
    """Try the batch, then twice of it, or half of it until it fits; returns the levels left to try with more state per device."""

    def fitting(batch: int, levels: tuple) -> tuple | None:
        """The levels from the first that fits; () if none does, None if no batch would fit."""
        for i, level in enumerate(levels):
            row = attempt(Candidate(mesh, batch, level))
            if row is None or row["hopeless"]:
                return None
            if row["fits"]:
                return levels[i:]
        return ()

    left = fitting(batch_size, levels)
    if left:
        fitting(2 * batch_size, left)
    if left or left is None:
        return left or levels
    for halving in range(HALVINGS):
        if fitting(batch_size // 2 ** (halving + 1), levels[-1:]) != ():
            break
    return levels[-1:]


def _rehearsed(config, candidate: Candidate, where: Slice, rehearse) -> dict:
    changes = candidate.changes(config)
    changed = config.copy_and_resolve_references()
    with changed.unlocked():
        changed.update_from_flattened_dict(changes)
    experiment = build_abstract(changed, where.devices, where.platform)
    state = sum(memory.bytes_of_device(x) for x in experiment.run.abstract)
    row = {
        "mesh": dict(zip(AXES, candidate.mesh, strict=True)),
        "batch_size": candidate.batch_size,
        "remat": candidate.remat,
        "flags": [f"--config.{key}={value}" for key, value in changes.items()],
        "hopeless": state > where.chip.usable,  # the state alone does not fit
    }
    if row["hopeless"]:
        arrays = memory.largest(experiment.run.abstract)
        facts = {"fits": False, "exhausted": {"used": state, "limit": where.chip.usable, "largest": arrays}}
    else:
        facts = rehearse(experiment)
    row |= {"fits": facts["fits"], "exhausted": facts.get("exhausted"), "prediction": facts.get("prediction")}
    row["bytes"] = facts["needed_bytes"] if facts["fits"] else (row["exhausted"]["used"] or 0)
    row["seconds"] = sum(facts.get("seconds", {}).values())
    log.info("%s: %s, %.2f GiB", " ".join(row["flags"]), "fits" if row["fits"] else "does not fit", row["bytes"] / 2**30)
    return row


def _speed(row: Mapping) -> float:
    return row["prediction"]["bound"]["images_per_second"] if row["fits"] else 0.0


def _levels(config) -> tuple[str | None, ...]:
    values = [value for _, value in choices(config.model)]
    if not values:
        return (None,)
    return ("none", "full") if all(isinstance(value, bool) for value in values) else REMATS


def _own(config, where: Slice) -> Candidate | None:
    """The config as it stands; None where its mesh does not fit the number of devices."""
    try:
        mesh = make_mesh(config.mesh, where.devices)
    except UserError:
        return None
    values = [value for _, value in choices(config.model)]
    remat = next((("none", "full")[value] if isinstance(value, bool) else value for value in values), None)
    return Candidate(tuple(mesh.shape.values()), config.batch_size, remat)


def _meshes(config, where: Slice, own: Candidate | None) -> list[tuple[int, int, int]]:
    """The meshes to try, the smallest state per device first.

    They are the config's own; fsdp over all devices of a slice (of GPUs: of a host), over about the square root of that, and over
    one; and, where the config has rules for 'tensor', that axis with fsdp over the rest of the slice.
    """
    groups = where.hosts if where.platform == "gpu" else where.slices  # fsdp and tensor stay within one of these
    size = len(where.devices) // groups
    side = min((n for n in range(1, size + 1) if size % n == 0), key=lambda n: abs(n - size**0.5))
    found = [(len(where.devices) // fsdp, fsdp, 1) for fsdp in (size, side, 1)]
    if size % TENSOR == 0 and any("tensor" in rule for _, rule in config.sharding if not isinstance(rule, str)):
        found.append((groups, size // TENSOR, TENSOR))
    if own:
        found.append(own.mesh)
    return sorted(set(found), key=lambda mesh: -mesh[1] * mesh[2])

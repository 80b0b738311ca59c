"""Which mesh, batch and rematerialization of a config fit into devices that are not there, and which of them is fastest: a few
candidates, each of which is rehearsed.
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
REMATS = ("none", "dots", "full")  # from the fastest to the smallest; where a model says yes or no, the latter two are a yes
TENSOR = 4  # the split over 'tensor' that is tried where the config has rules for one
HALVINGS = 2  # of a batch that does not fit


class Candidate(NamedTuple):
    mesh: tuple[int, int, int]  # sizes of AXES
    batch_size: int
    remat: str | None  # of REMATS; None: the model has no such choice

    def changes(self, config) -> dict:
        """{dotted key of the config: value}"""
        found = {f"mesh.{axis}": size for axis, size in zip(AXES, self.mesh, strict=True)} | {"batch_size": self.batch_size}
        for key, value in choices(config.model):
            found[f"model.{key}"] = self.remat != "none" if isinstance(value, bool) else self.remat
        return found


def fit(config, where: Slice, rehearse: Callable[[object], dict]) -> dict:
    """{'candidates': [...], 'own': the config as it stands, 'flags': overrides of the fastest, [] where nothing fits}, as JSON types.

    Candidates that fit come first, the one with the most images per second at its bound before the others, then those that do not, the
    smallest first. Rematerialization is tried only where what keeps more does not fit, twice the batch only where the batch fits, and
    half of it only where it does not. The mesh that splits the state most is tried first: what does not fit there fits nowhere.

    Args:
      config: not yet filled in.
      rehearse: of an `Abstract`: `cli.rehearse.rehearse` for `where`.

    Raises:
        UserError: devices whose memory and speed are not known, or a config that no mesh makes right.
    """
    if not where.chip:
        raise UserError("--fit needs devices whose memory and speed are known; give --topology TPUs or GPUs")
    tried: dict[Candidate, dict | None] = {}
    problems = []

    def attempt(candidate: Candidate) -> dict | None:
        """What is found out about a candidate; None where the config says no to it."""
        if candidate not in tried:
            try:
                tried[candidate] = _rehearsed(config, candidate, where, rehearse)
            except UserError as error:
                problems.append(error)
                tried[candidate] = None
        return tried[candidate]

    own = _own(config, where)
    stands = attempt(own) if own else None
    levels = dict.fromkeys((mesh[2] for mesh in _meshes(config, where, own)), _levels(config))
    for mesh in _meshes(config, where, own):
        levels[mesh[2]] = _climb(mesh, config.batch_size, levels[mesh[2]], attempt)
    found = [row for row in tried.values() if row]
    if not found:
        raise problems[0]
    found.sort(key=lambda row: (not row["fits"], -_speed(row), row["bytes"]))
    device = {"chip_bytes": int(where.chip.memory), "usable_bytes": where.chip.usable}
    return {**device, "candidates": found, "own": stands, "flags": found[0]["flags"] if found[0]["fits"] else []}


def choices(model: Mapping, prefix: str = "") -> Iterator[tuple[str, object]]:
    """(dotted key, value) of every 'remat' in `config.model`."""
    for key, value in model.items():
        if key == "remat":
            yield prefix + key, value
        elif hasattr(value, "items"):
            yield from choices(value, f"{prefix}{key}.")


def _climb(mesh, batch_size: int, levels: tuple, attempt) -> tuple:
    """Try the batch, then twice or, until it fits, half of it; returns the levels that are left to try with a larger state."""

    def first(batch: int, levels: tuple) -> tuple | None:
        """The levels from the first that fits, () if none does, None if no batch will."""
        for i, level in enumerate(levels):
            row = attempt(Candidate(mesh, batch, level))
            if row is None or row["hopeless"]:
                return None
            if row["fits"]:
                return levels[i:]
        return ()

    left = first(batch_size, levels)
    if left:
        first(2 * batch_size, left)
    if left or left is None:
        return left or levels
    for halving in range(HALVINGS):
        if first(batch_size // 2 ** (halving + 1), levels[-1:]) != ():
            break
    return levels[-1:]


def _rehearsed(config, candidate: Candidate, where: Slice, rehearse) -> dict:
    changes = candidate.changes(config)
    changed = config.copy_and_resolve_references()
    with changed.unlocked():
        changed.update_from_flattened_dict(changes)
    this = build_abstract(changed, where.devices, where.platform)
    state = sum(memory.bytes_of_device(x) for x in this.run.abstract)
    row = {
        "mesh": dict(zip(AXES, candidate.mesh, strict=True)),
        "batch_size": candidate.batch_size,
        "remat": candidate.remat,
        "flags": [f"--config.{key}={value}" for key, value in changes.items()],
        "hopeless": state > where.chip.usable,  # whatever the batch
    }
    if row["hopeless"]:
        arrays = memory.largest(this.run.abstract)
        told = {"fits": False, "exhausted": {"used": state, "limit": where.chip.usable, "largest": arrays}}
    else:
        told = rehearse(this)
    row |= {"fits": told["fits"], "exhausted": told.get("exhausted"), "prediction": told.get("prediction")}
    row["bytes"] = told["needed_bytes"] if told["fits"] else (row["exhausted"]["used"] or 0)
    row["seconds"] = sum(told.get("seconds", {}).values())
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
    """The config as it stands; None where its mesh is not one of these devices."""
    try:
        mesh = make_mesh(config.mesh, where.devices)
    except UserError:
        return None
    values = [value for _, value in choices(config.model)]
    remat = next((("none", "full")[value] if isinstance(value, bool) else value for value in values), None)
    return Candidate(tuple(mesh.shape.values()), config.batch_size, remat)


def _meshes(config, where: Slice, own: Candidate | None) -> list[tuple[int, int, int]]:
    """The config's own; all devices of a slice (of GPUs: of a host) for fsdp, about one side of a square of them, none; where there are
    rules for it also 'tensor' with all others for fsdp. In the order of the bytes of the state.
    """
    apart = where.hosts if where.platform == "gpu" else where.slices  # what is not data stays within one of these
    each = len(where.devices) // apart
    side = min((n for n in range(1, each + 1) if each % n == 0), key=lambda n: abs(n - each**0.5))
    found = [(len(where.devices) // fsdp, fsdp, 1) for fsdp in (each, side, 1)]
    if each % TENSOR == 0 and any("tensor" in rule for _, rule in config.sharding if not isinstance(rule, str)):
        found.append((apart, each // TENSOR, TENSOR))
    if own:
        found.append(own.mesh)
    return sorted(set(found), key=lambda mesh: -mesh[1] * mesh[2])

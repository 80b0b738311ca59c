"""The directory of a sweep: `sweep.json`, one folder per variation with a workdir for each seed, and a lock. Imports no JAX.

`sweep.json` holds {"version", "name", "baseline", "seeds", "variations", "runs"}. A variation is {"name", "config", "overrides":
flags, "keys": {key: text of its value}}, a run {"name": of its variation, "seed", "workdir": relative path}.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from ssl_jax import files
from ssl_jax.engine.records import read_json
from ssl_jax.errors import UserError, workdir_not_made
from ssl_jax.experiment import runs
from ssl_jax.experiment.config import MAY_CHANGE
from ssl_jax.experiment.sweep import Sweep, written

VERSION = 1
LONGEST = 100  # characters of the name of a folder
REMEDY = "restore it from a backup, or give another --workdir"


def record(sweep: Sweep, common: Sequence[str], workdir: Path) -> dict[str, Any]:
    """What `sweep.json` will hold: the plan, with the folders that `workdir` has already.

    Args:
        common: overrides of all runs.

    Raises:
        UserError: `workdir` holds a plain run, another sweep, or a variation of the same name with another config.
    """
    earlier = read(workdir) if (workdir / "sweep.json").exists() else None
    if earlier is None and (workdir / "config.json").exists():
        raise UserError(f"--workdir={workdir} holds a run (config.json), and a sweep needs a directory of its own; give another one")
    variations = described(sweep, common)
    folders = {run["name"]: PurePosixPath(run["workdir"]).parts[0] for run in earlier["runs"]} if earlier else {}
    if earlier:
        _check_same(earlier, variations, sweep.seeds, workdir)
    for variation in variations:
        if variation["name"] not in folders:
            folders[variation["name"]] = _folder(variation["name"], folders.values())
    planned = [
        {"name": variation["name"], "seed": seed, "workdir": f"{folders[variation['name']]}/seed-{seed}"}
        for variation in variations
        for seed in sweep.seeds
    ]
    name = sweep.name or workdir.resolve().name
    head = {"version": VERSION, "name": name, "baseline": sweep.baseline, "seeds": list(sweep.seeds)}
    return {**head, "variations": variations, "runs": planned}


def described(sweep: Sweep, common: Sequence[str]) -> list[dict[str, Any]]:
    """The variations as `sweep.json` holds them."""
    return [
        {
            "name": variation.name,
            "config": variation.config,
            "overrides": [*flags(sweep.common), *common, *flags(variation.overrides)],
            "keys": {key: written(value) for key, value in variation.overrides.items()},
        }
        for variation in sweep.variations
    ]


def flags(overrides: Mapping[str, Any]) -> list[str]:
    """['--config.model.temperature=0.1'] of {'model.temperature': 0.1}"""
    return [f"--config.{key}={written(value)}" for key, value in overrides.items()]


def _check_same(earlier: Mapping, variations: Sequence[Mapping], seeds: Sequence[int], workdir: Path) -> None:
    """Raises UserError unless the new plan has all of the earlier one."""
    new = {variation["name"]: variation for variation in variations}
    for old in earlier["variations"]:
        if old["name"] not in new:
            raise UserError(
                f"--workdir={workdir} holds a sweep with the variation {old['name']!r}, which this one lacks; give all of its "
                "variations and more, or another --workdir"
            )
        before, now = ([item["config"], *sorted(_kept(item["overrides"]))] for item in (old, new[old["name"]]))
        if before != now:
            changed = [*(set(before) - set(now)), *(set(now) - set(before))]
            raise UserError(
                f"the variation {old['name']!r} had another config or other overrides in --workdir={workdir} "
                f"({', '.join(changed[:3])}); give it another name, or give another --workdir"
            )
    gone = [seed for seed in earlier["seeds"] if seed not in seeds]
    if gone:
        raise UserError(f"--workdir={workdir} holds the seed {gone[0]}, which this sweep lacks; give all of its seeds and more")


def _kept(overrides: Sequence[str]) -> list[str]:
    """The overrides that a run must keep when it goes on."""
    return [text for text in overrides if not text.removeprefix("--config.").startswith(MAY_CHANGE)]


def _folder(name: str, taken) -> str:
    """A name for a folder that no other of `taken` has, also where case does not count."""
    slug = re.sub(r"[^A-Za-z0-9._=+-]+", "-", name).strip("-.") or "variation"
    if len(slug) > LONGEST or slug.casefold() in {each.casefold() for each in taken}:
        slug = f"{slug[:LONGEST]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return slug


def read(workdir: Path) -> dict[str, Any]:
    """The content of `sweep.json`. Raises UserError if there is none, or if it is damaged."""
    path = workdir / "sweep.json"
    needs = {"version": int, "name": str, "baseline": (str, type(None)), "seeds": list, "variations": list, "runs": list}
    plan = read_json(path, dict, needs, REMEDY)
    if plan["version"] != VERSION:
        raise UserError(f"{path} has version {plan['version']}, and this ssl_jax reads {VERSION}; update it, or give another --workdir")
    tables = {
        "variations": {"name": str, "config": str, "overrides": list, "keys": dict},
        "runs": {"name": str, "seed": int, "workdir": str},
    }
    for table, fields in tables.items():
        for number, row in enumerate(plan[table]):
            if not isinstance(row, dict) or any(not isinstance(row.get(field), kind) for field, kind in fields.items()):
                raise UserError(f"{path} is damaged (entry {number} of {table} lacks a field); {REMEDY}")
            place = PurePosixPath(row.get("workdir", "a/b"))
            if len(place.parts) != 2 or place.is_absolute() or ".." in place.parts:
                raise UserError(f"{path} is damaged (entry {number} of {table} has the workdir {str(place)!r}); {REMEDY}")
    names = {variation["name"] for variation in plan["variations"]}
    if any(run["name"] not in names for run in plan["runs"]):
        raise UserError(f"{path} is damaged (a run belongs to no variation); {REMEDY}")
    return plan


def write(plan: Mapping[str, Any], workdir: Path) -> None:
    """Write `sweep.json`. Raises MachineFault if the disk fails."""
    files.write(workdir / "sweep.json", json.dumps(plan, indent=1) + "\n")


def lock(workdir: Path):
    """Create `workdir` and lock it until the returned file is closed or this process ends.

    Raises:
        UserError: it cannot be written, or another process uses it.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        return files.lock(workdir / ".lock")
    except BlockingIOError:
        raise UserError(f"--workdir={workdir} is in use by another sweep; wait for it or choose another directory") from None
    except OSError as error:
        raise workdir_not_made(workdir, error) from None


def planned_runs(plan: Mapping[str, Any], workdir: Path) -> list[runs.Run]:
    """The runs of a plan in order: all variations with the first seed, then with the next one.

    So a sweep that ends early has every variation, and comparisons stay paired.
    """
    variations = {variation["name"]: variation for variation in plan["variations"]}
    found = []
    for run in sorted(plan["runs"], key=lambda run: plan["seeds"].index(run["seed"])):
        variation = variations[run["name"]]
        flags = (*variation["overrides"], f"--config.seed={run['seed']}")
        found.append(runs.Run(f"{run['name']} seed {run['seed']}", variation["config"], flags, workdir / run["workdir"]))
    return found

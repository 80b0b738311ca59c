"""Reads runs and sweeps, and puts runs of one config into groups that differ in their seeds only. Imports no JAX."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ssl_jax.engine.records import FEATURE_PARTS, read_evaluations
from ssl_jax.engine.renamed_keys import protocol
from ssl_jax.errors import MachineFault, UserError
from ssl_jax.experiment import sweep_folder
from ssl_jax.experiment.config import STAGE, differences
from ssl_jax.report.run import RunRecord, read_run
from ssl_jax.report.sections import flatten

SWEEP = "sweep.json"
OF_A_SEED = ("seed", "fingerprint", "workdir")  # keys, also of stages, that differ between runs of one group
DERIVED = ("data.image_shape", "data.num_classes", "data.examples")  # follow from other keys
NAMED, SHORT = 3, 40  # keys in the name of a group, and characters of a value there
TRAINED = "trained"
# {(metric '<label>/<name>', protocol without the parts that depend on the features): value}; NaN where the file says so
Evaluation = dict[tuple[str, str], float]


class Run(NamedTuple):
    """A workdir, or the place of one that a sweep has not started yet."""

    name: str  # its directory, as it was given
    record: RunRecord
    seed: int
    command: str  # '' where it was not recorded
    evaluations: dict[str, dict[int, Evaluation]]  # {subject: {step: ...}}
    damage: str  # why evaluations.json cannot be read, or ''

    @property
    def finished(self) -> bool:
        """All steps are logged, and the evaluations after the last one are written where the config has some."""
        total = self.record.total
        if total is None or self.damage or self.record.step < total:
            return False
        return not self.record.setting("evals") or total in self.evaluations.get(TRAINED, {})

    @property
    def state(self) -> str:
        record = self.record
        if self.damage:
            return self.damage
        if not record.config:
            return "not started"
        if (record.workdir / "stopped.json").is_file():
            return f"stopped at a loss that is not finite, after step {record.step:,}"
        if self.finished:
            return "finished"
        if record.total is not None and record.step >= record.total:
            return f"trained, step {record.step:,}, not evaluated"
        return f"unfinished, step {record.step:,}" + (f" of {record.total:,}" if record.total else "")

    def evaluation(self, subject: str, step: int | None) -> Evaluation | None:
        """Of the trained model at `step`, where None is the end of a finished run; of baselines the last one."""
        found = self.evaluations.get(subject, {})
        if subject != TRAINED:
            return found[max(found)] if found else None
        return found.get((self.record.total if self.finished else -1) if step is None else step)


class Group(NamedTuple):
    """Runs of one config with different seeds."""

    name: str
    runs: list[Run]  # ascending seeds
    keys: dict[str, str]  # {varied key: value as text}

    @property
    def config(self) -> dict:
        return next((run.record.config for run in self.runs if run.record.config), {})

    def values(self, metric: str, under: str, step: int | None = None, subject: str = TRAINED) -> dict[int, float]:
        """{seed: value} of the runs that measured `metric` under the protocol `under`."""
        values = {}
        for run in self.runs:
            found = run.evaluation(subject, step) or {}
            if (metric, under) in found:
                values[run.seed] = found[metric, under]
        return values


class Comparison(NamedTuple):
    groups: list[Group]
    baseline: Group | None  # None for a single group


def read_comparison(folders: Sequence[Path], baseline: str | None = None) -> Comparison:
    """Read runs and sweeps. The baseline is the group named so, else that of the only sweep, else the first group.

    Raises:
        UserError: a directory that holds neither, a run that is given twice, an unknown baseline, a damaged sweep.json.
    """
    sweeps, plain, seen, own = [], [], set(), None
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is no directory; give directories of runs or sweeps")
        if (folder / SWEEP).is_file():
            name, own, groups = _read_sweep(folder)
            sweeps.append((name, groups))
            runs = [run for group in groups for run in group.runs]
        elif (folder / "config.json").is_file():
            runs = [_read_run(folder, str(folder))]
            plain += runs
        else:
            inside = any(folder.glob("*/config.json")) or any(folder.glob(f"*/{SWEEP}"))
            hint = f"give those in it: {folder}/*" if inside else "give directories of runs or sweeps"
            raise UserError(f"{folder} holds no run and no sweep (no config.json, no {SWEEP}); {hint}")
        for run in runs:
            if (place := run.record.workdir.resolve()) in seen:
                raise UserError(f"{run.name} is given twice; give each directory once")
            seen.add(place)
    groups = [
        group._replace(name=group.name if len(sweeps) == 1 and not plain else f"{name}: {group.name}")
        for name, of_sweep in sweeps for group in of_sweep
    ]  # fmt: skip
    groups = _unique([*groups, *_grouped(plain)])
    if own is not None and len(sweeps) == 1:
        own = own if not plain else f"{sweeps[0][0]}: {own}"
    names = [group.name for group in groups]
    if baseline is not None and baseline not in names:
        raise UserError(f"--baseline={baseline} is unknown; choose of {', '.join(map(repr, names))}")
    wanted = baseline or (own if len(sweeps) == 1 else None)
    chosen = next((group for group in groups if group.name == wanted), groups[0])
    return Comparison(groups, chosen if len(groups) > 1 else None)


def _read_sweep(folder: Path) -> tuple[str, str | None, list[Group]]:
    """(name, baseline, a group for each variation)."""
    sweep = sweep_folder.read(folder)
    variations = {item["name"]: item for item in sweep["variations"]}
    runs: dict[str, list[Run]] = {name: [] for name in variations}
    for item in sweep["runs"]:
        variation, workdir = variations[item["name"]], folder / item["workdir"]
        flags = [f"--config={variation['config']}", *map(str, variation["overrides"]), f"--config.seed={item['seed']}"]
        command = shlex.join(["python", "launch.py", "train", *flags, f"--workdir={workdir}"])
        runs[item["name"]].append(_read_run(workdir, str(workdir), item["seed"], command))
    groups = [
        Group(name, sorted(of_name, key=lambda run: run.seed), {key: str(value) for key, value in variations[name]["keys"].items()})
        for name, of_name in runs.items() if of_name
    ]  # fmt: skip
    path, names = folder / SWEEP, {group.name for group in groups}
    if not groups or sweep["baseline"] not in (None, *names):
        what = f"its baseline {sweep['baseline']!r} has no run" if groups else "it lists no run"
        raise UserError(f"{path} is damaged ({what}); {sweep_folder.REMEDY}")
    return sweep["name"], sweep["baseline"], groups


def _read_run(workdir: Path, name: str, seed: int | None = None, command: str = "") -> Run:
    record = read_run(workdir, pictures=False)
    evaluations: dict[str, dict[int, Evaluation]] = {}
    damage = ""
    if not record.config and (workdir / "config.json").exists():
        damage = "config.json is damaged"
    try:
        entries = read_evaluations(workdir)
    except (UserError, MachineFault) as error:
        entries, damage = [], str(error).removeprefix(f"{workdir}/")
    for entry in entries:
        known = evaluations.setdefault(entry["subject"], {}).setdefault(entry["step"], {})
        under = {label: FEATURE_PARTS.sub("", protocol(text)) for label, text in entry["protocols"].items()}
        known.update({(name, under.get(name.partition("/")[0], "")): float(value) for name, value in entry["metrics"].items()})
    if seed is None:
        seed = record.setting("seed", 0)
        seed = seed if type(seed) is int else 0
    return Run(name, record, seed, command or str(record.provenance.get("command", "")), evaluations, damage)


def _grouped(runs: Sequence[Run]) -> list[Group]:
    """Runs of one config together, and those of one seed and config apart by their commit.

    Raises:
        UserError: two runs have the config, seed and commit in common.
    """
    groups: list[list[Run]] = []
    for run in runs:
        same = next((group for group in groups if _same_training(group[0].record.config, run.record.config)), None)
        groups.append([run]) if same is None else same.append(run)
    apart: list[list[Run]] = []
    for group in groups:
        by_commit: dict[str, list[Run]] = {}
        several = len({run.seed for run in group}) < len(group)
        for run in group:
            by_commit.setdefault(str(run.record.provenance.get("commit", "unknown")) if several else "", []).append(run)
        for of_commit in by_commit.values():
            ordered = sorted(of_commit, key=lambda run: run.seed)
            for first, second in itertools.pairwise(ordered):
                if first.seed == second.seed:
                    same = f"the same config, seed {first.seed} and commit"
                    raise UserError(f"{first.name} and {second.name} have {same}; give one of them")
            apart.append(ordered)
    return [Group(name, group, keys) for group, (name, keys) in zip(apart, _names(apart), strict=True)]


def _same_training(one: Mapping, other: Mapping) -> bool:
    if one.get("method") != other.get("method"):
        return False
    lines = differences(one, other)
    return all(STAGE.sub("", line.partition(": ")[0]) in OF_A_SEED for line in lines)


def _names(groups: Sequence[Sequence[Run]]) -> list[tuple[str, dict[str, str]]]:
    """(name, {varied key: value}) of each: the recipe or method, and keys that differ between groups of that recipe."""
    named: dict[str, list[int]] = {}
    for i, group in enumerate(groups):
        named.setdefault(_recipe(group[0]), []).append(i)
    found: list[tuple[str, dict[str, str]]] = [("", {})] * len(groups)
    for recipe, members in named.items():
        flat = [dict(flatten(groups[i][0].record.config, str)) for i in members]
        keys = [key for key in differing(flat) if key not in DERIVED and not key.startswith("evals.")]
        enough = _telling(keys, flat)
        commits = {str(groups[i][0].record.provenance.get("commit", "unknown")) for i in members}
        for i, values in zip(members, flat, strict=True):
            varied = {key: short(values.get(key, "–")) for key in keys}
            parts = [f"{key}={varied[key]}" for key in enough]
            if not keys and len(commits) > 1:
                parts = [f"commit {groups[i][0].record.provenance.get('commit', 'unknown')}"]
            found[i] = (", ".join([recipe, *parts]), varied if len(keys) <= NAMED else {})
    return found


def _telling(keys: Sequence[str], flat: Sequence[Mapping[str, str]]) -> list[str]:
    """The first keys, as few as tell all configs apart, and at most NAMED."""
    few = min(len(keys), NAMED)
    counts = (n for n in range(few) if len({tuple(config.get(key) for key in keys[:n]) for config in flat}) == len(flat))
    return list(keys[: next(counts, few)])


def _recipe(run: Run) -> str:
    """'simclr:cifar10' where the command is known, else the method."""
    config = next((part for part in shlex.split(run.command) if part.startswith("--config=")), "") if _quoted(run.command) else ""
    name = Path(config.removeprefix("--config=")).name.replace(".py", "")
    return name or str(run.record.setting("method", "unknown method"))


def _quoted(command: str) -> bool:
    try:
        return bool(shlex.split(command))
    except ValueError:
        return False


def _unique(groups: Sequence[Group]) -> list[Group]:
    """The groups, those of one name numbered."""
    names = [group.name for group in groups]
    return [
        group._replace(name=f"{group.name} ({names[: i + 1].count(group.name)})" if names.count(group.name) > 1 else group.name)
        for i, group in enumerate(groups)
    ]


def differing(configs: Sequence[Mapping[str, str]]) -> list[str]:
    """The keys of flat configs whose values are not the same in all, but those of the seeds."""
    keys = dict.fromkeys(key for config in configs for key in config)
    return [key for key in keys if STAGE.sub("", key) not in OF_A_SEED and len({config.get(key) for config in configs}) > 1]


def short(text: str) -> str:
    return text if len(text) <= SHORT else text[: SHORT - 1] + "…"

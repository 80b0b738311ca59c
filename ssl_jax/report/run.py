"""Reads the files of a workdir; an absent or damaged file is named in `missing` and raises no error."""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from ssl_jax.engine.durations import to_steps
from ssl_jax.engine.records import LARGE, finite, parse, read_json
from ssl_jax.engine.renamed_keys import translate
from ssl_jax.errors import MachineFault, UserError
from ssl_jax.experiment.transfer import Row, read_transfers

PIXELS = 1 << 26  # of a picture; the largest of ours have some millions
# What the disk and Pillow raise on a damaged picture.
BAD_PICTURE = (OSError, ValueError, TypeError, LookupError, SyntaxError, EOFError, ArithmeticError, MemoryError, struct.error,
               zlib.error, Image.DecompressionBombError)  # fmt: skip
LOGGED = re.compile(r"^\S+ \S+ (WARNING|ERROR|CRITICAL) (.*)")
EXPECTED = {
    "views": "the run has not started, or its method has no augmented views",
    "neighbors": "they are written after the last step of a run with evaluations",
}  # pictures of every run, and why one may be missing


class ReportEntry(NamedTuple):
    """One evaluation of evaluations.json."""

    subject: str  # 'raw pixels', 'untrained', 'trained'
    step: int
    metrics: dict[str, float]
    protocols: dict[str, str]  # {label: protocol}; metrics are called '<label>/...'


class RunRecord(NamedTuple):
    """The contents of a workdir; an absent or unreadable file is an empty value and a line in `missing`."""

    workdir: Path
    config: dict
    provenance: dict
    lines: list[dict[str, float]]  # of metrics.jsonl, finite numbers only
    starts: list[dict[str, float]]  # of starts.jsonl, likewise
    entries: list[ReportEntry]  # in ascending order of steps
    pictures: dict[str, bytes]  # {name: PNG}
    warnings: dict[str, int]  # {line of log.txt: how often}
    transfers: list[Row]  # of transfer/transfer.csv
    missing: list[str]

    def setting(self, name: str, default: Any = None) -> Any:
        """`setting('data.name')`; `default` where the config does not have it or holds null."""
        at: Any = self.config
        for part in name.split("."):
            at = at.get(part) if isinstance(at, Mapping) else None
        return default if at is None else at

    def count(self, name: str) -> int | None:
        """A setting that is a positive integer."""
        value = self.setting(name)
        return value if type(value) is int and 0 < value < LARGE else None

    @property
    def title(self) -> str:
        return f"{self.setting('method', 'unknown method')} on {self.setting('data.name', 'unknown data')}"

    @property
    def step(self) -> int:
        """The last logged step; 0 before the first."""
        return int(self.lines[-1]["step"]) if self.lines else 0

    @property
    def total(self) -> int | None:
        """Steps of the whole run; None where the config does not say."""
        try:
            return to_steps(self.setting("total"), "config.total", self.count("batch_size"), self.count("data.examples"))
        except (UserError, TypeError, ValueError, OverflowError):  # no config, or a damaged one
            return None

    @property
    def seconds(self) -> float:
        """Time spent in steps. The mean of a logged line counts for all steps since the line before."""
        before, total = 0.0, 0.0
        for line in self.lines:
            total += (line["step"] - before) * line.get("time/seconds_per_step", 0.0)
            before = line["step"]
        return total

    @property
    def latest(self) -> dict[str, ReportEntry]:
        """{subject: its last entry}: 'trained' first, then the baselines, 'untrained' before 'raw pixels'.

        Entries of the same subject and step are merged.
        """
        last: dict[str, ReportEntry] = {}
        for entry in self.entries:
            before = last.get(entry.subject)
            if before is not None and before.step == entry.step:
                metrics, protocols = {**before.metrics, **entry.metrics}, {**before.protocols, **entry.protocols}
                entry = entry._replace(metrics=metrics, protocols=protocols)
            last[entry.subject] = entry
        newest_first = list(last.items())[::-1]
        return dict(sorted(newest_first, key=lambda item: item[0] != "trained"))

    @property
    def references(self) -> dict[str, dict[str, float]]:
        """{'quoted: ' + name: {metric: value}} of config.references."""
        references = self.setting("references")
        if not isinstance(references, Mapping):
            return {}
        return {f"quoted: {name}": finite(metrics) for name, metrics in references.items()}


def read_run(workdir: Path, pictures: bool = True) -> RunRecord:
    """Read everything that a report shows; without `pictures`, which take longest, all else."""
    missing: list[str] = []
    config = _config(workdir, missing)
    provenance = _load(workdir / "provenance.json", dict, missing)
    records = _load(workdir / "evaluations.json", list, missing)
    entries = [entry for entry in map(_entry, records) if entry is not None]
    if len(entries) < len(records):
        missing.append(f"evaluations.json: {len(records) - len(entries)} of {len(records)} entries are not understood")
    lines = _lines(workdir / "metrics.jsonl", "step", missing)
    if not lines:
        missing.append("metrics.jsonl has no line: no step has been logged")
    shown = _pictures(workdir / "pictures", missing) if pictures else {}
    entries.sort(key=lambda entry: entry.step)
    starts = _lines(workdir / "starts.jsonl", "time/clock", missing)
    warnings, transfers = _warnings(workdir / "log.txt", missing), read_transfers(workdir, missing)
    return RunRecord(workdir, config, provenance, lines, starts, entries, shown, warnings, transfers, missing)


def _config(workdir: Path, missing: list[str]) -> dict:
    config = _load(workdir / "config.json", dict, missing)
    try:
        return translate(config)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        missing.append(f"config.json is damaged: {error}")
        return {}


def _load(path: Path, kind: type, missing: list[str]):
    if not path.exists():
        missing.append(f"{path.name} does not exist")
        return kind()
    try:
        return read_json(path, kind)
    except (UserError, MachineFault) as error:
        missing.append(str(error).removeprefix(f"{path.parent}/").partition("; ")[0])
        return kind()


def _lines(path: Path, needed: str, missing: list[str]) -> list[dict[str, float]]:
    try:
        lines, damaged = parse(path, needed)
    except (UserError, MachineFault) as error:
        missing.append(str(error).removeprefix(f"{path.parent}/").partition("; ")[0])
        return []
    if path.exists() and not path.is_file():
        missing.append(f"{path.name} is no file")
    if damaged:
        missing.append(f"{path.name}: {len(damaged):,} of {len(damaged) + len(lines):,} lines are damaged, first line {damaged[0]:,}")
    return lines


def _entry(record: Any) -> ReportEntry | None:
    if not isinstance(record, Mapping) or type(record.get("step")) is not int or not 0 <= record["step"] < LARGE:
        return None
    if not isinstance(record.get("metrics"), Mapping):
        return None
    protocols = record.get("protocols")
    protocols = {name: str(value) for name, value in protocols.items()} if isinstance(protocols, Mapping) else {}
    return ReportEntry(str(record.get("subject", "unnamed")), record["step"], finite(record["metrics"]), protocols)


def _pictures(folder: Path, missing: list[str]) -> dict[str, bytes]:
    pictures = {}
    for path in sorted(folder.glob("**/*.png")):
        name = path.relative_to(folder).with_suffix("").as_posix()
        try:
            content = path.read_bytes()
            with Image.open(io.BytesIO(content), formats=["PNG"]) as picture:
                if picture.width * picture.height > PIXELS:
                    raise ValueError(f"{picture.width} x {picture.height} pixels")
                picture.load()
            if not content.endswith(b"IEND\xaeB`\x82"):
                raise EOFError("its end is missing")
            pictures[name] = content
        except BAD_PICTURE as error:
            missing.append(f"pictures/{name}.png is not a complete PNG ({type(error).__name__})")
    missing += [f"pictures/{name}.png does not exist: {why}" for name, why in EXPECTED.items() if name not in pictures]
    return pictures


def _warnings(path: Path, missing: list[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    try:
        if path.is_file():
            with open(path, encoding="utf-8", errors="replace") as log:
                for match in filter(None, map(LOGGED.match, log)):
                    line = " ".join(match.groups())
                    counts[line] = counts.get(line, 0) + 1
    except OSError as error:
        missing.append(f"{path.name} cannot be read ({error.strerror})")
    return counts

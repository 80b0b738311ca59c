"""evaluations.json, every number with its protocol, and the table at the end of a run."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

import jax
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ssl_jax.engine.checkpoint import gather, write_json
from ssl_jax.engine.pictures import save_picture
from ssl_jax.engine.records import comparable, read_evaluations
from ssl_jax.engine.renamed_keys import protocol
from ssl_jax.errors import MachineFault, not_written, printable
from ssl_jax.evals import run as evals
from ssl_jax.evals.context import Context

log = logging.getLogger(__name__)


def merged(entries: Sequence[Mapping]) -> dict:
    """Merge entries of one subject and step; the last one wins where an evaluation was run twice."""
    found = {**entries[-1], "metrics": {}, "protocols": {}}
    for entry in entries:
        others = set(found["protocols"]) - set(entry["protocols"])
        for key in ("metrics", "protocols"):
            found[key] = _select(found[key], others) | entry[key]
    return found


def _select(values: Mapping, labels: Collection[str]) -> dict:
    """The items of {label: ...} or {'<label>/<metric>': ...} whose label is in `labels`."""
    return {name: value for name, value in values.items() if name.partition("/")[0] in labels}


def _without(entries: Sequence[Mapping], new: Mapping) -> list[dict]:
    """`entries` without what `new` replaces: the same subject, step and protocol."""
    kept = []
    for entry in entries:
        if (entry["subject"], entry["step"]) == (new["subject"], new["step"]):
            others = {label for label, text in entry["protocols"].items() if new["protocols"].get(label) != text}
            if not others and (entry["protocols"] or not new["protocols"]):  # else it records that there were none
                continue
            entry = entry | {key: _select(entry[key], others) for key in ("metrics", "protocols", "evals") if key in entry}
        kept.append(entry)
    return kept


def _short(value: float) -> str:
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.3f}"  # percentages, and fractions


def _text(name: str) -> Text:
    """For rich, which would take brackets in a string for markup; control characters are escapes."""
    return Text(printable(name))


class Evaluations:
    """The evaluations of one workdir, one entry per subject ('raw pixels', 'untrained', 'trained') and step.

    `evaluate` and `train` may write at the same time, so each change locks the file and reads it again.
    """
    def __init__(self, workdir: Path, spec: Mapping, upto_step: int | None = None, must_save: bool = True):
        """
        Args:
            spec: {label: {'kind': ..., option: value}}, the evaluations to run.
            upto_step: entries after it are dropped.
            must_save: raise MachineFault where the file cannot be written. Otherwise the numbers stay in memory, and `unsaved` is
                the fault.
        """
        self.path, self.spec = workdir / "evaluations.json", spec
        self.must_save, self.unsaved = must_save, None
        self.entries = self._read()
        if upto_step is not None and any(entry["step"] > upto_step for entry in self.entries):
            # A killed process may have evaluated steps after its last checkpoint, which will be measured again.
            self._change(lambda entries: [entry for entry in entries if entry["step"] <= upto_step])

    def _read(self) -> list[dict]:
        entries = read_evaluations(self.path.parent)
        for entry in entries:
            entry["protocols"] = {label: protocol(text) for label, text in entry["protocols"].items()}
        return entries

    def _change(self, change: Callable[[list[dict]], list[dict]]) -> None:
        """Apply `change` to the entries in the file; only process 0 writes. Raises MachineFault."""
        if jax.process_index() != 0 or self.unsaved:
            self.entries = change(self.entries if self.unsaved else self._read())
            return
        try:
            with self._locked():
                self.entries = change(self._read())
                write_json(self.path, self.entries)
        except MachineFault as error:
            if self.must_save:
                raise
            self.entries, self.unsaved = change(self.entries), error

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        path = self.path.with_name(".evaluations.lock")
        try:
            lock = open(path, "a")  # noqa: SIM115  closed below
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            raise not_written(path, error) from error
        with lock:
            yield

    def add(self, subject: str, step: int, context: Context, labels: Sequence[str] | None = None) -> dict[str, float]:
        """Run the evaluations `labels` (None: all) and write the file; returns {'knn/top1': ...} of all that ran at that step."""
        began = time.perf_counter()
        spec = {label: self.spec[label] for label in (self.spec if labels is None else labels)}
        results = evals.run(spec, context)
        metrics = {name: value for result in results.values() for name, value in result.metrics.items()}
        entry = {
            "subject": subject,
            "step": step,
            "metrics": metrics,
            "protocols": {label: result.protocol for label, result in results.items()},
            "evals": {label: evals.complete(spec[label]) for label in results},
        }
        self._change(lambda entries: [*_without(entries, entry), entry])
        for label, result in results.items():
            if result.picture is not None and not self.unsaved:
                save_picture(result.picture, self.path.parent / "pictures" / f"{label}_{step:08d}.png")
        numbers = ", ".join(f"{name} {_short(value)}" for name, value in metrics.items())
        if numbers:
            log.info("%s at step %d: %s (%.0f s)", subject, step, numbers, time.perf_counter() - began)
        return _select(merged(self.at(subject, step))["metrics"], self.spec)

    def unmeasured(self, subject: str, step: int) -> list[str]:
        """Labels of the evaluations that `subject` lacks at `step` with these options. A collective: all processes get one list."""
        entries = self.at(subject, step)

        def done(label):  # entries of earlier versions have fewer options or none; what they lack was the default
            found = (entry.get("evals", {}).get(label, self.spec[label]) for entry in entries if label in entry["protocols"])
            return any(evals.same(options, self.spec[label]) for options in found)

        return [label for label in self.spec if any(gather(not done(label)))]

    def not_beside_trained(self, subject: str) -> list[str]:
        """Labels of the newest evaluations of 'trained' that `subject` lacks under the same protocol. A collective."""
        newest = self._newest()

        def done(label):
            others = (entry for entry in self.entries if entry["subject"] == subject and label in entry["protocols"])
            return label not in newest["protocols"] or any(comparable(entry, newest, label) for entry in others)

        return [label for label in self.spec if any(gather(not done(label)))]

    def at(self, subject: str, step: int) -> list[dict]:
        """The entries of `subject` at `step`."""
        return [entry for entry in self.entries if (entry["subject"], entry["step"]) == (subject, step)]

    def _newest(self) -> dict:
        """The newest entry of 'trained', or else of another subject, reduced to the evaluations in `spec`."""
        asked = [entry for entry in self.entries if not self.spec or set(entry["protocols"]) & set(self.spec)]
        last = ([entry for entry in asked if entry["subject"] == "trained"] or asked or [None])[-1]
        if last is None:
            return {"subject": "trained", "step": 0, "metrics": {}, "protocols": {}}
        found = merged(self.at(last["subject"], last["step"]))
        labels = self.spec or found["protocols"]
        return {**found, "metrics": _select(found["metrics"], labels), "protocols": _select(found["protocols"], labels)}

    def show(self, config) -> None:
        """Print a row per metric of the newest entry, behind the other subjects under the same protocol; then the references."""
        if not any(entry["metrics"] for entry in self.entries):
            return
        newest, subjects = self._newest(), {}
        for subject in sorted(dict.fromkeys(entry["subject"] for entry in self.entries), key=lambda name: name == "trained"):
            entries = [entry for entry in self.entries if entry["subject"] == subject]
            metrics = {name: x for entry in entries for name, x in entry["metrics"].items() if comparable(entry, newest, name)}
            if subject == newest["subject"]:
                metrics |= newest["metrics"]
                subject = f"{subject}, step {newest['step']}" if subject == "trained" else subject
            subjects[subject] = metrics
        subjects |= {name: dict(metrics) for name, metrics in config.get("references", {}).items()}
        table = Table(title=_text(f"{config.method} on {config.data.name}"))
        table.add_column("metric")
        for subject in subjects:
            table.add_column(_text(subject), justify="right")
        for name in newest["metrics"]:
            if not name.endswith(("/top5", "/validation_top1")):
                table.add_row(_text(name), *(_short(metrics[name]) if name in metrics else "-" for metrics in subjects.values()))
        console = Console()
        console.print(table)
        for label, text in newest["protocols"].items():
            console.print(_text(f"{label}: {text}"), style="dim", highlight=False)

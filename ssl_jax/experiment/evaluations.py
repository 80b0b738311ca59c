"""evaluations.json: every number with the protocol that it was measured under, and the table at the end of a run."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
from rich.console import Console
from rich.table import Table

from ssl_jax.engine.checkpoint import write_json
from ssl_jax.engine.pictures import save_picture
from ssl_jax.errors import not_written
from ssl_jax.evals import run as evals
from ssl_jax.evals.context import Context

log = logging.getLogger(__name__)


# Parts of a protocol in which features measured alike may differ: what was chosen for them, their width and views.
OF_THE_FEATURES = re.compile(r"(?:\S+=\S+ )+(?=chosen )|\bD=\d+ |\balignment alpha=.*$| \[[^\]]*\]$")


def comparable(entry: Mapping, other: Mapping, metric: str) -> bool:
    """Whether `metric` ('<label>/...') was measured under the same protocol in both entries."""
    label = metric.partition("/")[0]
    told = [OF_THE_FEATURES.sub("", each["protocols"].get(label, "")) for each in (entry, other)]
    return told[0] == told[1]


def _short(value: float) -> str:
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.3f}"  # percentages, and shares of one


class Evaluations:
    """The evaluations of one workdir: entries of `subject` ('raw pixels', 'untrained', 'trained') and step.

    `evaluate` may add some while `train` does, so that each change is made to what is in the file then.
    """

    def __init__(self, workdir: Path, spec: Mapping, upto_step: int | None = None):
        self.path, self.spec = workdir / "evaluations.json", spec
        self.entries = self._read()
        if upto_step is not None and any(entry["step"] > upto_step for entry in self.entries):
            # what a killed process measured after its last checkpoint is measured again
            self._change(lambda entries: [entry for entry in entries if entry["step"] <= upto_step])

    def _read(self) -> list[dict]:
        return json.loads(self.path.read_text()) if self.path.exists() else []

    def _change(self, change: Callable[[list[dict]], list[dict]]) -> None:
        """Of several processes the first one writes. Raises MachineFault."""
        if jax.process_index() != 0:
            self.entries = change(self._read())
            return
        with self._locked():
            self.entries = change(self._read())
            write_json(self.path, self.entries)

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

    def add(self, subject: str, step: int, context: Context) -> dict[str, float]:
        """Run every evaluation of the config; returns {'knn/top1': ...} and writes the file."""
        began = time.perf_counter()
        results = evals.run(self.spec, context)
        metrics = {name: value for result in results.values() for name, value in result.metrics.items()}
        entry = {
            "subject": subject,
            "step": step,
            "metrics": metrics,
            "protocols": {label: result.protocol for label, result in results.items()},
        }
        measured = ("subject", "step", "protocols")  # the same measure taken again replaces the old one; another stands beside
        self._change(lambda entries: [e for e in entries if any(e[key] != entry[key] for key in measured)] + [entry])
        for label, result in results.items():
            if result.picture is not None:
                save_picture(result.picture, self.path.parent / "pictures" / f"{label}_{step:08d}.png")
        told = ", ".join(f"{name} {_short(value)}" for name, value in metrics.items())
        log.info("%s at step %d: %s (%.0f s)", subject, step, told, time.perf_counter() - began)
        return metrics

    def show(self, config) -> None:
        """Print the metrics of the last entry, a row each, those of the other subjects as far as their protocol is the same, and the
        references."""
        if not self.entries:
            return
        newest = self.entries[-1]
        subjects = {}
        for subject in dict.fromkeys(entry["subject"] for entry in self.entries):
            entries = [entry for entry in self.entries if entry["subject"] == subject]
            alike = {name: x for entry in entries for name, x in entry["metrics"].items() if comparable(entry, newest, name)}
            subjects[f"trained, step {entries[-1]['step']}" if subject == "trained" else subject] = alike
        subjects |= {name: dict(metrics) for name, metrics in config.get("references", {}).items()}
        table = Table(title=f"{config.method} on {config.data.name}")
        table.add_column("metric")
        for subject in subjects:
            table.add_column(subject, justify="right")
        for name in newest["metrics"]:
            if not name.endswith(("/top5", "/validation_top1")):
                table.add_row(name, *(_short(metrics[name]) if name in metrics else "-" for metrics in subjects.values()))
        console = Console()
        console.print(table)
        for label, protocol in newest["protocols"].items():
            console.print(f"{label}: {protocol}", style="dim", highlight=False)

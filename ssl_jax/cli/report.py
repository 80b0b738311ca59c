"""Turn a workdir into one self-contained HTML page.

  python launch.py report --workdir=runs/simclr

Writes report.html into the workdir: verdict, table of evaluations with their protocols, curves, augmented views, nearest
neighbours, settings, versions, warnings. It reads only what the run has written, so it works while the run goes on, on another
machine, and on a run that has failed: what is missing is named on the page. `train` writes the same page at its end.
"""

from __future__ import annotations

import base64
import json
import math
import os
import re
import statistics
import time
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from ssl_jax.cli.charts import chart, number
from ssl_jax.cli.main import add_workdir
from ssl_jax.cli.report_page import PAGE
from ssl_jax.engine.metrics import read_metrics
from ssl_jax.engine.optim import duration
from ssl_jax.errors import UserError

PERCENT = re.compile(r"top\d+|accuracy")  # evaluations give accuracies in percent
LOGGED = re.compile(r"^\S+ \S+ (WARNING|ERROR|CRITICAL) (.*)")
MAX_WARNINGS = 30
CAPTIONS = {
    "views": ("Augmented views", "A row per image: the image (where it has the size of a view), then its views as the first step saw them."),
    "neighbours": (
        "Nearest neighbours",
        "A row per test image: the image, then the training images whose features are most similar, best first, with the cosine "
        "similarity. Green and 'same': the label of the test image; red and 'other': another one; grey: no labels.",
    ),
}  # fmt: skip
EXPECTED = {"views": "the method has no augmented views, or the run has not started", "neighbours": "they are drawn after the last step"}


def add_arguments(sub) -> None:
    add_workdir(sub)


def main(args, overrides) -> int:
    if overrides:
        raise UserError(f"argument {overrides[0]!r} is not understood; report takes --workdir only")
    print(write_report(args.workdir))
    return 0


class Entry(NamedTuple):
    """One line of evaluations.json."""

    subject: str
    step: int
    metrics: dict[str, float]
    protocols: dict[str, str]


class Run(NamedTuple):
    """What a workdir tells; an absent or unreadable file is an empty value and a line in `missing`."""

    workdir: Path
    config: dict
    provenance: dict
    lines: list[dict]  # of metrics.jsonl
    entries: list[Entry]  # in ascending order of steps
    pictures: dict[str, bytes]  # {name: PNG}
    warnings: dict[str, int]  # {line of log.txt: how often}
    missing: list[str]

    def setting(self, name: str, default: Any = None) -> Any:
        """`setting('data.name')`; `default` where the config does not have it."""
        at: Any = self.config
        for part in name.split("."):
            at = at.get(part) if isinstance(at, Mapping) else None
        return default if at is None else at

    @property
    def step(self) -> int:
        return int(self.lines[-1]["step"]) if self.lines else 0

    @property
    def total(self) -> int | None:
        """Steps of the whole run, where the config tells."""
        try:
            return duration(self.config, "total", self.setting("batch_size"), self.setting("data.examples"))
        except (UserError, TypeError, ZeroDivisionError):
            return None

    def latest(self) -> dict[str, Entry]:
        """{subject: its last entry}, 'trained' last."""
        last = {entry.subject: entry for entry in self.entries}
        return dict(sorted(last.items(), key=lambda item: item[0] == "trained"))


def write_report(workdir: Path) -> Path:
    """Write `<workdir>/report.html` and return its path.

    Raises:
        UserError: there is no such directory, or it cannot be written.
    """
    if not workdir.is_dir():
        raise UserError(f"--workdir={workdir} is no directory; give the directory of a run")
    run = read_run(workdir)
    title = f"{run.setting('method', 'unknown method')} on {run.setting('data.name', 'unknown data')}"
    sections = (header(run, title), evaluations(run), curves(run), pictures(run), warnings(run), settings(run), provenance(run))
    footer = f"<footer>{_text(workdir.resolve())} · written {time.strftime('%Y-%m-%d %H:%M')}</footer>"
    path = workdir / "report.html"
    temporary = workdir / "report.html.tmp"
    try:
        temporary.write_text(PAGE.substitute(title=_text(title), body="\n".join((*sections, footer))), encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); check permissions and space") from error
    return path


def read_run(workdir: Path) -> Run:
    """Read everything a report is made of; never fails on what a file holds."""
    missing: list[str] = []

    def load(name: str, kind: type, otherwise: str):
        path = workdir / name
        if not path.is_file():
            missing.append(f"{name} does not exist: {otherwise}")
            return kind()
        try:
            value = json.loads(path.read_bytes())
        except ValueError as error:
            missing.append(f"{name} cannot be read ({error}): {otherwise}")
            return kind()
        if not isinstance(value, kind):
            missing.append(f"{name} does not hold what it should: {otherwise}")
            return kind()
        return value

    config = load("config.json", dict, "the settings are unknown")
    versions = load("provenance.json", dict, "versions and machine are unknown")
    told = load("evaluations.json", list, "the run has not been evaluated")
    entries = [entry for entry in map(_entry, told) if entry is not None]
    if len(entries) < len(told):
        missing.append(f"evaluations.json: {len(told) - len(entries)} of {len(told)} entries are not understood")
    entries.sort(key=lambda entry: entry.step)
    lines = [line for line in map(_finite, read_metrics(workdir)) if "step" in line]
    if not lines:
        missing.append("metrics.jsonl has no line: no step has been logged, so there are no curves")
    images = {}
    for path in sorted((workdir / "pictures").glob("**/*.png")):
        content = path.read_bytes()
        if content.startswith(b"\x89PNG") and b"IEND" in content[-12:]:
            images[path.relative_to(workdir / "pictures").with_suffix("").as_posix()] = content
        else:
            missing.append(f"pictures/{path.name} is no complete PNG")
    missing += [f"pictures/{name}.png does not exist: {why}" for name, why in EXPECTED.items() if name not in images]
    return Run(workdir, config, versions, lines, entries, images, _warnings(workdir / "log.txt"), missing)


def _entry(told: Any) -> Entry | None:
    if not isinstance(told, Mapping) or not isinstance(told.get("step"), int) or not isinstance(told.get("metrics"), Mapping):
        return None
    protocols = told.get("protocols")
    protocols = {k: str(v) for k, v in protocols.items()} if isinstance(protocols, Mapping) else {}
    return Entry(str(told.get("subject", "unnamed")), told["step"], _finite(told["metrics"]), protocols)


def _finite(told: Any) -> dict[str, float]:
    """The entries of a mapping that are finite numbers."""
    items = told.items() if isinstance(told, Mapping) else ()
    return {k: v for k, v in items if isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)}


def _warnings(path: Path) -> dict[str, int]:
    counts: dict[str, int] = {}
    if path.is_file():
        with open(path, encoding="utf-8", errors="replace") as log:
            for line in log:
                if match := LOGGED.match(line):
                    told = " ".join(match.groups())
                    counts[told] = counts.get(told, 0) + 1
    return counts


def header(run: Run, title: str) -> str:
    """Name, state of the run, verdict, facts."""
    parts = [f"<header><h1>{_text(title)}</h1><p class='soft'>{_text(run.workdir.resolve().name)}</p></header>"]
    if not run.lines:
        parts.append('<p class="banner">No step has been logged yet. This page tells what there is.</p>')
    elif run.total and run.step < run.total:
        parts.append(f'<p class="banner">Unfinished: step {run.step:,} of {run.total:,}.</p>')
    batch, examples = (_finite({"n": run.setting(name)}).get("n") for name in ("batch_size", "data.examples"))
    speeds = [line["time/images_per_second"] for line in run.lines if "time/images_per_second" in line]
    encoder = run.setting("model.encoder", {})
    facts = {"Steps": f"{run.step:,}" + (f" of {run.total:,}" if run.total else "")}
    if batch:
        seen = run.step * batch
        facts["Images seen"] = f"{seen:,}" + (f" ({seen / examples:.3g} epochs)" if examples else "")
        facts["Batch size"] = f"{batch:,}"
    if isinstance(encoder, Mapping) and encoder.get("name"):
        details = " ".join(f"{k} {v}" for k, v in encoder.items() if k != "name" and isinstance(v, int | float | str))
        facts["Encoder"] = f"{encoder['name']} ({details})" if details else encoder["name"]
    facts["Machine"] = run.provenance.get("devices", "unknown")
    facts["Computed in"] = run.setting("dtype", "unknown")
    if speeds:
        facts["Images per second"] = f"{statistics.median(speeds):,.0f} (median)"
        facts["Time in steps"] = _span(_seconds(run.lines))
    told = "".join(f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>" for name, value in facts.items())
    return "\n".join([*parts, f'<div class="card">{verdict(run)}<dl class="facts">{told}</dl></div>'])


def verdict(run: Run) -> str:
    """One sentence on the metric that the run is judged by, and the same as bars."""
    latest = run.latest()
    names = [name for entry in reversed(latest.values()) for name in entry.metrics]
    best = run.setting("best_metric")
    name = best if best in names else next(filter(PERCENT.search, names), next(iter(names), None))
    if name is None:
        return '<p class="verdict">No evaluation yet.</p>'
    values = {subject: entry.metrics[name] for subject, entry in latest.items() if name in entry.metrics}
    trained, baselines = values.get("trained"), {s: v for s, v in values.items() if s != "trained"}
    against = " and ".join(f"{_value(name, v)} {_text(s)}" for s, v in reversed(baselines.items()))
    if trained is None:
        sentence = f"{_text(_pretty(name))} has not been measured after training yet ({against})."
    else:
        better = PERCENT.search(name) and baselines and trained > max(baselines.values())
        kind = "good" if better else "bad" if PERCENT.search(name) and baselines else ""
        sentence = f'{_text(_pretty(name))} <b class="{kind}">{_value(name, trained)}</b>'
        sentence += f" against {against}" if against else ""
        sentence += "" if better or kind == "" else ": no better than a baseline"
    if not PERCENT.search(name):
        return f'<p class="verdict">{sentence}</p>'
    bars = {**baselines, **({f"trained, step {latest['trained'].step:,}": trained} if trained is not None else {})}
    classes = run.setting("data.num_classes")
    if isinstance(classes, int) and classes > 1 and name.endswith("/top1"):
        bars = {f"chance, {classes} classes": 100 / classes, **bars}
    bars |= {told: metrics[name] for told, metrics in _references(run).items() if name in metrics}
    rows = "".join(
        f'<span class="name">{_text(told)}</span><span class="bar{" ours" if told.startswith("trained, step") else ""}">'
        f'<i style="width:{max(0, min(100, value)):.2f}%"></i></span><span class="value">{_value(name, value)}</span>'
        for told, value in bars.items()
    )
    return f'<p class="verdict">{sentence}</p><div class="bars">{rows}</div>'


def evaluations(run: Run) -> str:
    """The table: a group of rows per evaluation under its protocol, a column per subject and per reference."""
    latest, references = run.latest(), _references(run)
    if not latest:
        return "<h2>Evaluations</h2><p class='empty'>Missing: the run has not been evaluated.</p>"
    columns = {s if s != "trained" else f"trained, step {e.step:,}": e.metrics for s, e in latest.items()} | references
    gain = {"untrained", "trained"} <= set(latest)
    heads = [_text(name) for name in columns]
    heads.insert(len(latest), "over untrained") if gain else None
    rows, names = [], list(dict.fromkeys(name for metrics in columns.values() for name in metrics))
    for label in dict.fromkeys(name.partition("/")[0] for name in names):
        protocols: dict[str, list[str]] = {}
        for subject, entry in latest.items():
            if label in entry.protocols:
                protocols.setdefault(entry.protocols[label], []).append(subject)
        notes = [p if len(protocols) == 1 else f"{', '.join(s)}: {p}" for p, s in protocols.items()]
        differ = "<b class='bad'>Not one protocol: these numbers do not compare.</b> " if len(notes) > 1 else ""
        told = differ + "<br>".join(map(_text, notes))
        rows.append(f'<tr class="group"><th colspan="{1 + len(heads)}">{_text(_pretty(label))}<div class="note">{told}</div></th></tr>')
        for name in (name for name in names if name.partition("/")[0] == label):
            cells = [(_value(name, m[name]) if name in m else "–", "value ours" if c.startswith("trained") else "value")
                     for c, m in columns.items()]  # fmt: skip
            if gain:
                pair = [latest[subject].metrics.get(name) for subject in ("trained", "untrained")]
                cells.insert(len(latest), ("–" if None in pair else f"{pair[0] - pair[1]:+.{2 if abs(pair[1]) >= 1 else 4}f}", "value soft"))
            cells = "".join(f'<td class="{kind}">{cell}</td>' for cell, kind in cells)
            rows.append(f'<tr><td class="indent">{_text(name.partition("/")[2] or name)}</td>{cells}</tr>')
    head = "".join(f'<th class="value">{name}</th>' for name in heads)
    quoted = "<p class='note'>Columns named in config.references are quoted from their sources, under the protocols of those.</p>"
    return (
        f"<h2>Evaluations</h2><div class='card'><div class='scroll'><table><thead><tr><th></th>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>{quoted if references else ''}</div>"
    )


def curves(run: Run) -> str:
    """Evaluations against the baselines, then everything that was logged."""
    trained = [entry for entry in run.entries if entry.subject == "trained"]
    baselines = {subject: entry.metrics for subject, entry in run.latest().items() if subject != "trained"}
    until = run.total or run.step
    evaluated = sorted(dict.fromkeys(name for entry in run.entries for name in entry.metrics), key=lambda n: not PERCENT.search(n))
    drawn = []
    for name in evaluated:
        points = [(entry.step, entry.metrics[name]) for entry in trained if name in entry.metrics]
        levels = {subject: metrics[name] for subject, metrics in reversed(baselines.items()) if name in metrics}
        if points:
            drawn.append(chart(_pretty(name, full=True), {"trained": points}, levels, until, _unit(name)))
    told = f'<div class="charts">{"".join(drawn)}</div>' if drawn else "<p class='empty'>Missing: no evaluation after training yet.</p>"
    logged: dict[str, list] = {}
    for line in run.lines:
        for name, value in line.items():
            if name != "step" and name not in evaluated:
                logged.setdefault(name, []).append((line["step"], value))
    groups: dict[str, dict[str, list]] = {}
    for name in sorted(logged, key=_rank):
        title, line, scale = _place(name)
        groups.setdefault(title, {})[line] = [(step, scale * value) for step, value in logged[name]]
    drawn = [chart(title, lines, until=until, unit=" %" if title.endswith("waiting for input") else "") for title, lines in groups.items()]
    training = f'<div class="charts">{"".join(drawn)}</div>' if drawn else "<p class='empty'>Missing: no step has been logged.</p>"
    return f"<h2>Evaluations over steps</h2>{told}<h2>Training</h2>{training}"


def _rank(name: str) -> tuple[int, str]:
    """Losses first, what the phases tell, gradients, learning rates, the clock."""
    kinds = (name.endswith("/loss"), not re.match("lr/|time/|.*/grad_norm/", name), "/grad_norm/" in name, name.startswith("lr/"))
    return kinds.index(True) if True in kinds else len(kinds), name


def _place(name: str) -> tuple[str, str, float]:
    """(title of the chart, name of the line, factor) of a metric: gradient norms share a chart, learning rates too."""
    first, _, rest = name.partition("/")
    if first == "lr":
        return "learning rate", rest, 1
    if rest.startswith("grad_norm/"):
        return "gradient norm", f"{first}: {rest.partition('/')[2]}", 1
    if name == "time/input_wait":
        return "time spent waiting for input", "share", 100
    return rest.replace("_", " ") if first == "time" else name, "last", 1


def pictures(run: Run) -> str:
    """Views and neighbours, then all others; of a numbered series (samples_000100) the newest."""
    parts = []
    series: dict[str, list[str]] = {}
    for name in run.pictures:
        series.setdefault(re.sub(r"[_-]?\d+$", "", name) or name, []).append(name)
    for stem in dict.fromkeys((*CAPTIONS, *series)):
        heading, caption = CAPTIONS.get(stem, (stem.replace("_", " ").capitalize(), ""))
        parts.append(f"<h2>{_text(heading)}</h2>")
        if stem not in series:
            parts.append(f"<p class='empty'>Missing: pictures/{stem}.png does not exist; {EXPECTED[stem]}.</p>")
            continue
        *earlier, name = sorted(series[stem], key=lambda n: (len(n), n))
        data = base64.b64encode(run.pictures[name]).decode()
        caption += f" {name}, the newest of {len(earlier) + 1} in pictures/." if earlier else ""
        parts.append(
            f'<figure class="picture card"><img alt="{_text(heading)}" src="data:image/png;base64,{data}">'
            f'<figcaption class="note">{_text(caption)}</figcaption></figure>'
        )
    return "\n".join(parts)


def warnings(run: Run) -> str:
    """What was skipped, what the log warns of, which files are missing."""
    lines = [f"{told}" + (f" (x {count:,})" if count > 1 else "") for told, count in run.warnings.items()]
    left_out = len(lines) - MAX_WARNINGS
    lines = lines[:MAX_WARNINGS] + ([f"... and {left_out:,} more in log.txt"] if left_out > 0 else [])
    skipped = sum(any(name.endswith("/skipped") and value > 0 for name, value in line.items()) for line in run.lines)
    if skipped:
        lines.insert(0, f"{skipped:,} of {len(run.lines):,} logged steps had an update left out: the loss or a gradient was not finite")
    told = "\n".join(map(_text, lines + run.missing))
    body = f'<div class="card"><pre>{told}</pre></div>' if told else "<p class='empty'>Nothing was skipped, no warnings.</p>"
    return f"<h2>Skipped, warned of, missing</h2>{body}"


def settings(run: Run) -> str:
    """The resolved config, by the names that --config.NAME=VALUE overrides."""
    if not run.config:
        return "<h2>Settings</h2><p class='empty'>Missing: no config.json.</p>"
    flat = dict(_flat(run.config))
    order = sorted(flat, key=lambda name: "." in name)  # stable: general settings first
    rows = "".join(f"<tr><td>{_text(name)}</td><td><pre>{_text(flat[name])}</pre></td></tr>" for name in order)
    table = f"<div class='scroll'><table class='settings'>{rows}</table></div>"
    return f"<h2>Settings</h2><details class='card'><summary>Resolved config, {len(flat)} values</summary>{table}</details>"


def _flat(values: Mapping, prefix: str = ""):
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", _setting(value)


def _setting(value: Any) -> str:
    """A value as text; a recipe of operators takes a line per operator."""
    if isinstance(value, list) and value and all(_is_op(item) for item in value):
        return "\n".join(f"{op}({', '.join(f'{k}={json.dumps(v)}' for k, v in arguments.items())})" for op, arguments in value)
    if isinstance(value, list) and value and all(isinstance(item, list) and item and all(map(_is_op, item)) for item in value):
        return "\n\n".join(map(_setting, value))
    return "not set" if value is None else json.dumps(value, ensure_ascii=False)


def _is_op(item: Any) -> bool:
    return isinstance(item, list) and len(item) == 2 and isinstance(item[0], str) and isinstance(item[1], Mapping)


def provenance(run: Run) -> str:
    """Commit, machine, versions."""
    if not run.provenance:
        return "<h2>Versions and machine</h2><p class='empty'>Missing: no provenance.json.</p>"
    rows = "".join(f"<tr><td>{_text(name)}</td><td>{_text(value)}</td></tr>" for name, value in _flat(run.provenance))
    return f"<h2>Versions and machine</h2><div class='card scroll'><table class='settings'>{rows}</table></div>"


def _references(run: Run) -> dict[str, dict[str, float]]:
    told = run.setting("references", {})
    return {name: _finite(metrics) for name, metrics in told.items()} if isinstance(told, Mapping) else {}


def _text(value: Any) -> str:
    return escape(str(value))


def _unit(name: str) -> str:
    return " %" if PERCENT.search(name) else ""


def _value(name: str, value: float) -> str:
    return f"{value:.2f} %" if PERCENT.search(name) else number(value)


def _pretty(name: str, full: bool = False) -> str:
    """'knn/top1' -> 'kNN', or 'kNN top1' in full; other metrics keep their names."""
    label, _, metric = name.partition("/")
    label = re.sub("^knn", "kNN", label)
    return label if not metric or (metric == "top1" and not full) else f"{label} {metric}"


def _seconds(lines: list[dict]) -> float:
    """Time spent in steps: each logged mean stands for the steps since the line before."""
    steps = [0, *(line["step"] for line in lines)]
    return sum((step - before) * line.get("time/seconds_per_step", 0) for before, step, line in zip(steps, steps[1:], lines, strict=False))


def _span(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if hours < 2 else f"{hours:.1f} h"

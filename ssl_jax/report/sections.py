"""The sections of a report as HTML. `text` escapes every string from the workdir."""

from __future__ import annotations

import base64
import io
import json
import re
import statistics
from collections.abc import Callable, Iterator, Mapping
from html import escape
from typing import Any

from PIL import Image

from ssl_jax.engine.records import FEATURE_PARTS, REST, SPAN, comparable, goodput
from ssl_jax.errors import printable
from ssl_jax.report.charts import PERCENT, chart, number
from ssl_jax.report.run import EXPECTED, ReportEntry, RunRecord

ACCURACY = re.compile(r"top\d+|accuracy")  # evaluations give accuracies in percent
SHARES = {
    "time/input_wait": "input",
    "time/device_wait": "devices",
    "time/host": "host",
    "time/slowest_input_wait": "input of the slowest process",
}
UNSEEN = {"step", "time/seconds_per_step", "time/clock", "time/slowest_input_process"}
FROM_ZERO = ("images per second", "where the time of a step goes")  # charts with an axis from 0, since small changes mean little
MAX_WARNINGS = 30
WIDE = 30  # longer facts take two columns
FRAMES, FRAME = 8, 200  # of a film strip: their number at most, and their longer side in pixels
OPENING = ("samples", "reconstruction", "views")  # a report opens with the first of these that exists
CAPTIONS = {
    "views": ("Augmented views", "Images (where they have the size of a view), each with its views of the first step."),
    "samples": ("Samples", "Samples of the averaged generator from the same latents at every evaluation."),
    "reconstruction": ("Reconstructions", "Rows of test images, each above its reconstructions."),
    "codebook": (
        "Use of the codebook",
        "Left: a square per code, gray where it never occurs in the test images. Right: how often the codes occur.",
    ),
    "pretext": (
        "The pretext task",
        "Rows of questions about test images, each above the answer of the model: green if it is right, red if it is wrong.",
    ),
    "motion": (
        "Predicted motion",
        "A panel for each axis of the motion between two views of test images: what the model predicts, over the true motion.",
    ),
    "affinity": (
        "Affinity of patches",
        "Test images with a framed patch; how likely each patch occurs together with it; segments by all affinities; segments by "
        "color alone; the mask.",
    ),
    "segmentation": (
        "Classes of pixels",
        "From above: test images, the true classes of their pixels (white: ignored), the predicted classes, and the errors in red.",
    ),
    "inpainting": (
        "Painted holes",
        "From above: test images with a hole, what the model paints, the smooth continuation of the border, the true image.",
    ),
    "neighbors": (
        "Nearest neighbors",
        "A row per test image: the image, then the training images with the most similar features, best first, with "
        "the cosine similarity. Green, 'same': it has the label of the test image. Red, 'other': it has another label. "
        "Gray: the data has no labels.",
    ),
}


def text(value: Any) -> str:
    return escape(printable(str(value), keep="\n\t"))


def header(run: RunRecord) -> str:
    """Name and state of the run, verdict, facts."""
    banner = ""
    if not run.lines:
        banner = '<p class="banner">No step has been logged yet; this page shows what there is.</p>'
    elif run.total and run.step < run.total:
        banner = f'<p class="banner">Unfinished: step {run.step:,} of {run.total:,}.</p>'
    facts = _facts(run)
    items = "".join(
        f'<div class="{"wide" if len(value) > WIDE else "narrow"}"><dt>{text(name)}</dt><dd>{text(value)}</dd></div>'
        for name, value in facts.items()
    )
    goodput_note = f'<p class="note">Goodput: the share {SPAN} that was spent in steps. The rest is {REST}.</p>'
    note = goodput_note if "Goodput" in facts else ""
    return (
        f'<h1>{text(run.title)}</h1><p class="soft">{text(run.workdir.resolve().name)}</p>{banner}'
        f'<div class="card">{_verdict(run)}<dl class="facts">{items}</dl>{note}</div>'
    )


def _facts(run: RunRecord) -> dict[str, str]:
    batch, examples, encoder = run.count("batch_size"), run.count("data.examples"), run.setting("model.encoder")
    facts = {"Steps": f"{run.step:,}" + (f" of {run.total:,}" if run.total else "")}
    if batch:
        seen = run.step * batch
        facts["Images seen"] = f"{seen:,}" + (f" ({seen / examples:.3g} epochs)" if examples else "")
        facts["Batch size"] = f"{batch:,}"
    if isinstance(encoder, Mapping) and "name" in encoder:
        shown = {k: v for k, v in encoder.items() if k != "name" and isinstance(v, int | float | str) and not isinstance(v, bool)}
        details = [f"{k} {v}" for k, v in shown.items()]
        facts["Encoder"] = " ".join([str(encoder["name"]), *details])
    facts["Machine"] = str(run.provenance.get("devices", "unknown"))
    facts["Computed in"] = str(run.setting("dtype", "unknown"))
    speeds = [line["time/images_per_second"] for line in run.lines if "time/images_per_second" in line]
    if speeds:
        facts["Images per second"] = f"{statistics.median(speeds):,.0f} (median)"
        facts["Time in steps"] = _span(run.seconds)
    share = goodput(run.lines, run.starts)
    if share is not None:
        facts["Goodput"] = f"{100 * share:.0f}{PERCENT}"
    return facts


def alike(run: RunRecord, name: str) -> Mapping[str, ReportEntry]:
    """The newest entries of the subjects that measured `name` under the protocol of 'trained'."""
    trained = run.latest.get("trained")
    return {
        subject: entry for subject, entry in run.latest.items()
        if trained is None or comparable(entry._asdict(), trained._asdict(), name)
    }  # fmt: skip


def _verdict(run: RunRecord) -> str:
    """One sentence on the best metric against the baselines, and the same as bars."""
    names = [name for entry in run.latest.values() for name in entry.metrics]
    best = str(run.setting("best_metric")).removeprefix("-")
    name = best if best in names else next(filter(ACCURACY.search, names), next(iter(names), None))
    if name is None:
        return '<p class="verdict">Not evaluated yet.</p>'
    values = {subject: entry.metrics[name] for subject, entry in alike(run, name).items() if name in entry.metrics}
    trained = values.pop("trained", None)
    against = " and ".join(f"{_value(name, value)} {text(subject)}" for subject, value in values.items())
    if trained is None:
        sentence = f"{_pretty(name)} is not measured after training yet ({against})"
    elif not values or not _unit(name):
        sentence = f"{_pretty(name)} <b>{_value(name, trained)}</b>" + (f" against {against}" if values else "")
    elif trained > max(values.values()):
        sentence = f'{_pretty(name)} <b class="good">{_value(name, trained)}</b> against {against}'
    else:
        sentence = f'{_pretty(name)} <b class="bad">{_value(name, trained)}</b>: no better than a baseline ({against})'
    return f'<p class="verdict">{sentence}</p>' + (_bars(run, name, values, trained) if _unit(name) else "")


def _bars(run: RunRecord, name: str, baselines: Mapping[str, float], trained: float | None) -> str:
    bars = [(subject, value, "") for subject, value in reversed(baselines.items())]
    classes = run.count("data.num_classes")
    if classes and name.endswith("/top1"):
        bars.insert(0, (f"chance, {classes} classes", 100 / classes, ""))
    if trained is not None:
        bars.append((_column(run, "trained"), trained, " ours"))
    bars += [(reference, metrics[name], "") for reference, metrics in run.references.items() if name in metrics]
    rows = [
        f'<span class="name">{text(bar)}</span><span class="bar{kind}">'
        f'<i style="width:{min(100, max(0, value)):.2f}%"></i></span><span class="value">{_value(name, value)}</span>'
        for bar, value, kind in bars
    ]
    return f'<div class="bars">{"".join(rows)}</div>'


def evaluations(run: RunRecord) -> str:
    """The table: a group of rows per evaluation under its protocol, a column per subject and per reference."""
    latest = run.latest
    if not latest:
        return section("Evaluations", _missing("the run has not been evaluated."))
    columns = {_column(run, subject): entry.metrics for subject, entry in latest.items()}
    heads = [*columns]
    gain = {"untrained", "trained"} <= set(latest)
    if gain:
        heads.insert(1, "over untrained")
    columns |= run.references
    heads += run.references
    names = dict.fromkeys(name for metrics in columns.values() for name in metrics)
    rows = []
    for label in dict.fromkeys(map(_label, names)):
        title = f'{_pretty(label)}<div class="note">{_protocol(run, label)}</div>'
        rows.append(f'<tr class="group"><th colspan="{1 + len(heads)}">{title}</th></tr>')
        for name in (name for name in names if _label(name) == label):
            cells = {head: _value(name, metrics[name]) for head, metrics in columns.items() if name in metrics}
            same = alike(run, name) if gain else {}
            if all(subject in same and name in same[subject].metrics for subject in ("trained", "untrained")):
                before, after = (latest[subject].metrics[name] for subject in ("untrained", "trained"))
                cells["over untrained"] = f"{after - before:+.2f}" if _unit(name) else f"{after - before:+.3g}"
            ours = _column(run, "trained") if "trained" in latest else None
            row = "".join(f'<td class="value{" ours" if h == ours else ""}">{cells.get(h, "–")}</td>' for h in heads)
            rows.append(f'<tr><td class="indent">{text(name.partition("/")[2] or name)}</td>{row}</tr>')
    head = "".join(f'<th class="value">{text(head)}</th>' for head in heads)
    table = f"<thead><tr><th></th>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    quoted = "Quoted numbers stand in config.references, under the protocols of their sources."
    quoted = f'<p class="note">{quoted}</p>' if run.references else ""
    return section("Evaluations", f'<div class="card"><div class="scroll"><table>{table}</table></div>{quoted}</div>')


def _protocol(run: RunRecord, label: str) -> str:
    """The protocol of all subjects, with the parts that differ by features; or the protocol of each where they do not compare."""
    protocols = {subject: entry.protocols[label] for subject, entry in run.latest.items() if label in entry.protocols}
    if len({FEATURE_PARTS.sub("", protocol) for protocol in protocols.values()}) > 1:
        lines = "<br>".join(text(f"{subject}: {protocol}") for subject, protocol in protocols.items())
        return f'<b class="bad">Measured under different protocols; these numbers may not compare:</b><br>{lines}'
    protocol = next(iter(protocols.values()), "")
    own = {subject: FEATURE_PARTS.findall(other) for subject, other in protocols.items() if other != protocol}
    return text(protocol) + "".join(text(f"; {subject}: {''.join(parts).strip()}") for subject, parts in own.items() if parts)


def curves(run: RunRecord) -> str:
    """Charts of evaluations against the baselines, then of everything that was logged."""
    trained = [entry for entry in run.entries if entry.subject == "trained"]
    baselines = {subject: entry.metrics for subject, entry in run.latest.items() if subject != "trained"}
    until = max(run.total or 0, run.step)
    names = dict.fromkeys(name for entry in run.entries for name in entry.metrics)
    figures = []
    for name in sorted(names, key=lambda name: not _unit(name)):
        points = [(entry.step, entry.metrics[name]) for entry in trained if name in entry.metrics]
        levels = {subject: metrics[name] for subject, metrics in baselines.items() if name in metrics}
        if points:
            figures.append(chart(_label_of(name), {"trained": points}, levels, until, _unit(name)))
    evaluated = _charts(figures, "no evaluation after training yet.")
    groups: dict[str, dict[str, list]] = {}
    others = {name for line in run.lines for name in line} - UNSEEN - {*names}
    for name in sorted(others, key=_rank):
        title, line_name, factor = _chart_of(name)
        points = [(line["step"], factor * line[name]) for line in run.lines if name in line]
        groups.setdefault(title, {})[line_name] = points
    figures = [
        chart(title, lines, until=until, unit=PERCENT if "input" in lines else "", from_zero=title in FROM_ZERO)
        for title, lines in groups.items()
    ]
    training = _charts(figures, "no step is logged yet.")
    return section("Evaluations over steps", evaluated) + section("Training", training)


def _charts(figures: list[str], otherwise: str) -> str:
    return f'<div class="charts">{"".join(figures)}</div>' if figures else _missing(otherwise)


def _rank(name: str) -> tuple[int, str]:
    """Sort key: losses, other metrics of the phases, gradients, learning rates, times."""
    order = (r".*/loss$", r"(?!lr/|time/|.*/grad_norm/)", r".*/grad_norm/", r"lr/", r"")
    return next(i for i, pattern in enumerate(order) if re.match(pattern, name)), name


def _chart_of(name: str) -> tuple[str, str, float]:
    """(title of the chart, name of the line, factor) of a metric: gradient norms share a chart, learning rates too."""
    first, _, rest = name.partition("/")
    if first == "lr":
        return "learning rate", rest, 1
    if rest.startswith("grad_norm/"):
        return "gradient norm", f"{first}: {rest.partition('/')[2]}", 1
    if name in SHARES:
        return "where the time of a step goes", SHARES[name], 100
    return rest.replace("_", " ") if first == "time" else name, "last", 1


def _series(run: RunRecord) -> dict[str, list[str]]:
    """{stem: names of pictures}: a numbered series, such as samples_000100, or a single one; views and neighbors come first."""
    series: dict[str, list[str]] = {stem: [] for stem in EXPECTED}
    for name in run.pictures:
        series.setdefault(re.sub(r"[_-]?\d+$", "", name) or name, []).append(name)
    return series


def _opening(series: Mapping[str, list[str]]) -> str | None:
    return next((stem for stem in OPENING if series.get(stem)), None)


def opening(run: RunRecord) -> str:
    """The first picture of the report: samples, reconstructions or views."""
    series = _series(run)
    stem = _opening(series)
    return _picture(run, stem, series[stem]) if stem else ""


def pictures(run: RunRecord) -> str:
    """All pictures but the one that the report opens with."""
    series = _series(run)
    parts = []
    for stem, members in series.items():
        if not members:
            parts.append(section(CAPTIONS[stem][0], _missing(f"pictures/{stem}.png does not exist; {EXPECTED[stem]}.")))
        elif stem != _opening(series):
            parts.append(_picture(run, stem, members))
    return "\n".join(parts)


def _picture(run: RunRecord, stem: str, members: list[str]) -> str:
    """The newest picture of a series, and the series as a film strip."""
    heading, caption = CAPTIONS.get(stem, (stem.replace("_", " ").capitalize(), ""))
    newest = max(members, key=lambda name: (len(name), name))
    if len(members) > 1:
        caption = f"{caption} {newest}, the newest of {len(members)} in pictures/.".strip()
    data = base64.b64encode(run.pictures[newest]).decode()
    image = f'<img alt="{text(heading)}" src="data:image/png;base64,{data}">'
    caption = f'<figcaption class="note">{text(caption)}</figcaption>'
    film = _film(run, members) if len(members) > 1 else ""
    return section(heading, f'<figure class="picture card {text(stem)}"><div class="scroll">{image}</div>{caption}{film}</figure>')


def _film(run: RunRecord, members: list[str]) -> str:
    """Thumbnails of a numbered series, in order: at most FRAMES, with the first and the last."""
    members = sorted(members, key=lambda name: (len(name), name))
    count = min(FRAMES, len(members))
    frames = []
    for name in dict.fromkeys(members[round(i * (len(members) - 1) / (count - 1))] for i in range(count)):
        picture = Image.open(io.BytesIO(run.pictures[name])).convert("RGB")
        picture.thumbnail((FRAME, FRAME))
        small = io.BytesIO()
        picture.save(small, "PNG", optimize=True)
        data, step = base64.b64encode(small.getvalue()).decode(), re.search(r"\d+$", name)
        label = text(f"step {int(step[0]):,}" if step and len(step[0]) < 20 else name)
        frames.append(f'<figure><img alt="{label}" src="data:image/png;base64,{data}"><figcaption>{label}</figcaption></figure>')
    return f'<div class="film scroll">{"".join(frames)}</div>'


def warnings(run: RunRecord) -> str:
    """Skipped updates, warnings of the log, missing files."""
    lines = [line + (f" (x {count:,})" if count > 1 else "") for line, count in run.warnings.items()]
    if len(lines) > MAX_WARNINGS:
        lines[MAX_WARNINGS:] = [f"and {len(lines) - MAX_WARNINGS:,} more in log.txt"]
    skipped = sum(any(k.endswith("/skipped") and v > 0 for k, v in line.items()) for line in run.lines)
    if skipped:
        lines.insert(0, f"{skipped:,} of {len(run.lines):,} logged steps skipped an update (not finite)")
    items = "".join(f"<li>{text(line)}</li>" for line in lines + run.missing)
    body = f'<ul class="card">{items}</ul>' if items else '<p class="soft">Nothing.</p>'
    return section("Skipped updates, warnings, missing files", body)


def settings(run: RunRecord) -> str:
    """The resolved config, with the names for --config.NAME=VALUE."""
    if not run.config:
        return section("Settings", _missing("config.json."))
    flat = sorted(flatten(run.config, _setting), key=lambda item: "." in item[0])  # stable: general settings first
    summary = f"<summary>Resolved config, {len(flat)} values</summary>"
    return section("Settings", f'<details class="card">{summary}{_settings_table(flat)}</details>')


def provenance(run: RunRecord) -> str:
    """Commit, devices, versions."""
    flat = list(flatten(run.provenance, _setting))
    body = f'<div class="card">{_settings_table(flat)}</div>' if flat else _missing("provenance.json.")
    return section("Versions and machine", body)


def _settings_table(items: list[tuple[str, str]]) -> str:
    rows = "".join(f"<tr><td>{text(name)}</td><td><pre>{text(value)}</pre></td></tr>" for name, value in items)
    return f'<div class="scroll"><table class="settings"><tbody>{rows}</tbody></table></div>'


def flatten(values: Mapping, as_text: Callable[[Any], str], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, value as text) of a nested config."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, as_text, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", as_text(value)


def _setting(value: Any) -> str:
    """A value as text: one line per operator of a recipe, and a blank line between recipes."""
    if _is_recipe(value):
        return "\n".join(f"{op}({', '.join(f'{k}={json.dumps(v)}' for k, v in args.items())})" for op, args in value)
    if isinstance(value, list) and value and all(map(_is_recipe, value)):
        return "\n\n".join(map(_setting, value))
    if isinstance(value, str):
        return value or "''"
    return "not set" if value is None else json.dumps(value, ensure_ascii=False)


def _is_recipe(value: Any) -> bool:
    """[[name, {argument: value}], ...]"""
    return isinstance(value, list) and bool(value) and all(
        isinstance(op, list) and len(op) == 2 and isinstance(op[0], str) and isinstance(op[1], Mapping) for op in value
    )  # fmt: skip


def section(heading: str, body: str) -> str:
    return f"<section><h2>{text(heading)}</h2>{body}</section>"


def _missing(what: str) -> str:
    return f'<p class="soft">Missing: {text(what)}</p>'


def _column(run: RunRecord, subject: str) -> str:
    return f"trained, step {run.latest['trained'].step:,}" if subject == "trained" else subject


def _label(name: str) -> str:
    return name.partition("/")[0]


def _label_of(name: str) -> str:
    """'knn/top1' -> 'kNN top1', as plain text."""
    return re.sub("^knn", "kNN", name).replace("/", " ", 1)


def _pretty(name: str) -> str:
    """'knn/top1' -> 'kNN', 'linear/loss' -> 'linear loss'; escaped."""
    return text(_label_of(name).removesuffix(" top1"))


def _unit(name: str) -> str:
    return PERCENT if ACCURACY.search(name) else ""


def _value(name: str, value: float) -> str:
    return number(value, _unit(name))


def _span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"

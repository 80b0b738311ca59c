"""The pictures of several groups side by side, at one step."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ssl_jax.report.compare.runs import Group, Run
from ssl_jax.report.run import BAD_PICTURE, PIXELS
from ssl_jax.report.sections import CAPTIONS, OPENING, section, text

SIDE, SMALL = 480, 240  # pixels of the longer side, and of those of more than FEW groups
FEW = 12
MOST = 2_500_000  # bytes of the pictures of a page, so that it opens fast
LAST = ("views", "neighbors")  # of every run, so they come after what is particular to a method
SERIES = re.compile(r"(.+?)[_-]?(\d+)")


def pictures(groups: Sequence[Group], step: int | None) -> str:
    """A section for each kind of picture that two groups have, or the only one; of each group the run with the lowest seed."""
    runs = {group.name: next((run for run in group.runs if (run.record.workdir / "pictures").is_dir()), None) for group in groups}
    found: dict[str, dict[str, dict[int | None, Path]]] = {}  # {kind: {group: {step: picture}}}
    for name, run in runs.items():
        for kind, steps in (_kinds(run) if run else {}).items():
            found.setdefault(kind, {})[name] = steps
    kinds = [kind for kind, of in found.items() if len(of) > 1 or len(groups) == 1]
    order = (*OPENING[:2], *(kind for kind in kinds if kind not in (*OPENING, *LAST)), *LAST)
    side = SIDE if len(groups) <= FEW else SMALL
    parts, room = [], MOST
    for kind in sorted(kinds, key=order.index):
        part, room = _section(kind, found[kind], runs, step, side, room)
        parts.append(part)
    return "".join(parts)


def _kinds(run: Run) -> dict[str, dict[int | None, Path]]:
    """{kind: {step: picture}}; the step is None for a picture that a run has once."""
    kinds: dict[str, dict[int | None, Path]] = {}
    for path in sorted((run.record.workdir / "pictures").glob("*.png")):
        match = SERIES.fullmatch(path.stem)
        kind, step = (match[1], int(match[2])) if match and len(match[2]) < 20 else (path.stem, None)
        kinds.setdefault(kind, {})[step] = path
    return kinds


def _section(
    kind: str, of: dict[str, dict[int | None, Path]], runs: dict[str, Run | None], step: int | None, side: int, room: int
) -> tuple[str, int]:
    """(HTML, the bytes that are left of `room`)."""
    common = set.intersection(*(set(steps) for steps in of.values())) - {None}
    at = step if step is not None and step in common else max(common, default=None)
    heading, caption = CAPTIONS.get(kind, (kind.replace("_", " ").capitalize(), ""))
    if at is not None:
        caption += f" All at step {at:,}."
    elif any(step is not None for steps in of.values() for step in steps):
        caption += " The groups have no step in common, so each shows its newest."
    figures = []
    for name, steps in of.items():
        chosen = at if at is not None else max(steps, key=lambda step: -1 if step is None else step)
        data = _thumbnail(steps[chosen], side)
        if data is not None and len(data) <= room:
            room -= len(data)
            label = f"{name}, seed {runs[name].seed}" + ("" if chosen is None else f", step {chosen:,}")
            image = f'<img loading="lazy" alt="{text(f"{heading}: {label}")}" src="data:image/jpeg;base64,{data}">'
            figures.append(f'<figure class="picture card">{image}<figcaption class="note">{text(label)}</figcaption></figure>')
    if len(figures) < len(of):
        caption += f" {len(of) - len(figures)} of {len(of)} are left out: damaged, or beyond the {MOST / 1e6:.3g} MB of a page."
    body = f'<p class="note">{text(caption.strip())}</p><div class="charts">{"".join(figures)}</div>'
    return section(heading, body), room


def _thumbnail(path: Path, side: int) -> str | None:
    """JPEG in base64, at most `side` pixels high and wide; None for a damaged picture."""
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            if picture.width * picture.height > PIXELS:
                return None
            small = picture.convert("RGB")
        small.thumbnail((side, side))
        out = io.BytesIO()
        small.save(out, "JPEG", quality=85)
    except BAD_PICTURE:
        return None
    return base64.b64encode(out.getvalue()).decode()

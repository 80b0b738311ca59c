"""Points with intervals as inline SVG: a metric against the value of a key, or against compute."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ssl_jax.report import charts
from ssl_jax.report.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH

WIDE = 20  # a positive axis is logarithmic if its largest value is this many times the smallest


class Point(NamedTuple):
    x: float
    y: float
    low: float | None  # of the interval; None draws none
    high: float | None
    title: str  # under the mouse


def scatter(title: str, series: Mapping[str, Sequence[Point]], across: str, categories: Sequence[str] = (),
            joined: bool | Sequence[str] = False, legend: bool = True) -> str:  # fmt: skip
    """A figure of points.

    Args:
        title: heading, plain text like all names.
        series: {name: points in ascending order of x}, finite, at least one point in all.
        across: what the horizontal axis shows.
        categories: names of the places 0, 1, ... on that axis; () where it has numbers.
        joined: lines between the points of all series, or of those named here.
        legend: name the series; otherwise the page does, by `charts.legend_of`.
    """
    points = [point for of_one in series.values() for point in of_one]
    ys = [y for point in points for y in (point.y, point.low, point.high) if y is not None]
    y_ticks = charts.ticks(*charts.padded(min(ys), max(ys)), 5)
    low, high = min(min(ys), y_ticks[0]), max(max(ys), y_ticks[-1])
    xs = [point.x for point in points]
    logarithmic = not categories and min(xs) > 0 and max(xs) / min(xs) >= WIDE
    scale = math.log10 if logarithmic else float
    left, right = (-0.5, len(categories) - 0.5) if categories else charts.padded(scale(min(xs)), scale(max(xs)))

    def position(x, y):
        across, up = (scale(x) - left) / (right - left), (y - low) / (high - low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    shapes = [charts.horizontal(position(xs[0], y)[1], "grid") + charts.svg_text(LEFT - 5, position(xs[0], y)[1] + 4, label, "end")
              for y, label in zip(y_ticks, charts.labels(y_ticks), strict=True)]  # fmt: skip
    if categories:
        room = max(3, 60 // len(categories))  # characters that fit below a place
        marks = {i: name if len(name) <= room else f"{name[: room - 1]}…" for i, name in enumerate(categories)}
    elif logarithmic:
        decades = range(math.floor(left) - 1, math.ceil(right) + 1)
        steps = (1, 3) if right - left < 2 else (1,)
        marks = {m * 10.0**d: f"{m * 10.0**d:,.4g}" for d in decades for m in steps if left <= math.log10(m * 10.0**d) <= right}
    else:
        inside = [x for x in charts.ticks(left, right, 4) if left <= x <= right]
        marks = dict(zip(inside, charts.labels(inside), strict=True)) if inside else {}
    for x, label in marks.items():
        at = position(x, low)[0]
        shapes.append(charts.svg_text(min(at, WIDTH - 2), HEIGHT - 7, html.escape(label), "end" if at > WIDTH - 24 else "middle"))
    lines = series if joined is True else joined or ()
    shapes += [_series(of_one, position, i, name in lines) for i, (name, of_one) in enumerate(series.items())]
    names = charts.legend_of(dict.fromkeys(series, "")) if legend and len(series) > 1 else []
    heading, across = html.escape(title), html.escape(f"{across}{', logarithmic' if logarithmic else ''}")
    names.insert(0, f"<span>over {across}</span>")
    caption = f'<figcaption><strong>{heading}</strong><span class="legend">{"".join(names)}</span>'
    frame = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{heading} over {across}">'
    return f'<figure class="chart">{caption}</figcaption>{frame}{"".join(shapes)}</svg></figure>'


def _series(points: Sequence[Point], position, i: int, joined: bool) -> str:
    at = [position(point.x, point.y) for point in points]
    shapes = ""
    if joined and len(at) > 1:
        shapes = f'<polyline class="{charts.color(i)}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in at)}"/>'
    for point, (x, y) in zip(points, at, strict=True):
        if point.low is not None:
            ends = [position(point.x, end)[1] for end in (point.low, point.high)]
            shapes += f'<polyline class="{charts.color(i)}" points="{x:.1f},{ends[0]:.1f} {x:.1f},{ends[1]:.1f}"/>'
        title = f"<title>{html.escape(point.title)}</title>"
        shapes += f'<circle class="c{i % charts.COLORS}" cx="{x:.1f}" cy="{y:.1f}" r="3.5">{title}</circle>'
    return shapes

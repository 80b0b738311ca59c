"""Line charts as inline SVG, in the colors of the page (CSS classes and variables of `page.PAGE`)."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

WIDTH, HEIGHT = 360, 190  # units of the viewBox; the page scales them
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 8, 24
MAX_POINTS = 300  # per line; longer ones are averaged
MAX_DOTS = 20  # longer lines have no dots at their points
PERCENT = "\N{NO-BREAK SPACE}%"  # as a unit
COLORS = 6  # --c0 ... of the page

Points = Sequence[tuple[float, float]]


def chart(
    title: str,
    lines: Mapping[str, Points],
    levels: Mapping[str, float] | None = None,
    until: float = 0,
    unit: str = "",
    from_zero: bool = False,
    bands: Mapping[str, Sequence[tuple[float, float, float]]] | None = None,
    axis: str = "step",
    legend: bool = True,
) -> str:
    """A figure with one line per name over steps, and dashed horizontal `levels` to compare with.

    Args:
        title: heading, plain text like all names.
        lines: {name: (step, value) pairs in ascending order}, finite, at least one pair in all. A single pair is a dot.
        levels: {name: value}.
        until: the step axis ends here or at the last point, whichever is later.
        unit: follows the values in the legend; PERCENT fixes two decimals.
        from_zero: the axis of the values begins at 0.
        bands: {name of a line: (step, low, high) in ascending order}, drawn behind it, at most `MAX_POINTS`.
        axis: what the places on the horizontal axis count, in the singular.
        legend: name the lines; otherwise the page does, by `legend_of`.
    """
    dots = max(map(len, lines.values()), default=0) <= MAX_DOTS
    place = {name: i for i, name in enumerate(lines)}  # a line without points keeps its color
    lines = {name: thinned(points) for name, points in lines.items() if points}
    levels = levels or {}
    bands = bands or {}
    values = [y for points in lines.values() for _, y in points] + list(levels.values()) + [0] * from_zero
    values += [y for band in bands.values() for _, *ends in band for y in ends]
    y_ticks = ticks(*padded(min(values), max(values)), 5)
    x_end = max([until, 1, *(points[-1][0] for points in lines.values())])
    x_ticks = [x for x in ticks(0, x_end, 4) if x == round(x)]
    low, high = min(min(values), y_ticks[0]), max(max(values), y_ticks[-1])

    def position(x, y):
        across, up = x / x_end, (y - low) / (high - low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    shapes = [horizontal(position(0, y)[1], "grid") + svg_text(LEFT - 5, position(0, y)[1] + 4, label, "end")
              for y, label in zip(y_ticks, labels(y_ticks), strict=True)]  # fmt: skip
    for x, label in zip(x_ticks, labels(x_ticks), strict=True):
        at = position(x, low)[0]
        anchor = "end" if at > WIDTH - 24 else "middle"
        shapes.append(svg_text(min(at, WIDTH - 2), HEIGHT - 7, label, anchor))
    shapes += [horizontal(position(0, y)[1], f"level l{i % 2}") for i, y in enumerate(levels.values())]
    shapes += [_band(bands[name], position, place[name]) for name in lines if name in bands]
    shapes += [_line(name, points, position, unit, place[name], dots, axis) for name, points in lines.items()]
    names = legend_of({name: number(points[-1][1], unit) for name, points in lines.items()}) if legend else []
    names += [f'<span><i class="key l{i % 2}"></i>{html.escape(name)} <b>{number(y, unit)}</b></span>'
              for i, (name, y) in enumerate(levels.items())]  # fmt: skip
    title = html.escape(title)
    caption = f'<figcaption><strong>{title}</strong><span class="legend">{"".join(names)}</span></figcaption>'
    frame = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title} over {html.escape(axis)}s">'
    return f'<figure class="chart">{caption}{frame}{"".join(shapes)}</svg></figure>'


def number(value: float, unit: str = "") -> str:
    """At most four significant digits; percentages with two decimals; separators in thousands."""
    if unit == PERCENT:
        return f"{value:.2f}{unit}"
    if abs(value) >= 1000 or value == 0:
        return f"{value:,.0f}"
    return f"{value:.4g}" if abs(value) >= 0.01 else f"{value:.2e}"


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` multiples of 1, 2, 2.5 or 5 times a power of ten in [low, high]; two around it where there are none inside."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next((m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999), 10 * power)
    inside = [n * step for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    return inside if len(inside) > 1 else [math.floor(low / step) * step, (math.floor(low / step) + 1) * step]


def labels(values: Sequence[float]) -> list[str]:
    """Tick labels with one precision: '0.5' and '1.0', '10k' and '20k', '2e-05'."""
    most = max(map(abs, values))
    scale, suffix = next(((s, t) for s, t in ((1e9, "G"), (1e6, "M"), (1e4, "k")) if most >= s), (1, ""))
    scale = 1e3 if suffix == "k" else scale
    step = (values[1] - values[0]) / scale if len(values) > 1 else 1
    decimals = next((d for d in range(5) if abs(round(step, d) - step) < 1e-6 * step), None)
    if decimals is None:
        return [f"{value:.2g}" if value else "0" for value in values]
    return [f"{value / scale:.{decimals}f}{suffix if value else ''}" for value in values]


def thinned(points: Points, most: int = MAX_POINTS) -> list[tuple[float, float]]:
    """At most `most` points: means over groups of neighbors, and the last point itself."""
    width = math.ceil(len(points) / most)
    if width <= 1:
        return list(points)
    groups = [points[i : i + width] for i in range(0, len(points) - 1, width)]
    means = [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]
    return [*means[: most - 1], points[-1]]


def padded(low: float, high: float) -> tuple[float, float]:
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 0.5
    return (low if low == 0 < high else low - margin), high + margin


def horizontal(y: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'


def svg_text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'


def color(i: int) -> str:
    """CSS classes of line i: the colors, then the same colors dashed."""
    return f"c{i % COLORS}" + " dashed" * (i // COLORS % 2)


def legend_of(lines: Mapping[str, str]) -> list[str]:
    """{name: text behind it} -> a key for each line of a chart, in their order."""
    return [f'<span><i class="key {color(i)}"></i>{html.escape(name)} <b>{html.escape(after)}</b></span>'
            for i, (name, after) in enumerate(lines.items())]  # fmt: skip


def _band(band: Sequence[tuple[float, float, float]], position, i: int) -> str:
    there = [position(x, high) for x, _, high in band]
    back = [position(x, low) for x, low, _ in reversed(band)]
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in there + back)
    return f'<polygon class="c{i % COLORS}" points="{points}"/>'


def _line(name: str, points: Points, position, unit: str, i: int, dots: bool, axis: str) -> str:
    """A polyline, with `dots` that show their value under the mouse. A single point is always a dot."""
    at = [position(x, y) for x, y in points]
    points_text = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
    shapes = f'<polyline class="{color(i)}" points="{points_text}"/>' if len(at) > 1 else ""
    if dots or len(at) == 1:
        for (x, y), (step, value) in zip(at, points, strict=True):
            title = f"{html.escape(name)}, {html.escape(axis)} {step:,.0f}: {number(value, unit)}"
            shapes += f'<circle class="c{i % COLORS}" cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{title}</title></circle>'
    return shapes

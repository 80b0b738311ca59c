"""Renders the embedded scenes: one object made of parts, small pebbles, a textured ground, light, and a second view.

The part structure alone decides the class: how many limbs, holes, rungs or rings, and how they are joined. Color,
texture, background, pose, proportions, scale, light, shadow, blur and noise are sampled independently of it. Objects
stand roughly upright (within 43 degrees) and light comes from above, as in photographs, so that rotation prediction has
a signal. Every scene is a pure function of (seed, index).

A scene is painted once, at twice the resolution, on a canvas larger than the frame; both views are cut from it.
Coordinates: x to the right, y down, in pixels of the frame; the center of pixel (row, column) is (x, y) = (column, row).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np

SIZE = 48  # frame height and width in pixels
CLASSES = (
    "ring", "star", "cross", "gear", "flower", "ladder", "comb", "chain", "dumbbell", "tree", "zigzag", "spiral"
)  # fmt: skip
PEBBLE = "pebble"
COLORS = ("red", "yellow", "green", "cyan", "blue", "magenta")  # hues of 0, 60, ... 300 degrees
MAX_PEBBLES = 3
ANSWERS = ("yes", "no", *(str(n) for n in range(MAX_PEBBLES + 1)), *COLORS, *CLASSES)
BACKGROUND, OBJECT, PEBBLES = 0, 1, 2  # values of the mask

MAX_ANGLE = 0.75  # of an object: radians from upright, to either side
MAX_SHIFT = 4.0  # camera motion: pixels
MAX_TURN = 0.25  # radians
MAX_LOG_ZOOM = 0.12

_FINE = 2  # canvas pixels per frame pixel
_MARGIN = 13  # frame pixels around the frame: enough for every allowed motion
_CANVAS = (SIZE + 2 * _MARGIN) * _FINE
_CENTER = (SIZE - 1) / 2
_YY, _XX = (np.mgrid[:_CANVAS, :_CANVAS].astype(np.float32) + 0.5) / _FINE - 0.5 - _MARGIN  # frame coordinates


class Scene(NamedTuple):
    """One example with its ground truth."""

    image: np.ndarray  # [SIZE, SIZE, 3] uint8
    label: int  # index into CLASSES
    pose: np.ndarray  # [4] float32: angle (radians, clockwise on the screen), x, y (pixels), radius (pixels)
    mask: np.ndarray  # [SIZE, SIZE, 1] uint8: BACKGROUND, OBJECT or PEBBLES
    boxes: list[tuple[float, float, float, float]]  # ymin, xmin, ymax, xmax in [0, 1]; the object first
    box_labels: list[str]  # a class name, or 'pebble'
    question: str
    answer: str  # one of ANSWERS
    image2: np.ndarray  # [SIZE, SIZE, 3] uint8
    motion: np.ndarray  # [4] float32: dx, dy (pixels), rotation (radians), log zoom; see `motion_matrix`


class _Part(NamedTuple):
    points: np.ndarray  # [N, 2] polygon in object coordinates: the object fits in a circle of radius ~1, y down
    paint: int  # 0 first color, 1 second color, -1 a hole


def motion_matrix(motion: np.ndarray) -> np.ndarray:
    """[2, 3] matrix that takes (x, y, 1) in `image` to (x, y) of the same scene point in `image2`.

    p2 = c + exp(log_zoom) R(rotation) (p1 - c) + (dx, dy), with c the center of the frame and R(t) = [[cos t, -sin t],
    [sin t, cos t]], which turns clockwise on the screen because y points down. It depends on the two frames only
    (T12 = T2 T1^-1 with T from scene to picture), not on scene coordinates. The inverse matrix takes `image2` to `image`.
    """
    dx, dy, turn, log_zoom = (float(value) for value in motion)
    rotation = np.exp(log_zoom) * _rotation(turn)
    center = np.array([_CENTER, _CENTER])
    return np.concatenate([rotation, (center - rotation @ center + (dx, dy))[:, None]], axis=1)


def _disc(x: float, y: float, radius: float, corners: int = 28) -> np.ndarray:
    angle = np.arange(corners) * (2 * np.pi / corners)
    return np.stack([x + radius * np.cos(angle), y + radius * np.sin(angle)], 1)


def _bar(start: Sequence[float], end: Sequence[float], width: float, taper: float = 1.0) -> np.ndarray:
    """A straight bar: `width` at its start, `width * taper` at its end."""
    start, end = np.asarray(start, float), np.asarray(end, float)
    along = (end - start) / np.linalg.norm(end - start)
    across = np.array([-along[1], along[0]]) * width / 2
    return np.stack([start + across, end + across * taper, end - across * taper, start - across])


def _ribbon(points: np.ndarray, width: float) -> list[np.ndarray]:
    """A polyline of the given width: bars with round joints."""
    bars = [_bar(a, b, width) for a, b in itertools.pairwise(points)]
    return bars + [_disc(x, y, width / 2, 12) for x, y in points]


def _rotation(angle: float) -> np.ndarray:
    """[2, 2] matrix that turns clockwise on the screen (y down)."""
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[cos, -sin], [sin, cos]])


def _direction(angle: float) -> np.ndarray:
    """Unit vector at `angle` clockwise from straight up."""
    return np.array([np.sin(angle), -np.cos(angle)])


def _parts(name: str, rng: np.random.Generator) -> list[_Part]:
    """The parts of one object, upright, in painting order; numbers and proportions vary within a class."""
    u = rng.uniform
    body: list[np.ndarray] = []
    accent: list[np.ndarray] = []
    holes: list[np.ndarray] = []
    if name == "ring":
        body = [_disc(0, 0, 0.95, 36)]
        holes = [_disc(0, 0, u(0.45, 0.68))]
    elif name == "star":
        tips, inner = 5, u(0.36, 0.48)
        angle = np.arange(2 * tips) * np.pi / tips
        radius = np.where(np.arange(2 * tips) % 2 == 0, 1.0, inner)
        body = [np.stack([radius * np.sin(angle), -radius * np.cos(angle)], 1)]
        accent = [_disc(0, 0, inner * u(0.5, 0.8))]
    elif name == "cross":
        width, up = u(0.30, 0.44), u(0.05, 0.35)
        body = [_bar((0, -1), (0, 1), width)]
        accent = [_bar((-0.85, -up), (0.85, -up), width)]
    elif name == "gear":
        teeth, root = int(rng.integers(8, 11)), u(0.68, 0.74)
        turns = np.arange(teeth) * 2 * np.pi / teeth
        body = [_disc(0, 0, root)] + [_bar(0.5 * _direction(t), 1.02 * _direction(t), u(0.26, 0.3)) for t in turns]
        holes = [_disc(0, 0, u(0.22, 0.34))]
    elif name == "flower":
        petals, out = int(rng.integers(5, 8)), u(0.60, 0.64)
        turns = np.arange(petals) * 2 * np.pi / petals
        radius = out * np.sin(np.pi / petals) * u(0.82, 0.98)
        body = [_disc(*(out * _direction(t)), radius, 18) for t in turns]
        body += [_bar((0, 0), out * _direction(t), 0.24) for t in turns]
        accent = [_disc(0, 0, u(0.24, 0.34), 18)]
    elif name == "ladder":
        rungs, half, width = int(rng.integers(3, 6)), u(0.42, 0.55), u(0.15, 0.2)
        body = [_bar((x * 0.9, -1), (x * 1.1, 1), width) for x in (-half, half)]
        accent = [_bar((-half, y), (half, y), width * 0.9) for y in np.linspace(-0.72, 0.72, rungs)]
    elif name == "comb":
        teeth, width, top = int(rng.integers(4, 7)), u(0.12, 0.17), u(-0.75, -0.6)
        body = [_bar((-1, top), (1, top), u(0.26, 0.36))]
        accent = [_bar((x, top), (x, u(0.6, 0.8)), width) for x in np.linspace(-0.9, 0.9, teeth)]
    elif name == "chain":
        links = int(rng.integers(3, 5))
        radius = u(1.18, 1.26) / links
        height = np.linspace(-1 + radius, 1 - radius, links)
        side = u(0.0, 0.35) * radius * np.where(np.arange(links) % 2 == 0, 1, -1)
        centers = list(zip(side, height, strict=True))
        body = [_disc(x, y, radius, 24) for x, y in centers]
        holes = [_disc(x, y, radius * u(0.5, 0.56), 18) for x, y in centers]
    elif name == "dumbbell":
        first, second = u(0.36, 0.46), u(0.36, 0.46)
        body = [_disc(0, first - 1, first), _disc(0, 1 - second, second)]
        accent = [_bar((0, -0.6), (0, 0.6), u(0.16, 0.26))]
    elif name == "tree":
        pairs, width, branch_angle = int(rng.integers(2, 4)), u(0.16, 0.22), u(0.6, 0.9)
        body = [_bar((0, 1), (0, -0.95), width * 1.4, 0.6)]
        for i, y in enumerate(np.linspace(0.5, -0.35, pairs)):
            length = 0.85 - 0.15 * i
            accent += [_bar((0, y), (0, y) + length * _direction(s * branch_angle), width, 0.8) for s in (-1, 1)]
    elif name == "zigzag":
        corners, width = int(rng.integers(5, 7)), u(0.22, 0.3)
        x = u(0.5, 0.65) * np.where(np.arange(corners) % 2 == 0, 1, -1)
        body = _ribbon(np.stack([x, np.linspace(-0.9, 0.9, corners)], 1), width)
    elif name == "spiral":
        turn = np.linspace(0, u(1.75, 2.1) * 2 * np.pi, 30)
        radius = 0.06 + 0.82 * turn / turn[-1]
        body = _ribbon(np.stack([radius * np.sin(turn), radius * np.cos(turn)], 1), u(0.17, 0.21))
    else:
        raise ValueError(f"no such class: {name}")
    return [_Part(p, 0) for p in body] + [_Part(p, 1) for p in accent] + [_Part(p, -1) for p in holes]


def _to_canvas(points: np.ndarray) -> np.ndarray:
    return (points + 0.5 + _MARGIN) * _FINE - 0.5


def _fill(canvas: np.ndarray, points: np.ndarray, value: int) -> None:
    """Fills a polygon in frame coordinates, with antialiased edges."""
    fixed = np.round(_to_canvas(points) * 16).astype(np.int32)
    cv2.fillPoly(canvas, [fixed], value, cv2.LINE_AA, shift=4)


def _texture(rng: np.random.Generator) -> np.ndarray:
    """[canvas, canvas] float32 pattern in [0, 1]: plain slope, stripes, checks or clouds."""
    kind = rng.integers(4)
    angle = rng.uniform(0, np.pi)
    cos, sin = math.cos(angle), math.sin(angle)
    along = cos * _XX + sin * _YY
    if kind == 0:
        return np.clip(0.5 + (along - along.mean()) / SIZE * rng.uniform(0.5, 1.2), 0, 1)
    if kind == 3:
        cells = int(rng.integers(5, 22))
        return cv2.resize(rng.random((cells, cells), np.float32), (_CANVAS, _CANVAS), interpolation=cv2.INTER_LINEAR)
    frequency = 2 * np.pi / rng.uniform(4, 14)
    wave = np.sin(frequency * along + rng.uniform(0, 2 * np.pi))
    if kind == 2:
        wave = wave * np.sin(frequency * (cos * _YY - sin * _XX) + rng.uniform(0, 2 * np.pi))
    return np.clip(0.5 + wave * rng.uniform(0.7, 2.0), 0, 1)


def _rgb(hue: float, saturation: float, value: float) -> np.ndarray:
    """[3, 1, 1] float32 in [0, 1] of a color with hue in degrees."""
    sector = (hue / 60.0 + np.array([5, 3, 1])) % 6
    channels = value * (1 - saturation * np.clip(np.minimum(sector, 4 - sector), 0, 1))
    return channels.astype(np.float32)[:, None, None]


def _luminance(color: np.ndarray) -> float:
    return float(0.299 * color[0, 0, 0] + 0.587 * color[1, 0, 0] + 0.114 * color[2, 0, 0])


def _named_color(index: int, rng: np.random.Generator) -> np.ndarray:
    return _rgb(60 * index + rng.uniform(-14, 14), rng.uniform(0.6, 1), rng.uniform(0.45, 1))


def _with_luminance(color: np.ndarray, target: float) -> np.ndarray:
    """The color, scaled and if necessary mixed with white, at the luminance `target` in [0, 1]."""
    scaled = color * (target / max(_luminance(color), 1e-3))
    peak = float(scaled.max())
    if peak <= 1:
        return scaled
    scaled = scaled / peak
    now = _luminance(scaled)
    return scaled + (1 - scaled) * (target - now) / max(1 - now, 1e-3)


def _blend(picture: np.ndarray, paint: np.ndarray, weight: np.ndarray) -> None:
    """Moves the picture [3, H, W] in place toward paint, a color [3, 1, 1] or a picture; weight [H, W] in [0, 1]."""
    change = paint - picture
    change *= weight
    picture += change


def _plain(color: np.ndarray) -> np.ndarray:
    return np.broadcast_to(color, (3, _CANVAS, _CANVAS)).copy()


def _scatter(count: int, coverage: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """Polygons of up to `count` pebbles that touch neither the object, each other, nor the edge of the frame."""
    free = coverage == 0
    pebbles: list[np.ndarray] = []
    for _ in range(60):
        if len(pebbles) == count:
            break
        radius = rng.uniform(2.4, 3.6)
        x, y = rng.uniform(radius, SIZE - 1 - radius, 2)
        reach = radius + 1.5
        box = np.round((np.array([y - reach, y + reach, x - reach, x + reach]) + _MARGIN) * _FINE).astype(int)
        window = free[box[0] : box[1], box[2] : box[3]]
        if window.all():
            window[:] = False
            outline = _disc(0, 0, radius, corners=int(rng.choice([3, 4, 12])))
            pebbles.append(outline @ _rotation(rng.uniform(0, 2 * np.pi)) + np.array([x, y]))
    return pebbles


def _view(canvas: np.ndarray, matrix: np.ndarray | None = None) -> np.ndarray:
    """The frame cut from the canvas, area-averaged to SIZE x SIZE; `matrix` as in `motion_matrix`."""
    fine = SIZE * _FINE
    if matrix is None:
        view = canvas[_MARGIN * _FINE : _MARGIN * _FINE + fine, _MARGIN * _FINE : _MARGIN * _FINE + fine]
    else:
        to_frame = np.array([[1 / _FINE, 0, 0.5 / _FINE - 0.5 - _MARGIN], [0, 1 / _FINE, 0.5 / _FINE - 0.5 - _MARGIN]])
        from_frame = np.array([[_FINE, 0, _FINE * 0.5 - 0.5], [0, _FINE, _FINE * 0.5 - 0.5], [0, 0, 1]])
        matrix = (from_frame @ np.vstack([matrix, [0, 0, 1]]) @ np.vstack([to_frame, [0, 0, 1]]))[:2]
        view = cv2.warpAffine(canvas, matrix, (fine, fine), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
    return cv2.resize(view, (SIZE, SIZE), interpolation=cv2.INTER_AREA)


def _expose(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Slight blur and noise of lens and sensor, new in each view. [SIZE, SIZE, 3] float in [0, 1] -> uint8."""
    blur = rng.uniform(0, 0.8)
    if blur > 0.3:
        picture = cv2.GaussianBlur(picture, (5, 5), blur)
    picture = picture + rng.standard_normal(picture.shape, np.float32) * rng.uniform(0.005, 0.03)
    return np.round(np.clip(picture, 0, 1) * 255).astype(np.uint8)


def _box(region: np.ndarray) -> tuple[float, float, float, float]:
    """(ymin, xmin, ymax, xmax) in [0, 1] of the set pixels; the maxima are exclusive."""
    rows, columns = np.flatnonzero(region.any(1)), np.flatnonzero(region.any(0))
    return rows[0] / SIZE, columns[0] / SIZE, (rows[-1] + 1) / SIZE, (columns[-1] + 1) / SIZE


def question_and_answer(label: int, color: int, pebbles: int, rng: np.random.Generator) -> tuple[str, str]:
    """A question and its answer. The best guess from the question alone is right in about 27% of cases."""
    kind = rng.integers(4)
    if kind == 0:
        return "what color is the object?", COLORS[color]
    if kind == 1:
        return "what is the object?", CLASSES[label]
    if kind == 2:
        return "how many pebbles are there?", str(pebbles)
    if rng.random() < 0.5:
        return f"is there a {CLASSES[label]}?", "yes"
    other = (label + rng.integers(1, len(CLASSES))) % len(CLASSES)
    return f"is there a {CLASSES[other]}?", "no"


def _encode(picture: np.ndarray) -> bytes:
    done, data = cv2.imencode(".png", picture[:, :, ::-1])  # OpenCV orders channels blue, green, red
    assert done
    return data.tobytes()


def render_encoded(seed: int, start: int, stop: int) -> list[Scene]:
    """Scenes start ... stop - 1 with pictures as PNG files (bytes)."""
    cv2.setNumThreads(1)
    scenes = (render(seed, index) for index in range(start, stop))
    return [s._replace(image=_encode(s.image), mask=_encode(s.mask), image2=_encode(s.image2)) for s in scenes]


def render(seed: int, index: int) -> Scene:
    """Scene number `index` (>= 0) of the series `seed` (>= 0). Classes take turns: label = index mod len(CLASSES)."""
    rng = np.random.default_rng((seed, index))
    u = rng.uniform
    label = index % len(CLASSES)
    color = int(rng.integers(len(COLORS)))

    # Geometry: object coordinates -> frame. Proportions and mirroring first, then the pose.
    radius, angle = u(11, 19), u(-MAX_ANGLE, MAX_ANGLE)
    center = _CENTER + u(-1, 1, 2) * (25 - radius)
    stretch = np.exp(u(-0.2, 0.2))
    shape = np.array([[stretch * rng.choice([-1, 1]), u(-0.2, 0.2)], [0, 1 / stretch]])
    to_frame = radius * _rotation(angle) @ shape
    coverage = np.zeros((_CANVAS, _CANVAS), np.uint8)
    second = np.zeros((_CANVAS, _CANVAS), np.uint8)
    for part in _parts(CLASSES[label], rng):
        points = part.points @ to_frame.T + center
        _fill(coverage, points, 0 if part.paint < 0 else 255)
        _fill(second, points, 255 if part.paint == 1 else 0)
    pebbles = _scatter(int(rng.integers(MAX_PEBBLES + 1)), coverage, rng)
    stones = [np.zeros((_CANVAS, _CANVAS), np.uint8) for _ in pebbles]
    for stone, points in zip(stones, pebbles, strict=True):
        _fill(stone, points, 255)

    # Colors: the object is lighter or darker than its ground, so that it is visible in grayscale, too.
    light_object = rng.random() < 0.5
    bright, dark = u(0.55, 0.85), u(0.12, 0.34)
    paint = _with_luminance(_named_color(color, rng), bright if light_object else dark)
    ground = _with_luminance(_rgb(u(0, 360), u(0, 0.9), 1), dark if light_object else bright)
    other = _with_luminance(_rgb(u(0, 360), u(0, 0.9), 1), _luminance(ground) * u(0.5, 1.5))

    # Ground: two colors in a texture, and a few soft strokes across.
    picture = _plain(ground)
    _blend(picture, other, _texture(rng))
    count = int(rng.integers(0, 4))
    if count:
        strokes = np.zeros((_CANVAS, _CANVAS), np.uint8)
        for _ in range(count):
            ends = u(-_MARGIN, SIZE + _MARGIN, (2, 2))
            _fill(strokes, _bar(ends[0], ends[1] + 0.1, u(0.8, 2.5)), 255)
        _blend(picture, other * u(0.7, 1.35), strokes * np.float32(u(0.3, 0.8) / 255))

    # Light from above: a cast shadow, a slope of brightness, and relief on the object.
    solid = coverage
    for stone in stones:
        solid = np.maximum(solid, stone)
    sun = _direction(u(-1.0, 1.0))
    cast = np.float32([[1, 0, -sun[0] * _FINE * u(1, 3)], [0, 1, -sun[1] * _FINE * u(1, 3)]])
    shadow = cv2.GaussianBlur(cv2.warpAffine(solid, cast, (_CANVAS, _CANVAS)), (0, 0), u(1, 3))
    picture *= 1 - shadow * np.float32(u(0.1, 0.5) / 255)
    shade, strength = _plain(paint), u(0.3, 0.6)
    darker = rng.random() < 0.5
    _blend(shade, paint * (1 - strength) if darker else paint + (1 - paint) * strength, _texture(rng) * u(0.1, 0.6))
    shade *= 1 - second * np.float32(u(-0.25, 0.3) / 255)
    height = cv2.GaussianBlur(solid, (0, 0), 2.0).astype(np.float32) / 255
    slope_y, slope_x = cv2.Sobel(height, -1, 0, 1) / 8, cv2.Sobel(height, -1, 1, 0) / 8
    relief = 1 - (slope_x * np.float32(sun[0]) + slope_y * np.float32(sun[1])) * np.float32(u(1, 4))
    shade *= relief
    _blend(picture, shade, coverage * np.float32(1 / 255))
    for stone, points in zip(stones, pebbles, strict=True):
        tint = _with_luminance(_rgb(u(0, 360), u(0, 1), 1), u(0.2, 0.8))
        corners = _to_canvas(np.stack([points.min(0) - 1, points.max(0) + 2])).astype(int)
        near = (slice(*corners[:, 1]), slice(*corners[:, 0]))
        _blend(picture[:, *near], tint * relief[near], stone[near] * np.float32(1 / 255))
    slope = sun * u(0, 0.35) / SIZE
    picture *= (1 + _XX * float(slope[0]) + _YY * float(slope[1])) * u(0.8, 1.1)
    picture = cv2.merge(np.clip(picture, 0, 1))  # [canvas, canvas, 3]

    # Two views of the same canvas.
    motion = (u(-1, 1, 4) * (MAX_SHIFT, MAX_SHIFT, MAX_TURN, MAX_LOG_ZOOM)).astype(np.float32)
    image = _expose(_view(picture), rng)
    image2 = _expose(_view(picture, motion_matrix(motion)), rng)
    mask = np.where(_view(coverage) > 127, OBJECT, BACKGROUND).astype(np.uint8)
    boxes, box_labels = [_box(mask == OBJECT)], [CLASSES[label]]
    for stone in stones:
        region = _view(stone) > 127
        mask[region] = PEBBLES
        boxes.append(_box(region))
        box_labels.append(PEBBLE)
    question, answer = question_and_answer(label, color, len(stones), rng)
    pose = np.array([angle, *center, radius], np.float32)
    return Scene(image, label, pose, mask[:, :, None], boxes, box_labels, question, answer, image2, motion)

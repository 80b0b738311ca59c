"""Host-side geometry: from one example to images of a fixed shape. Photometric operations run on the device.

An op samples its windows once for each example. It crops every image and mask of the example by the same windows, and
boxes and points follow. So all images of an example must have one size, and an image of a second camera is cropped alike.
Poses and motions would not match the crops, so random ops refuse them (see the kinds in `ssl_jax.data.features`);
resize_crop leaves them in pixels of the whole image.

A recipe is a sequence of (op name, arguments) with at most one op. The empty recipe leaves images unchanged, so they must
share one shape.

Each op takes flip=P: it mirrors with that probability.

    random_resized_crops(size, crops=2, ...)  -> [crops, size, size, 3]   one decode, many crops
    random_resized_crop(size, ...)            -> [size, size, 3]
    resize_crop(resize, crop)                 -> [crop, crop, 3]          short side, then center: evaluation
    resize_random_crop(resize, crop)          -> [crop, crop, 3]          short side, then anywhere (BiGAN, VQGAN)
    resize_whole(height, width)               -> [height, width, 3]       all of the image, whatever its shape

The literature uses three crop distributions, which differ in their mean area:
  torchvision  area uniform, aspect log-uniform, ten tries, else the largest center crop (MoCo, SimSiam, MAE, DINO, ...)
  simclr       TensorFlow's sample_distorted_bounding_box as SimCLR calls it: aspect uniform, height uniform within the
               bounds of the area, and at least a tenth of the image
  clamp        area uniform, aspect log-uniform, sides clamped to the image, one try
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import cv2
import numpy as np

from ssl_jax.data.decode import Picture, guarded
from ssl_jax.errors import UserError

cv2.setNumThreads(0)  # many images run at once; threads within one image would compete for the cores

INTERPOLATIONS = {"bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC}
MOST_PIXELS, MOST_CROPS = 2**14, 256  # of a side; of one image
NEARLY = 1.2  # shrinking by less than this factor needs no averaging
LARGEST = 8  # intermediate pixels per pixel of the source or the result
PHASES = 5  # source pixels before an area where its grid may begin
CLOSE = 1 / 16  # of a step of a grid: a shift that is not looked for further
Recipe = Sequence[tuple[str, Mapping]]
Box = tuple[int, int, int, int]  # top, left, height, width in pixels
Area = tuple[float, float, float, float]  # the same, not in whole pixels


def resize(pixels: np.ndarray, height: int, width: int, interpolation: str = "bicubic") -> np.ndarray:
    """uint8 [H, W, 3] to [height, width, 3] without aliasing.

    An axis that shrinks is first interpolated to the next whole multiple of the target, then averaged in whole blocks. On
    photographs the result is as close to Pillow's antialiased resize as OpenCV's area interpolation, and cheaper
    (benchmarks/input_path.py). An axis that shrinks by less than `NEARLY` is only interpolated: the error is no larger
    than the difference between Pillow's bilinear and bicubic.
    """
    return resize_area(pixels, (0, 0, *pixels.shape[:2]), (height, width), interpolation)


def resize_area(
    pixels: np.ndarray, area: Area, size: tuple[int, int], interpolation: str = "bicubic", around: int = 0
) -> np.ndarray:
    """As `resize` of the `area` of uint8 [H, W, 3], whose bounds need not be whole pixels.

    Interpolation reads `around` pixels on each side of the area, where there are any. With 0 an area of whole pixels is cut out,
    then resized.
    """
    flag = INTERPOLATIONS[interpolation]
    rows, columns = _grid(area[0], area[2], size[0], around), _grid(area[1], area[3], size[1], around)
    source = pixels[rows.start : rows.stop, columns.start : columns.stop]
    if rows.size * columns.size > LARGEST * max(source.shape[0] * source.shape[1], size[0] * size[1]):
        # A thin area: one axis shrinks by far and the other grows. So the first one goes first.
        if rows.blocks > columns.blocks:
            source = resize_area(source, (area[0] - rows.start, 0, area[2], source.shape[1]), (size[0], source.shape[1]), interpolation)
            return resize_area(source, (0, area[1] - columns.start, size[0], area[3]), size, interpolation)
        source = resize_area(source, (0, area[1] - columns.start, source.shape[0], area[3]), (source.shape[0], size[1]), interpolation)
        return resize_area(source, (area[0] - rows.start, 0, area[2], size[1]), size, interpolation)
    # With the two scales OpenCV keeps them as they are; with a size it would stretch the source to fit.
    pixels = cv2.resize(source, None, fx=columns.scale, fy=rows.scale, interpolation=flag)
    pixels = pixels[rows.skip : rows.skip + rows.size, columns.skip : columns.skip + columns.size]
    return pixels if rows.blocks == columns.blocks == 1 else cv2.resize(pixels, size[::-1], interpolation=cv2.INTER_AREA)


class _Grid(NamedTuple):
    """How one axis of an area is interpolated: source pixels [start, stop), times `scale`, without the first `skip`, are `size`
    pixels, which are averaged in `blocks`."""

    start: int
    stop: int
    scale: float
    skip: int
    size: int
    blocks: int


def _grid(start: float, extent: float, target: int, around: int) -> _Grid:
    """OpenCV's grid begins at a whole pixel. So it begins before the area, where a whole number of its steps lead to the start."""
    blocks = 1 if extent <= NEARLY * target else math.ceil(extent / target - 1e-9)
    scale = target * blocks / extent
    first, last = max(0, math.floor(start) - around), math.ceil(start + extent - 1e-9) + around
    if first == start:
        return _Grid(first, last, scale, 0, target * blocks, blocks)

    whole = round(start * scale)
    if start <= extent and abs(start * scale - whole) < 1e-6:  # a centered crop of the whole image
        return _Grid(0, last, scale, whole, target * blocks, blocks)
    best, origin = math.inf, first
    for at in range(first, max(-1, first - PHASES), -1):
        steps = (start - at) * scale
        error = abs(steps - int(steps + 0.5))
        if error < best:
            best, origin = error, at
            if error < CLOSE:
                break
    # The end of the grid is rounded, and must not be short of the area.
    skip = min(round((start - origin) * scale), round((last - around - origin) * scale) - target * blocks)
    return _Grid(origin, last, scale, skip, target * blocks, blocks)


def torchvision_box(rng: np.random.Generator, height: int, width: int, area, ratio) -> Box:
    """A crop with the distribution of torchvision's RandomResizedCrop.get_params."""
    for _ in range(10):
        u = rng.random(4).tolist()  # one call, since the overhead is per call
        target, aspect = height * width * _between(u[0], area), _log_between(u[1], ratio)
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(u[2] * (height - h + 1)), int(u[3] * (width - w + 1)), h, w
    w = min(width, round(height * ratio[1]))
    h = min(height, round(width / ratio[0]))
    return (height - h) // 2, (width - w) // 2, max(h, 1), max(w, 1)


def simclr_box(rng: np.random.Generator, height: int, width: int, area, ratio) -> Box:
    """tf.image.sample_distorted_bounding_box with the whole image as its box, min_object_covered=0.1 and 100 attempts."""
    smallest, largest = max(area[0], 0.1) * height * width, area[1] * height * width
    for _ in range(100):
        u = rng.random(4).tolist()
        aspect = _between(u[0], ratio)
        low = round(math.sqrt(area[0] * height * width / aspect))
        high = min(round(math.sqrt(largest / aspect)), int((width + 0.5 - 1e-7) / aspect), height)
        low = min(low, high)
        h = low + int(u[1] * (high - low + 1))
        w = round(h * aspect)
        if 0 < h <= height and 0 < w <= width and smallest <= h * w <= largest:
            return int(u[2] * (height - h + 1)), int(u[3] * (width - w + 1)), h, w
    return 0, 0, height, width


def clamp_box(rng: np.random.Generator, height: int, width: int, area, ratio) -> Box:
    """The crop of BYOL's reference and MAE's linear probe: no rejection, sides clamped to the image."""
    u = rng.random(4).tolist()
    target, aspect = height * width * _between(u[0], area), _log_between(u[1], ratio)
    w = min(max(round(math.sqrt(target * aspect)), 1), width)
    h = min(max(round(math.sqrt(target / aspect)), 1), height)
    return int(u[2] * (height - h + 1)), int(u[3] * (width - w + 1)), h, w


def _between(u: float, bounds) -> float:
    return bounds[0] + u * (bounds[1] - bounds[0])


def _log_between(u: float, bounds) -> float:
    return bounds[0] * (bounds[1] / bounds[0]) ** u


SAMPLINGS = {"torchvision": torchvision_box, "simclr": simclr_box, "clamp": clamp_box}


class Window(NamedTuple):
    """How one result is made: resize `box` of the image (None: all) to `size`, crop `part` of that, then mirror."""

    box: Box | None
    size: tuple[int, int]  # (height, width) in pixels
    part: Box  # in the resized image
    mirror: bool
    interpolation: str


def random_resized_crops(
    height: int,
    width: int,
    rng: np.random.Generator,
    *,
    size: int,
    crops: int = 2,
    area: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    interpolation: str = "bicubic",
    sampling: str = "torchvision",
    flip: float = 0.0,
) -> list[Window]:
    """Independent random crops of one image, each resized: [crops, size, size, 3].

    The image is decoded once, at the smallest scale that has a source pixel for every pixel of every crop.

    Args:
      size: side of the result in pixels.
      crops: number of crops.
      area: bounds of the crop's share of the image, 0 < low <= high <= 1.
      ratio: bounds of width / height.
      interpolation: 'bilinear' or 'bicubic'; antialiased when shrinking. Masks take the nearest pixel.
      sampling: 'torchvision', 'simclr' or 'clamp'; see the module docstring.
      flip: probability that a crop is mirrored left to right.
    """
    sample = SAMPLINGS[sampling]
    boxes = [sample(rng, height, width, area, ratio) for _ in range(crops)]
    mirrored = _mirrored(rng, crops, flip)
    return [Window(box, (size, size), (0, 0, size, size), m, interpolation) for box, m in zip(boxes, mirrored, strict=True)]


def random_resized_crop(
    height: int,
    width: int,
    rng: np.random.Generator,
    *,
    size: int,
    area: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    interpolation: str = "bicubic",
    sampling: str = "torchvision",
    flip: float = 0.0,
) -> list[Window]:
    """One random crop, without the axis of crops: [size, size, 3]. Arguments as in `random_resized_crops`."""
    return random_resized_crops(
        height, width, rng, size=size, crops=1, area=area, ratio=ratio, interpolation=interpolation, sampling=sampling, flip=flip
    )


def resize_crop(
    height: int, width: int, rng: np.random.Generator, *, resize: int, crop: int, interpolation: str = "bicubic", flip: float = 0.0
) -> list[Window]:
    """Resize the short side to `resize`, then crop the center: [crop, crop, 3]. Sizes round as in torchvision."""
    short = min(height, width)
    size = resize * height // short, resize * width // short
    part = round((size[0] - crop) / 2), round((size[1] - crop) / 2), crop, crop
    return [Window(None, size, part, _mirrored(rng, 1, flip)[0], interpolation)]


def resize_random_crop(
    height: int, width: int, rng: np.random.Generator, *, resize: int, crop: int, interpolation: str = "bicubic", flip: float = 0.0
) -> list[Window]:
    """Resize the short side to `resize`, then crop a random square: [crop, crop, 3]. Sizes round as in `resize_crop`."""
    (window,) = resize_crop(height, width, rng, resize=resize, crop=crop, interpolation=interpolation)
    top, left = (int(u * (side - crop + 1)) for u, side in zip(rng.random(2).tolist(), window.size, strict=True))
    return [window._replace(part=(top, left, crop, crop), mirror=_mirrored(rng, 1, flip)[0])]


def resize_whole(
    old_height: int, old_width: int, rng: np.random.Generator, *, height: int, width: int, interpolation: str = "bicubic",
    flip: float = 0.0,
) -> list[Window]:  # fmt: skip
    """Resize the whole image to `height` x `width`, which may change its proportions: [height, width, 3]."""
    return [Window(None, (height, width), (0, 0, height, width), _mirrored(rng, 1, flip)[0], interpolation)]


def _mirrored(rng, count, flip) -> list[bool]:
    return (rng.random(count) < flip).tolist() if flip else [False] * count  # without flips the generator stays untouched


class Op(NamedTuple):
    """A host operation."""

    windows: Callable  # (height, width, rng, **arguments) -> [Window], for all features of an example
    shape: Callable  # arguments -> shape of the resulting image
    random: Callable  # arguments -> whether windows differ between examples


OPS = {
    "random_resized_crops": Op(random_resized_crops, lambda size, crops=2, **_: (crops, size, size, 3), lambda **_: True),
    "random_resized_crop": Op(random_resized_crop, lambda size, **_: (size, size, 3), lambda **_: True),
    "resize_crop": Op(resize_crop, lambda crop, **_: (crop, crop, 3), lambda flip=0.0, **_: flip > 0),
    "resize_random_crop": Op(resize_random_crop, lambda crop, **_: (crop, crop, 3), lambda **_: True),
    "resize_whole": Op(resize_whole, lambda height, width, **_: (height, width, 3), lambda flip=0.0, **_: flip > 0),
}


def check_host_ops(ops: Recipe) -> None:
    """Raises UserError with the op, the argument and the valid choices, before any file is read."""
    if not isinstance(ops, list | tuple):
        raise UserError(f"host ops {ops!r} are no list of pairs (name, arguments); write [('resize_crop', dict(resize=256, ...))]")
    if len(ops) > 1:
        raise UserError(f"host ops {ops!r}: at most one runs on the host; move the others to config.views")
    for entry in ops:
        is_pair = isinstance(entry, list | tuple) and len(entry) == 2 and isinstance(entry[0], str)
        if not is_pair or not isinstance(entry[1], Mapping):
            raise UserError(f"host op {entry!r} is not a pair (name, arguments); write ('resize_crop', dict(resize=256, ...))")
        name, arguments = entry
        if name not in OPS:
            raise UserError(f"unknown host op '{name}'; valid: {', '.join(OPS)}")
        parameters = dict(list(inspect.signature(OPS[name].windows).parameters.items())[3:])
        for argument, value in arguments.items():
            if argument not in parameters:
                raise UserError(f"host op {name}: unknown argument '{argument}'; valid: {', '.join(parameters)}")
            _check_value(name, argument, value)
        for argument, parameter in parameters.items():
            if parameter.default is parameter.empty and argument not in arguments:
                raise UserError(f"host op {name}: argument '{argument}' is missing; valid: {', '.join(parameters)}")
        if name in ("resize_crop", "resize_random_crop") and arguments["crop"] > arguments["resize"]:
            raise UserError(f"host op {name}: crop={arguments['crop']} > resize={arguments['resize']}; swap them")


def _check_value(name, argument, value):
    def fail(expected):
        raise UserError(f"host op {name}: {argument}={value!r}; expected {expected}")

    if argument in ("size", "crops", "resize", "crop", "height", "width"):
        most = MOST_CROPS if argument == "crops" else MOST_PIXELS
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            fail(f"a positive whole number, at most {most}")
    elif argument == "flip":
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
            fail("a probability from 0 to 1")
    elif argument in ("area", "ratio"):
        upper = 1.0 if argument == "area" else math.inf
        if not isinstance(value, list | tuple) or len(value) != 2 or not all(isinstance(v, int | float) for v in value):
            fail("a pair (low, high)")
        if not 0 < value[0] <= value[1] <= upper or value[1] == math.inf:
            fail("0 < low <= high" + (" <= 1" if argument == "area" else ""))
    else:
        choices = INTERPOLATIONS if argument == "interpolation" else SAMPLINGS
        if not isinstance(value, str) or value not in choices:
            fail("one of " + ", ".join(choices))


def output_shape(ops: Recipe) -> tuple[int, ...] | None:
    """Shape of one image after the recipe; None for the empty recipe, which keeps the image's own."""
    return OPS[ops[0][0]].shape(**ops[0][1]) if ops else None


def is_random(ops: Recipe) -> bool:
    """Whether the recipe crops examples at random."""
    return bool(ops) and OPS[ops[0][0]].random(**ops[0][1])


def sample_windows(ops: Recipe, height: int, width: int, rng: np.random.Generator | None) -> list[Window]:
    """The windows of a checked recipe of one op on an image of `height` x `width` pixels. All randomness of a recipe is here."""
    name, arguments = ops[0]
    return OPS[name].windows(height, width, rng, **arguments)


def apply_host_ops(ops: Recipe, picture: Picture, rng: np.random.Generator | None) -> np.ndarray:
    """Run a checked recipe on one image: uint8 of `output_shape(ops)`, or the full image [H, W, 3]."""
    if not ops:
        return picture.pixels()
    return without_crop_axis(ops, crop_image(picture, sample_windows(ops, picture.height, picture.width, rng)))


def without_crop_axis(ops: Recipe, values: np.ndarray) -> np.ndarray:
    """`values` [crops, ...], or [...] if the recipe has no axis of crops."""
    return values if len(output_shape(ops)) == 4 else values[0]


# ------------------------------------------------------------------------------- windows applied to each kind of feature


def crop_image(picture: Picture, windows: Sequence[Window]) -> np.ndarray:
    """uint8 [windows, h, w, 3]. Raises CorruptImage."""
    areas = [_source_area(window, picture.height, picture.width) for window in windows]
    shrink = min(min(a[2] / window.part[2], a[3] / window.part[3]) for a, window in zip(areas, windows, strict=True))
    out = np.empty((len(windows), *windows[0].part[2:], 3), np.uint8)
    with picture.decoded(max(1.0, shrink)) as (pixels, factor):
        for i, window in enumerate(windows):
            top, left, height, width = picture.stored(areas[i])
            area = top / factor, left / factor, height / factor, width / factor
            shape = window.part[:1:-1] if picture.transposed else window.part[2:]
            around = 2 if window.box is None else 0  # bicubic interpolation reaches as far
            cropped = picture.upright(guarded(resize_area, pixels, area, shape, window.interpolation, around))
            out[i] = cropped[:, ::-1] if window.mirror else cropped
    return out


def crop_mask(mask: np.ndarray, windows: Sequence[Window]) -> np.ndarray:
    """[H, W, C] -> [windows, h, w, C] by the nearest pixel, so no new values arise."""
    out = []
    for window in windows:
        top, left, height, width = _source_area(window, *mask.shape[:2])
        h, w = window.part[2:]
        rows = np.clip(np.floor(top + (np.arange(h) + 0.5) * height / h), 0, mask.shape[0] - 1).astype(int)
        columns = np.clip(np.floor(left + (np.arange(w) + 0.5) * width / w), 0, mask.shape[1] - 1).astype(int)
        out.append(mask[rows[:, None], columns[None, ::-1] if window.mirror else columns[None]])
    return np.stack(out)


def crop_points(
    points: np.ndarray, valid: np.ndarray, size: tuple[int, int], windows: Sequence[Window]
) -> tuple[np.ndarray, np.ndarray]:
    """Points [N, 2] as (y, x) in [0, 1] of an image of `size` -> (points of each window [windows, N, 2], which lie inside)."""
    cropped, inside = [], []
    for window in windows:
        top, left, height, width = _source_area(window, *size)
        at = (points * np.asarray(size) - (top, left)) / (height, width)
        if window.mirror:
            at[:, 1] = 1 - at[:, 1]
        cropped.append(np.where(valid[:, None], at, 0))
        inside.append(valid & ((at >= 0) & (at <= 1)).all(1))
    return np.stack(cropped).astype(np.float32), np.stack(inside)


def crop_boxes(
    boxes: np.ndarray, valid: np.ndarray, size: tuple[int, int], windows: Sequence[Window]
) -> tuple[np.ndarray, np.ndarray]:
    """Boxes [N, 4] as (ymin, xmin, ymax, xmax) in [0, 1] -> boxes of each window [windows, N, 4], clipped to it.

    A box stays valid if its center lies in the window (SSD, Liu et al. 2016, section 2.2). Other boxes become 0.
    """
    _, inside = crop_points((boxes[:, :2] + boxes[:, 2:]) / 2, valid, size, windows)
    cropped = []
    for window in windows:
        top, left, height, width = _source_area(window, *size)
        at = (boxes * np.tile(size, 2) - (top, left, top, left)) / (height, width, height, width)
        if window.mirror:
            at = np.stack([at[:, 0], 1 - at[:, 3], at[:, 2], 1 - at[:, 1]], 1)
        cropped.append(np.clip(at, 0, 1))
    return np.where(inside[..., None], np.stack(cropped), 0).astype(np.float32), inside


def _source_area(window: Window, height: int, width: int) -> Area:
    """(top, left, height, width) of the area that a window shows, in pixels of the image, not rounded."""
    top, left, h, w = window.box or (0, 0, height, width)
    rows, columns = h / window.size[0], w / window.size[1]
    return top + window.part[0] * rows, left + window.part[1] * columns, window.part[2] * rows, window.part[3] * columns

"""Host-side geometry: from one decoded picture to uint8 of a fixed shape. Everything photometric runs on the device.

A recipe is a sequence of (op name, arguments) with at most one op; the empty recipe takes images as they are, so they
must share one shape.

    random_resized_crops(size, crops=2, ...)  -> [crops, size, size, 3]   one decode, many crops
    random_resized_crop(size, ...)            -> [size, size, 3]
    resize_crop(resize, crop)                 -> [crop, crop, 3]          short side, then center: evaluation

Three crop distributions are in use in the literature and differ in their mean area, so they have names:
  torchvision  area uniform, aspect log-uniform, ten tries, else the largest center crop (MoCo, SimSiam, MAE, DINO, ...)
  simclr       TensorFlow's sample_distorted_bounding_box as SimCLR calls it: aspect uniform, height uniform between the
               bounds of the area, and at least a tenth of the image
  clamp        area uniform, aspect log-uniform, sides clamped to the image, no second try
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence

import cv2
import numpy as np

from ssl_jax.data.decode import Picture
from ssl_jax.errors import UserError

cv2.setNumThreads(0)  # we run many images at once; threads inside one image only fight over the cores

INTERPOLATIONS = {"bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC}
NEARLY = 1.2
Recipe = Sequence[tuple[str, Mapping]]
Box = tuple[int, int, int, int]  # top, left, height, width in pixels


def resize(pixels: np.ndarray, height: int, width: int, interpolation: str = "bicubic") -> np.ndarray:
    """uint8 [H, W, 3] to [height, width, 3] without aliasing.

    An axis that shrinks is first interpolated up to the next whole multiple of the target, then averaged in whole
    blocks. On photographs that is as close to Pillow's antialiased resize as OpenCV's area interpolation, and cheaper
    (benchmarks/input_path.py). An axis that shrinks by less than `NEARLY` is interpolated only: the difference is no
    larger than that between Pillow's bilinear and bicubic.
    """
    flag = INTERPOLATIONS[interpolation]
    rows = 1 if pixels.shape[0] <= NEARLY * height else math.ceil(pixels.shape[0] / height)
    columns = 1 if pixels.shape[1] <= NEARLY * width else math.ceil(pixels.shape[1] / width)
    if rows == columns == 1:
        return cv2.resize(pixels, (width, height), interpolation=flag)
    pixels = cv2.resize(pixels, (width * columns, height * rows), interpolation=flag)
    return cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)


def torchvision_box(rng: np.random.Generator, height: int, width: int, area, ratio) -> Box:
    """RandomResizedCrop.get_params of torchvision, same distribution."""
    for _ in range(10):
        u = rng.random(4).tolist()  # one call: a generator's overhead is per call
        target, aspect = height * width * _between(u[0], area), _log_between(u[1], ratio)
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(u[2] * (height - h + 1)), int(u[3] * (width - w + 1)), h, w
    w = min(width, round(height * ratio[1]))
    h = min(height, round(width / ratio[0]))
    return (height - h) // 2, (width - w) // 2, max(h, 1), max(w, 1)


def simclr_box(rng: np.random.Generator, height: int, width: int, area, ratio) -> Box:
    """tf.image.sample_distorted_bounding_box with the whole image as its box, min_object_covered=0.1, 100 attempts."""
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
    """The crop of BYOL's reference and of MAE's linear probe: no rejection, sides clamped to the image."""
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


def random_resized_crops(
    picture: Picture,
    rng: np.random.Generator,
    *,
    size: int,
    crops: int = 2,
    area: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    interpolation: str = "bicubic",
    sampling: str = "torchvision",
) -> np.ndarray:
    """Independent random crops of one picture, each resized: uint8 [crops, size, size, 3].

    The picture is decoded once, at the smallest scale that still has a pixel for every pixel of every crop.

    Args:
      size: side of the result in pixels.
      crops: how many.
      area: bounds of the crop's share of the image, 0 < low <= high <= 1.
      ratio: bounds of width / height.
      interpolation: 'bilinear' or 'bicubic'; antialiased when shrinking.
      sampling: 'torchvision', 'simclr' or 'clamp', see the module's text.
    """
    sample = SAMPLINGS[sampling]
    boxes = [sample(rng, picture.height, picture.width, area, ratio) for _ in range(crops)]
    pixels, factor = picture.pixels_and_factor(max(1.0, min(min(h, w) for _, _, h, w in boxes) / size))
    out = np.empty((crops, size, size, 3), np.uint8)
    for i, (top, left, h, w) in enumerate(boxes):
        rows = slice(round(top / factor), round((top + h) / factor))
        columns = slice(round(left / factor), round((left + w) / factor))
        out[i] = resize(pixels[rows, columns], size, size, interpolation)
    return out


def random_resized_crop(
    picture: Picture,
    rng: np.random.Generator,
    *,
    size: int,
    area: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    interpolation: str = "bicubic",
    sampling: str = "torchvision",
) -> np.ndarray:
    """One random crop without the axis of crops: uint8 [size, size, 3]. Arguments as `random_resized_crops`."""
    return random_resized_crops(
        picture, rng, size=size, crops=1, area=area, ratio=ratio, interpolation=interpolation, sampling=sampling
    )[0]


def resize_crop(
    picture: Picture, rng: np.random.Generator, *, resize: int, crop: int, interpolation: str = "bicubic"
) -> np.ndarray:
    """The short side resized to `resize`, then the center: uint8 [crop, crop, 3]. Sizes round as torchvision's do."""
    del rng
    short = min(picture.height, picture.width)
    height, width = (resize * side // short for side in (picture.height, picture.width))
    pixels, _ = picture.pixels_and_factor(max(1.0, short / resize))
    pixels = _resize(pixels, height, width, interpolation)
    top, left = round((height - crop) / 2), round((width - crop) / 2)
    return np.ascontiguousarray(pixels[top : top + crop, left : left + crop])


_resize = resize  # `resize_crop` has an argument of that name

OPS: dict[str, tuple[Callable, Callable]] = {  # name: (op, arguments -> shape of its result)
    "random_resized_crops": (
        random_resized_crops,
        lambda size, crops=2, **_: (crops, size, size, 3),
    ),
    "random_resized_crop": (random_resized_crop, lambda size, **_: (size, size, 3)),
    "resize_crop": (resize_crop, lambda crop, **_: (crop, crop, 3)),
}


def check_host_ops(ops: Recipe) -> None:
    """Raises a UserError naming the op, the argument and the valid ones, before any file is read."""
    if len(ops) > 1:
        raise UserError(
            f"host ops {[op[0] for op in ops]}: at most one runs on the host; move the rest to config.views"
        )
    for entry in ops:
        if isinstance(entry, str) or len(entry) != 2 or not isinstance(entry[1], Mapping):
            raise UserError(
                f"host op {entry!r} is no pair (name, arguments); write ('resize_crop', dict(resize=256, ...))"
            )
        name, arguments = entry
        if name not in OPS:
            raise UserError(f"unknown host op '{name}'; valid: {', '.join(OPS)}")
        parameters = dict(list(inspect.signature(OPS[name][0]).parameters.items())[2:])
        for argument, value in arguments.items():
            if argument not in parameters:
                raise UserError(f"host op {name}: unknown argument '{argument}'; valid: {', '.join(parameters)}")
            _check_value(name, argument, value)
        for argument, parameter in parameters.items():
            if parameter.default is parameter.empty and argument not in arguments:
                raise UserError(f"host op {name}: argument '{argument}' is missing; valid: {', '.join(parameters)}")
        if name == "resize_crop" and arguments["crop"] > arguments["resize"]:
            raise UserError(f"host op {name}: crop={arguments['crop']} > resize={arguments['resize']}; swap them")


def _check_value(name, argument, value):
    def fail(expected):
        raise UserError(f"host op {name}: {argument}={value!r}; expected {expected}")

    if argument in ("size", "crops", "resize", "crop"):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            fail("a positive whole number")
    elif argument in ("area", "ratio"):
        upper = 1.0 if argument == "area" else math.inf
        if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 2:
            fail("a pair (low, high)")
        if not 0 < value[0] <= value[1] <= upper:
            fail("0 < low <= high" + (" <= 1" if argument == "area" else ""))
    else:
        choices = INTERPOLATIONS if argument == "interpolation" else SAMPLINGS
        if value not in choices:
            fail("one of " + ", ".join(choices))


def output_shape(ops: Recipe) -> tuple[int, ...] | None:
    """Shape of one example after the recipe; None for the empty recipe, which keeps the image's own."""
    return OPS[ops[0][0]][1](**ops[0][1]) if ops else None


def apply_host_ops(ops: Recipe, picture: Picture, rng: np.random.Generator | None) -> np.ndarray:
    """Run a checked recipe on one picture: uint8 of `output_shape(ops)`, or the full image [H, W, 3]."""
    for name, arguments in ops:
        return OPS[name][0](picture, rng, **arguments)
    return picture.pixels()

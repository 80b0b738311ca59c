"""Photographs to two 224-pixel crops on one core: ours against Pillow and torchvision.

    TFDS_DATA_DIR=... python benchmarks/input_path.py [--split original] [--rounds 5] [--png crops.png]

Four paths turn the same encoded JPEGs into two random resized crops each:
    ours         the host op `random_resized_crops`: one decode at the scale that the crops need, OpenCV geometry
    reader       the same through `Reader`, with a label, as batches are read
    reference    Pillow decodes once and torchvision's RandomResizedCrop runs twice: a careful PyTorch loader
    two decodes  Pillow decodes for every crop
With `--side 256` three more read smaller copies, which `launch.py prepare` writes into a temporary directory:
    jpeg, raw    `Reader` on the copy of this form, from its file
    Pillow jpeg  the reference on the encoded images of the JPEG copy
The paths run in turns of ten images, so that the changing speed of a machine affects all of them alike, and caches little. They run
in one thread. Time is CPU time of the process. Prints images/s (an image is one pair of
crops), the ratio per round, and one line of JSON.

It also measures the resize alone, with OpenCV's area and linear interpolation for comparison: agreement with Pillow's
antialiased resize in dB, and milliseconds. `--png` writes the crops of both paths side by side, from the same boxes.
"""

import argparse
import io
import json
import os
import pathlib
import sys
import tempfile
import time

import cv2
import numpy as np
from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from ssl_jax.data import geometry
from ssl_jax.data.decode import Picture
from ssl_jax.data.features import Feature
from ssl_jax.data.preparation import FORMS, prepare
from ssl_jax.data.reader import Reader
from ssl_jax.data.sources import Source, open_source

SIZE = 224
TURN = 10  # images of one path before the next path has its turn


def torchvision_crop(interpolation):
    """torchvision's RandomResizedCrop."""
    import torch
    import torch_vision

    torch.set_num_threads(1)
    torch_vision.torchvision()
    from torchvision import transforms

    return transforms.RandomResizedCrop(SIZE, interpolation=transforms.InterpolationMode(interpolation))


class Bytes(Source):
    """Encoded images with labels."""

    features = {"image": Feature((None, None, 3), "uint8", "image"), "label": Feature((), "int32")}  # noqa: RUF012
    num_classes = label_names = image_shape = None
    name = split = "bytes"

    def __init__(self, images):
        super().__init__()
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"image": self.images[index], "label": index}

    def select(self, features):
        return self


def paths(interpolation, images, copies):
    """{name: function (encoded bytes, index in `images`) -> two crops}; copies: {form: source of the smaller images}."""
    crop = torchvision_crop(interpolation)
    rng = np.random.default_rng(0)
    ops = (("random_resized_crops", {"size": SIZE, "crops": 2, "interpolation": interpolation}),)

    def decode(data):
        return Image.open(io.BytesIO(data)).convert("RGB")

    def reference(data):
        image = decode(data)
        return np.stack([np.asarray(crop(image)) for _ in range(2)])

    reader = Reader(Bytes(images), ops, ("image", "label"))
    functions = {
        "ours": lambda data, i: geometry.apply_host_ops(ops, Picture(data), rng),
        "reader": lambda data, i: reader.read(i, (0, i)),
        "reference": lambda data, i: reference(data),
        "two decodes": lambda data, i: np.stack([np.asarray(crop(decode(data))) for _ in range(2)]),
    }
    readers = {form: Reader(source, ops, ("image", "label")) for form, source in copies.items()}
    for form in copies:
        functions[form] = lambda data, i, form=form: readers[form].read(i, (0, i))
    if copies:
        small = [copies["jpeg"][i]["image"] for i in range(len(images))]
        functions["Pillow jpeg"] = lambda data, i: reference(small[i])
    return functions


def smaller_copies(arguments, folder):
    """{form: (source of the smaller images, bytes of an image)}"""
    found = {}
    for form in FORMS if arguments.side else ():
        choices = {"data_dir": arguments.data_dir, "side": arguments.side, "form": form}
        (written,) = prepare(arguments.dataset, [arguments.split], pathlib.Path(folder) / form, **choices)
        found[form] = open_source(f"{folder}/{form}", arguments.split), written.bytes / written.examples
    return found


def compare_paths(images, interpolation, rounds, copies):
    """{path: CPU seconds for all images, [rounds]}"""
    functions = paths(interpolation, images, copies)
    for function in functions.values():
        function(images[0], 0)
    seconds = {name: np.zeros(rounds) for name in functions}
    for i in range(rounds):
        for first in range(0, len(images), TURN):
            for name, function in functions.items():
                start = time.process_time()
                for index in range(first, min(first + TURN, len(images))):
                    function(images[index], index)
                seconds[name][i] += time.process_time() - start
    return seconds


def compare_resizes(images, interpolation):
    """{name: (dB against Pillow, ms)} over random crops that shrink to SIZE."""
    rng = np.random.default_rng(0)
    flag = getattr(Image.Resampling, interpolation.upper())
    ways = {
        "ours": lambda crop: geometry.resize(crop, SIZE, SIZE, interpolation),
        "cv2 area": lambda crop: cv2.resize(crop, (SIZE, SIZE), interpolation=cv2.INTER_AREA),
        "cv2 linear": lambda crop: cv2.resize(crop, (SIZE, SIZE), interpolation=cv2.INTER_LINEAR),
    }
    totals = {name: [] for name in ways}
    for data in images:
        pixels = Picture(data).pixels()
        top, left, height, width = geometry.torchvision_box(rng, *pixels.shape[:2], (0.08, 1.0), (3 / 4, 4 / 3))
        if min(height, width) <= SIZE:
            continue
        crop = np.ascontiguousarray(pixels[top : top + height, left : left + width])
        expected = np.asarray(Image.fromarray(crop).resize((SIZE, SIZE), flag), float)
        for name, way in ways.items():
            start = time.process_time()
            got = way(crop)
            took = time.process_time() - start
            totals[name].append((10 * np.log10(255**2 / np.mean((got - expected) ** 2)), 1e3 * took))
    return {name: np.mean(values, axis=0).tolist() for name, values in totals.items()}


def write_picture(images, path, interpolation):
    """Rows of (whole image, our two crops, Pillow's two crops from the same boxes)."""
    op = {"size": SIZE, "crops": 2, "interpolation": interpolation}
    flag = getattr(Image.Resampling, interpolation.upper())
    rows = []
    for i, data in enumerate(images[:8]):
        ours = geometry.apply_host_ops([("random_resized_crops", op)], Picture(data), np.random.default_rng(i))
        image = Image.open(io.BytesIO(data)).convert("RGB")
        rng = np.random.default_rng(i)
        boxes = [geometry.torchvision_box(rng, image.height, image.width, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in "12"]
        pillow = [image.resize((SIZE, SIZE), flag, (x, y, x + w, y + h)) for y, x, h, w in boxes]
        rows.append(np.hstack([np.asarray(image.resize((SIZE, SIZE))), *ours, *map(np.asarray, pillow)]))
    Image.fromarray(np.vstack(rows)).save(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dataset", default="imagenet_sample")
    parser.add_argument("--split", default="original")
    parser.add_argument("--data_dir", default="", help="TFDS data directory; default $TFDS_DATA_DIR")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--interpolation", default="bicubic", choices=list(geometry.INTERPOLATIONS))
    parser.add_argument("--side", type=int, default=0, help="also read copies with this short side (default: none)")
    parser.add_argument("--png", default="", help="write crops of both paths here")
    arguments = parser.parse_args()
    source = open_source(arguments.dataset, arguments.split, arguments.data_dir)
    images = [source[i]["image"] for i in range(min(arguments.images, len(source)))]

    with tempfile.TemporaryDirectory() as folder:
        copies = smaller_copies(arguments, folder)
        sources = {form: source for form, (source, _) in copies.items()}
        seconds = compare_paths(images, arguments.interpolation, arguments.rounds, sources)
    rates = {name: len(images) / np.median(values) for name, values in seconds.items()}
    print(f"{len(images)} JPEGs of {np.mean([*map(len, images)]) / 1e3:.0f} kB, two {SIZE}-pixel crops each, "
          f"{arguments.interpolation}, one thread, CPU time, load {os.getloadavg()[0]:.1f}")  # fmt: skip
    for form, (_, size) in copies.items():
        print(f"copy with a short side of {arguments.side}, {form}: {size / 1e3:.0f} kB an image")
    print(f"{'path':14}{'images/s':>10}{'faster than reference by':>26}{'(rounds)':>18}")
    ratios = {name: seconds["reference"] / values for name, values in seconds.items()}
    for name, rate in rates.items():
        bounds = f"{ratios[name].min():.2f} .. {ratios[name].max():.2f}"
        print(f"{name:14}{rate:10.0f}{np.median(ratios[name]):25.2f}x{bounds:>18}")
    resizes = compare_resizes(images, arguments.interpolation)
    print(f"\n{'shrinking':14}{'dB to Pillow':>14}{'ms':>8}")
    for name, (decibel, milliseconds) in resizes.items():
        print(f"{name:14}{decibel:14.1f}{milliseconds:8.2f}")
    if arguments.png:
        write_picture(images, arguments.png, arguments.interpolation)
    result = {
        "benchmark": "input_path",
        "dataset": f"{arguments.dataset}:{arguments.split}",
        "images": len(images),
        "interpolation": arguments.interpolation,
        "images_per_second": {name: round(rate, 1) for name, rate in rates.items()},
        "speedup": {name: round(float(np.median(values)), 3) for name, values in ratios.items()},
        "resize": {name: {"db": round(db, 2), "ms": round(ms, 3)} for name, (db, ms) in resizes.items()},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

"""The embedded dataset: `Scenes`, a TFDS builder that needs neither network nor TensorFlow.

9,000 pictures of 48 x 48 pixels in 12 classes. Part structure alone decides the class; color, texture, ground,
pose, proportions, scale and light are nuisances (see `ssl_jax.data.render`). Every class is equally frequent in each
split, so chance is 8.3%. Training and test pictures show different scenes.

Test accuracy in per cent, config `full`:

    pixels, cosine k-nearest-neighbors (k = 20, temperature 0.07)     26.2
    the same after subtracting the mean training picture               32.4
    pixels, linear (L-BFGS / ridge, penalty chosen on held-out train)  9.8 / 10.5
    untrained encoder, kNN / linear (mean of three seeds)              17.6 / 17.3
    SimCLR, configs/simclr.py, 45 epochs                               61.8 / 67.0
    supervised, configs/supervised.py, 20 epochs                       92.5 / 92.7

Seeds and deviations are in docs/methods/simclr.md and supervised.md.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from ssl_jax.data import render
from ssl_jax.errors import UserError

_CHUNK = 200  # scenes that a rendering process makes at a time


@dataclass
class ScenesConfig(tfds.core.BuilderConfig):
    """Number of scenes in each split; multiples of 12 keep the classes balanced."""

    train: int = 0
    test: int = 0


class Scenes(tfds.core.GeneratorBasedBuilder):
    """Objects made of parts, in 12 classes, with pose, mask, boxes, a question and a second view.

    Features of one example:
        image     uint8 [48, 48, 3]
        label     int, one of `render.CLASSES`
        pose      float32 [4]: angle (radians, clockwise on the screen, within 0.75), x and y of the center (pixels, x
                  to the right, y down), radius (pixels)
        mask      uint8 [48, 48, 1]: 0 ground, 1 object, 2 pebbles
        objects   sequence of bbox (ymin, xmin, ymax, xmax in [0, 1]) and label (a class or 'pebble'); the object first
        question  text; four kinds, equally frequent; answer: one of `render.ANSWERS`
        image2    uint8 [48, 48, 3]: the same scene after the camera moved, with its own blur and noise
        motion    float32 [4]: dx, dy (pixels, within 4), rotation (radians, within 0.25), log zoom (within 0.12); takes
                  points of `image` to points of `image2` by `render.motion_matrix`
    """

    VERSION = tfds.core.Version("1.0.1")
    RELEASE_NOTES = {  # noqa: RUF012 (the attribute TFDS reads)
        "1.0.0": "First release.",
        "1.0.1": "Questions ask for the 'color' of the object, no longer its 'colour'. Everything else is identical.",
    }
    url_infos = {}  # noqa: RUF012 (nothing is downloaded, so TFDS must not look for checksums)
    BUILDER_CONFIGS = [  # noqa: RUF012
        ScenesConfig(name="full", description="For experiments: 7,200 + 1,800.", train=7200, test=1800),
        ScenesConfig(name="tiny", description="For tests: 192 + 96.", train=192, test=96),
    ]

    def __init__(self, *, file_format: str = "array_record", **kwargs):
        super().__init__(file_format=file_format, **kwargs)  # TFDS's own default, tfrecord, needs TensorFlow

    def _info(self) -> tfds.core.DatasetInfo:
        size = render.SIZE
        features = {
            "image": tfds.features.Image(shape=(size, size, 3), encoding_format="png"),
            "label": tfds.features.ClassLabel(names=render.CLASSES),
            "pose": tfds.features.Tensor(shape=(4,), dtype=np.float32),
            "mask": tfds.features.Image(shape=(size, size, 1), encoding_format="png"),
            "objects": tfds.features.Sequence(
                {
                    "bbox": tfds.features.BBoxFeature(),
                    "label": tfds.features.ClassLabel(names=[*render.CLASSES, render.PEBBLE]),
                }
            ),
            "question": tfds.features.Text(),
            "answer": tfds.features.ClassLabel(names=render.ANSWERS),
            "image2": tfds.features.Image(shape=(size, size, 3), encoding_format="png"),
            "motion": tfds.features.Tensor(shape=(4,), dtype=np.float32),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        sizes = self.builder_config
        return {"train": self._generate_examples(0, sizes.train), "test": self._generate_examples(1, sizes.test)}

    def _generate_examples(self, seed: int, count: int) -> Iterator[tuple[str, dict]]:
        """Scenes 0 ... count - 1 of the series `seed`."""
        for index, scene in enumerate(_encoded_scenes(seed, count)):
            boxes = [tfds.features.BBox(*(float(edge) for edge in box)) for box in scene.boxes]
            yield (
                f"{index:06d}",
                {
                    "image": io.BytesIO(scene.image),
                    "label": scene.label,
                    "pose": scene.pose,
                    "mask": io.BytesIO(scene.mask),
                    "objects": [
                        {"bbox": box, "label": name} for box, name in zip(boxes, scene.box_labels, strict=True)
                    ],
                    "question": scene.question,
                    "answer": scene.answer,
                    "image2": io.BytesIO(scene.image2),
                    "motion": scene.motion,
                },
            )


def _encoded_scenes(seed: int, count: int) -> Iterator[render.Scene]:
    """Scenes 0 ... count - 1 with pictures as PNG files. Renders in one process per core if there are enough scenes."""
    jobs = [(seed, start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if cores == 1 or len(jobs) < 4:
        for job in jobs:
            yield from render.render_encoded(*job)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy JAX's locks, but not the threads that hold them
    with ProcessPoolExecutor(min(cores, len(jobs), 8), mp_context=context) as pool:
        for future in [pool.submit(render.render_encoded, *job) for job in jobs]:
            yield from future.result()


def cache_dir() -> Path:
    """The default directory of the dataset: $XDG_CACHE_HOME/ssl_jax/tfds, or ~/.cache/ssl_jax/tfds."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ssl_jax" / "tfds"


def prepare(data_dir: str | os.PathLike = "", config: str = "full") -> Scenes:
    """The builder with data prepared below `data_dir` (default: `cache_dir()`); read it with `.as_data_source(split)`.

    The first call renders and writes the data in seconds, and prints a line at its start and end. TFDS writes into a temporary
    directory and renames it at the end. A lock lets one process prepare at a time; the others wait and use the result. A new
    preparation removes the files of an interrupted one.

    Raises:
        UserError: unknown config, or a data_dir that is not a writable local directory.
    """
    if config not in Scenes.builder_configs:
        raise UserError(f"the embedded dataset has no config '{config}'; choose {' or '.join(Scenes.builder_configs)}")
    if "://" in os.fspath(data_dir):
        raise UserError(f"the embedded dataset needs a local data_dir, not {data_dir}; leave it empty for the default")
    root = Path(data_dir).expanduser() if data_dir else cache_dir()
    builder = Scenes(data_dir=root, config=config)
    if _is_prepared(builder):
        return builder
    try:
        with _locked(root):
            return _prepare_alone(root, config)
    except OSError as error:
        raise UserError(f"cannot prepare the embedded dataset in {root}: {error}; name a writable data_dir") from error


def _is_prepared(builder: Scenes) -> bool:
    return (Path(builder.data_dir) / "dataset_info.json").exists()  # TFDS's own check logs a warning if it is missing


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    """A lock that one process holds at a time; the system releases it when the process dies."""
    root.mkdir(parents=True, exist_ok=True)
    with open(root / ".scenes.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _prepare_alone(root: Path, config: str) -> Scenes:
    builder = Scenes(data_dir=root, config=config)  # new, because another process may have finished meanwhile
    if _is_prepared(builder):
        return builder
    target = Path(builder.data_dir)
    if target.parent.exists():  # holds only versions; the lock ensures that nobody writes them
        for leftover in target.parent.glob(f"*{target.name}*"):
            shutil.rmtree(leftover)
    scenes = builder.builder_config.train + builder.builder_config.test
    print(f"preparing the embedded dataset: rendering {scenes} scenes into {target}", flush=True)
    start = time.perf_counter()
    quiet = io.StringIO()  # TFDS prints several progress bars
    with (
        contextlib.redirect_stdout(quiet),
        contextlib.redirect_stderr(quiet),
        tempfile.TemporaryDirectory() as downloads,  # stays empty; by default TFDS creates one in the home directory
    ):
        builder.download_and_prepare(download_dir=downloads)
    print(f"the embedded dataset is ready after {time.perf_counter() - start:.0f} s", flush=True)
    return Scenes(data_dir=root, config=config)

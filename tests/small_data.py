"""Small prepared TFDS datasets and folders of pictures, of kinds that people have."""

import io

import numpy as np
from PIL import Image


def png(i, channels=3):
    """An encoded picture of 16 x 16 pixels; equal numbers give equal pictures."""
    pixels = np.random.default_rng(i).integers(0, 256, (16, 16, channels), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels if channels == 3 else pixels[..., 0]).save(file, "PNG")
    file.seek(0)
    return file


def picture_feature(channels=3):
    import tensorflow_datasets as tfds

    return tfds.features.Image(shape=(16, 16, channels), encoding_format="png")


def prepare(data_dir, name, features, splits):
    """Prepare `name` below `data_dir`; splits: {split: rows}."""
    import tensorflow_datasets as tfds

    class Small(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        url_infos = {}  # noqa: RUF012

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, manager):
            return {split: self._generate_examples(rows) for split, rows in splits.items()}

        def _generate_examples(self, rows):
            yield from enumerate(rows)

    Small.name = name
    Small(data_dir=data_dir, file_format="array_record").download_and_prepare()


def labeled(data_dir, name, feature, **splits):
    """A dataset of images with the feature 'label'; splits: {split: labels}."""
    rows = {split: [{"image": png(i), "label": label} for i, label in enumerate(labels)] for split, labels in splits.items()}
    prepare(data_dir, name, {"image": picture_feature(), "label": feature}, rows)


def photographs(folder, count=30, size=16):
    """A folder of pictures without classes."""
    folder.mkdir(parents=True)
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (size, size, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03}.png")
    return folder

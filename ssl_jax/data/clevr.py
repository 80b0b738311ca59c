"""CLEVR, a question at a time (Johnson et al. 2017, arXiv:1612.06890).

An example of TFDS's `clevr` is an image with its questions. Here it is one question with its image and its answer, so that an epoch
asks every question once, in any order, as published training does.
"""

from __future__ import annotations

import numpy as np

from ssl_jax.data.decode import CorruptImage
from ssl_jax.data.features import Feature
from ssl_jax.data.prepared import TfdsSource
from ssl_jax.data.source import Source, digest
from ssl_jax.errors import UserError

NAME = "clevr/questions"
EACH = 10  # questions of an image
LISTS = {"question": "question_answer/question", "answer": "question_answer/answer"}


class ClevrQuestions(Source):
    """Example i is question i mod 10 about image i // 10.

    Features: image (uint8 [H, W, 3]), question (text), answer (phrase). An image with fewer than ten questions repeats its first
    ones: eleven of the 700,000 training examples, and nine of the 150,000 for validation. To count them would mean to read all images.
    """

    def __init__(self, images: TfdsSource):
        super().__init__()
        missing = [name for name in ("image", *LISTS.values()) if name not in images.features]
        if missing:
            raise UserError(f"data '{NAME}' needs TFDS's clevr; these data have no {', '.join(missing)}")
        self.name, self.split = NAME, images.split
        self.features = {
            "image": images.features["image"],
            "question": Feature((), "object", "text"),
            "answer": Feature((), "object", "phrase"),
        }
        self.num_classes, self.label_names, self.image_shape = None, None, images.image_shape
        self.fingerprint = digest([images.fingerprint, NAME])
        self._images = images.select(("image", *LISTS.values()))

    def __len__(self):
        return EACH * len(self._images)

    def __getitem__(self, index):
        example = self._images[index // EACH]
        paths = {name: LISTS.get(name, name) for name in self.features}
        return {name: self._one(example[path], index) if name in LISTS else example[path] for name, path in paths.items()}

    def _one(self, texts, index):
        """The question or answer of example `index`."""
        count = len(np.asarray(texts, object))
        if count > EACH:
            raise UserError(f"data '{NAME}': {self.called(index)} has {count} questions; an image of CLEVR has at most {EACH}")
        if not count:
            raise CorruptImage("the image has no questions")
        return texts[index % EACH % count]

    def called(self, index):
        return f"question {index % EACH} of image {index // EACH}"

    def select(self, features):
        other = self.__class__.__new__(self.__class__)
        images = self._images.select(tuple(LISTS.get(name, name) for name in features))
        state = {"features": {name: self.features[name] for name in features}, "_images": images}
        other.__dict__.update({**self.__getstate__(), **state})
        return other

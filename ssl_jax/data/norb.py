"""Pairs of views of smallNORB: the same toy in the same light, after the camera moved around it.

LeCun et al. 2004, "Learning methods for generic object recognition with invariance to pose and lighting". Each of the toys is seen from
9 elevations, 5 degrees apart, and 18 azimuths, 20 degrees apart, in 6 lightings. The stereo partner, `image2` of TFDS, is not used: its
motion never changes.
"""

from __future__ import annotations

import numpy as np

from ssl_jax.data.features import Feature
from ssl_jax.data.prepared import TfdsSource
from ssl_jax.data.source import Source, digest
from ssl_jax.errors import UserError

NAME = "smallnorb/pairs"
FIXED = ("label_category", "instance", "label_lighting")  # the same in both views
MOVES = ("label_elevation", "label_azimuth")
DEGREES, AZIMUTHS = (5.0, 20.0), 18
MOST = 2  # steps of the camera along each axis


class NorbPairs(Source):
    """Example i is view i and a view of the same toy in the same light, at most two steps away along both axes, drawn once by i.

    Features: image and image2 (uint8 [96, 96, 3]), motion (float32 [2]: change of elevation and of azimuth in degrees), label (the
    category, 5 classes). All such views of the split are equally likely, the view itself, too. A split that holds no whole toys has
    fewer pairs to draw from.
    """

    def __init__(self, views: TfdsSource):
        super().__init__()
        missing = [name for name in ("image", *FIXED, *MOVES) if name not in views.features]
        if missing:
            raise UserError(f"data '{NAME}' needs TFDS's smallnorb; these data have no {', '.join(missing)}")
        self.name, self.split = NAME, views.split
        shape = (*views.features["image"].shape[:2], 3)
        self.features = {
            "image": Feature(shape, "uint8", "image"),
            "image2": Feature(shape, "uint8", "image"),
            "label": Feature((), "int32"),
            "motion": Feature((2,), "float32", "pose"),
        }
        self.num_classes, self.label_names, self.image_shape = 5, None, shape
        self.fingerprint = digest([views.fingerprint, NAME])
        places = views.select((*FIXED, *MOVES))
        table = np.array([[int(example[name]) for name in (*FIXED, *MOVES)] for example in map(places.__getitem__, range(len(views)))])
        self._category, self._partners, self._motions = table[:, 0], *partners(table)
        self._views = views.select(("image",))

    def __len__(self):
        return len(self._partners)

    def __getitem__(self, index):
        found = {
            "image": lambda: self._views[index]["image"],
            "image2": lambda: self._views[int(self._partners[index])]["image"],
            "label": lambda: int(self._category[index]),
            "motion": lambda: self._motions[index],
        }
        return {name: found[name]() for name in self.features}

    def select(self, features):
        other = self.__class__.__new__(self.__class__)
        other.__dict__.update({**self.__getstate__(), "features": {name: self.features[name] for name in features}})
        return other


def partners(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the partner of each view, int64 [N]; the motions to it in degrees, float32 [N, 2]).

    table: int [N, 5], a row for each view: category, instance, lighting, elevation (0 to 8) and azimuth (0 to 17, a circle).
    """
    chosen, moves = np.empty(len(table), np.int64), np.empty((len(table), 2), np.int64)
    _, group = np.unique(table[:, :3], axis=0, return_inverse=True)
    for number in range(group.max() + 1):
        (rows,) = np.nonzero(group == number)
        places = table[rows, 3:]
        steps = places[None] - places[:, None]  # [from, to, axis]
        steps[..., 1] = (steps[..., 1] + AZIMUTHS // 2) % AZIMUTHS - AZIMUTHS // 2
        near = (np.abs(steps) <= MOST).all(-1)
        for place, row in enumerate(rows):
            choices = np.flatnonzero(near[place])
            choice = choices[np.random.default_rng(row).integers(len(choices))]
            chosen[row], moves[row] = rows[choice], steps[place, choice]
    return chosen, (moves * np.array(DEGREES)).astype(np.float32)

"""The labels of a split: whether they are classes, and those that can be read at once, before a run begins."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ssl_jax.data.decode import CorruptImage
from ssl_jax.data.sources import Source

SAMPLE = 512  # labels that are read of a split whose labels are not in memory


class Labels(NamedTuple):
    """Labels of one split."""

    values: np.ndarray  # int [N], or [N, C] where an example may have several of C classes
    whole: bool  # all of the split; else evenly spaced


def label_form(source: Source) -> tuple[str, str]:
    """What the feature 'label' is, as the data declare it: ('class' | 'several' | '', why it is neither).

    'class': one whole number per example. 'several': a vector of 0 and 1, one for each class. An empty form has a reason that
    follows the name of the data: "has only image".
    """
    feature = source.features.get("label")
    if feature is None:
        return "", f"has only {', '.join(source.features)}"
    whole = feature.dtype.startswith(("int", "uint", "bool"))
    if whole and feature.shape == ():
        return "class", ""
    if whole and len(feature.shape) == 1 and feature.shape[0] is not None:
        return "several", ""
    what = "a list whose length differs" if None in feature.shape else "no class"
    return "", f"has labels of {feature}: {what}"


def read_labels(source: Source, most: int = SAMPLE) -> Labels:
    """The labels of a split: all if they are in memory or few, else `most`, evenly spaced. Unreadable records are left out."""
    in_memory = getattr(source, "labels", None)
    if in_memory is not None:
        return Labels(np.asarray(in_memory), True)
    count = min(most, len(source))
    places = np.arange(count) * len(source) // count
    opened, found = source.select(("label",)), []
    for place in places.tolist():
        try:
            found.append(np.asarray(opened[place]["label"]))
        except CorruptImage:  # the pipeline names it when it reads the image
            continue
    return Labels(np.asarray(found).astype(np.int64), count == len(source))


def fault(labels: Labels, classes: int | None) -> str:
    """What is wrong with `labels`, as the end of 'x:train ...'; '' if nothing is. `classes`: their number, if declared."""
    values = labels.values
    if not values.size:
        return "has no readable label"
    if values.ndim == 2:
        outside = values[(values != 0) & (values != 1)]
        return f"has label vectors with {outside[0]}; only 0 and 1 say which classes an image has" if outside.size else ""
    if (values < 0).any():
        return f"has {'no labels' if (values < 0).all() else 'examples without a label'} (label {values.min()})"
    if classes and values.max() >= classes:
        return f"has label {values.max()}, and declares {classes} classes, 0 to {classes - 1}"
    return ""


def few(labels: Labels) -> str:
    """Why `labels` without a fault cannot train a classifier; '' if they can."""
    if labels.values.ndim == 2:
        return "" if labels.values.any() or not labels.whole else "has no example of any class"
    return "has one class only" if labels.whole and labels.values.min() == labels.values.max() else ""

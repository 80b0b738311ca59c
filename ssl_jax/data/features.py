"""Features of a dataset by name, and whether they match the inputs of a method.

Every feature has a kind, which decides what host geometry does to it. The type of the TFDS feature sets the kind, and
`config.data.kinds` = {name: kind} overrides it:

    image    Image with three channels, or any Image whose name in the batch is 'image'; becomes RGB
    mask     LabeledImage, any other Image with one channel (segmentation), or an Image that is not uint8 (depth)
    boxes    BBoxFeature: (ymin, xmin, ymax, xmax) as fractions of the height and width of the image
    points   only by `config.data.kinds`: (y, x) as fractions of the height and width of the image
    text     Text; becomes token ids if `config.data.vocabulary` names it
    phrase   only by `config.data.kinds`: text that is one word of `config.data.vocabulary` as a whole, such as an answer; becomes
             its number, -1 if the train split lacks it
    pose     other floats (poses, motions); random ops refuse them, because they may be in pixels of the whole image
    plain    anything else, such as labels; host geometry leaves it unchanged

Nested features are named by their path: 'objects/bbox'. A list has None as its length. A method declares the length to
which the list is padded with zeros, and may ask for `NAME_valid`, bool [length], True for the rows of the list. For boxes
and points it must ask: rows outside of a crop are invalid, too.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import numpy as np

from ssl_jax.data.geometry import Recipe, is_random, output_shape
from ssl_jax.errors import UserError

KINDS = ("image", "mask", "boxes", "points", "text", "phrase", "pose", "plain")
VALID = "_valid"


class Feature(NamedTuple):
    """One feature of one example. `shape` has None where examples differ: lengths of lists, sizes of images."""

    shape: tuple[int | None, ...]
    dtype: str
    kind: str = "plain"

    def __str__(self):
        return f"{self.dtype} ({', '.join('?' if n is None else str(n) for n in self.shape)})"


def from_tfds(features: Mapping[str, Any]) -> dict[tuple[str, ...], Feature]:
    """{path: feature} of a TFDS FeaturesDict. Images keep their channels; `rename_features` decides which become RGB."""
    import tensorflow_datasets as tfds

    def walk(feature, path, lead):
        if isinstance(feature, tfds.features.FeaturesDict):
            for key in feature:
                walk(feature[key], (*path, key), lead)
        elif isinstance(feature, tfds.features.Sequence):
            walk(feature.feature, path, (*lead, feature._length))
        elif isinstance(feature, tfds.features.Image):
            labeled = isinstance(feature, tfds.features.LabeledImage) or np.dtype(feature.np_dtype) != np.uint8
            kind = "mask" if labeled else "image"
            found[path] = Feature((*lead, *feature.shape), dtype_of(feature.np_dtype), kind)
        elif isinstance(feature, tfds.features.BBoxFeature):
            found[path] = Feature((*lead, 4), "float32", "boxes")
        elif isinstance(feature, tfds.features.Tensor | tfds.features.Scalar):  # ClassLabel and Text are Tensors
            dtype = dtype_of(feature.np_dtype)
            kind = {"object": "text", "float32": "pose"}.get(dtype, "plain")
            found[path] = Feature((*lead, *feature.shape), dtype, kind)

    found: dict = {}
    for key in features:
        walk(features[key], (key,), ())
    return found


def dtype_of(dtype) -> str:
    """The dtype on the device: integers of four bytes or more become int32, floats become float32."""
    dtype = np.dtype(dtype)
    if dtype.kind in "SUO":
        return "object"
    if dtype.kind in "iu" and dtype.itemsize > 2:
        return "int32"
    return "float32" if dtype.kind == "f" else dtype.name


def rename_features(
    own: Mapping[str, Feature], names: Mapping[str, str], kinds: Mapping[str, str], where: str
) -> tuple[dict[str, str], dict[str, Feature]]:
    """({name in the batch: name in the dataset}, {name in the batch: feature}), sorted by name.

    Args:
      own: {name in the dataset: feature}.
      names: `config.data.features`, {name in the batch: feature}; other features keep their own names.
      kinds: `config.data.kinds`, {name in the batch: kind}.
      where: name of the dataset, for messages.

    Raises:
      UserError: unknown feature or unknown kind, or none is the image.
    """
    for name, feature in names.items():
        if feature not in own:
            raise UserError(f"config.data.features: data '{where}' has no feature '{feature}' for '{name}'; it has {listing(own)}")
    paths = dict(sorted({**{name: name for name in own}, **names}.items()))
    for name, kind in kinds.items():
        if kind not in KINDS:
            raise UserError(f"config.data.kinds.{name}={kind!r} is unknown; choose {', '.join(KINDS)}")
        if name not in paths:
            raise UserError(f"config.data.kinds: data '{where}' has no feature '{name}'; it has {listing(own)}")
    found = {}
    for name, path in paths.items():
        shape, dtype, kind = own[path]
        if kind == "image" and shape[-1] == 1 and name != "image":
            kind = "mask"
        kind = kinds.get(name, kind)
        found[name] = Feature((*shape[:-1], 3) if kind == "image" else shape, dtype, kind)
    if "image" not in found:
        images = [name for name, feature in found.items() if feature.kind in ("image", "mask")]
        flags = " or ".join(f"--config.data.features.image={paths[name]}" for name in images)
        remedy = f"say which one it is: {flags}" if images else "give another dataset"
        raise UserError(f"data '{where}' has no feature 'image' but {listing(found)}; {remedy}")
    return paths, found


def listing(features: Mapping[str, Any]) -> str:
    """'image uint8 (48, 48, 3), label int32 ()'"""
    return ", ".join(f"{name} {feature}" for name, feature in sorted(features.items()))


def after_host_ops(features: Mapping[str, Feature], ops: Recipe, vocabulary: Mapping[str, Any] = {}) -> dict[str, Feature]:
    """Features after the host recipe `ops`, with `NAME_valid` for lists; texts in `vocabulary` are token ids."""
    size, found = output_shape(ops), {}
    crops = () if size is None else size[:-3]
    for name, feature in features.items():
        shape, dtype, kind = feature
        if kind in ("image", "mask") and size:
            shape = (*shape[:-3], *size[:-1], shape[-1])
        elif kind == "text" and name in vocabulary:
            shape, dtype = (*shape, None), "int32"
        elif kind == "phrase" and name in vocabulary:
            dtype = "int32"
        elif kind in ("boxes", "points"):
            shape = (*crops, *shape)
        found[name] = Feature(shape, dtype, kind)
        if kind in ("boxes", "points"):
            found.setdefault(name + VALID, Feature(shape[:-1], "bool"))
        elif kind in ("pose", "plain") and shape[:1] == (None,):
            found.setdefault(name + VALID, Feature(shape[:1], "bool"))
    return found


def refusal(name: str, features: Mapping[str, Feature], names: Collection[str], ops: Recipe) -> str | None:
    """Why `name` cannot be read together with the features `names` and the host recipe `ops`, or None."""
    feature, kinds = features[name], [features[each].kind for each in names if each in features]
    if feature.kind in ("boxes", "points"):
        if name + VALID not in names:
            valid = Feature(feature.shape[:-1], "bool")
            return f"its rows are padded; ask for {name + VALID!r} {valid}, too, and mask the loss with it"
        if ops and not {"image", "mask"} & set(kinds):
            return "config.data.ops crop it with an image; ask for the image, too"
    if feature.kind == "pose" and is_random(ops):
        return (
            f"it may be in pixels of the whole image, which {ops[0][0]} cuts at random; crop on the device, or give "
            f"--config.data.kinds.{name}=plain if it does not depend on the crop"
        )
    return None


def mismatch(inputs: Mapping[str, Any], features: Mapping[str, Feature], ops: Recipe = ()) -> str | None:
    """Why data with `features` (of `after_host_ops`) cannot give `inputs` = {name: (shape, dtype)}: 'input ...', or None."""
    for name, (shape, dtype) in inputs.items():
        wanted, there = Feature(tuple(shape), str(np.dtype(dtype))), features.get(name)
        if there is None:
            close = difflib.get_close_matches(name, features, 1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            return f"input {name!r} {wanted}: no such feature; {hint}the data have {listing(features)}"
        if there.dtype == "object" and there.kind in ("text", "phrase") and wanted.dtype == "int32":
            return f"input {name!r} {wanted}: it is text; add the key {name!r} to config.data.vocabulary to read token ids"
        if there.kind == "text" and there.shape == (*wanted.shape, None):
            return f"input {name!r} {wanted}: it is text of several words; --config.data.kinds.{name}=phrase makes each text one class"
        fits = len(there.shape) == len(wanted.shape) and all(n in (None, m) for n, m in zip(there.shape, wanted.shape, strict=True))
        if not fits or there.dtype != wanted.dtype:
            return f"input {name!r} {wanted}: the data have it as {there} ({there.kind}); they have {listing(features)}"
        if reason := refusal(name, features, inputs, ops):
            return f"input {name!r} {wanted}: {reason}"
    return None


def with_length(feature: Feature, spec: Any | None) -> Feature:
    """`feature` with the lengths of `spec` (an object with a shape, or None), aligned at the last axis. Images keep their own sizes."""
    if spec is None or None not in feature.shape or (feature.kind in ("image", "mask") and len(feature.shape) == 3):
        return feature
    tail = tuple(spec.shape)[max(0, len(spec.shape) - len(feature.shape)) :]
    if len(tail) != len(feature.shape):
        return feature
    return feature._replace(shape=tuple(m if n is None else n for n, m in zip(feature.shape, tail, strict=True)))


def padded_to(value: Any, feature: Feature, name: str, where: str) -> np.ndarray:
    """A list as an array of `feature.shape`; missing rows are 0.

    Raises:
      UserError: the list has more rows than the method declares.
    """
    rows = np.asarray(value, feature.dtype).reshape(-1, *feature.shape[1:])
    if len(rows) > feature.shape[0]:
        raise UserError(f"{where}: '{name}' has {len(rows)} rows, more than the declared {feature.shape[0]}; declare more")
    out = np.zeros(feature.shape, feature.dtype)
    out[: len(rows)] = rows
    return out

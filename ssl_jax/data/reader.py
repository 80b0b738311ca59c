"""Examples by index: decoding, host geometry for every requested feature, and a cache of decoded images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ssl_jax.data.decode import CorruptImage, Picture, mask_pixels
from ssl_jax.data.features import VALID, Feature, after_host_ops, dtype_of, listing, padded_to, refusal, with_length
from ssl_jax.data.geometry import (
    Recipe,
    check_host_ops,
    crop_boxes,
    crop_image,
    crop_mask,
    crop_points,
    sample_windows,
    without_crop_axis,
)
from ssl_jax.data.source import Source
from ssl_jax.data.vocabulary import Numbers, Tokenizer, Vocabulary
from ssl_jax.errors import UserError

CACHE_BYTES = 1 << 30  # bound of the decoded images of one source in one process
MAX_WALK = 1000  # after so many unreadable records in a row, the whole data set is refused
Spec = dict[str, tuple[tuple[int, ...], np.dtype]]
Skipped = list[tuple[int, str]]  # (index in the source, reason)
# Names of features, or {name: an object with `shape` and `dtype`, or None}. The shape sets the lengths of lists.
Inputs = Sequence[str] | Mapping[str, Any]
DEFAULT = ("image", "label")


def element_spec(source: Source, ops: Recipe, inputs: Inputs = DEFAULT, vocabulary: Mapping[str, Vocabulary] = {}) -> Spec:
    """{name: (shape, dtype)} of one example. Decodes the first readable image only if the size is not declared."""
    return Reader(source, ops, inputs, vocabulary).spec


def describe(source: Source, ops: Recipe, vocabulary: Mapping[str, Any] = {}) -> dict[str, Feature]:
    """All features of `source` after the host recipe; lists have None as their length.

    Without a recipe and without a declared size, images have the size of the first readable one.
    """
    check_host_ops(ops)
    features = dict(source.features)
    unknown = [name for name, each in features.items() if each.kind in ("image", "mask") and None in each.shape[-3:-1]]
    if unknown and not ops:
        spec = Reader(source, ops, [name for name in unknown if len(features[name].shape) == 3]).spec
        features |= {name: features[name]._replace(shape=shape) for name, (shape, _) in spec.items()}
    return after_host_ops(features, ops, vocabulary)


class _Cache:
    """Decoded columns of a source, filled at first use. Two threads may fill the same row, with the same content."""

    def __init__(self, size: int, spec: Spec):
        self.columns = {key: np.empty((size, *shape), dtype) for key, (shape, dtype) in spec.items()}
        self.ready = np.zeros(size, bool)


class Reader:
    """Reads examples by index: decodes, applies host geometry, and replaces unreadable records."""

    def __init__(self, source: Source, ops: Recipe, inputs: Inputs, vocabulary: Mapping[str, Vocabulary] = {}):
        check_host_ops(ops)
        self.ops = tuple((name, dict(arguments)) for name, arguments in ops)
        self.inputs = dict(inputs) if isinstance(inputs, Mapping) else dict.fromkeys(inputs)
        if self.inputs.get("label", 0) is None and "label" not in source.features:
            del self.inputs["label"]  # requested by name alone: read if the data have labels
        self.vocabulary = {name: vocabulary[name] for name in self.inputs if name in vocabulary}
        available = after_host_ops(source.features, (), self.vocabulary)
        self._check(source, available)
        self.features = {name: with_length(available[name], spec) for name, spec in self.inputs.items()}
        self.kinds = {name: each.kind for name, each in self.features.items()}
        self.tokenizers = {name: Tokenizer(each) for name, each in self.vocabulary.items() if self.kinds[name] == "text"}
        self.numbers = {name: Numbers(each) for name, each in self.vocabulary.items() if self.kinds[name] == "phrase"}
        # {NAME_valid: NAME}; and the feature whose size is that of the example.
        self.lists = {name: name.removesuffix(VALID) for name in self.inputs if name not in source.features}
        self.frame = next((name for name, kind in self.kinds.items() if kind in ("image", "mask")), None)
        self.source = source.select(tuple(dict.fromkeys(self.lists.get(name, name) for name in self.inputs)))
        self.unreadable: dict[int, str] = {}  # index -> reason
        self.features = self._sizes()
        self.raw_spec = {name: (each.shape, np.dtype(each.dtype)) for name, each in self.features.items()}
        if any(None in shape for shape, _ in self.raw_spec.values()):
            self.raw_spec = None
        after = self.features | after_host_ops({n: each for n, each in self.features.items() if n not in self.lists}, self.ops)
        self.spec = {name: (after[name].shape, np.dtype(after[name].dtype)) for name in self.inputs}
        self.cache = self._find_cache(source)

    def _check(self, source, available):
        """Raises UserError for inputs that cannot be read."""
        for name, spec in self.inputs.items():
            if name.startswith("_"):
                raise UserError(f"feature '{name}': names that begin with _ are reserved; rename it by config.data.features")
            if name not in available:
                raise UserError(f"data '{source.name}' has no feature '{name}'; it has {listing(source.features)}")
            shape, _, kind = with_length(available[name], spec)
            if kind not in ("image", "mask") and None in shape:
                raise UserError(f"'{name}' of data '{source.name}' is a list ({available[name]}); ask for a length, by a Spec")
            if reason := refusal(name, available, self.inputs, self.ops):
                raise UserError(f"'{name}' of data '{source.name}': {reason}")

    def _sizes(self) -> dict[str, Feature]:
        """`features` where unknown image sizes are those of the first readable example, unless an op resizes."""
        found = dict(self.features)
        unknown = [name for name, each in found.items() if None in each.shape]
        if unknown and not self.ops:
            first = self._first()
            found |= {name: found[name]._replace(shape=first[name].shape) for name in unknown}
        return found

    def _find_cache(self, source) -> _Cache | None:
        if self.raw_spec is None or any(dtype.hasobject for _, dtype in self.raw_spec.values()):
            return None
        bytes_each = sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in self.raw_spec.values())
        if bytes_each * len(source) > CACHE_BYTES:
            return None
        key = tuple((name, shape, dtype.str) for name, (shape, dtype) in self.raw_spec.items())
        return source.caches.setdefault(key, _Cache(len(source), self.raw_spec))

    def _first(self) -> dict:
        """The first readable example, decoded."""
        for index in range(min(len(self.source), MAX_WALK)):
            try:
                return self._pixels(self._values(index))
            except CorruptImage as error:
                self.unreadable[index] = str(error)
        raise self._all_unreadable(0)

    def _all_unreadable(self, index):
        count = min(len(self.source), MAX_WALK)
        return UserError(
            f"data '{self.source.name}': {count} images in a row cannot be read (first: {self.source.called(index)}, "
            f"{self.unreadable[index]}); check the files, or prepare the dataset again"
        )

    def _values(self, index: int) -> dict:
        """The example as arrays of `features`; single images are `Picture`s, not decoded yet."""
        example, values = self.source[index], {}
        for name, feature in self.features.items():
            if name in self.lists:
                rows = example[self.lists[name]]
                values[name] = np.arange(feature.shape[0]) < len(rows) if feature.shape else np.array(True)
            else:
                values[name] = self._value(name, feature, example[name], index)
        return values

    def _value(self, name, feature, value, index):
        if feature.kind == "image":
            return Picture(value) if len(feature.shape) == 3 else np.asarray(value)
        if feature.kind == "mask":
            return mask_pixels(value) if isinstance(value, bytes) else _to_device_dtype(value)
        where = f"data '{self.source.name}', {self.source.called(index)}"
        if name in self.tokenizers:
            tokens = self.tokenizers[name]
            if len(feature.shape) == 1:
                return tokens(value, feature.shape[0], f"{where}: '{name}'")
            return padded_to([tokens(text, feature.shape[1], f"{where}: '{name}'") for text in value], feature, name, where)
        if name in self.numbers:
            return self.numbers[name](value)
        if feature.shape and self.source.features[name].shape[:1] == (None,):
            return padded_to(value, feature, name, where)
        return _to_device_dtype(value)

    def _pixels(self, values: dict) -> dict:
        return {name: value.pixels() if isinstance(value, Picture) else value for name, value in values.items()}

    def decode(self, index: int) -> dict:
        """One example as it is stored, without host geometry and of any size. Raises CorruptImage."""
        return self._pixels(self._values(index))

    def _check_shapes(self, index, values, spec):
        for key, value in values.items():
            if value.shape != spec[key][0]:
                remedy = (
                    "give config.data.ops an op that makes one size, e.g. [('resize_crop', dict(resize=256, crop=224))]"
                    if self.kinds[key] in ("image", "mask")
                    else "leave it out of the inputs"
                )
                raise UserError(
                    f"data '{self.source.name}': '{key}' of {self.source.called(index)} has shape {value.shape}, others "
                    f"{spec[key][0]}; {remedy}"
                )

    def _fill(self, index: int):
        values = self._pixels(self._values(index))
        self._check_shapes(index, values, self.raw_spec)
        for key, value in values.items():
            self.cache.columns[key][index] = value
        self.cache.ready[index] = True

    def read(self, index: int, seed: tuple[int, int]) -> dict:
        """One example of `spec`, with random numbers from `seed`. Raises CorruptImage for an unreadable record, every time."""
        if index in self.unreadable:
            raise CorruptImage(self.unreadable[index])
        try:
            if self.cache is not None:
                if not self.cache.ready[index]:
                    self._fill(index)
                values = {key: column[index] for key, column in self.cache.columns.items()}
            else:
                values = self._values(index)
            values = self._crop(values, index, np.random.default_rng(seed)) if self.ops else self._pixels(values)
        except CorruptImage as error:
            self.unreadable[index] = str(error)
            raise
        self._check_shapes(index, values, self.spec)
        return values

    def _crop(self, values: dict, index: int, rng: np.random.Generator) -> dict:
        """Every feature after the host recipe; the windows are sampled once, for the size of the first image."""
        if self.frame is None:
            return values
        size = _size(values[self.frame])
        windows, out = sample_windows(self.ops, *size, rng), dict(values)
        for name, value in values.items():
            kind = self.kinds[name]
            if kind in ("image", "mask"):
                if _size(value) != size:
                    raise UserError(
                        f"data '{self.source.name}': '{name}' of {self.source.called(index)} has {_size(value)} pixels and "
                        f"'{self.frame}' {size}; config.data.ops crop both alike, so make the sizes equal or leave one out"
                    )
                out[name] = self._crop_map(kind, value, windows)
            elif kind in ("boxes", "points"):
                crop, valid = crop_boxes if kind == "boxes" else crop_points, values[name + VALID]
                cropped, inside = crop(value.reshape(-1, value.shape[-1]), valid.ravel(), size, windows)
                out[name] = without_crop_axis(self.ops, cropped.reshape(len(windows), *value.shape))
                out[name + VALID] = without_crop_axis(self.ops, inside.reshape(len(windows), *valid.shape))
        return out

    def _crop_map(self, kind, value, windows):
        if getattr(value, "ndim", 3) == 4:
            return np.stack([self._crop_map(kind, each, windows) for each in value])
        if kind == "mask":
            return without_crop_axis(self.ops, crop_mask(value, windows))
        return without_crop_axis(self.ops, crop_image(value if isinstance(value, Picture) else Picture(value), windows))

    def read_or_next(self, index: int, seed: tuple[int, int], skipped: Skipped) -> dict:
        """The example, or the next readable one. Appends (index, reason) of each skipped record to `skipped`."""
        for offset in range(min(len(self.source), MAX_WALK)):
            candidate = (index + offset) % len(self.source)
            try:
                return self.read(candidate, seed)
            except CorruptImage as error:
                skipped.append((candidate, str(error)))
        raise self._all_unreadable(index)

    def batch(self, indices: Sequence[int], seeds: Sequence[tuple[int, int]]) -> tuple[dict, Skipped]:
        """(examples stacked [len(indices), ...], skipped records). `seeds` seed the random generator of each example."""
        skipped: Skipped = []
        indices = np.asarray(indices, np.int64)
        if self.cache is not None and not self.ops:
            for index in indices[~self.cache.ready[indices]].tolist():
                if index not in self.unreadable and not self.cache.ready[index]:
                    try:
                        self._fill(index)
                    except CorruptImage as error:
                        self.unreadable[index] = str(error)
            if self.cache.ready[indices].all():
                return {key: self.cache.columns[key][indices] for key in self.inputs}, skipped
        out = {key: np.empty((len(indices), *shape), dtype) for key, (shape, dtype) in self.spec.items()}
        for row, (index, seed) in enumerate(zip(indices.tolist(), seeds, strict=True)):
            values = self.read_or_next(index, seed, skipped)
            for key in self.inputs:
                out[key][row] = values[key]
        return out, skipped


def _size(value) -> tuple[int, int]:
    return (value.height, value.width) if isinstance(value, Picture) else value.shape[-3:-1]


def _to_device_dtype(value) -> np.ndarray:
    """Feature values with dtypes of the device: int32, float32, bool; text stays an object."""
    value = np.asarray(value)
    return value.astype(dtype_of(value.dtype), copy=False)

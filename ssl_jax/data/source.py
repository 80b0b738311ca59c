"""What every source of examples offers, and which of its failures are corrupt examples, bad input or faults of the machine."""

from __future__ import annotations

import abc
import errno
import hashlib
import json
import types
from collections.abc import Mapping

from ssl_jax.data.features import Feature
from ssl_jax.errors import MachineFault

# What a file or its user is to blame for. Any other error of reading is a fault of the machine.
OWN_ERRORS = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO)


class Source(abc.ABC):
    """Random access to examples: `len(source)`, `source[i] -> {'image': encoded bytes, 'label': int, ...}`.

    Attributes:
      name, split: as given to `open_source`.
      features: {name: feature} of `source[i]`, see `ssl_jax.data.features`; nested ones by path, 'objects/bbox'.
      num_classes, label_names: of the feature 'label'; None without labels.
      class_names: {feature: names of its classes}, of all features that declare them, also in lists; empty for folders of classes.
      image_shape: (H, W, 3) of decoded images if the dataset declares one shape for all, else None.
      fingerprint: 16 hex digits over files, sizes and split; equal on every machine with the same data.
      caches: decoded columns of small images, filled by the reader; not pickled.
    """

    name: str
    split: str
    features: dict[str, Feature]
    num_classes: int | None
    label_names: tuple[str, ...] | None
    class_names: Mapping[str, tuple[str, ...]] = types.MappingProxyType({})
    image_shape: tuple[int, int, int] | None
    fingerprint: str

    def __init__(self):
        self.caches, self.class_names = {}, {}

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def __getitem__(self, index: int) -> dict:
        """Raises CorruptImage if the record cannot be read, MachineFault if its disk fails."""

    @abc.abstractmethod
    def select(self, features) -> Source:
        """The same source with only these features; others are not parsed."""

    def called(self, index: int) -> str:
        """How messages name an example: 'example 38', with its file if there is one."""
        return f"example {index}"

    def key(self, index: int) -> str:
        """The name of an example in files of features: its path in a folder of images, else its number in the split."""
        return str(index)

    def __getstate__(self):
        return {**self.__dict__, "caches": {}}


def unreadable(path: str, error: OSError) -> MachineFault:
    """The MachineFault to raise where the disk of the data `path` fails."""
    return MachineFault(
        f"data '{printable(path)}' cannot be read ({error.strerror or one_line(error)}); see that its disk is there and works, "
        "and run the same command again"
    )


def digest(content) -> str:
    """16 hex digits over anything that JSON can hold."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def one_line(error: Exception) -> str:
    """The message of an exception, shortened."""
    return printable(" ".join(str(error).split()))[:200] or type(error).__name__


def printable(text: str) -> str:
    """A name of a file for messages: without control characters and bytes that are no text."""
    return "".join(c if c.isprintable() else "?" for c in text)

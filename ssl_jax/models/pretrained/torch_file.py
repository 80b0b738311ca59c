"""Read state dicts that `torch.save` wrote, without PyTorch and without executing the pickle's code."""

from __future__ import annotations

import collections
import io
import math
import pickle
import zipfile
from pathlib import Path

import numpy as np

from ssl_jax.models.pretrained.weights_file import check_archive, refused

WHAT, REMEDY = "not a dictionary of tensors that torch.save wrote", "save model.state_dict()"
_MAGIC = 0x1950A86A20F9469CFC6C  # first pickle of the format before PyTorch 1.6
_DTYPES = {"Double": "<f8", "Float": "<f4", "Half": "<f2", "Long": "<i8", "Int": "<i4", "Short": "<i2", "Byte": "u1", "Bool": "?"}


def read_state_dict(path: str | Path) -> dict[str, np.ndarray]:
    """{name: array} of a state dict in either format of `torch.save`.

    Accepts only dictionaries of plain, contiguous tensors; the pickle may use no other class. Raises UserError for any other file.
    """
    path = Path(path)
    with refused(path, WHAT, REMEDY):
        found = _read(path)
        if not isinstance(found, dict) or not all(isinstance(value, np.ndarray) for value in found.values()):
            raise TypeError("it has other contents")
        if not _of_text(found):
            raise TypeError("a name is no text")
        return dict(found)


def read_checkpoint(path: str | Path) -> dict:
    """What a training program saved: a dictionary that holds state dicts beside numbers, texts and lists.

    The options of a command line (`argparse.Namespace`) are read as nothing. Raises UserError for any other class.
    """
    path = Path(path)
    with refused(path, WHAT, REMEDY):
        found = _read(path)
        if not isinstance(found, dict) or not _of_text(found):
            raise TypeError("it has other contents")
        return dict(found)


def is_state_dict(value) -> bool:
    """Whether `value` is a dictionary from names to arrays."""
    return isinstance(value, dict) and _of_text(value) and all(isinstance(each, np.ndarray) for each in value.values())


def _of_text(found: dict) -> bool:
    return all(isinstance(name, str) for name in found)


def _read(path: Path):
    return _read_archive(path) if zipfile.is_zipfile(path) else _read_stream(path)


def _read_archive(path):
    with zipfile.ZipFile(path) as archive:
        check_archive(archive, path)
        pickled = next((name for name in archive.namelist() if name.endswith("/data.pkl")), None)
        if pickled is None:
            raise ValueError("it has no data.pkl")
        folder = pickled.removesuffix("data.pkl")

        def storage(dtype, key, count):
            return np.frombuffer(archive.read(f"{folder}data/{key}"), dtype, count)

        return _Unpickler(io.BytesIO(archive.read(pickled)), storage).load()


def _read_stream(path):
    """The format before PyTorch 1.6: magic number, version, system, object, storage keys, then int64 length and values of each."""
    left, storages = path.stat().st_size, {}

    def storage(dtype, key, count):
        nonlocal left
        if key not in storages:
            left -= count * dtype.itemsize
            if count < 0 or left < 0:
                raise ValueError("the tensors are larger than the file")
            storages[key] = np.empty(count, dtype)
        return storages[key]

    with open(path, "rb") as file:
        if _Unpickler(file, storage).load() != _MAGIC:
            raise ValueError("unknown format")
        _version, _system, found, keys = (_Unpickler(file, storage).load() for _ in range(4))
        for key in keys:
            count = int(np.frombuffer(file.read(8), "<i8")[0])
            values = storages[key]
            if count != len(values):
                raise ValueError("the length of a tensor differs from its header")
            values[:] = np.frombuffer(file.read(values.nbytes), values.dtype)
    return found


class _Options:
    """In place of an argparse.Namespace: its values are dropped."""

    def __setstate__(self, state):
        pass


class _Unpickler(pickle.Unpickler):
    def __init__(self, file, storage):
        super().__init__(file)
        self._storage = storage

    def find_class(self, module, name):
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch._utils" and name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            return _tensor
        if module == "torch._utils" and name == "_rebuild_parameter":
            return lambda data, *_: data
        if (module, name) == ("argparse", "Namespace"):
            return _Options
        kind = name.removesuffix("Storage")
        if module == "torch" and kind in _DTYPES and name.endswith("Storage"):
            return np.dtype(_DTYPES[kind])
        raise pickle.UnpicklingError(f"it uses {module}.{name}")

    def persistent_load(self, pid):
        kind, dtype, key, _device, count = pid[:5]
        if kind != "storage" or not isinstance(dtype, np.dtype) or not isinstance(key, str) or type(count) is not int:
            raise pickle.UnpicklingError("unknown kind of storage")
        return self._storage(dtype, key, count)


def _tensor(storage, offset, shape, strides, *_):
    """A view of `storage`, because the old format stores values after the object."""
    if len(shape) > 32 or not isinstance(storage, np.ndarray):
        raise ValueError("a tensor has no shape")
    expected = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    if any(a != b and n > 1 for a, b, n in zip(strides, expected, shape, strict=True)):
        raise ValueError("a tensor is not contiguous")
    return storage[offset : offset + math.prod(shape)].reshape(shape)

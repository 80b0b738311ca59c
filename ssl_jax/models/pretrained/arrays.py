"""Read arrays by name from .safetensors, .npz and files of `torch.save`."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from ssl_jax.models.pretrained.torch_file import read_state_dict
from ssl_jax.models.pretrained.weights_file import check_archive, refused


def read_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """{name: array} of a file, by its suffix: .safetensors, .npz, else what `torch.save` wrote.

    Raises:
        UserError: the file is missing or no such file. MachineFault: it cannot be read.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        with refused(path, "no safetensors file"):
            return load_file(path)
    if path.suffix == ".npz":
        with refused(path, "no .npz file of arrays"):
            with zipfile.ZipFile(path) as archive:
                check_archive(archive, path)
            with np.load(path, allow_pickle=False) as arrays:
                return _numbers(dict(arrays))
    return read_state_dict(path)


def _numbers(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    for name, array in arrays.items():
        if not (np.issubdtype(array.dtype, np.number) or array.dtype == np.bool_):
            raise TypeError(f"{name} holds {array.dtype}")
    return arrays

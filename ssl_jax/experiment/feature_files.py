"""The files of features: shards, and what becomes of them. NumPy arrays, or a directory of Parquet files."""

from __future__ import annotations

import importlib
import io
import shutil
from pathlib import Path

import numpy as np

from ssl_jax import files
from ssl_jax.data.source import Source
from ssl_jax.errors import UserError, not_written

FOLDERS = {"npy": "shards", "parquet": "features.parquet"}  # of the shards; those of npy are joined at the end
SUFFIXES = {"npy": ".npz", "parquet": ".parquet"}


def check_format(form: str) -> None:
    """Raises UserError where the library of a format is not installed."""
    if form == "parquet":
        _pyarrow()


def check_names(data: Source, form: str) -> None:
    """Raises UserError for a name that is no line of a text file."""
    if form == "npy":
        odd = next((name for name in map(data.key, range(len(data))) if "\n" in name or "\r" in name), None)
        if odd is not None:
            raise UserError(f"the file {odd!r} has a line break in its name, and names.txt has a line for each; give --format=parquet")


def folder_of(output: Path, form: str) -> Path:
    """The directory of the shards."""
    return output / FOLDERS[form]


def shard(folder: Path, form: str, number: int, count: int) -> Path:
    """The file of shard `number` of `count`; sorted by name, they are in the order of the data."""
    return folder / f"part-{number:06d}-of-{count:06d}{SUFFIXES[form]}"


def write_shard(path: Path, form: str, data: Source, x: np.ndarray, labels: np.ndarray | None, index: np.ndarray) -> None:
    """Write one shard, so that the file is complete or not there.

    Args:
        x: float32 [N, D]. labels: int32 [N], or [N, C] for several; None without. index: [N], the number of each example.

    Raises:
        MachineFault: it cannot be written.
    """
    try:
        path.parent.mkdir(exist_ok=True)
    except OSError as error:
        raise not_written(path, error) from error
    files.write(path, _parquet(data, x, labels, index) if form == "parquet" else _npz(x, labels, index))


def _npz(x, labels, index) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, features=x, index=index, **({} if labels is None else {"labels": labels}))
    return buffer.getvalue()


def _parquet(data: Source, x, labels, index) -> bytes:
    arrow = _pyarrow()
    parquet = importlib.import_module("pyarrow.parquet")
    columns = {"name": arrow.array([_text(data.key(i)).decode("utf-8", "replace") for i in index.tolist()], arrow.string())}
    if labels is not None:
        columns["label"] = arrow.array(labels) if labels.ndim == 1 else _rows(arrow, labels)
    columns["features"] = _rows(arrow, x)
    sink = arrow.BufferOutputStream()
    parquet.write_table(arrow.table(columns), sink)
    return sink.getvalue().to_pybytes()


def _rows(arrow, values: np.ndarray):
    """A column of lists of one length."""
    return arrow.FixedSizeListArray.from_arrays(arrow.array(values.reshape(-1)), values.shape[1])


def finish(output: Path, form: str, data: Source, count: int, width: int) -> int:
    """Join the shards of npy into features.npy, names.txt and labels.npy; returns the rows.

    Raises:
        MachineFault: a file cannot be read or written.
    """
    folder = folder_of(output, form)
    paths = [shard(folder, form, number, count) for number in range(count)]
    try:
        if form == "parquet":
            parquet = importlib.import_module("pyarrow.parquet")
            return sum(parquet.read_metadata(path).num_rows for path in paths)
        index, labels = _joined(output, paths, width)
    except OSError as error:
        raise not_written(output, error) from error
    files.write(output / "names.txt", b"".join(_text(data.key(i)) + b"\n" for i in index.tolist()))
    if labels is not None:
        buffer = io.BytesIO()
        np.save(buffer, labels)
        files.write(output / "labels.npy", buffer.getvalue())
    return len(index)


def clean(output: Path, form: str) -> None:
    """Remove what is not needed once the rest is complete: shards that were joined, and files that a killed run has left."""
    folder = folder_of(output, form)
    for left in [*output.glob(".*.tmp"), *folder.glob(".*.tmp")]:
        left.unlink(missing_ok=True)
    if form == "npy":
        shutil.rmtree(folder, ignore_errors=True)


def _joined(output: Path, paths: list[Path], width: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Write features.npy shard by shard; returns (index, labels or None) of all rows."""
    index, labels = [], []
    for path in paths:
        with np.load(path) as part:
            index.append(part["index"])
            labels += [part["labels"]] if "labels" in part else []
    rows = sum(map(len, index))
    temporary, start = output / ".features.npy.tmp", 0
    whole = np.lib.format.open_memmap(temporary, "w+", np.float32, (rows, width))
    for path in paths:
        with np.load(path) as part:
            x = part["features"]
        whole[start : start + len(x)] = x
        start += len(x)
    whole.flush()
    del whole
    files.put(temporary, output / "features.npy")
    return np.concatenate(index), np.concatenate(labels) if labels else None


def _text(name: str) -> bytes:
    """A name as the file system has it."""
    return name.encode("utf-8", "surrogateescape")


def _pyarrow():
    try:
        return importlib.import_module("pyarrow")
    except ImportError:
        raise UserError("--format=parquet needs pyarrow, which is not installed; pip install pyarrow, or give --format=npy") from None

"""Files that outlive a crash, and locks on files. Imports no JAX, since launchers use it."""

from __future__ import annotations

import errno
import fcntl
import os
import uuid
from pathlib import Path

from ssl_jax.errors import not_written


def write(path: Path, data: str | bytes) -> None:
    """Write a file so that a killed process or a power loss leaves the old content or the new one.

    Raises:
        MachineFault: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")  # unique: `evaluate` may write the same file as `train`
    try:
        try:
            temporary.write_bytes(data.encode() if isinstance(data, str) else data)
            put(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise not_written(path, error) from error


def put(temporary: Path, path: Path) -> None:
    """Rename a finished file or folder to `path`. What it holds is on the disk before the rename, and the rename before the end."""
    flush_tree(temporary)
    os.replace(temporary, path)
    flush(path.parent)


def flush_tree(path: Path) -> None:
    """`flush` a file, or a directory with all that is below it."""
    for folder, _, names in os.walk(path):
        for name in names:
            flush(Path(folder, name))
        flush(Path(folder))
    if not path.is_dir():
        flush(path)


def flush(path: Path) -> None:
    """Wait until a file, or the list of names of a directory, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system without this for directories
            raise
    finally:
        os.close(descriptor)


def lock(path: Path):
    """Create `path` and lock it until the returned file is closed or the process ends.

    The lock is on the file that is at `path` when this returns, even where another process removes such files.

    Raises:
        BlockingIOError: another process holds it.
        OSError: it cannot be written or locked.
    """
    while True:
        file = open(path, "a")  # noqa: SIM115  held by the caller
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if at(path, file.fileno()):
                return file
        except BaseException:
            file.close()
            raise
        file.close()


def at(path: Path, descriptor: int) -> bool:
    """Whether the open file or directory `descriptor` is the one at `path`."""
    try:
        there = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    here = os.fstat(descriptor)
    return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)

"""Directories that Orbax cannot open by their own names.

Orbax looks for the files of a save by a pattern that begins with the path: it finds nothing below `real[1]`, and takes the files of
a sibling below `a*`. It takes `/gs/x` for gs://x. TensorStore takes `a\\b` for `a/b`. Such a directory is opened through a
descriptor of its parent.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from ssl_jax.errors import UserError

DESCRIPTORS = Path("/proc/self/fd")
UNSAFE = re.compile(r"[][*?\\]|gs:/|^/+(gs|s3|az|hf)(/|$)")


@contextlib.contextmanager
def openable(directory: Path) -> Iterator[Path]:
    """Context of a path that Orbax can open for `directory`, whose parent exists.

    Raises:
        UserError: there is none on this system, or the name is no text.
        OSError: the parent cannot be opened.
    """
    path = directory.absolute()
    check_text(path)
    if not UNSAFE.search(f"{path}/"):
        yield path
        return
    if UNSAFE.search(f"/{path.name}/") or not DESCRIPTORS.is_dir():
        raise UserError(f"{path} cannot be the directory of checkpoints here; choose a path without brackets, '*', '?' and backslashes")
    parent = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield DESCRIPTORS / str(parent) / path.name
    finally:
        os.close(parent)


def check_text(path: Path) -> None:
    """Raises UserError for a path whose bytes are no UTF-8: checkpoints, logs and reports could not name it."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UserError(f"the path {os.fsencode(path)!r} is no UTF-8; choose another directory") from None

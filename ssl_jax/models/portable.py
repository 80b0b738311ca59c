"""Whether a program is traced for other machines: then it contains no kernels of this one."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

_portable = contextvars.ContextVar("portable", default=False)


@contextlib.contextmanager
def portable() -> Iterator[None]:
    """Context manager: programs traced inside contain no platform-specific kernels, for export to several platforms."""
    token = _portable.set(True)
    try:
        yield
    finally:
        _portable.reset(token)


def is_portable() -> bool:
    return _portable.get()

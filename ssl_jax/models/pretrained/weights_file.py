"""Files of weights may hold anything: what libraries raise becomes one line, and archives are bounded before they are read."""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Iterator
from pathlib import Path

from ssl_jax.errors import MachineFault, UserError

RATIO = 20  # largest inflated size of an archive by its own size: weights are nearly incompressible, 1000 is a bomb


@contextlib.contextmanager
def refused(path: Path, what: str, remedy: str = "copy or download it again") -> Iterator[None]:
    """Context in which whatever a library raises about the contents of `path` becomes a UserError: '`path` is `what` (cause)'."""
    if not path.is_file():
        raise UserError(f"{path} is no file; give the path of the weights")
    try:
        yield
    except (UserError, MachineFault):
        raise
    except OSError as error:
        if error.errno is None:  # a library speaks of the contents
            raise UserError(f"{path} is {what} ({_line(error)}); {remedy}") from error
        raise MachineFault(f"{path} cannot be read ({error.strerror}); repair its disk or its permissions") from error
    except Exception as error:  # zipfile, zlib, pickle, NumPy and safetensors raise types of their own; all mean other contents
        raise UserError(f"{path} is {what} ({_line(error)}); {remedy}") from error


def check_archive(archive: zipfile.ZipFile, path: Path) -> None:
    """Raises ValueError if the members of a zip file would inflate to more than RATIO times its size, before anything is read."""
    size, inflated = path.stat().st_size, sum(member.file_size for member in archive.infolist())
    if inflated > RATIO * size:
        raise ValueError(f"{size:,} bytes would inflate to {inflated:,}")


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200] or type(error).__name__

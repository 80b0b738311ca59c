"""The two exceptions whose messages are written for users, and the text that may stand in a message."""

import errno
import logging
import os
import re
import unicodedata
from pathlib import Path

ESCAPED = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # Unicode categories: controls, invisible marks, lone surrogates, separators of lines


class _OneLine(Exception):
    """Whose message is one line, whatever names and values of the user stand in it."""

    def __str__(self) -> str:
        return printable(super().__str__())


class UserError(_OneLine):
    """Bad input. The message is one line that names the cause and the remedy.

    The command line prints it without a traceback and exits with status 2, after which no launcher restarts the run. Any other
    exception except `MachineFault` is a bug in ssl_jax and keeps its traceback.
    """

    code = 2


class NotFinite(UserError):
    """A loss, a gradient or a state is not finite. The run may go on with another learning rate, or by skipping such steps."""


class MachineFault(_OneLine):
    """A disk, network or host failed, and a restart may help. The message is one line, too.

    The command line exits with status 74 (EX_IOERR of sysexits.h), after which launchers restart the run.
    """

    code = 74


def not_written(path: Path, error: OSError) -> MachineFault:
    """The MachineFault to raise if the file `path` of a run cannot be written."""
    remedy = "free space or repair the directory and run the same command again"
    return MachineFault(f"{path} cannot be written ({error.strerror or error}); {remedy}")


def printable(text: str, keep: str = "") -> str:
    """`text` with control characters, marks that reorder text, and lone surrogates as escapes like \\x1b; those in `keep` stay.

    Names of files and values of configs could otherwise write lines of a log, or commands to a terminal.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in ESCAPED and c not in keep else c for c in text
    )


def control_characters(text: str) -> bool:
    """Whether `printable` would change `text`."""
    return printable(text) != text


class PrintableFormatter(logging.Formatter):
    """A record is one line: control characters of names and values are escaped. A traceback still follows on lines of its own."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record))
# Errors of a path that someone has given: a restart does not help.
BAD_PATH = (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.ENOENT, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)


def workdir_not_made(workdir: Path, error: OSError, flag: str = "--workdir") -> UserError | MachineFault:
    """What to raise if `workdir`, which `flag` has given, cannot be created and written."""
    failed = f"{flag}={workdir} cannot be written ({error.strerror or error})"
    if error.errno in BAD_PATH:
        return UserError(f"{failed}; choose another directory")
    return MachineFault(f"{failed}; repair its disk, and start again")


# Errors of a disk, a mount, a network or a limit of the machine. Missing files are not among them: they are usually a wrong path.
MACHINE_ERRORS = {
    getattr(errno, name)
    for name in (
        "EACCES", "EPERM", "EROFS", "ENOSPC", "EDQUOT", "EFBIG", "EIO", "ESTALE", "ENODEV", "ENXIO", "EREMOTEIO", "ENOTCONN",
        "ETIMEDOUT", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH", "ENOLCK", "EMFILE", "ENFILE", "ENOMEM", "EBUSY",
    )
    if hasattr(errno, name)
}  # fmt: skip
# Libraries written in C++ and Rust raise other types, with the number in the text: TensorStore as [os_error_code='28'] or
# [OS error 28: ...], safetensors as (os error 28) or Os { code: 28.
OS_ERROR = re.compile(r"os_error_code='(\d+)'|\[OS error (\d+)|\(os error (\d+)\)|\bOs \{ code: (\d+)")
STATUS = re.compile(r"(PERMISSION_DENIED|UNAVAILABLE|RESOURCE_EXHAUSTED|DEADLINE_EXCEEDED|ABORTED|UNAUTHENTICATED): ")  # of TensorStore


def machine_fault(error: BaseException | None) -> MachineFault | None:
    """The fault of the machine that `error`, or what caused it, reports; None where there is none."""
    while error is not None:
        text = " ".join(str(error).split())
        number = error.errno if isinstance(error, OSError) else None
        if found := OS_ERROR.search(text):
            number = int(next(group for group in found.groups() if group))
        if number in MACHINE_ERRORS:
            place = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
            return MachineFault(f"{place}{os.strerror(number)}; free space or repair the disk, and run the same command again")
        if isinstance(error, ValueError) and STATUS.match(text):
            return MachineFault(f"{text[:200]}; repair the disk, and run the same command again")
        error = error.__cause__
    return None

"""The two exceptions whose messages are written for users, and how a text from outside is printed."""

import logging
from pathlib import Path


class UserError(Exception):
    """Bad input. The message is one line that names the cause and the remedy.

    The command line prints it without a traceback and exits with status 2, after which no launcher restarts the run. Any other
    exception except `MachineFault` is a bug in ssl_jax and keeps its traceback.
    """

    code = 2


class MachineFault(Exception):
    """A disk, network or host failed, and a restart may help. The message is one line, too.

    The command line exits with status 74 (EX_IOERR of sysexits.h), after which launchers restart the run.
    """

    code = 74


def control_characters(text: str) -> bool:
    """Whether `text` has a character that could end a line, steer a terminal or not be written: C0, C1, lone surrogates."""
    return any(map(_controls, text))


def printable(text: str, keep: str = "") -> str:
    """`text` with control characters but those in `keep` written as escapes, such as \\n, so that it stays on its line."""
    return "".join(c if c in keep or not _controls(c) else c.encode("unicode_escape").decode() for c in text)


class PrintableFormatter(logging.Formatter):
    """Escapes control characters in messages, so that the name of a file cannot steer a terminal; tracebacks keep their lines."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), keep="\n\t")


def _controls(c: str) -> bool:
    return ord(c) < 32 or 127 <= ord(c) < 160 or 0xD800 <= ord(c) < 0xE000 or c in "\u2028\u2029"


def not_written(path: Path, error: OSError) -> MachineFault:
    """The MachineFault to raise if the file `path` of a run cannot be written."""
    remedy = "free space or repair the directory and run the same command again"
    return MachineFault(f"{path} cannot be written ({error.strerror}); {remedy}")

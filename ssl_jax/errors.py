"""The two exceptions whose messages are written for users, and the text that may stand in a message."""

import logging
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


class MachineFault(_OneLine):
    """A disk, network or host failed, and a restart may help. The message is one line, too.

    The command line exits with status 74 (EX_IOERR of sysexits.h), after which launchers restart the run.
    """

    code = 74


def not_written(path: Path, error: OSError) -> MachineFault:
    """The MachineFault to raise if the file `path` of a run cannot be written."""
    remedy = "free space or repair the directory and run the same command again"
    return MachineFault(f"{path} cannot be written ({error.strerror}); {remedy}")


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

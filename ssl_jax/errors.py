"""The two exceptions a person is meant to read."""

from pathlib import Path


class UserError(Exception):
    """Bad input: the message is one line that names the cause and the remedy.

    The command line prints it without a traceback and exits with status 2, after which nobody starts a run again. Everything else that
    is raised, but for `MachineFault`, is a bug of ours and keeps its traceback.
    """

    code = 2


class MachineFault(Exception):
    """A disk, a network or a host that failed, and may do better at another start: one line, too.

    The command line exits with status 74 (EX_IOERR of sysexits.h), after which whoever starts runs again does.
    """

    code = 74


def not_written(path: Path, error: OSError) -> MachineFault:
    """What to raise where a file of a run cannot be."""
    return MachineFault(f"{path} cannot be written ({error.strerror}); free space or mend the directory and run the same command again")

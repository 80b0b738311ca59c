"""The two exceptions whose messages are written for users."""

from pathlib import Path


class UserError(Exception):
    """Bad input. The message is one line that names the cause and the remedy.

    The command line prints it without a traceback and exits with status 2, after which no launcher restarts the run. Any other
    exception except `MachineFault` is a bug in ssl_jax and keeps its traceback.
    """

    code = 2


class NotFinite(UserError):
    """A loss, a gradient or a state is not finite. The run may go on with another learning rate, or by skipping such steps."""


class MachineFault(Exception):
    """A disk, network or host failed, and a restart may help. The message is one line, too.

    The command line exits with status 74 (EX_IOERR of sysexits.h), after which launchers restart the run.
    """

    code = 74


def not_written(path: Path, error: OSError) -> MachineFault:
    """The MachineFault to raise if the file `path` of a run cannot be written."""
    remedy = "free space or repair the directory and run the same command again"
    return MachineFault(f"{path} cannot be written ({error.strerror}); {remedy}")

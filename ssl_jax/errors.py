"""The one exception a person is meant to read."""


class UserError(Exception):
    """Bad input: the message is one line that names the cause and the remedy.

    The command line prints it without a traceback and exits with status 2. Everything else that is raised is a bug of ours
    and keeps its traceback.
    """

"""ssl_jax from the command line: `python launch.py VERB --help`."""

import os
import signal
import sys

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # Ctrl-C during the imports below
    signal.signal(signal.SIGINT, lambda *_: os._exit(128 + signal.SIGINT))

from ssl_jax.cli.main import main, run

if __name__ == "__main__":  # worker processes import this file
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    run(main, sys.argv[1:])

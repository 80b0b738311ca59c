"""ssl_jax from the command line: `python launch.py VERB --help`."""

import sys

from ssl_jax.cli.main import main

if __name__ == "__main__":  # worker processes import this file
    sys.exit(main(sys.argv[1:]))

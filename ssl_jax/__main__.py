"""`python -m ssl_jax VERB`, and the console command `ssl_jax VERB`."""

import sys

from ssl_jax.cli.main import main


def run() -> int:
    """The console command."""
    return main(sys.argv[1:])


if __name__ == "__main__":  # worker processes import this file
    sys.exit(run())

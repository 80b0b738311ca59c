"""`python -m ssl_jax VERB`, and the console command `ssl_jax VERB`."""

import sys
from typing import NoReturn

from ssl_jax.cli import main as cli


def run() -> NoReturn:
    """The console command."""
    cli.run(cli.main, sys.argv[1:])


if __name__ == "__main__":  # worker processes import this file
    run()

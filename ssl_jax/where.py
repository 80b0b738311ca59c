"""Where the recipes and the program are: in a checkout, or installed as a package. Imports nothing of ssl_jax but the errors."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
CHECKOUT = PACKAGE.parent
LAUNCHER = CHECKOUT / "launch.py"
IN_CHECKOUT = LAUNCHER.is_file() and (CHECKOUT / "configs" / "common.py").is_file()
RECIPES = CHECKOUT if IN_CHECKOUT else PACKAGE / "recipes"  # the folder that holds configs/


def find_config(name: str) -> Path:
    """The path of a config file: `name` from the current directory, else below the recipes of this package, else `name` itself."""
    path = Path(name)
    packaged = RECIPES / path
    there = os.path.isfile  # False also for names that no file can have
    return packaged if not there(path) and not path.is_absolute() and there(packaged) else path


def program() -> str:
    """How this program was called, for messages: 'python launch.py', 'ssl_jax' or 'python -m ssl_jax'."""
    called = Path(sys.argv[0])
    if called.name == "__main__.py" and called.resolve().parent == PACKAGE:
        return "python -m ssl_jax"
    return "ssl_jax" if called.name in ("ssl_jax", "ssl_jax.exe") else "python launch.py"


def as_called(text: str) -> str:
    """`text`, which speaks of `python launch.py`, with the name by which this program was called."""
    return text if program() == "python launch.py" else re.sub(r"(?<![\w./-])(python )?launch\.py\b", program(), text)

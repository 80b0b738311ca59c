"""List the configs and their variants.

  python launch.py configs
  python launch.py configs simclr

With a method: every variant with its hardware, the time it takes there, the numbers to expect and their source.
"""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ssl_jax.cli.main import refuse_rest
from ssl_jax.errors import UserError
from ssl_jax.where import RECIPES, as_called, find_config

FOLDERS = (Path("configs"), RECIPES / "configs")
COLUMNS = ("variant", "about", "hardware", "time", "expected", "source")


def add_arguments(sub) -> None:
    sub.add_argument("method", nargs="?", help="name of a file in configs/, or its path")


def main(args, overrides) -> int:
    refuse_rest(overrides)
    console = Console()
    if args.method:
        show_variants(args.method, console)
    else:
        show_configs(console)
    return 0


def show_configs(console: Console) -> None:
    """Print every file of configs/ with its variants: those of the current directory, else those of this package."""
    rows = []
    for path in _files():
        module = _import(path)
        if hasattr(module, "VARIANTS"):
            rows.append((path.stem, _idea(module), ", ".join(_shown(variant.name) for variant in module.VARIANTS)))
    if console.is_terminal:
        console.print(_table(("config", "what", "variants"), rows))
    else:
        for name, idea, variants in rows:
            print(f"{name}: {idea}\n    {variants}")
    print(as_called("more about one: launch.py configs NAME; train it: launch.py train --config=configs/NAME.py:VARIANT --workdir=DIR"))


def show_variants(method: str, console: Console) -> None:
    """Print the docstring and the table of variants of a config file. Raises UserError if there is no such file or table."""
    path = _find(method)
    module = _import(path)
    if not hasattr(module, "VARIANTS"):
        raise UserError(f"{path} has no VARIANTS; its get_config says which variants it has")
    print(f"{path}\n{inspect.getdoc(module) or ''}\n")
    if not console.is_terminal:
        for variant in module.VARIANTS:
            facts = "; ".join(filter(None, [variant.hardware, variant.time, variant.expected]))
            paragraphs = [_about(variant), facts + (f" ({variant.source})" if variant.source else "")]
            print("\n    ".join([_shown(variant.name), *filter(None, "\n".join(paragraphs).splitlines())]))
        return
    rows = [(_shown(v.name), _about(v), v.hardware, v.time, v.expected, v.source) for v in module.VARIANTS]
    console.print(_table(COLUMNS, rows))


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(show_lines=True)
    for name in columns:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))  # `Text`, since rich takes brackets in a string for markup
    return table


def _files() -> Sequence[Path]:
    found = ([path for path in sorted(folder.glob("*.py")) if path.stem not in ("__init__", "common")] for folder in FOLDERS)
    return next(filter(None, found), [])


def _find(method: str) -> Path:
    name = method.partition(":")[0]
    for path in (find_config(name), *(folder / f"{name}.py" for folder in FOLDERS)):
        if os.path.isfile(path):  # False also for names that no file can have
            return path
    near = difflib.get_close_matches(name, [path.stem for path in _files()], 1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(path.stem for path in _files()) or 'none here'}"
    raise UserError(f"no config {method!r}; {hint}")


def _import(path: Path) -> ModuleType:
    from ssl_jax.experiment.config import import_file  # imports ml_collections, which --help avoids

    with import_file(str(path)) as module:
        return module


def _idea(module: ModuleType) -> str:
    """The first paragraph of the docstring."""
    return " ".join((inspect.getdoc(module) or "").partition("\n\n")[0].split())


def _shown(name: str) -> str:
    return name or "(default)"


def _about(variant) -> str:
    """The line of the table, and below it the docstring of the variant's function."""
    return "\n".join(filter(None, [variant.about, " ".join((inspect.getdoc(variant.apply) or "").split())]))

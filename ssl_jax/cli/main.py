"""The verbs, their flags, and the exit codes: 0 done (or saved after SIGTERM), 2 bad input, 74 a fault of the machine, 130 saved after
SIGINT."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from ssl_jax.errors import MachineFault, UserError

VERBS = {
    "train": "train a config in a workdir, or go on where it stopped",
    "evaluate": "evaluate the checkpoint of a run: kNN, linear probe, ...",
    "sample": "write grids of what a generative run makes",
    "export": "write a finished run as safetensors, Orbax parameters or StableHLO",
    "configs": "list the configs, their variants and what to expect of each",
    "rehearse": "compile a config for devices that are not there: memory, FLOPs, collectives, time",
    "report": "turn a workdir into one self-contained HTML page",
    "submit": "have a config trained by Slurm, GKE, a Cloud TPU, or detached on this machine",
    "status": "tell how a submitted job is",
    "logs": "print the log of a submitted job",
    "cancel": "end a submitted job; it saves",
}


class Parser(argparse.ArgumentParser):
    """Raises UserError instead of ending the program."""

    def error(self, message: str):
        raise UserError(f"{message}; see `{self.prog} --help`")


class _Once(logging.Filter):
    """Lets every message through once."""

    def __init__(self):
        super().__init__()
        self.told: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        fresh = record.getMessage() not in self.told
        self.told.add(record.getMessage())
        return fresh


def parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """Of `argv`: only the verb that it asks for is imported, and has its flags."""
    asked = next((argument for argument in argv if not argument.startswith("-")), None)
    top = Parser(
        prog="python launch.py",
        description="ssl_jax: visual representation pretraining in JAX. Every method runs under the same verbs.",
        epilog="example: python launch.py train --config=configs/simclr.py --workdir=runs/simclr --config.seed=1",
        allow_abbrev=False,
    )
    verbs = top.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb, summary in VERBS.items():
        sub = verbs.add_parser(verb, help=summary, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
        if verb == asked:
            module = verb_module(verb)
            sub.description = module.__doc__
            module.add_arguments(sub)
    return top


def verb_module(verb: str) -> ModuleType:
    """It has `add_arguments(sub)` and `main(args, overrides) -> exit code`, and imports JAX in `main` only."""
    return importlib.import_module(f"ssl_jax.cli.{verb}")


def main(argv: list[str]) -> int:
    """Run a verb; a mistake of the user, or a fault of the machine, is one line on stderr."""
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        os.environ.setdefault("NPROC", "16")  # else fake devices wait for each other with fewer threads than devices
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("ssl_jax").setLevel(logging.INFO)
    logging.getLogger("ssl_jax.data").addFilter(_Once())  # a split is opened again for every evaluation
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax: every file, and a traceback of what it raises anyway
    try:
        args, overrides = parser(argv).parse_known_args(argv)
        return verb_module(args.verb).main(args, overrides)
    except (UserError, MachineFault) as error:
        _leave(error)
        print(f"error: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except Exception as error:  # whatever it was: of several processes this one ends, of one it goes on with its traceback
        _leave(error)
        raise


def _leave(error: BaseException) -> None:
    """End this process at once if it is one of several."""
    if "jax" in sys.modules:  # else it has not joined others
        from ssl_jax.experiment import distributed

        distributed.abort(error)


def add_workdir(sub: argparse.ArgumentParser) -> None:
    """The flag that every verb has."""
    sub.add_argument("--workdir", type=_directory, required=True, help="directory of the run")


def _directory(told: str) -> Path:
    """Raises UserError for an address: as a path it would be a directory 'gs:' here."""
    if "://" in told:
        raise UserError(f"--workdir={told} is no directory; mount the bucket on every host (gcsfuse, say) and give the path there")
    return Path(told)


def refuse_rest(rest: list[str]) -> None:
    """Of a verb that takes no --config.KEY=VALUE. Raises UserError if there is any."""
    if rest:
        raise UserError(f"argument {rest[0]!r} is not understood; see `python launch.py VERB --help`")

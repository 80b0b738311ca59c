"""The verbs, their flags and exit codes.

Exit codes: 0 done (or saved after SIGTERM), 2 bad input, 74 a fault of the machine, 130 saved after SIGINT.
"""

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

from ssl_jax.errors import MachineFault, PrintableFormatter, UserError, control_characters, printable
from ssl_jax.where import as_called, program

VERBS = {
    "train": "train a config in a workdir, or resume it",
    "evaluate": "evaluate the checkpoint of a run: kNN, linear probe, ...",
    "sample": "write image grids of a generative run",
    "export": "write a finished run as safetensors, Orbax parameters or StableHLO",
    "configs": "list the configs, their variants and expected numbers",
    "rehearse": "compile a config for devices that are not there: memory, FLOPs, collectives, time",
    "report": "write a workdir as one self-contained HTML page",
    "submit": "train a config on Slurm, GKE, a Cloud TPU, or detached on this machine",
    "status": "print the state of a submitted job",
    "logs": "print the log of a submitted job",
    "cancel": "cancel a submitted job; it saves",
}


class Parser(argparse.ArgumentParser):
    """Raises UserError instead of ending the program."""

    def error(self, message: str):
        raise UserError(f"{message}; see `{self.prog} --help`")


class _Once(logging.Filter):
    """Lets every message through once."""

    def __init__(self):
        super().__init__()
        self.seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        fresh = record.getMessage() not in self.seen
        self.seen.add(record.getMessage())
        return fresh


def parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """The parser for `argv`. Only the verb in `argv` is imported and has its flags."""
    asked = next((argument for argument in argv if not argument.startswith("-")), None)
    top = Parser(
        prog=program(),
        description="ssl_jax: visual representation pretraining in JAX. Every method runs under the same verbs.",
        epilog=as_called("example: python launch.py train --config=configs/simclr.py --workdir=runs/simclr --config.seed=1"),
        allow_abbrev=False,
    )
    verbs = top.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb, summary in VERBS.items():
        sub = verbs.add_parser(verb, help=summary, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
        if verb == asked:
            module = verb_module(verb)
            sub.description = as_called(module.__doc__)
            module.add_arguments(sub)
    return top


def verb_module(verb: str) -> ModuleType:
    """A module with `add_arguments(sub)` and `main(args, overrides) -> exit code`, which imports JAX in `main` only."""
    return importlib.import_module(f"ssl_jax.cli.{verb}")


def main(argv: list[str]) -> int:
    """Run a verb and return the exit code. Bad input and faults of the machine are one line on stderr."""
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        os.environ.setdefault("NPROC", "16")  # fake devices deadlock with fewer threads than devices
    shown = logging.StreamHandler(sys.stderr)
    shown.setFormatter(PrintableFormatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[shown])
    logging.getLogger("ssl_jax").setLevel(logging.INFO)
    logging.getLogger("ssl_jax.data").addFilter(_Once())  # a split is opened again for every evaluation
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs every file, and tracebacks of what it raises anyway
    try:
        args, overrides = parser(argv).parse_known_args(argv)
        return verb_module(args.verb).main(args, overrides)
    except (UserError, MachineFault) as error:
        _abort(error)
        print(f"error: {printable(as_called(str(error)))}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # whoever read the output, such as `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as error:  # one of several processes ends here; a single process keeps its traceback
        _abort(error)
        raise


def _abort(error: BaseException) -> None:
    """End this process at once if it is one of several."""
    if "jax" in sys.modules:  # else it has joined no other processes
        from ssl_jax.experiment import distributed

        distributed.abort(error)


def add_workdir(sub: argparse.ArgumentParser) -> None:
    """The flag --workdir."""
    sub.add_argument("--workdir", type=_directory, required=True, help="directory of the run")


def _directory(text: str) -> Path:
    """Raises UserError for a URL, which as a path would be a directory 'gs:' here, and for control characters."""
    if "://" in text:
        raise UserError(f"--workdir={text} is no directory; mount the bucket on every host (as by gcsfuse) and give its path")
    if control_characters(text):
        raise UserError(f"--workdir={printable(text)} has a control character in its name; choose another directory")
    return Path(text)


def refuse_rest(rest: list[str]) -> None:
    """For verbs that take no overrides. Raises UserError if an argument is left."""
    if rest:
        raise UserError(f"argument {rest[0]!r} is not understood; see `python launch.py VERB --help`")

"""The verbs, their flags and exit codes.

Exit codes: 0 done (or saved after SIGTERM), 2 bad input, 74 a fault of the machine, 130 saved after SIGINT, 129 after SIGHUP.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

from ssl_jax import interrupts
from ssl_jax.errors import MachineFault, UserError, machine_fault

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


def _no_fault(record: logging.LogRecord) -> bool:
    """For asyncio, which logs a traceback for each of Orbax's tasks that failed on a full disk, when it is collected."""
    return not record.exc_info or machine_fault(record.exc_info[1]) is None


def parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """The parser for `argv`. Only the verb in `argv` is imported and has its flags."""
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
    """A module with `add_arguments(sub)` and `main(args, overrides) -> exit code`, which imports JAX in `main` only."""
    return importlib.import_module(f"ssl_jax.cli.{verb}")


def main(argv: list[str]) -> int:
    """Run a verb and return the exit code. Bad input and faults of the machine are one line on stderr."""
    _open_streams()
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        os.environ.setdefault("NPROC", "16")  # fake devices deadlock with fewer threads than devices
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("ssl_jax").setLevel(logging.INFO)
    logging.getLogger("ssl_jax.data").addFilter(_Once())  # a split is opened again for every evaluation
    logging.getLogger("asyncio").addFilter(_no_fault)
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs every file, and tracebacks of what it raises anyway
    with interrupts.heard(), _quiet_threads():
        try:
            args, overrides = parser(argv).parse_known_args(argv)
            code = verb_module(args.verb).main(args, overrides)
            sys.stdout.flush()  # a full disk or an ended reader is noticed here rather than at the exit
            return code
        except (UserError, MachineFault) as error:
            return _end(error)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 128 + signal.SIGINT
        except BrokenPipeError:  # whoever read the output, such as `head`, has ended
            _drop_output()
            return 128 + signal.SIGPIPE
        except Exception as error:  # one of several processes ends here; a single process keeps its traceback
            fault = machine_fault(error)
            if fault is not None:
                if isinstance(error, OSError):
                    _drop_output()  # it may be stdout that cannot be written
                return _end(fault)
            _abort(error)
            raise


def _open_streams() -> None:
    """Give closed streams /dev/null. The next file would become stdout or stderr, and libraries would write their messages into it."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free one
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115  for the life of the process
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115


def _end(error: UserError | MachineFault) -> int:
    """Print one line, and return the exit code."""
    _abort(error)
    with contextlib.suppress(OSError):  # stderr may be on the full disk; the exit code remains
        print(f"error: {error}", file=sys.stderr)
    return error.code


def _drop_output() -> None:
    """Send what is left for stdout nowhere, or Python would try to write it at its end."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (AttributeError, OSError, ValueError):  # closed, or not a file
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


@contextlib.contextmanager
def _quiet_threads() -> Iterator[None]:
    """In place of tracebacks of threads that write files: a disk that is full fails in all of them, and the verb reports it once."""
    in_thread, unraisable = threading.excepthook, sys.unraisablehook

    def of_thread(failure) -> None:
        if failure.exc_value is None or machine_fault(failure.exc_value) is None:
            in_thread(failure)

    def of_callback(failure) -> None:  # TensorStore still calls an event loop that Orbax has closed after the first failure
        if str(failure.exc_value) != "Event loop is closed":
            unraisable(failure)

    threading.excepthook, sys.unraisablehook = of_thread, of_callback
    try:
        yield
    finally:
        threading.excepthook, sys.unraisablehook = in_thread, unraisable


def _abort(error: BaseException) -> None:
    """End this process at once if it is one of several."""
    if "jax" in sys.modules:  # else it has joined no other processes
        from ssl_jax.experiment import distributed

        distributed.abort(error)


def add_workdir(sub: argparse.ArgumentParser) -> None:
    """The flag --workdir."""
    sub.add_argument("--workdir", type=_directory, required=True, help="directory of the run")


def _directory(text: str) -> Path:
    """Raises UserError for a URL, which as a path would be a directory 'gs:' here."""
    if "://" in text:
        raise UserError(f"--workdir={text} is no directory; mount the bucket on every host (as by gcsfuse) and give its path")
    return Path(text)


def refuse_rest(rest: list[str]) -> None:
    """For verbs that take no overrides. Raises UserError if an argument is left."""
    if rest:
        raise UserError(f"argument {rest[0]!r} is not understood; see `python launch.py VERB --help`")

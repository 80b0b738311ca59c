"""The verbs, their flags and exit codes.

Exit codes: 0 done (or saved after SIGTERM), 2 bad input, 74 a fault of the machine, 130 saved after SIGINT, 129 after SIGHUP.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import importlib
import logging
import math
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from ssl_jax import interrupts
from ssl_jax.errors import MachineFault, PrintableFormatter, UserError, control_characters, machine_fault, printable
from ssl_jax.where import as_called, program

VERBS = {
    "train": "train a config in a workdir, or resume it",
    "evaluate": "evaluate the checkpoint of a run: kNN, linear probe, ...",
    "features": "write the features of images to NumPy or Parquet files",
    "sample": "write image grids of a generative run",
    "transfer": "train one encoder's tasks: classification, segmentation, detection, questions; one table",
    "sweep": "train variations of configs with several seeds: an ablation study",
    "export": "write a finished run as safetensors, Orbax parameters or StableHLO",
    "configs": "list the configs, their variants and expected numbers",
    "prepare": "write a smaller copy of a dataset, which is read faster",
    "rehearse": "compile a config for devices that are not there: memory, FLOPs, collectives, time",
    "report": "write a workdir as one self-contained HTML page",
    "compare": "compare runs or sweeps: one page, and its table as CSV, Markdown and LaTeX",
    "submit": "train a config on Slurm, GKE, a Cloud TPU, or detached on this machine",
    "status": "print the state of a submitted job, or of the runs of a sweep",
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
    _open_streams()
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        os.environ.setdefault("NPROC", "16")  # fake devices deadlock with fewer threads than devices
    shown = logging.StreamHandler(sys.stderr)
    shown.setFormatter(PrintableFormatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[shown])
    logging.getLogger("ssl_jax").setLevel(logging.INFO)
    logging.getLogger("ssl_jax.data").addFilter(_Once())  # a split is opened again for every evaluation
    logging.getLogger("asyncio").addFilter(_no_fault)
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs every file, and tracebacks of what it raises anyway
    with interrupts.heard(), _quiet_threads():
        try:
            _refuse_control_characters(argv)
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


def run(function: Callable[[list[str]], int], argv: list[str]) -> NoReturn:
    """End this process with the exit code that `function(argv)` returns.

    Python is not taken down, only what asked to be called at its end. Else XLA would wait for programs that still run, as after an
    error, while their Python functions (models/onednn.py) wait for a turn that never comes.
    """
    try:
        code = function(argv)
    except SystemExit as ended:  # --help, or SIGTERM
        code = ended.code if isinstance(ended.code, int) else 0
    except BaseException:  # noqa: BLE001  printed, and the exit code is that of Python
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()  # prints what one of them raises
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


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
        print(f"error: {printable(as_called(str(error)))}", file=sys.stderr)
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


def _refuse_control_characters(argv: Sequence[str]) -> None:
    """Raises UserError for an argument with a control character; the brackets of an override may span lines.

    Names of directories and jobs become lines of scripts, logs and terminals.
    """
    for argument in argv:
        if control_characters(argument.replace("\n", "").replace("\t", "") if argument.startswith("--config.") else argument):
            raise UserError(f"argument {argument!r} has control characters; leave them out")


def add_workdir(sub: argparse.ArgumentParser) -> None:
    """The flag --workdir."""
    sub.add_argument("--workdir", type=folder("--workdir"), required=True, help="directory of the run")


def add_step(sub: argparse.ArgumentParser, default: str = "the newest") -> None:
    """The flag --step."""
    sub.add_argument("--step", type=whole("--step", 0), help=f"which checkpoint (default: {default})")


def add_encoder(sub: argparse.ArgumentParser) -> None:
    """The flags of an encoder: --workdir and --step, or --weights and --config."""
    sub.add_argument("--workdir", type=folder("--workdir"), help="directory of a run")
    add_step(sub)
    sub.add_argument("--weights", metavar="FILE", help="instead of a run: an encoder of others (docs/guides/foreign_weights.md)")
    sub.add_argument("--config", help="with --weights: a config, for its data")


def check_encoder(args: argparse.Namespace) -> None:
    """Raises UserError unless the flags name a run, or a file of weights with a config."""
    if (args.workdir is None) == (args.weights is None):
        raise UserError("give either --workdir=RUN, or --weights=FILE with --config=CONFIG")
    if args.weights is not None and args.config is None:
        raise UserError(f"--weights={args.weights} needs --config=configs/NAME.py, for its data and evaluations")
    if args.weights is not None and args.step is not None:
        raise UserError(f"--step={args.step} is of a run, and --weights={args.weights} has no steps")
    if args.workdir is not None and args.config is not None:
        raise UserError(f"--config={args.config} is for --weights; a run has its own config, and --config.KEY=VALUE changes it")


def folder(flag: str) -> Callable[[str], Path]:
    """The type of a flag that takes a directory, which need not exist. Raises UserError where no directory can be."""

    def read(text: str) -> Path:
        if "://" in text:  # as a path it would be a directory 'gs:' here
            raise UserError(f"{flag}={text} is no directory; mount the bucket on every host (as by gcsfuse) and give its path")
        if not text.strip():
            raise UserError(f"{flag}={text} is empty; give a directory")
        path = Path(text)
        try:
            there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
        except OSError as error:
            raise UserError(f"{flag}={text} cannot be written ({error.strerror}); choose another directory") from None
        if not there.is_dir():
            raise UserError(f"{flag}={text} cannot be written ({there} is a file); choose another directory")
        return path

    return read


def file(flag: str) -> Callable[[str], Path]:
    """The type of a flag that takes a file to write. Raises UserError for a directory, or a place where no file can be."""

    def read(text: str) -> Path:
        if os.path.isdir(text):
            raise UserError(f"{flag}={text} is a directory; give the name of a file")
        path = Path(text)
        folder(flag)(text and str(path.parent))
        try:
            path.exists()
        except OSError as error:
            raise UserError(f"{flag}={text} cannot be written ({error.strerror}); choose another file") from None
        return path

    return read


def whole(flag: str, least: int, most: int = 2**31 - 1) -> Callable[[str], int]:
    """The type of a flag that takes a whole number from `least` to `most`. Raises UserError for another text."""
    return _number(flag, int, "a whole number", least, most)


def number(flag: str, least: float = 0.0, most: float = math.inf, positive: bool = False) -> Callable[[str], float]:
    """The type of a flag that takes a finite number from `least` to `most`, with `positive` not 0. Raises UserError."""
    return _number(flag, float, "a finite number", least, most, positive)


def _number(flag, cast, words, least, most, positive=False):
    def read(text: str):
        try:
            value = cast(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise UserError(f"{flag}={text} must be {words}")
        if positive and value <= 0:
            raise UserError(f"{flag}={text} must be above 0")
        if value < least:
            raise UserError(f"{flag}={text} must {f'be at least {least}' if least else 'not be negative'}")
        if value > most:
            raise UserError(f"{flag}={text} must be at most {most}")
        return value

    return read


def refuse_rest(rest: list[str]) -> None:
    """For verbs that take no overrides. Raises UserError if an argument is left."""
    if rest:
        raise UserError(f"argument {rest[0]!r} is not understood; see `python launch.py VERB --help`")

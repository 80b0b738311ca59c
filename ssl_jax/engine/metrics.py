"""Metrics on disk: metrics.jsonl is the source of truth, TensorBoard files are a copy for viewing."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import math
import queue
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax

from ssl_jax import files
from ssl_jax.engine.records import parse, read_metrics
from ssl_jax.errors import not_written

log = logging.getLogger(__name__)

if "torch" in sys.modules:
    from tensorboardX import SummaryWriter
else:  # tensorboardX imports an installed PyTorch just for a type name, which would add two seconds to every start
    sys.modules["torch"] = None
    from tensorboardX import SummaryWriter

    del sys.modules["torch"]


class MetricsWriter:
    """Appends one JSON object per logged step to `<workdir>/metrics.jsonl`. Only process 0 writes.

    Metrics that depend on the clock or the machine have names that start with `time/`; the rest is the same in every run of a
    config. A restart removes the lines past the resumed step, so that no step is logged twice. Lines that cannot be read are named in
    the log, and the damaged file is kept as metrics.jsonl.damaged-N.
    """

    def __init__(self, workdir: Path, start_step: int = 0, tensorboard: bool = True):
        self.path = Path(workdir) / "metrics.jsonl"
        self._file = self._board = None
        if jax.process_index() != 0:
            return
        lines, bad = parse(self.path, "step")
        if bad:
            self._keep_damaged(bad)
        self._begin([line for line in lines if line["step"] <= start_step])
        if tensorboard:
            purge = start_step + 1 if start_step else None
            # The writer's thread dies on a full disk. A short queue would then fill up and block the run.
            self._board = SummaryWriter(str(Path(workdir) / "tensorboard"), purge_step=purge, max_queue=1 << 15)

    def _keep_damaged(self, bad: Sequence[int]) -> None:
        """Copy the file, and name its unreadable lines."""
        number = next(n for n in itertools.count(1) if not self.path.with_name(f"{self.path.name}.damaged-{n}").exists())
        copy = self.path.with_name(f"{self.path.name}.damaged-{number}")
        files.write(copy, self.path.read_bytes())
        places = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
        log.warning("%s: %d lines cannot be read (%s); the others are kept, the damaged file is %s", self.path, len(bad), places, copy)

    def _begin(self, lines: Sequence[Mapping[str, float]]) -> None:
        """Rewrite the file with `lines`, and open it for appending."""
        files.write(self.path, "".join(json.dumps(line) + "\n" for line in lines))
        try:
            self._file = open(self.path, "a", buffering=1)  # noqa: SIM115  closed in close()
        except OSError as error:
            raise not_written(self.path, error) from error

    def amend(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add metrics that were measured later to the last line, that of `step`. If there is no such line, write one.

        Raises:
            MachineFault: the disk is full, or the directory is gone.
        """
        if self._file is None:
            return
        *before, last = read_metrics(self.path.parent) or [{}]
        if last.get("step") != step:
            self.write(step, metrics)
            return
        finite = _finite(metrics)
        self._file.close()
        self._begin([*before, {**last, **finite}])
        self._write_board(step, finite)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the finite metrics. JSON has no NaN and inf, and the loop has checked for them.

        Raises:
            MachineFault: the disk is full, or the directory is gone.
        """
        if self._file is None:
            return
        finite = _finite(metrics)
        try:
            self._file.write(json.dumps({"step": step, **finite}) + "\n")
        except OSError as error:
            raise not_written(self.path, error) from error
        self._write_board(step, finite)

    def _write_board(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._board is not None:
            for name, value in metrics.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        for close in (self._file and self._file.close, self._board and self._close_board):
            if close is not None:
                try:
                    close()
                except OSError as error:  # only a warning, so that it does not hide the reason why the run ended
                    log.warning("%s cannot be closed (%s)", self.path.parent, error.strerror)

    def _close_board(self) -> None:
        """Close it. Where it cannot be flushed, end its thread and the close at the exit, too, whose errors would be tracebacks."""
        writer = self._board.file_writer.event_writer
        try:
            self._board.close()
        except OSError:
            writer._closed, worker = True, writer._worker
            with contextlib.suppress(queue.Full):
                writer._event_queue.put_nowait(worker._shutdown_signal)
            worker.join(1.0)
            raise


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items() if math.isfinite(value)}


def record_start(workdir: Path, clock: float) -> None:
    """Append to `<workdir>/starts.jsonl` the time (time.time) at which this start of the run began. Only process 0 writes."""
    if jax.process_index() != 0:
        return
    path = Path(workdir) / "starts.jsonl"
    try:
        with path.open("a") as file:
            file.write(json.dumps({"time/clock": clock}) + "\n")
    except OSError as error:
        raise not_written(path, error) from error

"""Metrics on disk: JSON lines are the source of truth, TensorBoard is a copy to look at."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax

from ssl_jax.engine.records import read_metrics
from ssl_jax.errors import not_written

log = logging.getLogger(__name__)

if "torch" in sys.modules:
    from tensorboardX import SummaryWriter
else:  # tensorboardX imports PyTorch where it is installed, for the name of a type: two seconds of every start
    sys.modules["torch"] = None
    from tensorboardX import SummaryWriter

    del sys.modules["torch"]


class MetricsWriter:
    """Appends one JSON object per logged step to `<workdir>/metrics.jsonl`.

    Everything that depends on the clock or the machine stands under keys that start with `time/`; the rest is the same in
    every run of the same config. After a restart the lines past the resumed step are cut, so that a file never tells two
    stories. Of several processes the first one writes.
    """

    def __init__(self, workdir: Path, start_step: int = 0, tensorboard: bool = True):
        self.path = Path(workdir) / "metrics.jsonl"
        self._file = self._board = None
        if jax.process_index() != 0:
            return
        self._begin([line for line in read_metrics(workdir) if line["step"] <= start_step])
        if tensorboard:
            purge = start_step + 1 if start_step else None
            # Its thread ends on a full disk, and then a short queue would fill up and stop the run.
            self._board = SummaryWriter(str(Path(workdir) / "tensorboard"), purge_step=purge, max_queue=1 << 15)

    def _begin(self, lines: Sequence[Mapping[str, float]]) -> None:
        """A file of these lines, to append to."""
        try:
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
            os.replace(temporary, self.path)
            self._file = open(self.path, "a", buffering=1)  # noqa: SIM115  closed in close()
        except OSError as error:
            raise not_written(self.path, error) from error

    def amend(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add what was measured later to the line of `step`, the last one; write it where there is none.

        Raises:
            MachineFault: the disk is full, or the directory gone.
        """
        if self._file is None:
            return
        *before, last = read_metrics(self.path.parent) or [{}]
        if last.get("step") != step:
            self.write(step, metrics)
            return
        told = _finite(metrics)
        self._file.close()
        self._begin([*before, {**last, **told}])
        self._draw(step, told)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write what has a value; JSON has none for NaN and inf, and the loop has dealt with them before.

        Raises:
            MachineFault: the disk is full, or the directory gone.
        """
        if self._file is None:
            return
        told = _finite(metrics)
        try:
            self._file.write(json.dumps({"step": step, **told}) + "\n")
        except OSError as error:
            raise not_written(self.path, error) from error
        self._draw(step, told)

    def _draw(self, step: int, told: Mapping[str, float]) -> None:
        if self._board is not None:
            for name, value in told.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        for opened in (self._file, self._board):
            if opened is not None:
                try:
                    opened.close()
                except OSError as error:  # what is told of the run's end must not be lost to it
                    log.warning("%s cannot be closed (%s)", self.path.parent, error.strerror)


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items() if math.isfinite(value)}


def record_start(workdir: Path, clock: float) -> None:
    """Append to `<workdir>/starts.jsonl` when (time.time) this start of the run began. Of several processes the first one writes."""
    if jax.process_index() != 0:
        return
    path = Path(workdir) / "starts.jsonl"
    try:
        with path.open("a") as file:
            file.write(json.dumps({"time/clock": clock}) + "\n")
    except OSError as error:
        raise not_written(path, error) from error

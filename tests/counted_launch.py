"""`launch.py`, which also writes down what each process is given: a line {step, process, ids} for each batch, in $COUNTED.

Batches are read ahead, so that the last lines of a process may be of steps that it never came to.
"""

import json
import os
import pathlib
import sys
import threading

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jax

from ssl_jax.cli import local
from ssl_jax.cli.main import main
from ssl_jax.data.pipeline import TrainBatches, _Reader

local.LAUNCHER = pathlib.Path(__file__).resolve()
read_step, read_rows, this_thread = TrainBatches.__getitem__, _Reader.batch, threading.local()


def counted_rows(self, indices, seeds):
    this_thread.ids = [int(i) for i in indices]
    return read_rows(self, indices, seeds)


def counted_step(self, step):
    batch = read_step(self, step)
    line = {"step": step + 1, "process": jax.process_index(), "ids": this_thread.ids}
    with open(pathlib.Path(os.environ["COUNTED"]) / f"{os.getpid()}.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")
    return batch


if __name__ == "__main__":
    TrainBatches.__getitem__, _Reader.batch = counted_step, counted_rows
    sys.exit(main(sys.argv[1:]))

"""`launch.py` with faults that environment variables inject; for tests of several processes.

  COUNTED=FOLDER   every process writes a line {step, process, ids} for each batch that it reads. Batches are read ahead, so the last
                   lines of a process may be of steps that it never reached.
  SLOW=P:SECONDS   process P waits this long for each batch
  LATE=P:SECONDS   process P starts its first step this much later
  SKEW=P:SECONDS   the clock of process P is this much fast
  HANG=P:STEP      process P hangs in Python in this step, unless the file ONCE=PATH exists, which it creates
  CRASH=P:STEP     process P raises an exception, likewise
"""

import json
import os
import pathlib
import sys
import threading
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jax

from launch import main
from ssl_jax.data.pipeline import TrainBatches
from ssl_jax.data.reader import Reader
from ssl_jax.engine.loop import Signals
from ssl_jax.engine.watchdog import Watchdog
from ssl_jax.launchers import supervise

supervise.LAUNCHER = pathlib.Path(__file__).resolve()
read_step, read_rows, this_thread = TrainBatches.__getitem__, Reader.batch, threading.local()
stop, beat, clock = Signals.stop, Watchdog.beat, time.time


def odd(name):
    """The number of variable `name` if it is for this process; else None."""
    process, _, value = os.environ.get(name, ":").partition(":")
    return float(value) if process == os.environ.get("SSL_JAX_PROCESS", "0") else None


def counted_rows(self, indices, seeds):
    this_thread.ids = [int(i) for i in indices]
    return read_rows(self, indices, seeds)


def odd_step(self, step):
    time.sleep(odd("SLOW") or 0)
    batch = read_step(self, step)
    if "COUNTED" in os.environ:
        line = {"step": step + 1, "process": jax.process_index(), "ids": this_thread.ids}
        with open(pathlib.Path(os.environ["COUNTED"]) / f"{os.getpid()}.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
    return batch


def late_step(self, step):
    if step == 1:
        time.sleep(odd("LATE") or 0)
    return beat(self, step)


def odd_stop(self, step):
    flag = pathlib.Path(os.environ.get("ONCE", "/dev/null"))
    if step in (odd("HANG"), odd("CRASH")) and not flag.exists():
        flag.touch()
        if step == odd("CRASH"):
            raise RuntimeError("a bug")
        time.sleep(1e6)
    return stop(self, step)


if __name__ == "__main__":
    TrainBatches.__getitem__, Reader.batch, Signals.stop = odd_step, counted_rows, odd_stop
    Watchdog.beat = late_step
    if (skew := odd("SKEW")) is not None:
        time.time = lambda: clock() + skew
    sys.exit(main(sys.argv[1:]))

"""Runs of one, two or four processes with four devices in all, started and watched from a test."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import threading
import time
from itertools import chain

import numpy as np
from xla_flags import flags

from ssl_jax.experiment.launch_environment import COORDINATOR, PROCESS, PROCESSES

ROOT = pathlib.Path(__file__).parent.parent
EXAMPLES, BATCH = 96, 32  # per epoch, per step
SHORT = {  # overrides for methods whose evaluations take longer than a run
    "autoencoder": ("--config.evals={'reconstruction': {'kind': 'reconstruction'}, 'knn': {'kind': 'knn'}}", "--config.best_metric=")
}
FLAGS = ("--config.baselines=()", f"--config.data.train_split=train[:{EXAMPLES}]", f"--config.batch_size={BATCH}")


def environment(devices, **others):
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags(devices), "NPROC": "16", **{k: str(v) for k, v in others.items()}}


class Running:
    """A started command; `log` is its stderr."""

    def __init__(self, arguments, environment):
        self.process = subprocess.Popen(arguments, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        self.lines: list[tuple[float, str]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self.process.stderr:
            self.lines.append((time.monotonic(), line))

    @property
    def log(self) -> str:
        return "".join(line for _, line in self.lines)

    def finish(self, code=0, timeout=1500) -> str:
        self.process.wait(timeout)
        self._reader.join(10)
        assert self.process.returncode == code, self.log
        return self.log

    def when(self, text) -> float:
        """The time of the first line with `text`."""
        return next(at for at, line in self.lines if text in line)

    def child(self, process) -> int:
        """The id of a process of the run."""
        children = pathlib.Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        variable = f"{PROCESS}={process}"
        return next(int(pid) for pid in children if variable in pathlib.Path(f"/proc/{pid}/environ").read_text().split("\0"))


def start_pair(*arguments) -> list[Running]:
    """Two processes of one run with two devices each, with a command line for each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = {COORDINATOR: f"127.0.0.1:{probe.getsockname()[1]}", PROCESSES: 2}
    return [Running(command, environment(2, **place, **{PROCESS: process})) for process, command in enumerate(arguments)]


class Runs:
    """Runs of the `:smoke` variant of one config; the example ids of WORKDIR are in WORKDIR.ids/."""

    def __init__(self, folder, name, steps=12, every=3):
        self.folder, self.name, self.steps = folder, name, steps
        self.flags = (*FLAGS, f"--config.total={steps} steps", f"--config.evaluate_every={steps} steps",
                      f"--config.checkpoint_every={every} steps", *SHORT.get(name, ()))  # fmt: skip

    def arguments(self, workdir, *flags):
        script = str(pathlib.Path(__file__).with_name("odd_launch.py"))
        train = ["train", f"--config=configs/{self.name}.py:smoke", f"--workdir={self.folder / workdir}"]
        return [sys.executable, script, *train, *self.flags, *flags]

    def start(self, workdir, processes, *flags, **odd) -> Running:
        counted = self.folder / f"{workdir}.ids" / f"{processes}-{len(list(self.folder.glob(f'{workdir}.ids/*')))}"
        counted.mkdir(parents=True)
        several = [f"--processes={processes}"] if processes > 1 else []
        return Running(self.arguments(workdir, *flags, *several), environment(4 // processes, COUNTED=counted, **odd))

    def logged(self, workdir) -> int:
        """How many steps are in the metrics."""
        path = self.folder / workdir / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    def wait_for(self, workdir, step, running):
        deadline = time.monotonic() + 600
        while self.logged(workdir) < step:
            assert running.process.poll() is None, running.log
            assert time.monotonic() < deadline, f"{workdir} has not reached step {step}: {running.log}"
            time.sleep(0.02)

    def curve(self, workdir):
        rows = [json.loads(line) for line in (self.folder / workdir / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == list(range(1, self.steps + 1))  # written once
        return [{k: v for k, v in row.items() if k.endswith("/loss")} for row in rows]

    def evaluation(self, workdir):
        (entry,) = json.loads((self.folder / workdir / "evaluations.json").read_text())
        return entry["metrics"]

    def examples(self, workdir):
        """{step: ids of its examples in order}; checks that a repeated step, with any number of processes, has the same ids."""
        steps = {}
        for start in (self.folder / f"{workdir}.ids").iterdir():
            parts = {}
            for path in start.iterdir():
                for line in map(json.loads, path.read_text().splitlines()):
                    part = parts.setdefault((line["step"], line["process"]), line["ids"])
                    assert part == line["ids"]
            count = int(start.name.split("-")[0])
            for step in {step for step, _ in parts}:
                ids = [parts.get((step, process)) for process in range(count)]
                if None not in ids:  # else only some processes have read it, ahead
                    same = all(part == ids[0] for part in ids)  # as for processes along 'tensor'
                    ids = ids[0] if same else list(chain(*ids))
                    assert steps.setdefault(step, ids) == ids
        return steps

    def check(self, workdir, other):
        """The same curve and evaluation as `other`, and every example once in every epoch."""
        for ours, theirs in zip(self.curve(workdir), self.curve(other), strict=True):
            assert ours.keys() == theirs.keys()
            np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-5, atol=1e-5)
        ours, theirs = self.evaluation(workdir), self.evaluation(other)
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():  # an image or two may be classified differently
            np.testing.assert_allclose(value, theirs[name], rtol=1e-4, atol=1 if "/top" in name else 0, err_msg=name)
        seen = self.examples(workdir)
        for first in range(1, self.steps, EXAMPLES // BATCH):
            epoch = chain(*(seen[first + i] for i in range(EXAMPLES // BATCH)))
            assert sorted(epoch) == list(range(EXAMPLES))
        assert seen.items() >= {step: ids for step, ids in self.examples(other).items() if step <= self.steps}.items()

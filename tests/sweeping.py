"""Helpers of the tests of `launch.py sweep`."""

import json
import sys

from launch import main
from ssl_jax.experiment import sweep_check

CONFIG = "--config=configs/simclr.py:smoke"
VARY = "--vary=model.temperature=0.1,0.5"
# Stands for `launch.py train`: notes its arguments and cores, and writes what a finished run leaves. CODES are exit codes by the end
# of the workdir; 'wait' waits for SIGTERM, and saves.
TRAIN = """
import json, os, pathlib, signal, sys, time
flags = dict(flag.removeprefix("--").partition("=")[::2] for flag in sys.argv[2:])
workdir = pathlib.Path(flags["workdir"])
with open(CALLS, "a") as calls: calls.write(json.dumps(flags | {"cores": sorted(os.sched_getaffinity(0))}) + chr(10))
code = next((code for end, code in CODES.items() if str(workdir).endswith(end)), 0)
config = {"total": "9 steps", "batch_size": 1, "data": {"examples": 9}, "best_metric": "knn/top1"}
(workdir / "config.json").write_text(json.dumps(config))
line = {"step": 5, "ssl/loss": 1.5, "time/seconds_per_step": 2.0, "time/clock": 1.0}
(workdir / "metrics.jsonl").write_text("".join(json.dumps(line | {"step": step}) + chr(10) for step in (3, 5)))
if code == "wait":
    def save(*_): print("saved"); sys.exit(75)
    signal.signal(signal.SIGTERM, save)
    (workdir / "ready").touch()
    time.sleep(60)
if code < 0: os.kill(os.getpid(), -code)
if code: print("error: something is wrong", file=sys.stderr); sys.exit(code)
with open(workdir / "metrics.jsonl", "a") as file: file.write(json.dumps(line | {"step": 9}) + chr(10))
entry = {"subject": "trained", "step": 9, "metrics": {"knn/top1": 50.0 + int(flags["config.seed"])}, "protocols": {"knn": "kNN"}}
(workdir / "evaluations.json").write_text(json.dumps([entry]))
(workdir / "report.html").write_text("")
"""


def stand_in(tmp_path, monkeypatch):
    """(set_codes, calls): the stand-in in place of `launch.py train`, and a function that lists its calls since it was last asked."""
    script = tmp_path / "train.py"
    calls = tmp_path / "calls"

    def set_codes(codes):
        script.write_text(f"CALLS = {str(calls)!r}\nCODES = {codes!r}\n{TRAIN}")

    def read_calls():
        found = [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []
        calls.unlink(missing_ok=True)
        return found

    set_codes({})
    monkeypatch.setattr("ssl_jax.launchers.supervise.launch_command", lambda: [sys.executable, "-I", str(script)])
    sizes = lambda plan, names: {name: sweep_check.Size(9, 1_000_000) for name in names}  # noqa: E731
    monkeypatch.setattr(sweep_check, "check_shapes", sizes)
    return set_codes, read_calls


def sweep(workdir, *given, config=CONFIG):
    return main(["sweep", config, f"--workdir={workdir}", *given])


def error(capsys):
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def states(workdir, capsys):
    """{run: the rest of its line} of `launch.py status`."""
    capsys.readouterr()
    assert main(["status", f"--workdir={workdir}"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    return {line.partition(": ")[0]: line.partition(": ")[2] for line in lines}

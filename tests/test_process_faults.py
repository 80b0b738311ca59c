"""Faults of runs of two processes: what is noticed, after how long, what is lost. Each prints a row of docs/robustness.md:

  python -m pytest -m slow tests/test_process_faults.py -s
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import time

import pytest
from process_runs import Running, Runs, both, environment

from launch import main
from ssl_jax.engine import watchdog
from ssl_jax.experiment import distributed
from ssl_jax.experiment.launch_environment import COORDINATOR, PROCESS, PROCESSES

pytestmark = pytest.mark.slow
STEPS, EVERY = 60, 5


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """With 'straight', an undisturbed run of two processes, in it."""
    runs = Runs(tmp_path_factory.mktemp("faults"), "simclr", STEPS, EVERY)
    runs.start("straight", 2).finish()
    return runs


def tell(fault, noticed, seconds, lost):
    print(f"\n| {fault} | {noticed} | {seconds:.1f} s | {lost} |")


def check_restart(runs, workdir, running, began, fault, noticed):
    """The run was started again, to the same curve, and lost no more than what came after the last checkpoint."""
    told = running.finish()
    assert noticed in told and "restarting all (1 of 1)" in told
    resumed = [int(n) for n in re.findall(r"going on at step (\d+)", told)][-1]
    lost = runs.reached - resumed
    assert lost <= 2 * EVERY  # a save in flight is lost with its process
    runs.check(workdir, "straight")
    tell(fault, noticed, running.when("restarting all") - began, f"{lost} steps")


def disturb(runs, workdir, process, signum, step=12, **odd):
    """A run with one restart, one process of which is sent a signal after `step`."""
    running = runs.start(workdir, 2, "--max_restarts=1", **odd)
    runs.wait_for(workdir, step, running)
    runs.reached = runs.logged(workdir)
    os.kill(running.child(process), signum)
    return running, time.monotonic()


@pytest.mark.parametrize("process", [0, 1])
def test_kill_9(runs, process):
    running, began = disturb(runs, f"kill-{process}", process, signal.SIGKILL)
    check_restart(runs, f"kill-{process}", running, began, f"kill -9 of process {process}", f"process {process} ended with SIGKILL")


def test_one_is_stopped(runs):
    """It beats no more; after HEARTBEAT seconds the others are ended by JAX."""
    running, began = disturb(runs, "stopped", 1, signal.SIGSTOP)
    check_restart(runs, "stopped", running, began, "SIGSTOP of process 1", "process 1 did not answer and was killed")
    assert running.when("restarting all") - began < distributed.HEARTBEAT + 60


def test_one_hangs_in_python(runs):
    """It beats on, so that only the watchdog sees it."""
    runs.reached = 20
    running = runs.start("hangs", 2, "--max_restarts=1", HANG="1:20", ONCE=runs.folder / "hung")
    runs.wait_for("hangs", 18, running)
    began = time.monotonic()
    check_restart(runs, "hangs", running, began, "process 1 hangs in Python", f"ended with exit code {watchdog.EXIT}")
    assert "the run is stuck: process 1 is at step 20" in running.told + (runs.folder / "hangs" / "processes" / "1.txt").read_text()
    assert "in odd_stop" in (runs.folder / "hangs" / "processes" / "1.stacks.txt").read_text()


def test_one_alone_hangs_in_python(runs):
    runs.reached = 20
    running = runs.start("one-hangs", 1, "--max_restarts=1", HANG="0:20", ONCE=runs.folder / "one-hung")
    runs.wait_for("one-hangs", 18, running)
    began = time.monotonic()
    noticed = f"process 0 ended with exit code {watchdog.EXIT}"
    check_restart(runs, "one-hangs", running, began, "the only process hangs in Python", noticed)
    assert "the run is stuck: process 0 is at step 20" in running.told


def test_an_exception_in_one(runs):
    runs.reached = 20
    running = runs.start("raises", 2, "--max_restarts=1", CRASH="1:20", ONCE=runs.folder / "raised")
    runs.wait_for("raises", 18, running)
    check_restart(runs, "raises", running, time.monotonic(), "an exception in process 1", "process 1 ended with exit code 1")
    assert "RuntimeError: a bug" in (runs.folder / "raises" / "processes" / "1.txt").read_text()


def test_sigterm_to_one(runs):
    running = runs.start("told", 2)
    runs.wait_for("told", 12, running)
    began = time.monotonic()
    os.kill(running.child(1), signal.SIGTERM)
    told = running.finish()
    seconds = time.monotonic() - began
    step = int(re.search(r"SIGTERM at step (\d+): saved", told).group(1))
    again = runs.start("told", 2)
    assert f"going on at step {step} of" in again.finish()
    runs.check("told", "straight")
    tell("SIGTERM to process 1", f"all save at step {step}, exit code 0", seconds, "nothing")


@pytest.fixture
def small_disk(tmp_path):
    """A tmpfs, of which 'fill' leaves nothing."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("a full disk is a tmpfs, and mounting is not allowed here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_disk_full(runs, small_disk):
    (small_disk / "full").mkdir()
    (runs.folder / "full").symlink_to(small_disk / "full")
    running = runs.start("full", 2)
    runs.wait_for("full", 12, running)
    began = time.monotonic()
    with contextlib.suppress(OSError), open(small_disk / "filling", "wb") as file:
        while True:
            file.write(bytes(1 << 16))
            file.flush()
    told = running.finish(code=74)
    seconds = time.monotonic() - began
    assert re.search(r"error: .*(could not save a checkpoint|cannot be written).*[Nn]o space left", told)
    reached = runs.logged("full")
    (small_disk / "filling").unlink()
    again = runs.start("full", 2).finish()
    resumes = int(re.search(r"going on at step (\d+) of", again).group(1))
    assert reached - resumes <= 2 * EVERY
    runs.check("full", "straight")
    tell("disk full at a save", "one line, exit code 74", seconds, f"{reached - resumes} steps")


def test_checkpoints_deleted(runs):
    running = runs.start("deleted", 2)
    runs.wait_for("deleted", 12, running)
    began = time.monotonic()
    shutil.rmtree(runs.folder / "deleted" / "checkpoints")
    told = running.finish()
    assert "has been deleted under this run; it is made again" in told
    runs.check("deleted", "straight")
    assert (runs.folder / "deleted" / "checkpoints" / str(STEPS)).is_dir()
    tell("checkpoints deleted", "made again at the next save, told in the log", running.when("has been deleted") - began, "nothing")


def test_slow_input(runs):
    running = runs.start("slow", 2, "--config.total=140 steps", SLOW="1:4")
    deadline = time.monotonic() + 600
    while "waits for it" not in running.told and running.process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    seconds = running.when("waits for it") - running.when("step 1/140")
    running.process.send_signal(signal.SIGTERM)
    told = running.finish()
    slow = r"the input is too slow: process 1 waits for it \d+% of the time"
    assert re.search(slow, told)
    assert main(["report", f"--workdir={runs.folder / 'slow'}"]) == 0
    assert re.search(slow, (runs.folder / "slow" / "report.html").read_text())
    tell("slow input of process 1", "named in the log and in the report", seconds, "nothing")


def test_port_taken(runs):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        place = {COORDINATOR: f"127.0.0.1:{taken.getsockname()[1]}", PROCESSES: 2, PROCESS: 0}
        began = time.monotonic()
        told = Running(runs.arguments("port"), environment(2, **place)).finish(code=74)
    assert re.search(r"error: port \d+ of the coordinator is taken", told)
    tell("port of the coordinator taken", "one line, exit code 74", time.monotonic() - began, "nothing has begun")


def test_two_configs(runs):
    began = time.monotonic()
    for running in both(runs.arguments("two"), runs.arguments("two", "--config.mesh.fsdp=2")):
        assert "the config of process 1 is not that of process 0" in running.finish(code=2)
    assert runs.logged("two") == 0
    tell("different configs", "both end with one line, exit code 2", time.monotonic() - began, "nothing has begun")


def test_one_compiles_for_longer(runs):
    """Than the half minute that Gloo waits for a first connection."""
    runs.start("late", 2, LATE="1:45").finish()
    runs.check("late", "straight")
    tell("process 1 comes to its first step 45 s later", "the other waits", 45, "nothing")


def test_clock_skew(runs):
    runs.start("skew", 2, SKEW="1:86400").finish()
    runs.check("skew", "straight")
    tell("clock of process 1 a day fast", "nothing to notice: no decision reads the clock", 0, "nothing")


def test_bit_flipped(runs):
    running = runs.start("flipped", 2)
    runs.wait_for("flipped", 22, running)
    os.kill(running.child(0), signal.SIGTERM)
    running.finish()
    newest = max((runs.folder / "flipped" / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
    shard = max((path for path in newest.rglob("d/*") if path.is_file()), key=lambda path: path.stat().st_size)
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 2] ^= 1
    shard.write_bytes(raw)
    again = runs.start("flipped", 2)
    told = again.finish()
    assert f"checkpoint {newest.name} is corrupt" in told
    resumed = int(re.search(r"going on at step (\d+)", told).group(1))
    assert 0 < int(newest.name) - resumed <= EVERY
    runs.check("flipped", "straight")
    assert list((runs.folder / "flipped" / "checkpoints_corrupt").iterdir())
    tell("a bit flipped in a shard", "set aside when read, the one before is taken", 0, f"{int(newest.name) - resumed} steps")

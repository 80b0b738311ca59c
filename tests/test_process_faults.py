"""Faults in runs of two processes: what is noticed, after how long, what is lost. Each test prints a row of docs/robustness.md:

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
from process_runs import Running, Runs, environment, start_pair

from launch import main
from ssl_jax.engine import watchdog
from ssl_jax.experiment import distributed
from ssl_jax.experiment.launch_environment import COORDINATOR, PROCESS, PROCESSES

pytestmark = pytest.mark.slow
STEPS, EVERY = 60, 5


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of two processes, with the undisturbed run 'straight'."""
    runs = Runs(tmp_path_factory.mktemp("faults"), "simclr", STEPS, EVERY)
    runs.start("straight", 2).finish()
    return runs


def print_row(fault, noticed, seconds, lost):
    print(f"\n| {fault} | {noticed} | {seconds:.1f} s | {lost} |")


def check_restart(runs, workdir, running, began, fault, noticed):
    """The run was restarted, to the same curve, and lost only the steps after its last checkpoint."""
    log = running.finish()
    assert noticed in log and "restarting all (1 of 1)" in log
    resumed = [int(n) for n in re.findall(r"going on at step (\d+)", log)][-1]
    lost = runs.reached - resumed
    assert lost <= 2 * EVERY  # a save in flight is lost with its process
    runs.check(workdir, "straight")
    print_row(fault, noticed, running.when("restarting all") - began, f"{lost} steps")


def start_and_signal(runs, workdir, process, signum, step=12, **odd):
    """A run with one restart, one process of which gets a signal after `step`."""
    running = runs.start(workdir, 2, "--max_restarts=1", **odd)
    runs.wait_for(workdir, step, running)
    runs.reached = runs.logged(workdir)
    os.kill(running.child(process), signum)
    return running, time.monotonic()


@pytest.mark.parametrize("process", [0, 1])
def test_process_killed_with_sigkill(runs, process):
    running, began = start_and_signal(runs, f"kill-{process}", process, signal.SIGKILL)
    check_restart(runs, f"kill-{process}", running, began, f"kill -9 of process {process}", f"process {process} ended with SIGKILL")


def test_process_stopped_with_sigstop(runs):
    """It sends no heartbeat; after HEARTBEAT seconds JAX ends the others."""
    running, began = start_and_signal(runs, "stopped", 1, signal.SIGSTOP)
    check_restart(runs, "stopped", running, began, "SIGSTOP of process 1", "process 1 did not answer and was killed")
    assert running.when("restarting all") - began < distributed.HEARTBEAT + 60


def test_process_that_hangs_in_python(runs):
    """Its heartbeat goes on, so only the watchdog notices."""
    runs.reached = 20
    running = runs.start("hangs", 2, "--max_restarts=1", HANG="1:20", ONCE=runs.folder / "hung")
    runs.wait_for("hangs", 18, running)
    began = time.monotonic()
    check_restart(runs, "hangs", running, began, "process 1 hangs in Python", f"ended with exit code {watchdog.EXIT}")
    assert "the run is stuck: process 1 is at step 20" in running.log + (runs.folder / "hangs" / "processes" / "1.txt").read_text()
    assert "in odd_stop" in (runs.folder / "hangs" / "processes" / "1.stacks.txt").read_text()


def test_single_process_that_hangs_in_python(runs):
    runs.reached = 20
    running = runs.start("one-hangs", 1, "--max_restarts=1", HANG="0:20", ONCE=runs.folder / "one-hung")
    runs.wait_for("one-hangs", 18, running)
    began = time.monotonic()
    noticed = f"process 0 ended with exit code {watchdog.EXIT}"
    check_restart(runs, "one-hangs", running, began, "the only process hangs in Python", noticed)
    assert "the run is stuck: process 0 is at step 20" in running.log


def test_exception_in_one_process(runs):
    runs.reached = 20
    running = runs.start("raises", 2, "--max_restarts=1", CRASH="1:20", ONCE=runs.folder / "raised")
    runs.wait_for("raises", 18, running)
    check_restart(runs, "raises", running, time.monotonic(), "an exception in process 1", "process 1 ended with exit code 1")
    assert "RuntimeError: a bug" in (runs.folder / "raises" / "processes" / "1.txt").read_text()


def test_sigterm_to_one_process_saves_in_all(runs):
    running = runs.start("sigterm", 2)
    runs.wait_for("sigterm", 12, running)
    began = time.monotonic()
    os.kill(running.child(1), signal.SIGTERM)
    log = running.finish()
    seconds = time.monotonic() - began
    step = int(re.search(r"SIGTERM at step (\d+): saved", log).group(1))
    second = runs.start("sigterm", 2)
    assert f"going on at step {step} of" in second.finish()
    runs.check("sigterm", "straight")
    print_row("SIGTERM to process 1", f"all save at step {step}, exit code 0", seconds, "nothing")


@pytest.fixture
def small_disk(tmp_path):
    """A tmpfs, small enough to fill."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("a full disk is a tmpfs, and mounting is not allowed here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_full_disk_during_a_save(runs, small_disk):
    (small_disk / "full").mkdir()
    (runs.folder / "full").symlink_to(small_disk / "full")
    running = runs.start("full", 2)
    runs.wait_for("full", 12, running)
    began = time.monotonic()
    with contextlib.suppress(OSError), open(small_disk / "filling", "wb") as file:
        while True:
            file.write(bytes(1 << 16))
            file.flush()
    log = running.finish(code=74)
    seconds = time.monotonic() - began
    assert re.search(r"error: .*(could not save a checkpoint|cannot be written).*[Nn]o space left", log)
    reached = runs.logged("full")
    (small_disk / "filling").unlink()
    second = runs.start("full", 2).finish()
    resumed = int(re.search(r"going on at step (\d+) of", second).group(1))
    assert reached - resumed <= 2 * EVERY
    runs.check("full", "straight")
    print_row("disk full at a save", "one line, exit code 74", seconds, f"{reached - resumed} steps")


def test_checkpoints_deleted_during_a_run(runs):
    running = runs.start("deleted", 2)
    runs.wait_for("deleted", 12, running)
    began = time.monotonic()
    shutil.rmtree(runs.folder / "deleted" / "checkpoints")
    log = running.finish()
    assert "was deleted during this run; creating it again" in log
    runs.check("deleted", "straight")
    assert (runs.folder / "deleted" / "checkpoints" / str(STEPS)).is_dir()
    noticed = running.when("was deleted during") - began
    print_row("checkpoints deleted", "made again at the next save, reported in the log", noticed, "nothing")


def test_slow_input_is_named_in_log_and_report(runs):
    running = runs.start("slow", 2, "--config.total=140 steps", SLOW="1:4")
    deadline = time.monotonic() + 600
    while "waits for it" not in running.log and running.process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    seconds = running.when("waits for it") - running.when("step 1/140")
    running.process.send_signal(signal.SIGTERM)
    log = running.finish()
    slow = r"the input is too slow: process 1 waits for it \d+% of the time"
    assert re.search(slow, log)
    assert main(["report", f"--workdir={runs.folder / 'slow'}"]) == 0
    assert re.search(slow, (runs.folder / "slow" / "report.html").read_text())
    print_row("slow input of process 1", "named in the log and in the report", seconds, "nothing")


def test_coordinator_port_in_use(runs):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        place = {COORDINATOR: f"127.0.0.1:{taken.getsockname()[1]}", PROCESSES: 2, PROCESS: 0}
        began = time.monotonic()
        log = Running(runs.arguments("port"), environment(2, **place)).finish(code=74)
    assert re.search(r"error: port \d+ of the coordinator is taken", log)
    print_row("port of the coordinator taken", "one line, exit code 74", time.monotonic() - began, "nothing has begun")


def test_processes_with_different_configs(runs):
    began = time.monotonic()
    for running in start_pair(runs.arguments("two"), runs.arguments("two", "--config.mesh.fsdp=2")):
        assert "the config of process 1 is not that of process 0" in running.finish(code=2)
    assert runs.logged("two") == 0
    print_row("different configs", "both end with one line, exit code 2", time.monotonic() - began, "nothing has begun")


def test_process_that_compiles_longer_than_the_gloo_timeout(runs):
    """Gloo waits half a minute for a first connection."""
    runs.start("late", 2, LATE="1:45").finish()
    runs.check("late", "straight")
    print_row("process 1 comes to its first step 45 s later", "the other waits", 45, "nothing")


def test_clock_skew_between_processes(runs):
    runs.start("skew", 2, SKEW="1:86400").finish()
    runs.check("skew", "straight")
    print_row("clock of process 1 a day fast", "nothing to notice: no decision reads the clock", 0, "nothing")


def test_checkpoint_with_flipped_bit_is_set_aside(runs):
    running = runs.start("flipped", 2)
    runs.wait_for("flipped", 22, running)
    os.kill(running.child(0), signal.SIGTERM)
    running.finish()
    newest = max((runs.folder / "flipped" / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
    shard = max((path for path in newest.rglob("d/*") if path.is_file()), key=lambda path: path.stat().st_size)
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 2] ^= 1
    shard.write_bytes(raw)
    second = runs.start("flipped", 2)
    log = second.finish()
    assert f"checkpoint {newest.name} is corrupt" in log
    resumed = int(re.search(r"going on at step (\d+)", log).group(1))
    assert 0 < int(newest.name) - resumed <= EVERY
    runs.check("flipped", "straight")
    assert list((runs.folder / "flipped" / "checkpoints_corrupt").iterdir())
    print_row("a bit flipped in a shard", "set aside when read, the one before is taken", 0, f"{int(newest.name) - resumed} steps")

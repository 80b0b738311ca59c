"""Step timing, goodput, waits for input, and profiler traces of chosen steps."""

import gzip
import json
import threading
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax.engine import loop, sharding
from ssl_jax.engine.method import State
from ssl_jax.engine.metrics import MetricsWriter
from ssl_jax.engine.records import goodput, read_metrics
from ssl_jax.engine.timing import Clock, Trace
from ssl_jax.engine.watchdog import Watchdog
from ssl_jax.errors import UserError


@pytest.mark.full
def test_waits_are_shares_of_the_time_without_pauses():
    clock = Clock(10, batch_size=8)
    with clock.waiting("input"):
        time.sleep(0.2)
    with clock.waiting("device"):
        time.sleep(0.1)
    with clock.paused():
        time.sleep(0.5)
    time.sleep(0.1)
    times = clock.split(12)
    assert times["time/seconds_per_step"] == pytest.approx(0.2, rel=0.2)
    assert times["time/images_per_second"] == pytest.approx(40, rel=0.2)
    assert times["time/input_wait"] == pytest.approx(0.5, rel=0.2)
    assert times["time/input_wait"] + times["time/device_wait"] + times["time/host"] == pytest.approx(1)
    assert clock.split(13)["time/input_wait"] == 0


@pytest.mark.parametrize("synchronous", [True, False])
def test_images_per_second_is_steady_across_saves(monkeypatch, synchronous):
    """The loop of `engine.loop.train` with steps of 0.5 s, a report at every step and a save at every other one.

    The host waits while it dispatches a step (CPUs, synchronous) or while it fetches metrics (accelerators).
    """
    now, ready = 0.0, 0.0
    monkeypatch.setattr("ssl_jax.engine.timing.time.perf_counter", lambda: now)
    clock, waiting, speeds = Clock(0, batch_size=8), [], []
    for step in range(1, 13):
        clock.begin_step()
        ready = max(now, ready) + 0.5
        waiting.append((step, ready))
        now = ready if synchronous else now + 0.001
        save = step % 2 == 0
        while len(waiting) > (0 if save else 1):
            done, its_end = waiting.pop(0)
            with clock.waiting("device"):
                now = max(now, its_end) + 0.001
            speeds.append((done, clock.split(done)["time/images_per_second"]))
        if save:
            with clock.paused():
                now += 7.0
    assert [done for done, _ in speeds] == list(range(1, 13))
    assert all(speed == pytest.approx(16, rel=0.5) for _, speed in speeds[3:]), speeds


@pytest.mark.parametrize("steps", ["5", "5-7", "0:3", "7:5", "a:b"])
def test_invalid_profile_range_is_a_one_line_error(tmp_path, steps):
    with pytest.raises(UserError, match=r"--profile=.* is not a range of steps"):
        Trace(tmp_path, steps)


@pytest.mark.parametrize("until", [3, 6])
def test_trace_holds_exactly_the_chosen_steps(tmp_path, until):
    """Also if the run ends within the range."""
    trace, x = Trace(tmp_path, "2:4"), jnp.ones(4)
    for step in range(1, until + 1):
        trace.before(step, x)
        with jax.profiler.StepTraceAnnotation("step", step_num=step):
            x = jax.jit(jnp.sin)(x)
        trace.after(step, x)
    trace.close()
    (path,) = tmp_path.rglob("perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    steps = {event["args"]["step_num"] for event in events if event.get("name") == "step" and "step_num" in event.get("args", {})}
    assert steps == {str(step) for step in range(2, min(4, until) + 1)}


@pytest.mark.full
def test_writing_a_trace_does_not_count_as_step_time(tmp_path):
    class Slow(Trace):
        def close(self):
            if self.running:
                time.sleep(1.0)
            super().close()

    class NoCheckpoints:
        def save(self, *_):
            pass

        wait = rate = save

    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    loss = jnp.zeros(())
    run = types.SimpleNamespace(mesh=mesh, step=lambda state, batch, root: (state, {"loss": loss}), root=None)
    state = State(np.zeros((), np.int32), {}, {}, {}, {})
    settings = {"batch_size": 1, "log_every_steps": 1, "checkpoint_every_steps": 9, "evaluate_every_steps": 9, "on_nonfinite": "stop"}
    settings["optim"] = {}
    dog, batches = Watchdog(tmp_path), ({"image": np.zeros((1, 2), np.uint8)} for _ in range(5))
    writer = MetricsWriter(tmp_path, tensorboard=False)
    with loop.Signals() as watch:
        loop.train(
            types.SimpleNamespace(phases=()), run, state, batches, 5, writer, NoCheckpoints(), settings, {},
            {}, lambda *_: {}, lambda *_: None, watch, dog, Slow(tmp_path, "2:3"),
        )  # fmt: skip
    writer.close()
    seconds = [line["time/seconds_per_step"] for line in read_metrics(tmp_path)]
    assert len(seconds) == 5 and max(seconds) < 0.9
    assert len(dog._durations) == 4 and max(dog._durations) < 0.9
    assert dog._longest > 1.0
    assert list(tmp_path.rglob("perfetto_trace.json.gz"))


def test_each_process_writes_its_trace_to_its_own_folder(tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder, **_: begun.append(folder))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    Trace(tmp_path, "3:4").before(3, ())
    assert begun == [str(tmp_path / "1")]


def test_resuming_after_the_profile_range_warns(tmp_path, caplog):
    trace = Trace(tmp_path, "3:4")
    for step in (4, 5):
        trace.before(step, ())
        trace.after(step, ())
    assert caplog.text.count("--profile=3:4: nothing is traced, since the run resumes at step 4") == 1
    assert not list(tmp_path.iterdir())


def logged(clock, steps, seconds, every=10):
    """(logged lines of `steps`, the clock after them), if each step takes `seconds`."""
    lines = [
        {"step": step, "time/clock": clock + seconds * (step - steps.start + 1), "time/seconds_per_step": seconds}
        for step in steps
        if step % every == 0
    ]
    return lines, clock + seconds * len(steps)


def starts(*clocks):
    return [{"time/clock": clock} for clock in clocks]


def test_goodput_is_step_time_since_the_first_start():
    assert goodput([], starts(5.0)) is None
    steady, end = logged(1000.0, range(1, 51), 2.0)
    assert goodput(steady, []) is None
    assert goodput(steady, starts(1000.0)) == pytest.approx(1.0)
    assert goodput(steady, starts(950.0)) == pytest.approx(100 / 150)  # it took 50 s to begin
    assert goodput(steady, starts(850.0, 950.0)) == pytest.approx(100 / 250)  # the first start logged no line
    more, _ = logged(end + 100.0, range(51, 61), 2.0)  # 100 s for evaluations, a restart and repeated steps
    assert goodput([*steady, *more], starts(1000.0, end + 50.0)) == pytest.approx(120 / 220)
    assert goodput([*steady, *more], starts(end + 50.0)) == pytest.approx(20 / 70)  # an earlier version began the run
    assert goodput(steady, starts(1000.0, 2000.0)) == pytest.approx(1.0)  # restarted after it was finished
    assert goodput(steady, starts(2000.0)) is None


def test_goodput_does_not_count_compiling():
    lines = logged(1000.0, range(1, 51), 2.0)[0]
    lines = [{**line, "time/clock": line["time/clock"] + 100.0} for line in lines]
    lines[0]["time/seconds_per_step"] = 12.0
    assert goodput(lines, starts(1000.0)) == pytest.approx(100 / 200)
    assert goodput(lines[:2], starts(1000.0)) == pytest.approx(40 / 140)


def test_goodput_of_a_run_with_two_speeds():
    """With and without a restart in between."""
    slow, end = logged(0.0, range(1, 601), 4.0)
    quick, _ = logged(end + 300.0, range(601, 1001), 2.0)
    assert goodput([*slow, *quick], starts(0.0, end + 250.0)) == pytest.approx(3200 / 3500)
    assert goodput([*slow, *quick], starts(0.0)) == pytest.approx(3200 / 3500, rel=0.02)
    assert goodput([*slow, *quick[:2]], starts(0.0, end + 250.0)) == pytest.approx(2440 / 2740)


def test_slowest_input_names_the_process_that_waits_longest(tmp_path, monkeypatch):
    (tmp_path / "1.json").write_text('{"step": 6, "paused": false, "left": 9.0, "input_wait": 0.7}')
    (tmp_path / "2.json").write_text('{"step": 6, ')  # incomplete
    (tmp_path / "3.json").write_text('{"step": 6, "input_wait": 0.9}')  # of another version
    readers = set()
    read_others = Watchdog._read_others
    monkeypatch.setattr(Watchdog, "_read_others", lambda dog: readers.add(threading.current_thread().name) or read_others(dog))
    with Watchdog(tmp_path, 0, 4) as dog:
        dog.record_input_wait(0.2, 1000.0)
        deadline = time.monotonic() + 10
        while (metrics := dog.slowest_input())["time/slowest_input_wait"] != 0.7 and time.monotonic() < deadline:
            time.sleep(0.01)
        dog.record_input_wait(0.8, 1000.0)
        assert metrics == {"time/slowest_input_process": 1.0, "time/slowest_input_wait": 0.7}
        assert dog.slowest_input() == {"time/slowest_input_process": 0.0, "time/slowest_input_wait": pytest.approx(0.8)}
    with Watchdog(tmp_path, 1, 4) as dog:
        assert dog.slowest_input() == {}  # only process 0 reads the files and logs metrics
    assert readers == {"watchdog"}  # a thread reads the files, so no step waits for them


@pytest.mark.full
def test_many_processes_write_heartbeats_less_often(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(Watchdog, "_write", lambda dog: written.append(dog.processes))
    with Watchdog(tmp_path / "few", 0, 16), Watchdog(tmp_path / "many", 0, 17):
        time.sleep(4.5)
    assert written.count(17) == 1 and written.count(16) > 2


def test_input_wait_is_a_moving_average(tmp_path):
    dog = Watchdog(tmp_path)
    for _ in range(30):  # every other step waits for all readers
        dog.record_input_wait(0.99, 3.0)
        dog.record_input_wait(0.0, 0.6)
        assert dog.slowest_input()["time/slowest_input_wait"] < 0.9
    assert dog.slowest_input()["time/slowest_input_wait"] > 0.7
    dog.record_input_wait(0.0, 60.0)
    assert dog.slowest_input()["time/slowest_input_wait"] < 0.05

"""The watchdog: slow and stuck steps, pauses, and the process that the others wait for; mostly with a fake clock."""

import json
import pathlib
import subprocess
import sys
import time
import types

import pytest

from ssl_jax.engine import watchdog

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.full
def test_hanging_step_dumps_the_stacks_of_all_threads(tmp_path, caplog):
    with watchdog.Watchdog(tmp_path, least=0.2) as dog:
        for step in range(5):
            dog.beat(step)
        deadline = time.monotonic() + 20
        while "step 4 has taken" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.1)
    assert "step 4 has taken" in caplog.text
    assert "test_hanging_step_dumps_the_stacks_of_all_threads" in (tmp_path / "0.stacks.txt").read_text()
    heartbeat = json.loads((tmp_path / "0.json").read_text())
    assert heartbeat.pop("left") < 0.2
    assert heartbeat == {"step": 4, "paused": False, "input_wait": 0.0}


class Ended(BaseException):
    pass


@pytest.fixture
def timed(tmp_path, monkeypatch):
    """(watchdog, [seconds of its fake clock]); its thread is not started, and Ended is raised where the process would end."""

    def ended(code):
        raise Ended(code)

    now = [0.0]
    monkeypatch.setattr(watchdog, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(watchdog.os, "_exit", ended)
    return watchdog.Watchdog(tmp_path, restarted=True), now


def five_steps_of_200_ms(dog, now):
    for step in range(5):
        dog.beat(step)
        now[0] += 0.2


def test_slow_step_warns_after_5_seconds_and_ends_the_run_after_60(timed, tmp_path, caplog):
    dog, now = timed
    five_steps_of_200_ms(dog, now)
    dog.beat(5)
    now[0] += 4.9
    dog._check()
    assert "has taken" not in caplog.text
    now[0] += 0.2
    dog._check()
    assert "step 5 has taken 5 s, longer than 5 s" in caplog.text and "stuck" not in caplog.text
    now[0] += 54.8
    dog._check()
    assert caplog.text.count("has taken") == 1
    now[0] += 0.2
    with pytest.raises(Ended, match=str(watchdog.EXIT)):
        dog._check()
    assert "the run is stuck: process 0 is at step 5" in caplog.text


def test_single_process_without_a_launcher_only_warns(timed, tmp_path, caplog):
    _, now = timed
    dog = watchdog.Watchdog(tmp_path)
    five_steps_of_200_ms(dog, now)
    now[0] += 1000.0
    dog._check()
    assert "step 4 has taken 1000 s" in caplog.text


def test_step_durations_exclude_pauses(timed):
    dog, now = timed
    for step in range(6):
        dog.beat(step)
        now[0] += 3.0
        with dog.paused():
            now[0] += 100.0
            with dog.paused():
                now[0] += 100.0
        now[0] += 4.0
    dog.beat(6)
    assert list(dog._durations) == [7.0] * 6
    now[0] += 30.0
    with dog.paused():
        now[0] += 1000.0
        dog._check()
    now[0] += 39.9  # 70 s are ten times the median
    dog._check()
    now[0] += 0.2
    with pytest.raises(Ended):
        dog._check()


def between_instructions(function, traced, act):
    """Call `function`, with `act(i)` before instruction i of the code in `traced`; returns the number of instructions."""
    count = 0

    def trace(frame, event, _):
        nonlocal count
        if frame.f_code not in traced:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            count += 1
            sys.settrace(None)
            act(count)
            sys.settrace(trace)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
    return count


def test_pause_may_begin_or_end_at_any_instruction_of_the_check(timed, caplog):
    """A pause of an hour between steps of 30 s, whose limit is 300 s."""
    dog, now = timed
    for step in range(5):
        dog.beat(step)
        now[0] += 30.0

    def work():
        dog.beat(dog._at.step + 1)
        now[0] += 30.0
        with dog.paused():
            now[0] += 3600.0
        now[0] += 30.0

    codes = {watchdog.Watchdog.paused.__wrapped__.__code__, watchdog.Watchdog.beat.__code__, watchdog.Watchdog._position.__code__}
    assert between_instructions(work, codes, lambda _: dog._check()) > 100
    checking = {watchdog.Watchdog._check.__code__, watchdog.Position.seconds.__code__}
    for wanted in range(1, between_instructions(dog._check, checking, lambda _: None) + 1):
        dog.beat(dog._at.step + 1)
        pause = dog.paused()
        pause.__enter__()
        now[0] += 3600.0

        def end(count, wanted=wanted, pause=pause):
            if count == wanted:
                pause.__exit__(None, None, None)
                now[0] += 30.0

        between_instructions(dog._check, checking, end)
    assert "has taken" not in caplog.text


@pytest.mark.full
def test_compiling_and_short_pauses_are_not_stuck(tmp_path, caplog):
    with watchdog.Watchdog(tmp_path, least=0.2) as dog:
        dog.beat(0)
        time.sleep(2.5)  # compiling
        for step in range(1, 5):
            dog.beat(step)
        with dog.paused():
            time.sleep(2.5)
        dog.beat(5)
    assert "has taken" not in caplog.text


@pytest.mark.full
def test_hanging_pause_warns_unless_earlier_pauses_were_as_long(tmp_path, caplog):
    with watchdog.Watchdog(tmp_path, least=0.2, pause=1.0) as dog:
        dog.beat(0)
        with dog.paused():
            time.sleep(0.5)
        for step in range(1, 5):
            dog.beat(step)
        with dog.paused():
            time.sleep(3.0)
        assert "has taken" not in caplog.text
        dog._longest = 0.0
        with dog.paused():
            hang()
    assert "the work after step 4 has taken" in caplog.text and "longer than 1 s" in caplog.text
    assert "in hang" in (tmp_path / "0.stacks.txt").read_text()


def hang():
    time.sleep(3.5)


def write_heartbeat(folder, process, step, paused, left):
    heartbeat = {"step": step, "paused": paused, "left": left, "input_wait": 0.0}
    (folder / f"{process}.json").write_text(json.dumps(heartbeat))


@pytest.mark.parametrize(
    ("hang", "message"),
    [("time.sleep(60)", "the furthest at step 8"), ("with dog.paused(): time.sleep(60)", "the furthest after step 8")],
    ids=["step", "evaluation"],
)
@pytest.mark.full
def test_process_that_is_furthest_behind_is_named(tmp_path, hang, message):
    text = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
import logging, pathlib
from ssl_jax.engine.watchdog import Watchdog
logging.basicConfig(format="%(message)s")
with Watchdog(pathlib.Path({str(tmp_path)!r}), 0, 3, least=0.2, pause=0.2) as dog:
    for step in range(9):
        dog.beat(step)
    {hang}
"""
    write_heartbeat(tmp_path, 1, 7, False, left=0.0)
    write_heartbeat(tmp_path, 2, 7, True, left=7000.0)  # it is ahead: its work after step 7 waits for process 1
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=60)
    assert done.returncode == watchdog.EXIT
    assert f"process 1 is at step 7, {message}; ending process 0" in done.stderr


@pytest.fixture
def waiting(timed, tmp_path):
    """As `timed`, for process 0 of three, which has reached the limit of step 5."""
    _, now = timed
    dog = watchdog.Watchdog(tmp_path, 0, 3)
    five_steps_of_200_ms(dog, now)
    dog.beat(5)
    now[0] += 60.0
    return dog, now


def test_processes_wait_while_the_one_behind_has_time_left(waiting, tmp_path, caplog):
    """For instance process 0, which plots. They also wait when the one behind has reached their step."""
    dog, now = waiting
    write_heartbeat(tmp_path, 1, 4, True, left=7000.0)
    write_heartbeat(tmp_path, 2, 5, False, left=0.0)
    for _ in range(55):
        dog._check()
        now[0] += 1.0
    message = "step 5 goes on, since the process behind has 7000 s left: process 1 is after step 4, the furthest at step 5"
    assert caplog.text.count("goes on") == 1 and message in caplog.text
    now[0] += 100.0
    write_heartbeat(tmp_path, 1, 5, False, left=59.0)
    dog._check()
    assert "has 59 s left: process 0, process 1, process 2 is at step 5, the furthest at step 5" in caplog.text


def test_processes_end_when_the_one_behind_is_paused_for_too_long(waiting, tmp_path, caplog):
    dog, _ = waiting
    write_heartbeat(tmp_path, 1, 4, True, left=-1.0)
    write_heartbeat(tmp_path, 2, 5, False, left=0.0)
    with pytest.raises(Ended):
        dog._check()
    assert "process 1 is after step 4, the furthest at step 5; ending process 0" in caplog.text and "goes on" not in caplog.text


def test_processes_end_when_the_one_behind_stops_writing(waiting, tmp_path, caplog):
    dog, now = waiting
    write_heartbeat(tmp_path, 1, 4, True, left=100.0)
    write_heartbeat(tmp_path, 2, 5, False, left=0.0)
    dog._check()
    now[0] += 61.0
    dog._check()
    assert "has 39 s left" in caplog.text
    now[0] += 130.0
    with pytest.raises(Ended):
        dog._check()


def test_processes_that_wait_for_each_other_all_end(waiting, tmp_path, caplog):
    """Their heartbeats are a second old, so they seem to have a second left."""
    dog, _ = waiting
    for process in (1, 2):
        write_heartbeat(tmp_path, process, 5, False, left=1.0)
    with pytest.raises(Ended):
        dog._check()
    assert "process 0, process 1, process 2 is at step 5, the furthest at step 5; ending process 0" in caplog.text

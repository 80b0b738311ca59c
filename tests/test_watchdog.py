"""Which step is stuck, whom the others wait for, and what ends; mostly by a clock that is moved by hand."""

import json
import pathlib
import subprocess
import sys
import time
import types

import pytest

from ssl_jax.engine import watchdog

ROOT = pathlib.Path(__file__).parent.parent


def test_a_step_that_does_not_end_is_told_with_all_stacks(tmp_path, caplog):
    with watchdog.Watchdog(tmp_path, least=0.2) as dog:
        for step in range(5):
            dog.beat(step)
        deadline = time.monotonic() + 20
        while "step 4 has taken" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.1)
    assert "step 4 has taken" in caplog.text
    assert "test_a_step_that_does_not_end_is_told_with_all_stacks" in (tmp_path / "0.stacks.txt").read_text()
    told = json.loads((tmp_path / "0.json").read_text())
    assert told.pop("left") < 0.2
    assert told == {"step": 4, "paused": False, "input_wait": 0.0}


class Ended(BaseException):
    pass


@pytest.fixture
def timed(tmp_path, monkeypatch):
    """A watchdog of 60 s, of a clock that only moves by hand: [seconds]; its thread is not started, and what would end the process is
    raised."""

    def ended(code):
        raise Ended(code)

    now = [0.0]
    monkeypatch.setattr(watchdog, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(watchdog.os, "_exit", ended)
    return watchdog.Watchdog(tmp_path, restarted=True), now


def steps_of_a_fifth_of_a_second(dog, now):
    for step in range(5):
        dog.beat(step)
        now[0] += 0.2


def test_a_step_is_told_after_five_seconds_and_ended_after_a_minute(timed, tmp_path, caplog):
    dog, now = timed
    steps_of_a_fifth_of_a_second(dog, now)
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


def test_one_process_that_nobody_would_start_again_is_only_told(timed, tmp_path, caplog):
    _, now = timed
    dog = watchdog.Watchdog(tmp_path)
    steps_of_a_fifth_of_a_second(dog, now)
    now[0] += 1000.0
    dog._check()
    assert "step 4 has taken 1000 s" in caplog.text


def test_a_step_lasts_as_long_as_it_does_without_its_pauses(timed):
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
    """Call `function`, with `act(i)` between its instructions: before each one of the functions whose code is in `traced`."""
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


def test_a_pause_may_begin_and_end_while_the_watchdog_looks(timed, caplog):
    """At any instruction of either. A pause of an hour, between steps of 30 s that may take 300."""
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

    codes = {watchdog.Watchdog.paused.__wrapped__.__code__, watchdog.Watchdog.beat.__code__, watchdog.Watchdog._place.__code__}
    assert between_instructions(work, codes, lambda _: dog._check()) > 100
    looking = {watchdog.Watchdog._check.__code__, watchdog.At.seconds.__code__}
    for wanted in range(1, between_instructions(dog._check, looking, lambda _: None) + 1):
        dog.beat(dog._at.step + 1)
        pause = dog.paused()
        pause.__enter__()
        now[0] += 3600.0

        def end(count, wanted=wanted, pause=pause):
            if count == wanted:
                pause.__exit__(None, None, None)
                now[0] += 30.0

        between_instructions(dog._check, looking, end)
    assert "has taken" not in caplog.text


def test_a_pause_and_the_first_steps_are_not_stuck(tmp_path, caplog):
    with watchdog.Watchdog(tmp_path, least=0.2) as dog:
        dog.beat(0)
        time.sleep(2.5)  # compiling
        for step in range(1, 5):
            dog.beat(step)
        with dog.paused():
            time.sleep(2.5)
        dog.beat(5)
    assert "has taken" not in caplog.text


def test_a_pause_that_does_not_end_is_told_unless_the_ones_before_were_as_long(tmp_path, caplog):
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
    assert "what is done behind step 4 has taken" in caplog.text and "longer than 1 s" in caplog.text
    assert "in hang" in (tmp_path / "0.stacks.txt").read_text()


def hang():
    time.sleep(3.5)


def tell(folder, process, step, paused, left):
    told = {"step": step, "paused": paused, "left": left, "input_wait": 0.0}
    (folder / f"{process}.json").write_text(json.dumps(told))


@pytest.mark.parametrize(
    ("hang", "told"),
    [("time.sleep(60)", "the furthest at step 8"), ("with dog.paused(): time.sleep(60)", "the furthest behind step 8")],
    ids=["step", "evaluation"],
)
def test_of_several_processes_the_one_behind_is_named(tmp_path, hang, told):
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
    tell(tmp_path, 1, 7, False, left=0.0)
    tell(tmp_path, 2, 7, True, left=7000.0)  # it is further: what it does behind step 7 waits for process 1
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=60)
    assert done.returncode == watchdog.EXIT
    assert f"process 1 is at step 7, {told}; ending process 0" in done.stderr


@pytest.fixture
def waiting(timed, tmp_path):
    """Process 0 of three, as `timed`, which has been in step 5 for as long as a step may take."""
    _, now = timed
    dog = watchdog.Watchdog(tmp_path, 0, 3)
    steps_of_a_fifth_of_a_second(dog, now)
    dog.beat(5)
    now[0] += 60.0
    return dog, now


def test_the_others_do_not_end_while_the_one_behind_is_paused_and_has_time_left(waiting, tmp_path, caplog):
    """Such as process 0, which draws; nor when that one has begun the step in which they have waited."""
    dog, now = waiting
    tell(tmp_path, 1, 4, True, left=7000.0)
    tell(tmp_path, 2, 5, False, left=0.0)
    for _ in range(55):
        dog._check()
        now[0] += 1.0
    told = "step 5 goes on, since the one behind has 7000 s left: process 1 is behind step 4, the furthest at step 5"
    assert caplog.text.count("goes on") == 1 and told in caplog.text
    now[0] += 100.0
    tell(tmp_path, 1, 5, False, left=59.0)
    dog._check()
    assert "has 59 s left: process 0, process 1, process 2 is at step 5, the furthest at step 5" in caplog.text


def test_the_others_end_when_the_one_behind_is_paused_for_too_long(waiting, tmp_path, caplog):
    dog, _ = waiting
    tell(tmp_path, 1, 4, True, left=-1.0)
    tell(tmp_path, 2, 5, False, left=0.0)
    with pytest.raises(Ended):
        dog._check()
    assert "process 1 is behind step 4, the furthest at step 5; ending process 0" in caplog.text and "goes on" not in caplog.text


def test_the_others_end_when_the_one_behind_has_told_nothing_for_longer_than_it_had_left(waiting, tmp_path, caplog):
    dog, now = waiting
    tell(tmp_path, 1, 4, True, left=100.0)
    tell(tmp_path, 2, 5, False, left=0.0)
    dog._check()
    now[0] += 61.0
    dog._check()
    assert "has 39 s left" in caplog.text
    now[0] += 130.0
    with pytest.raises(Ended):
        dog._check()


def test_all_end_where_each_waits_for_the_others(waiting, tmp_path, caplog):
    """What they have written is a second old, and so they seem to have one left."""
    dog, _ = waiting
    for process in (1, 2):
        tell(tmp_path, process, 5, False, left=1.0)
    with pytest.raises(Ended):
        dog._check()
    assert "process 0, process 1, process 2 is at step 5, the furthest at step 5; ending process 0" in caplog.text

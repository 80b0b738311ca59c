"""`launch.py sweep`: the plan, `sweep.json`, resumption, failed runs, several runs at once, arrays of jobs, and states from files."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console
from submitting import ROOT, error
from sweeping import CONFIG, VARY, stand_in, states, sweep
from test_report import write_run
from xla_flags import flags

from launch import main
from ssl_jax.errors import UserError
from ssl_jax.experiment import runs, sweep_check, sweep_folder
from ssl_jax.experiment.sweep import Sweep, Variation, check, product
from ssl_jax.experiment.sweep_search import draw, read_axis
from ssl_jax.launchers import shares
from ssl_jax.report import sweep_table


@pytest.fixture(autouse=True)
def here(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def train(tmp_path, monkeypatch):
    return stand_in(tmp_path, monkeypatch)


# ---------------------------------------------------------------------------------------------------- the plan


def test_product_takes_all_combinations_and_keys_of_an_axis_move_together():
    variations = product(["configs/a.py", "configs/b.py:small"], {"x": (1, 2)}, {"y": (0.1, 1e-3), "z": ("u", (1, 2))})
    assert [each.overrides for each in variations[:4]] == [
        {"x": 1, "y": 0.1, "z": "u"}, {"x": 1, "y": 1e-3, "z": (1, 2)}, {"x": 2, "y": 0.1, "z": "u"}, {"x": 2, "y": 1e-3, "z": (1, 2)},
    ]  # fmt: skip
    assert len(variations) == 8 and variations[5].name == "b:small x=1, y=0.001, z=(1, 2)"
    assert product("configs/a.py") == [Variation("a", "configs/a.py", {})]


@pytest.mark.parametrize(
    ("axes", "message"),
    [([{"x": ()}], "the axis x has no values"), ([{"x": (1,), "y": (1, 2)}], "x has 1, y has 2"), ([{}], "without a key has no")],
)
def test_product_refuses_axes_without_values_and_of_different_lengths(axes, message):
    with pytest.raises(UserError, match=message):
        product("configs/a.py", *axes)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("k=0.1,0.2", ["0.1", "0.2"]),
        ("k=(1, 2),(3,),[a,(b,c)]", ["(1, 2)", "(3,)", "[a,(b,c)]"]),
        ("k='a,b',\"c,'d\",dict(a=1,b='(')", ["'a,b'", "\"c,'d\"", "dict(a=1,b='(')"]),
        ("k=a=b,''", ["a=b", "''"]),
    ],
)
def test_commas_in_brackets_and_quotes_belong_to_a_value(text, values):
    assert read_axis("--vary", text) == ("k", values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variations": ()}, "has no variations"),
        ({"seeds": ()}, "has no seeds"),
        ({"variations": [Variation("a", "c.py"), Variation("a", "d.py")]}, "the variation 'a' is given twice"),
        ({"seeds": (0, 1, 0)}, "the seed 0 is given twice"),
        ({"baseline": "b"}, "the baseline 'b' is no variation of the sweep; choose of 'a'"),
        ({"variations": [Variation("a\n", "c.py")]}, "has no name that can be printed"),
        ({"variations": [Variation("a", "c.py", {"seed": 3})]}, "sets config.seed"),
        ({"common": {"seed": 3}}, "sets config.seed"),
        ({"variations": [Variation("a", "c.py", {"x": 3})], "common": {"x": 3}}, "the key x is common to all runs"),
    ],
)
def test_plans_that_cannot_be_are_refused(changes, message):
    check(Sweep([Variation("a", "c.py")], (0, 1), "a"))
    with pytest.raises(UserError, match=message):
        check(Sweep([Variation("a", "c.py")], (0, 1), "a")._replace(**changes))


def test_random_draws_are_repeatable_in_range_and_continue():
    axes = [{"lr": ["log:1e-4:1e-1"]}, {"n": ["int:1:3"]}, {"p": ["uniform:-1:1"]}, {"a": ["u", "v"], "b": ["1", "2"]}]
    drawn = draw(["configs/a.py"], axes, 40, 0)
    assert drawn[:10] == draw(["configs/a.py"], axes, 10, 0) != draw(["configs/a.py"], axes, 10, 1)
    values = [each.overrides for each in drawn]
    rates = sorted(float(each["lr"]) for each in values)
    assert 1e-4 <= rates[0] < 4e-4 and 3e-2 < rates[-1] <= 1e-1 and 1e-3 < rates[20] < 1e-2
    assert {each["n"] for each in values} == {"1", "2", "3"} and all(-1 <= float(each["p"]) <= 1 for each in values)
    assert {(each["a"], each["b"]) for each in values} == {("u", "1"), ("v", "2")}
    assert drawn[3].name == "a trial-3"
    with pytest.raises(UserError, match="--trials=4 is more than the 3 different draws"):
        draw(["configs/a.py"], [{"n": ["int:1:3"]}], 4, 0)


def test_sweep_json_holds_the_plan(tmp_path, train, monkeypatch):
    planned = []
    monkeypatch.setattr(runs, "train_all", lambda given, *_, **__: planned.extend(given) or [])
    zipped = ("--zip", "batch_size=16,32", "optim.net.lr=1e-3,2e-3")
    flags = ("--config=configs/vae.py:smoke", "--seeds=0,7", *zipped, "--config.total=6 steps")
    assert sweep(tmp_path / "out", *flags, "--baseline=simclr:smoke batch_size=32, optim.net.lr=2e-3") == 0
    plan = json.loads((tmp_path / "out" / "sweep.json").read_text())
    first, second = "simclr:smoke batch_size=16, optim.net.lr=1e-3", "simclr:smoke batch_size=32, optim.net.lr=2e-3"
    assert {key: plan[key] for key in ("version", "name", "baseline", "seeds")} == {
        "version": 1, "name": "out", "baseline": second, "seeds": [0, 7],
    }  # fmt: skip
    assert len(plan["variations"]) == 4 and plan["variations"][0] == {
        "name": first,
        "config": "configs/simclr.py:smoke",
        "overrides": ["--config.total=6 steps", "--config.batch_size=16", "--config.optim.net.lr=1e-3"],
        "keys": {"batch_size": "16", "optim.net.lr": "1e-3"},
    }
    folder = "simclr-smoke-batch_size=16-optim.net.lr=1e-3"
    assert plan["runs"][:2] == [{"name": first, "seed": seed, "workdir": f"{folder}/seed-{seed}"} for seed in (0, 7)]
    assert [run.overrides[-1] for run in planned] == ["--config.seed=0"] * 4 + ["--config.seed=7"] * 4  # pairs are complete early
    assert planned[0][1:] == (
        "configs/simclr.py:smoke", (*plan["variations"][0]["overrides"], "--config.seed=0"), tmp_path / "out" / folder / "seed-0",
    )  # fmt: skip


def test_a_file_gives_the_sweep(tmp_path, train, capsys):
    path = tmp_path / "study.py"
    path.write_text(
        "from ssl_jax.experiment.sweep import *\ndef get_sweep():\n"
        "    return Sweep([Variation('Low', 'configs/simclr.py:smoke', {'model.temperature': 0.1}),\n"
        "                  Variation('low', 'configs/simclr.py:smoke', {'model.temperature': 0.2})],\n"
        "                 (0,), 'low', {'total': '6 steps', 'model.mean': (0.5, 0.5, 0.25)})\n"
    )
    assert main(["sweep", f"--sweep={path}", f"--workdir={tmp_path}/out", "--seeds=2"]) == 0
    plan = sweep_folder.read(tmp_path / "out")
    assert plan["variations"][1]["overrides"] == [
        "--config.total=6 steps", "--config.model.mean=(0.5, 0.5, 0.25)", "--config.model.temperature=0.2",
    ]  # fmt: skip
    folders = [run["workdir"].split("/")[0] for run in plan["runs"]]
    assert plan["name"] == "study" and plan["seeds"] == [0, 1] and plan["baseline"] == "low"
    assert folders[0] == "Low" and folders[2].startswith("low-") and len({folder.casefold() for folder in folders}) == 2


@pytest.mark.parametrize("path", sorted((ROOT / "sweeps").glob("*.py")), ids=lambda path: path.stem)
def test_sweeps_of_this_repository_are_valid(path):
    from ssl_jax.experiment.sweep import read_file

    study = read_file(str(path))
    check(study)
    sweep_check.check_configs(sweep_folder.record(study, (), pathlib.Path("/no/such/folder")))


def test_dry_run_prints_the_plan_and_starts_nothing(tmp_path, train, capsys):
    assert sweep(tmp_path / "out", VARY, "--seeds=3", "--dry_run") == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == f"out: 6 runs: 2 variations x 3 seeds, in {tmp_path}/out"
    assert shown[1] == "to train: 54 steps; checkpoints take about 6.0 MB; the first steps will tell the time"
    assert len(shown) == 8 and not (tmp_path / "out").exists() and train[1]() == []


@pytest.mark.full
def test_shapes_and_data_are_checked_before_the_first_run(tmp_path, capsys):
    assert sweep(tmp_path / "a", "--vary=data.name=scenes/tiny,/no/folder", "--config.data.train_split=train") == 2
    assert "variation 'simclr:smoke data.name=/no/folder': " in error(capsys)
    plan = sweep_folder.record(
        Sweep([Variation("a", "configs/simclr.py:smoke", {"data.name": "scenes/tiny", "data.train_split": "train[:64]"})]), (),
        tmp_path / "b",
    )  # fmt: skip
    (size,) = sweep_check.check_shapes(plan, ["a"]).values()
    assert size.steps == 8 and 1e6 < size.bytes < 1e8
    assert not (tmp_path / "a").exists()


# ---------------------------------------------------------------------------------------------------- running


def test_finished_runs_are_kept_and_failed_ones_leave_the_others(tmp_path, train, capsys):
    set_codes, calls = train
    set_codes({"=0.1/seed-1": 2, "=0.5/seed-0": -9})
    out = tmp_path / "out"
    assert sweep(out, VARY, "--seeds=2") == 2
    shown = capsys.readouterr()
    assert "failed 2 of 4: simclr:smoke model.temperature=0.5 seed 0: ended by SIGKILL (by hand, or for lack of memory)" in shown.out
    assert "finished 1 of 4: simclr:smoke model.temperature=0.1 seed 0: knn/top1 50" in shown.out
    assert "out: 4 runs: 2 done, 2 failed" in shown.out
    place = out / "simclr-smoke-model.temperature=0.1" / "seed-1"
    name = "simclr:smoke model.temperature=0.1 seed 1"
    assert f"failed: {name}: something is wrong (see {place}/output.txt)" in shown.err
    assert states(out, capsys)[name] == "failed; step 5/9; ssl/loss 1.5; something is wrong"
    assert len(calls()) == 4
    set_codes({})
    assert sweep(out, VARY, "--seeds=2") == 0 and len(calls()) == 2
    assert states(out, capsys)[name] == "done; step 9/9; knn/top1 51"
    assert sweep(out, VARY, "--seeds=2") == 0 and calls() == []


@pytest.mark.full
def test_a_new_value_and_a_new_seed_run_only_what_is_new(tmp_path, train):
    _, calls = train
    assert sweep(tmp_path / "out", VARY, "--seeds=2") == 0 and len(calls()) == 4
    assert sweep(tmp_path / "out", VARY + ",0.05", "--seeds=2", "--config.data.workers=1") == 0
    assert [call["config.model.temperature"] for call in calls()] == ["0.05", "0.05"]
    assert sweep(tmp_path / "out", VARY + ",0.05", "--seeds=0,1,9") == 0
    assert [call["config.seed"] for call in calls()] == ["9"] * 3


def test_other_plans_in_the_same_directory_are_refused(tmp_path, train, capsys):
    out = tmp_path / "out"
    assert sweep(out, VARY, "--seeds=2") == 0
    capsys.readouterr()
    refused = [
        ((VARY, "--seeds=2", "--config.batch_size=16"), "had another config or other overrides"),
        (("--vary=model.temperature=0.1", "--seeds=2"), "the variation 'simclr:smoke model.temperature=0.5', which this one lacks"),
        ((VARY, "--seeds=1"), "holds the seed 1, which this sweep lacks"),
    ]
    for given, message in refused:
        assert sweep(out, *given) == 2
        assert message in error(capsys)
    with sweep_folder.lock(out):
        assert sweep(out, VARY, "--seeds=2") == 2
    assert "is in use by another sweep" in error(capsys)
    write_run(tmp_path / "run")
    assert sweep(tmp_path / "run", VARY) == 2
    assert "holds a run (config.json), and a sweep needs a directory of its own" in error(capsys)
    (out / "sweep.json").write_text('{"version": 1}')
    assert sweep(out, VARY, "--seeds=2") == 2
    assert "sweep.json is damaged (it has no 'name')" in error(capsys)


def test_fault_of_the_machine_ends_the_sweep_and_the_others_save(tmp_path, train, capsys):
    train[0]({"=0.1/seed-0": 74, "=0.5/seed-0": "wait"})
    assert sweep(tmp_path / "out", VARY, "--seeds=2", "--jobs=2") == 74
    assert "/seed-0: something is wrong" in error(capsys)
    found = states(tmp_path / "out", capsys)
    assert [found[f"simclr:smoke model.temperature={tau}"].split(";")[0] for tau in ("0.1 seed 0", "0.5 seed 0", "0.1 seed 1")] == [
        "failed", "interrupted", "waiting",
    ]  # fmt: skip


def test_interrupted_run_ends_the_sweep_and_fail_fast_ends_at_the_first_failure(tmp_path, train):
    set_codes, calls = train
    set_codes({"=0.1/seed-0": 130})
    assert sweep(tmp_path / "a", VARY) == 130 and len(calls()) == 1
    set_codes({"=0.1/seed-0": 1})
    assert sweep(tmp_path / "b", VARY, "--fail_fast") == 2 and len(calls()) == 1


def test_runs_at_once_divide_the_cores(tmp_path, train):
    assert sweep(tmp_path / "out", VARY, "--jobs=2") == 0
    first, second = (set(call["cores"]) for call in train[1]())
    assert first and second and not first & second and first | second <= os.sched_getaffinity(0)


@pytest.mark.parametrize(
    ("jobs", "environment", "gpus"),
    [
        (2, {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4"}, ["0,1", "2,3,4"]),
        (2, {"CUDA_VISIBLE_DEVICES": "GPU-a, GPU-b"}, ["GPU-a", "GPU-b"]),
        (2, {"CUDA_VISIBLE_DEVICES": "0,1", "JAX_PLATFORMS": "cpu"}, [None, None]),
        (1, {"CUDA_VISIBLE_DEVICES": "0,1"}, [None]),
    ],
)
def test_runs_at_once_divide_the_gpus(jobs, environment, gpus, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    found = shares.divide(jobs, environment)
    assert [share.environment.get("CUDA_VISIBLE_DEVICES") for share in found] == gpus
    assert [share.cores for share in found] == ([(0, 1, 2, 3), (4, 5, 6, 7)] if jobs == 2 else [()])
    with pytest.raises(UserError, match="--jobs=9 is more than the"):
        shares.divide(9, environment)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143)])
def test_runs_save_when_the_sweep_alone_is_killed(tmp_path, train, signum, code):
    """After kill -9 the kernel tells the run."""
    train[0]({"seed-0": "wait"})
    script = f"""
import sys
from pathlib import Path
from ssl_jax.experiment import runs
run = runs.Run("a", "c.py", ("--config.seed=0",), Path({str(tmp_path / "seed-0")!r}))
runs.train_all([run], [sys.executable, {str(tmp_path / "train.py")!r}])
"""
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
    until(lambda: (tmp_path / "seed-0" / "ready").exists())
    assert runs.progress(tmp_path / "seed-0").state == "running"
    process.send_signal(signum)
    assert process.wait() == code
    until(lambda: "saved" in (tmp_path / "seed-0" / "output.txt").read_text())
    until(lambda: runs.progress(tmp_path / "seed-0").state == "interrupted")


def until(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_estimate_is_printed_once_after_the_first_steps(tmp_path, train, monkeypatch, capsys):
    monkeypatch.setattr("ssl_jax.experiment.runs.EVERY", 0.0)
    assert sweep(tmp_path / "out", VARY, "--seeds=2") == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "estimated time" in line)
    assert "of steps (2 s each, measured on the first run)" in line


def test_states_are_read_from_files(tmp_path):
    run = tmp_path / "run"
    assert runs.progress(run).state == "waiting"
    run.mkdir()
    runs.note_start(run, os.getpid())
    assert runs.progress(run).state == "running"
    attempt = json.loads((run / "attempt.json").read_text())
    (run / "attempt.json").write_text(json.dumps(attempt | {"born": "1"}))
    assert runs.progress(run).state == "interrupted"
    (run / "attempt.json").write_text(json.dumps(attempt | {"host": "elsewhere"}))
    assert runs.progress(run).state == "running"
    long_ago = time.time() - 2 * runs.SILENT
    os.utime(run / "attempt.json", (long_ago, long_ago))
    assert runs.progress(run).state == "interrupted"
    (run / "output.txt").write_text("Traceback\nerror: it is \x1b[31mred\n")
    runs.note_end(run, 1, False)
    assert runs.progress(run)[:2] == ("failed", "it is \\x1b[31mred")
    runs.note_end(run, 75, False)
    assert runs.progress(run).state == "interrupted"
    for text in ("[]", "{", '{"state": "odd"}'):
        (run / "attempt.json").write_text(text)
        assert runs.progress(run).state == "waiting"


def test_a_report_of_an_unfinished_run_does_not_finish_it(tmp_path):
    (tmp_path / "report.html").touch()
    config = {"total": "9 steps", "batch_size": 1, "data": {"examples": 9}, "best_metric": ""}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "metrics.jsonl").write_text('{"step": 9}\n')
    entry = {"subject": "trained", "step": 5, "metrics": {}, "protocols": {}}
    (tmp_path / "evaluations.json").write_text(json.dumps([entry]))
    assert not runs.finished(tmp_path)  # the last evaluation is missing
    (tmp_path / "evaluations.json").write_text(json.dumps([entry | {"step": 9}]))
    assert runs.finished(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 8}\n')
    assert not runs.finished(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 9}\n')
    (tmp_path / "evaluations.json").write_text("{")
    assert not runs.finished(tmp_path)


def test_table_of_a_terminal(tmp_path, train, capsys):
    train[0]({"=0.5/seed-0": 1})
    assert sweep(tmp_path / "out", VARY) == 2
    plan = sweep_folder.read(tmp_path / "out")
    console = Console(force_terminal=True, width=120, height=20)
    with console.capture() as captured, sweep_table.LiveTable(plan, tmp_path / "out", console) as view:
        view.say("one line")
    text = captured.get()
    assert "one line" in text and "2 runs: 1 done, 1 failed" in text and "knn/top1 50" in text and "something is wrong" in text
    few = sweep_table.table(plan, sweep_table.read_progress(plan, tmp_path / "out"), most=1)
    assert few.row_count == 1 and few.caption == "1 more" and next(iter(few.columns[1].cells)).plain == "failed"
    assert [sweep_table.duration(seconds) for seconds in (45, 720, 12000)] == ["45 s", "12 min", "3 h 20 min"]


# ---------------------------------------------------------------------------------------------------- real runs


def lines(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]


@pytest.mark.full
def test_killed_sweep_has_the_numbers_of_an_undisturbed_one(tmp_path):
    """Two configs x two values x two seeds; kill -9 of the sweep and of its run in the middle."""
    every = ("--config.data.name=scenes/tiny", "--config.data.train_split=train", "--config.data.test_split=test",
             "--config.total=4 steps", "--config.evaluate_every=4 steps", "--config.checkpoint_every=1 steps", "--config.baselines=()",
             "--config.evals=dict(knn=dict(kind='knn', k=5, temperature=0.1))", "--config.best_metric=knn/top1")  # fmt: skip

    def start(workdir):
        given = (CONFIG, "--config=configs/supervised.py:smoke", "--vary=optim.net.lr=1e-3,3e-3", "--seeds=2", f"--workdir={workdir}")
        command = [sys.executable, "launch.py", "sweep", *given, *every]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags(1)}
        return subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)

    def found(workdir):
        plan = sweep_folder.read(workdir)
        return {run["workdir"]: runs.progress(workdir / run["workdir"]) for run in plan["runs"]}

    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    assert start(undisturbed).wait() == 0
    process = start(killed)
    until(lambda: (killed / "sweep.json").exists() and any(
        run.state == "running" and run.step >= 2 for run in list(found(killed).values())[2:]
    ), 1200)  # fmt: skip
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    until(lambda: all(run.state != "running" for run in found(killed).values()), 60)  # a killed training needs a moment to end
    before = {name: run.state for name, run in found(killed).items()}
    assert "interrupted" in before.values() and "done" in before.values() and "waiting" in before.values()
    assert start(killed).wait() == 0
    after = found(killed)
    assert len(after) == 8 and {run.state for run in after.values()} == {"done"}
    for name in after:
        assert lines(killed / name) == lines(undisturbed / name), name

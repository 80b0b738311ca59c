"""`launch.py transfer`: the plan, resumption, failed runs, the table and the section of the report."""

import csv
import json
import pathlib
import sys

import numpy as np
import pytest
from scipy import stats
from test_report import write_run

from launch import main
from ssl_jax.errors import MachineFault
from ssl_jax.experiment import runs, transfer
from ssl_jax.experiment.config import load
from ssl_jax.report.write import write_report

ROOT = pathlib.Path(__file__).parent.parent
RECIPE = """
from configs import common, simclr
def get_config(variant=""):
    config = simclr.get_config("smoke")
    with config.unlocked():
        config.stages = dict(backbone=common.backbone("configs/simclr.py:smoke"))
        config.model.backbone = "frozen"
        config.optim.net.lr_multipliers = common.SAME
        config.best_metric = variant or "knn/top1"
    return config
"""
# Stands for `launch.py train`: notes its arguments, and writes what a finished run leaves.
TRAIN = """
import json, pathlib, sys
flags = dict(flag.removeprefix("--").partition("=")[::2] for flag in sys.argv[2:])
workdir = pathlib.Path(flags["workdir"])
with open(CALLS, "a") as calls: calls.write(json.dumps(flags) + chr(10))
code = CODES.get("/".join(workdir.parts[-2:]), 0)
if code: print("error: something is wrong", file=sys.stderr); sys.exit(code)
value = 50 + int(flags["config.seed"]) + 10 * ("config.stages.backbone.untrained" not in flags)
entry = lambda step, value: {"subject": "trained", "step": step, "metrics": {"knn/top1": value}, "protocols": {"knn": "kNN k=20"}}
(workdir / "evaluations.json").write_text(json.dumps([entry(5, 1.0), entry(9, float(value))]))
(workdir / "report.html").write_text("")
"""


@pytest.fixture
def task(tmp_path):
    path = tmp_path / "odd_task.py"
    path.write_text(RECIPE)
    return str(path)


@pytest.fixture
def train(tmp_path):
    """(command, calls): the stand-in, whose exit codes are CODES = {'TASK/START-SEED': code}, and a function that lists its calls."""

    def make(codes):
        script = tmp_path / "train.py"
        script.write_text(f"CALLS = {str(tmp_path / 'calls')!r}\nCODES = {codes!r}\n{TRAIN}")
        return [sys.executable, str(script)]

    def calls():
        return [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]

    return make, calls


def plan(task, tmp_path, starts=("untrained", "pretrained"), seeds=(0, 1)):
    return transfer.plan(["--config.stages.backbone.workdir=runs/x"], tmp_path / "out", [task], starts, seeds, ())


def test_plan_has_a_run_for_each_task_start_and_seed(task, tmp_path):
    cells = plan(task, tmp_path, tuple(transfer.STARTS), (0, 3))
    assert [(cell.task, cell.start, cell.seed) for cell in cells] == [
        ("odd_task", start, seed) for start in ("untrained", "pretrained", "finetuned", "scratch") for seed in (0, 3)
    ]
    assert cells[1].workdir == tmp_path / "out" / "odd_task" / "untrained-3" and cells[0].metric == "knn/top1"
    trained, untrained = "--config.model.backbone=trained", "--config.stages.backbone.untrained=True"
    flags = {cell.start: {trained, untrained} & set(cell.overrides) for cell in cells}
    assert flags == {"untrained": {untrained}, "pretrained": set(), "finetuned": {trained}, "scratch": {trained, untrained}}


@pytest.mark.parametrize("recipe", [*transfer.TASKS.values(), "configs/detection.py:bccd"])
def test_only_a_trained_pretrained_encoder_has_a_lower_rate(recipe, tmp_path, monkeypatch):
    """Whatever the recipe says: a frozen backbone has no parameters, so a rule for them would be refused."""
    monkeypatch.chdir(ROOT)
    for cell in plan(recipe, tmp_path, tuple(transfer.STARTS), (0,)):
        multipliers = load(cell.recipe, cell.overrides).optim.net.lr_multipliers
        assert multipliers == ((("^net/backbone/", 0.1), (".*", 1.0)) if cell.start == "finetuned" else ((".*", 1.0),)), cell.start


def test_finished_runs_are_not_run_again_and_failed_ones_do_not_stop_the_others(task, tmp_path, train):
    make, calls = train
    cells = plan(task, tmp_path)
    failed = transfer.run(cells, make({"odd_task/untrained-1": 2}))
    assert failed == [
        f"odd_task untrained seed 1: something is wrong (see {tmp_path}/out/odd_task/untrained-1/output.txt)"
    ] and len(calls()) == 4
    assert transfer.run(cells, make({})) == [] and len(calls()) == 5
    assert transfer.run(cells, make({})) == [] and len(calls()) == 5


def test_fault_of_the_machine_ends_the_transfers_and_is_named(task, tmp_path, train):
    make, calls = train
    with pytest.raises(MachineFault, match=r"odd_task/untrained-0: something is wrong"):
        transfer.run(plan(task, tmp_path), make({"odd_task/untrained-0": 74}))
    assert len(calls()) == 1
    with pytest.raises(KeyboardInterrupt):
        transfer.run(plan(task, tmp_path), make({"odd_task/untrained-0": 130}))


def test_table_holds_the_last_step_of_each_seed_and_the_t_interval(task, tmp_path, train):
    cells = plan(task, tmp_path, seeds=(0, 1, 2))
    transfer.run(cells, train[0]({"odd_task/pretrained-2": 1}), 2 * [runs.Share()])
    table = transfer.write_tables(cells, tmp_path / "out")
    half = stats.t.interval(0.95, 2, 51, stats.sem([50, 51, 52]))[1] - 51
    assert f"| odd_task | knn/top1 | 51.00 ± {half:.2f} (50.0, 51.0, 52.0) | 60.50 ± " in table
    assert (tmp_path / "out" / "transfer.md").read_text() == table
    with open(tmp_path / "out" / "transfer.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5 and rows[3] == dict(
        task="odd_task", metric="knn/top1", start="pretrained", seed="0", step="9", value="60.0", protocol="kNN k=20"
    )
    assert [row._asdict() | {"seed": str(row.seed), "step": str(row.step), "value": str(row.value)} for row in
            transfer.read_transfers(make_run(tmp_path, tmp_path / "out" / "transfer.csv"), [])] == rows  # fmt: skip


def test_summary_of_no_one_and_several_seeds():
    values = np.array([40.0, 44.0, 48.5])
    half = stats.t.interval(0.95, 2, values.mean(), stats.sem(values))[1] - values.mean()
    assert transfer.summary([]) == "–" and transfer.summary([12.345]) == "12.35 (1 seed)"
    assert transfer.summary(list(values)) == f"{values.mean():.2f} ± {half:.2f} (40.0, 44.0, 48.5)"


def make_run(tmp_path, table):
    workdir = tmp_path / "run"
    (workdir / "transfer").mkdir(parents=True)
    (workdir / "transfer" / "transfer.csv").write_text(table.read_text())
    return workdir


def test_report_shows_the_transfers_and_names_a_damaged_table(task, tmp_path, train):
    cells = plan(task, tmp_path)
    transfer.run(cells, train[0]({}))
    transfer.write_tables(cells, tmp_path / "out")
    write_run(tmp_path / "run")
    (tmp_path / "run" / "transfer").mkdir()
    table = tmp_path / "run" / "transfer" / "transfer.csv"
    table.write_text((tmp_path / "out" / "transfer.csv").read_text())
    page = write_report(tmp_path / "run").read_text()
    assert "Transfers" in page and "pretrained, frozen" in page and "trained with the task" not in page and "60.50 ±" in page
    table.write_text("task,metric\n<script>,x\n")
    page = write_report(tmp_path / "run").read_text()
    assert "transfer/transfer.csv is damaged" in page and "<h2>Transfers</h2>" not in page and "<script>" not in page


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "give --workdir=RUN or --weights=FILE"),
        (("--workdir={run}", "--weights=a.safetensors"), "give --workdir=RUN or --weights=FILE"),
        (("--weights=a.safetensors",), "--weights needs --output=DIR"),
        (("--workdir={empty}",), "holds no run (no config.json)"),
        (("--workdir={run}", "--tasks=segmentatoin"), "--tasks: 'segmentatoin' is unknown; choose of classification, segmentation"),
        (("--workdir={run}", "--tasks=configs/simclr.py:smoke"), "builds on no backbone"),
        (("--workdir={run}", "--tasks={task},{task}"), "one twice"),
        (("--workdir={run}", "--tasks={task}", "--starts=random"), "--starts: 'random' is unknown; choose of untrained, pretrained"),
        (("--workdir={run}", "--tasks={task}", "--seeds=0,0"), "--seeds=0,0 names one twice"),
        (("--workdir={run}", "--tasks={task}", "--seeds=x"), "--seeds: 'x' is no whole number"),
        (("--workdir={run}", "--tasks={task}", "--seeds="), "--seeds= names none"),
        (("--workdir={run}", "--tasks={task}", "--jobs=0"), "--jobs=0 must be at least 1"),
        (("--workdir={run}", "--tasks={task}", "--config.model.bakbone=x"), "did you mean"),
    ],
)
def test_bad_input_of_transfer_is_one_line(flags, message, task, tmp_path, capsys):
    write_run(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    places = {"run": tmp_path / "run", "empty": tmp_path / "empty", "task": task}
    assert main(["transfer", *(flag.format(**places) for flag in flags)]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and message in error and "\n" not in error

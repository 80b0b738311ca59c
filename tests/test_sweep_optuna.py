"""`launch.py sweep --search=optuna`: trials that learn, are stopped early and go on; and the line where Optuna is missing."""

import json
import sys

import pytest
from submitting import ROOT, error
from sweeping import CONFIG, stand_in, states, sweep

from ssl_jax.experiment import sweep_check, sweep_folder

GIVEN = ("--search=optuna", "--vary=optim.net.lr=log:1e-4:1e-1", "--vary=batch_size=int:16:32", "--zip", "model.temperature=0.1,0.5",
         "optim.net.weight_decay=0.01,0.02")  # fmt: skip


@pytest.fixture(autouse=True)
def here(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def train(tmp_path, monkeypatch):
    found = stand_in(tmp_path, monkeypatch)
    monkeypatch.setattr(sweep_check, "check_shapes", lambda plan, names: {name: sweep_check.Size(9, 1_000_000) for name in names})
    return found


def test_missing_optuna_is_one_line(tmp_path, train, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert sweep(tmp_path / "out", *GIVEN, "--trials=2") == 2
    assert "--search=optuna needs Optuna; pip install -r requirements-search.txt" in error(capsys)


@pytest.fixture
def optuna():
    return pytest.importorskip("optuna", reason="pip install -r requirements-search.txt")


@pytest.mark.full
def test_search_draws_in_range_goes_on_and_marks_failed_trials(tmp_path, train, capsys, optuna):
    set_codes, calls = train
    set_codes({"trial-1/seed-0": 1, "trial-2/seed-0": 130})
    assert sweep(tmp_path / "out", *GIVEN, "--trials=4") == 130
    first = calls()
    found = states(tmp_path / "out", capsys)
    assert [found[f"simclr:smoke trial-{number} seed 0"].split(";")[0] for number in range(3)] == ["done", "failed", "interrupted"]
    set_codes({})
    assert sweep(tmp_path / "out", *GIVEN, "--trials=4") == 0
    again = calls()
    assert len(first) == 3 and len(again) == 2 and again[0] == first[2]  # the interrupted one first, with its values
    drawn = [first[0], first[1], *again]
    assert all(1e-4 <= float(call["config.optim.net.lr"]) <= 0.1 and 16 <= int(call["config.batch_size"]) <= 32 for call in drawn)
    pairs = {(call["config.model.temperature"], call["config.optim.net.weight_decay"]) for call in drawn}
    assert pairs <= {("0.1", "0.01"), ("0.5", "0.02")} and len({call["config.optim.net.lr"] for call in drawn}) == 4
    plan = sweep_folder.read(tmp_path / "out")
    assert [each["name"] for each in plan["variations"]] == [f"simclr:smoke trial-{number}" for number in range(4)]
    assert plan["variations"][3]["keys"]["optim.net.lr"] == again[1]["config.optim.net.lr"]
    assert sweep(tmp_path / "out", *GIVEN, "--trials=4") == 0 and calls() == []


@pytest.mark.full
def test_trial_below_the_median_is_stopped_at_an_evaluation(tmp_path, train, capsys, optuna, monkeypatch):
    monkeypatch.setattr("ssl_jax.experiment.runs.EVERY", 0.0)
    script = tmp_path / "train.py"
    extra = """
entries = [{"subject": "trained", "step": 3, "metrics": {"knn/top1": 1.0 if "trial-5" in str(workdir) else 40.0}, "protocols": {}}]
(workdir / "evaluations.json").write_text(json.dumps(entries))
time.sleep(0.3)
"""
    train[0]({"trial-5/seed-0": "wait"})
    script.write_text(script.read_text().replace('if code == "wait":', f'{extra}if code == "wait":', 1))
    assert sweep(tmp_path / "out", *GIVEN, "--trials=6") == 0
    shown = capsys.readouterr().out
    assert "stopped 6 of 6: simclr:smoke trial-5 seed 0: stopped at step 3: knn/top1 1 is worse than the median of earlier" in shown
    assert "6 runs: 5 done, 1 stopped" in shown
    line = states(tmp_path / "out", capsys)["simclr:smoke trial-5 seed 0"]
    assert line.startswith("stopped; step 5/9; knn/top1 1; stopped at step 3")
    train[1]()
    assert sweep(tmp_path / "out", *GIVEN, "--trials=6") == 0 and train[1]() == []


@pytest.mark.full
def test_other_searches_in_the_same_directory_are_refused(tmp_path, train, capsys, optuna):
    assert sweep(tmp_path / "out", *GIVEN, "--trials=1") == 0
    capsys.readouterr()
    assert sweep(tmp_path / "out", *GIVEN, "--trials=2", "--config.total=5 steps") == 2
    assert "holds a search with other flags" in error(capsys)
    assert sweep(tmp_path / "out", "--vary=batch_size=16,32") == 2
    assert "with the variation 'simclr:smoke trial-0', which this one lacks" in error(capsys)
    assert sweep(tmp_path / "grid", "--vary=batch_size=16,32") == 0
    capsys.readouterr()
    assert sweep(tmp_path / "grid", *GIVEN, "--trials=2") == 2
    assert "holds a sweep that is no search by Optuna" in error(capsys)
    assert sweep(tmp_path / "new", *GIVEN, "--trials=2", "--config.best_metric=") == 2
    assert "config.best_metric is empty" in error(capsys)
    assert json.loads((tmp_path / "out" / "sweep.json").read_text())["variations"][0]["config"] == CONFIG.removeprefix("--config=")

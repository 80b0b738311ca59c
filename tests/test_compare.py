"""`launch.py compare`: right statistics, one protocol in a column, pairs of seeds, and pages that are safe and legible."""

import csv
import json
import math
import pathlib
import re
import shlex
import subprocess
import sys
import time

import numpy as np
import pytest
from scipy import stats
from test_report import HOSTILE, Page, check_self_contained

from launch import main
from ssl_jax.engine import intervals
from ssl_jax.engine.checkpoint import write_json
from ssl_jax.engine.metrics import MetricsWriter, record_start
from ssl_jax.engine.pictures import save_picture
from ssl_jax.engine.records import comparable
from ssl_jax.errors import UserError
from ssl_jax.experiment import config as configs
from ssl_jax.experiment.provenance import train_command
from ssl_jax.experiment.transfer import summary
from ssl_jax.report.compare.cost import cost
from ssl_jax.report.compare.runs import read_comparison
from ssl_jax.report.compare.table import make_table
from ssl_jax.report.compare.write import write_comparison

STEPS = 40


def write_run(workdir, seed=0, value=50.0, protocol="kNN k=20 D=64 cosine", steps=STEPS, entries=None, commit="abc123", **overrides):
    """A finished run, or one of fewer steps, in the words of the project's own writers."""
    flags = [f"--config.{key.replace('__', '.')}={setting}" for key, setting in overrides.items()]
    config = configs.plain(configs.load("configs/simclr.py:smoke", [f"--config.total={STEPS} steps", f"--config.seed={seed}", *flags]))
    config["data"] |= {"examples": 640, "num_classes": 12, "image_shape": [48, 48, 3]}
    workdir.mkdir(parents=True)
    write_json(workdir / "config.json", config)
    write_json(workdir / "provenance.json", {"commit": commit, "devices": "2 x cpu", "step_flops": 25_000_000})
    record_start(workdir, 1000.0)
    writer = MetricsWriter(workdir, tensorboard=False)
    for step in range(10, steps + 1, 10):
        writer.write(step, {"ssl/loss": 6.0 - step / 10 + seed, "time/seconds_per_step": 0.5, "time/clock": 1000.0 + step})
    writer.close()
    if entries is None:
        entries = [entry("untrained", 0, 20.0 + seed, protocol)]
        entries += [entry("trained", step, value - (STEPS - step) / 10, protocol) for step in (20, 40) if step <= steps]
    write_json(workdir / "evaluations.json", entries)
    for name in ("views", *(f"samples_{step:08d}" for step in range(20, steps + 1, 20))):
        save_picture(np.full((8, 8, 3), 20 * seed, np.uint8), workdir / "pictures" / f"{name}.png")
    return workdir


def entry(subject, step, value, protocol="kNN k=20 D=64 cosine"):
    metrics = {"knn/top1": value, "knn/top5": value + 5}
    return {"subject": subject, "step": step, "metrics": metrics, "protocols": {"knn": protocol}}


def write_sweep(folder, numbers, baseline=None, seeds=(0, 1, 2), keys=None):
    """A sweep with a variation for each name of `numbers`, {name: value of each seed}; None is a run that has not started."""
    runs = [{"name": name, "seed": seed, "workdir": f"{name}/seed-{seed}"} for name in numbers for seed in seeds]
    variations = [
        {"name": name, "config": "configs/simclr.py:smoke", "overrides": [f"--config.model.temperature={i + 1}"],
         "keys": (keys or {}).get(name, {"model.temperature": str(i + 1)})}
        for i, name in enumerate(numbers)
    ]  # fmt: skip
    for run in runs:
        value, i = numbers[run["name"]][seeds.index(run["seed"])], list(numbers).index(run["name"])
        if value is not None:
            write_run(folder / run["workdir"], run["seed"], value, model__temperature=i + 1)
    folder.mkdir(parents=True, exist_ok=True)
    sweep = {"version": 1, "name": folder.name, "baseline": baseline, "seeds": list(seeds), "variations": variations, "runs": runs}
    (folder / "sweep.json").write_text(json.dumps(sweep))
    return folder


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Two values of the temperature with three seeds."""
    return write_sweep(tmp_path_factory.mktemp("sweeps") / "tau", {"warm": (50.0, 52.0, 54.0), "cold": (51.0, 54.0, 57.0)}, "warm")


def page_of(folders, output, **options):
    source = write_comparison(folders, output, **options).read_text(encoding="utf-8")
    return source, Page(source)


def rows_of(folders, step=None, metrics=(), baseline=None):
    comparison = read_comparison(folders, baseline)
    table = make_table(comparison, metrics, step)
    return {row.name: {column.title: cell for column, cell in row.cells.items()} for row in table.rows}


# ---- statistics


@pytest.mark.parametrize("values", [[1.0, 2.0], [63.1, 60.2, 61.9], [0.1, 0.4, 0.2, 0.35, 0.3, 0.9]])
def test_intervals_agree_with_scipy(values):
    found = intervals.summarize(values)
    expected = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
    np.testing.assert_allclose(found.t, expected, rtol=1e-9)
    np.testing.assert_allclose((found.mean, found.deviation), (np.mean(values), np.std(values, ddof=1)))
    expected = stats.bootstrap((np.array(values),), np.mean, method="percentile", rng=np.random.default_rng(0)).confidence_interval
    np.testing.assert_allclose(found.bootstrap, expected)
    assert intervals.bootstrap_interval(values) == found.bootstrap


def test_t_interval_and_paired_difference_by_hand():
    """Differences 1, 2, 3: mean 2, deviation 1, t(0.975, 2) = 4.302653, so 2 ± 4.302653 / sqrt(3)."""
    difference = intervals.paired({0: 51.0, 1: 54.0, 2: 57.0, 9: 0.0}, {0: 50.0, 1: 52.0, 2: 54.0, 7: 1.0})
    assert (difference.seeds, difference.mean) == ((0, 1, 2), 2.0)
    np.testing.assert_allclose(difference.t, (2 - 2.484138, 2 + 2.484138), rtol=1e-6)
    assert not difference.significant
    assert summary([51.0, 52.0, 53.0]) == "52.00 ± 2.48 (51.0, 52.0, 53.0)"  # of `transfer`, by the same function


def test_one_seed_has_no_interval_and_none_has_no_mean():
    assert intervals.summarize([3.0]) == (1, 3.0, None, None, None)
    assert intervals.summarize([]) == (0, None, None, None, None)
    assert intervals.paired({0: 1.0}, {1: 2.0}) == ((), None, None)
    assert intervals.paired({0: 1.0}, {0: 3.0}) == ((0,), -2.0, None)


def test_significant_needs_six_seeds():
    base = dict.fromkeys(range(6), 0.0)
    better = {seed: 1.0 + seed / 100 for seed in range(6)}
    assert intervals.paired(better, base).significant
    assert not intervals.paired({seed: better[seed] for seed in range(5)}, base).significant
    assert not intervals.paired({seed: (-1.0) ** seed for seed in range(6)}, base).significant


@pytest.mark.full
def test_coverage_of_a_bootstrap_of_three_is_what_the_page_says():
    rng, covered = np.random.default_rng(0), []
    for _ in range(2000):
        values = rng.normal(size=3)
        low, high = np.quantile(values[rng.integers(0, 3, (1000, 3))].mean(1), (0.025, 0.975))
        covered.append(low <= 0 <= high)
    assert abs(np.mean(covered) - float(intervals.COVERAGE_OF_3.split()[0]) / 100) < 0.03


# ---- groups, columns, rows


def test_sweep_has_a_row_for_each_variation_and_the_difference_to_its_baseline(sweep):
    rows = rows_of([sweep])
    assert list(rows) == ["warm", "cold", "untrained"]
    warm, cold = rows["warm"]["knn/top1"], rows["cold"]["knn/top1"]
    assert warm.values == {0: 50.0, 1: 52.0, 2: 54.0} and warm.difference is None
    assert cold.difference.mean == 2.0 and cold.difference.seeds == (0, 1, 2)
    assert rows["untrained"]["knn/top1"].values == {0: 20.0, 1: 21.0, 2: 22.0}  # equal in both variations, so one row
    assert rows_of([sweep], baseline="cold")["warm"]["knn/top1"].difference.mean == -2.0


def test_a_column_never_mixes_protocols(tmp_path):
    """Two groups, and two seeds of one group."""
    runs = [write_run(tmp_path / "a0", 0, 50.0), write_run(tmp_path / "a1", 1, 60.0, "kNN k=200 D=64 cosine")]
    runs += [write_run(tmp_path / "b0", 0, 70.0, "kNN k=200 D=32 cosine", model__temperature=0.5)]
    rows = rows_of(runs, metrics=["knn/top1"])
    a, b = (next(cells for name, cells in rows.items() if f"temperature={value}" in name) for value in (0.2, 0.5))
    assert {title for title in a if "top1" in title} == {"knn/top1, k=20", "knn/top1, k=200"}
    assert a["knn/top1, k=20"].values == {0: 50.0} and a["knn/top1, k=200"].values == {1: 60.0}
    assert not b["knn/top1, k=20"].values and b["knn/top1, k=200"].values == {0: 70.0}  # the width D is none of the evaluation
    assert b["knn/top1, k=200"].difference.seeds == ()
    _, page = page_of(runs, tmp_path / "out")
    assert "knn/top1, k=20: kNN k=20 cosine" in page.text and "knn/top1, k=200: kNN k=200 cosine" in page.text
    assert comparable(entry("a", 0, 1.0), entry("b", 0, 1.0, "kNN k=20 D=32 cosine"), "knn/top1")


def test_one_run_under_two_protocols_has_both_columns(tmp_path):
    other = {**entry("trained", STEPS, 90.0, "kNN k=200"), "metrics": {"knn/top1": 90.0}}
    run = write_run(tmp_path / "a", entries=[entry("trained", STEPS, 50.0), other])
    cells = rows_of([run])["simclr"]
    assert {title: cell.values for title, cell in cells.items()} == {
        "knn/top1, k=20": {0: 50.0}, "knn/top1, k=200": {0: 90.0}, "knn/top5": {0: 55.0},
    }  # fmt: skip


def test_runs_with_other_seeds_are_paired_on_shared_ones_only(tmp_path):
    runs = [write_run(tmp_path / f"a{seed}", seed, 50.0 + seed) for seed in (0, 1)]
    runs += [write_run(tmp_path / f"b{seed}", seed, 60.0 + 3 * seed, model__temperature=0.5) for seed in (1, 2)]
    rows = rows_of(runs)
    difference = next(cells for name, cells in rows.items() if "0.5" in name)["knn/top1"].difference
    assert (difference.seeds, difference.mean, difference.t) == ((1,), 12.0, None)
    _, page = page_of(runs, tmp_path / "out")
    assert "n=1: seed 1" in page.text and "no interval" in page.text


def test_missing_values_and_nan_are_shown_as_such(tmp_path):
    runs = [write_run(tmp_path / "0", 0, 50.0), write_run(tmp_path / "1", 1, math.nan), write_run(tmp_path / "3", 3, 52.0)]
    bare = {"subject": "trained", "step": STEPS, "metrics": {"rank/rankme": 3.0}, "protocols": {}}
    runs.append(write_run(tmp_path / "2", 2, entries=[bare]))
    cell = rows_of(runs)["simclr"]["knn/top1"]
    assert (cell.values, cell.not_numbers, cell.missing) == ({0: 50.0, 3: 52.0}, [1], [2])
    assert cell.summary.mean == 51.0 and cell.summary.n == 2
    _, page = page_of(runs, tmp_path / "out", metrics=["knn/top1"])
    assert "seed 1 is not a number (NaN)" in page.text and "seed 2 missing" in page.text
    assert "seed 1 is not a number (NaN); seed 2 missing" in (tmp_path / "out" / "compare.md").read_text()


def test_unfinished_runs_are_listed_and_have_no_place_in_the_table(tmp_path):
    numbers = {"warm": (50.0, 52.0), "cold": (51.0, None)}
    folder = write_sweep(tmp_path / "tau", numbers, seeds=(0, 1))
    write_run(folder / "cold" / "seed-1", 1, 99.0, steps=20, model__temperature=2)
    rows = rows_of([folder])
    assert rows["cold"]["knn/top1"].values == {0: 51.0}
    assert rows_of([folder], step=20)["cold"]["knn/top1"].values == {0: 49.0, 1: 97.0}
    _, page = page_of([folder], tmp_path / "out")
    assert "1 of 4 runs are not finished" in page.text and "cold/seed-1: unfinished, step 20 of 40" in page.text
    write_sweep(tmp_path / "other", {"warm": (50.0,), "cold": (None,)}, seeds=(0,))
    (tmp_path / "other/warm/seed-0/stopped.json").write_text("{}")
    _, page = page_of([tmp_path / "other"], tmp_path / "out")
    assert "cold/seed-0: not started" in page.text
    (tmp_path / "other/warm/seed-0/evaluations.json").write_text("[{")
    _, page = page_of([tmp_path / "other"], tmp_path / "out")
    assert "evaluations.json is damaged" in page.text and "No finished run has been evaluated yet" in page.text


def test_plain_runs_are_grouped_by_config_and_apart_by_commit(tmp_path):
    runs = [write_run(tmp_path / f"a{seed}", seed) for seed in (1, 0)] + [write_run(tmp_path / "b", 0, model__temperature=0.5)]
    groups = read_comparison(runs).groups
    assert [[run.seed for run in group.runs] for group in groups] == [[0, 1], [0]]
    assert [group.name for group in groups] == ["simclr, model.temperature=0.2", "simclr, model.temperature=0.5"]
    again = [write_run(tmp_path / f"again{seed}", seed, commit="def456") for seed in (0, 1)]
    groups = read_comparison([*runs[:2], *again]).groups
    assert [group.name for group in groups] == ["simclr, commit abc123", "simclr, commit def456"]
    with pytest.raises(UserError, match="have the same config, seed 0 and commit; give one of them"):
        read_comparison([*runs, write_run(tmp_path / "twin", 0)])


def test_sweeps_of_one_name_and_plain_runs_have_names_of_their_own(sweep, tmp_path):
    other = write_sweep(tmp_path / "tau", {"warm": (60.0,)}, seeds=(0,))
    names = [group.name for group in read_comparison([sweep, other, write_run(tmp_path / "plain", model__temperature=9)]).groups]
    assert names == ["tau: warm (1)", "tau: cold", "tau: warm (2)", "simclr"]


# ---- files


def test_page_shows_numbers_formulas_and_commands(sweep, tmp_path):
    source, page = page_of([sweep], tmp_path / "out")
    for expected in (
        "52.00 ± 4.97", "bootstrap [50.00, 54.00]", "0: 50.00 · 1: 52.00 · 2: 54.00", "Baseline: warm", "+2.00", "[-0.48, +4.48]",
        "n=3: seeds 0, 1, 2", "scipy.stats.bootstrap", "74 %", "t(0.975, n - 1)", "device-seconds", "1e+09", "abc123",
        "--config.seed=2", "--config.model.temperature=2", "kNN k=20 cosine", "Effects of the varied keys", "Curves", "ssl/loss",
        "Samples", "All at step 40.", "cold, seed 0, step 40",
    ):  # fmt: skip
        assert expected in page.text or expected in source, expected
    assert "significant" not in page.text.lower()
    titles = dict(page.attributes)
    assert titles["lang"] == "en" and "polygon" in page.tags  # bands
    style = source.replace("data:image/jpeg", "data:image/png")
    check_self_contained(style, Page(style))


@pytest.mark.full
def test_six_seeds_may_be_called_significant(tmp_path):
    numbers = {"warm": (50.0,) * 6, "cold": tuple(51.0 + i / 10 for i in range(6))}
    _, page = page_of([write_sweep(tmp_path / "tau", numbers, seeds=tuple(range(6)))], tmp_path / "out")
    assert "significant at 5 %" in page.text and "no correction for several comparisons" in page.text


def test_csv_markdown_and_latex(sweep, tmp_path):
    write_comparison([sweep], tmp_path / "out")
    with open(tmp_path / "out/compare.csv", newline="") as file:
        lines = {(line["row"], line["metric"]): line for line in csv.DictReader(file)}
    cold = lines["cold", "knn/top1"]
    assert (cold["n"], cold["seeds"], cold["values"]) == ("3", "0 1 2", "51.0 54.0 57.0")
    assert (float(cold["mean"]), float(cold["standard_deviation"])) == (54.0, 3.0)
    assert (cold["baseline"], cold["shared_seeds"]) == ("warm", "0 1 2")
    assert float(cold["difference_low"]) == pytest.approx(2 - 2.484138, rel=1e-6)
    assert ("untrained", "knn/top5") in lines and lines["warm", "knn/top1"]["difference"] == ""
    markdown = (tmp_path / "out/compare.md").read_text()
    assert "| warm | 3 | 52.00 ± 4.97 (50.00, 52.00, 54.00) |" in markdown and "- knn/top1: kNN k=20 cosine" in markdown
    latex = (tmp_path / "out/compare.tex").read_text()
    assert r"warm & 3 & $52.00 \pm 4.97$ \\" in latex and latex.count("{") == latex.count("}")


@pytest.mark.full
def test_varied_keys_have_effects_and_a_heat_map(tmp_path):
    keys = {f"{a}_{b}": {"model.temperature": a, "optim.net.lr": b} for a in ("0.1", "0.5") for b in ("1e-3", "3e-3")}
    numbers = {name: (50.0 + i, 51.0 + i) for i, name in enumerate(keys)}
    source, page = page_of([write_sweep(tmp_path / "grid", numbers, seeds=(0, 1), keys=keys)], tmp_path / "out")
    assert "knn/top1: model.temperature (down), optim.net.lr (across)" in page.text
    heat = source[source.index("(across)") :]
    assert re.findall(r">([\d.]+)</t[dh]>", heat[: heat.index("</table>")]) == ["0.1", "50.50", "51.50", "0.5", "52.50", "53.50"]
    assert "model.temperature=0.1: 50.50, n=2" in page.text


@pytest.mark.full
def test_hostile_names_are_escaped(tmp_path):
    hostile = HOSTILE.replace("/", "_")
    keys = {hostile: {HOSTILE: HOSTILE}, "b": {HOSTILE: "2"}}
    folder = write_sweep(tmp_path / "x", {hostile: (50.0, 52.0), "b": (1.0, 2.0)}, seeds=(0, 1), keys=keys)
    for workdir in folder.glob("*/seed-*"):
        entries = [entry("trained", STEPS, 1.0, HOSTILE), entry(HOSTILE, 0, 2.0, HOSTILE)]
        (workdir / "evaluations.json").write_text(json.dumps(entries))
        (workdir / "provenance.json").write_text(json.dumps({"commit": HOSTILE, "devices": HOSTILE}))
    source, page = page_of([folder], tmp_path / "out")
    assert "<script" not in source and "example.com" in page.text
    assert not [value for name, value in page.attributes if name == "src" and not value.startswith("data:")]
    assert not [name for name, _ in page.attributes if name.startswith("on")]


@pytest.mark.full
def test_two_hundred_runs_make_a_small_page(tmp_path):
    numbers = {f"variation_{i:02d}_{'with_a_long_name_' * 4}": (50.0 + i, 51.0, 52.0 - i) for i in range(67)}
    folder = write_sweep(tmp_path / "many", numbers)
    began = time.perf_counter()
    source, page = page_of([folder], tmp_path / "out")
    assert time.perf_counter() - began < 60
    assert len(source) < 3_000_000
    assert "Of 67 groups, 12 are drawn" in page.text


def test_cost_counts_images_and_seconds_of_all_devices(sweep):
    run = read_comparison([sweep]).groups[0].runs[0]
    batch = run.record.config["batch_size"]
    assert cost(run) == (STEPS, STEPS * batch, STEPS * 25_000_000, 2, STEPS * 0.5 * 2, 40.0)
    assert cost(run, 20) == (20, 20 * batch, 20 * 25_000_000, 2, 20.0, 20.0)


# ---- the command line


def test_command_line(sweep, tmp_path, capsys):
    flags = [f"--output={tmp_path / 'new' / 'out'}", "--metric=ssl/loss", "--metric=knn/top5", "--step=20"]
    assert main(["compare", str(sweep), *flags]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "new" / "out" / "compare.html")
    page = Page((tmp_path / "new" / "out" / "compare.html").read_text())
    assert "evaluated at step 20" in page.text and "knn/top1" not in page.text and "53.00" in page.text
    for argv, cause in [
        ([str(sweep), "--baseline=hot"], "--baseline=hot is unknown; choose of 'warm', 'cold'"),
        ([str(sweep), "--metric=knn/top2"], "--metric=knn/top2 is a metric of none of the runs; did you mean knn/top"),
        ([str(sweep), "--metric=knn/top1", "--metric=knn/top1"], "--metric=knn/top1 is given twice"),
        ([str(sweep), "--step=7"], "--step=7: no run was evaluated there; there are steps 20, 40"),
        ([str(sweep), f"{sweep}/warm/seed-0", "--output=x"], "warm/seed-0 is given twice"),
        ([str(sweep / "warm"), "--output=x"], f"give those in it: {sweep}/warm/*"),
    ]:
        assert main(["compare", *argv]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and cause in lines[0], lines


def test_no_evaluation_in_common(tmp_path):
    rank = {"subject": "trained", "step": STEPS, "metrics": {"rank/rankme": 3.0}, "protocols": {"rank": "r"}}
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", entries=[rank], model__temperature=0.5)]
    with pytest.raises(UserError, match=r"no evaluation in common: simclr, .*0.2 has knn; simclr, .*0.5 has rank; run one of both"):
        write_comparison(runs, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_sweeps_are_refused(sweep, tmp_path):
    good = json.loads((sweep / "sweep.json").read_text())
    for change, cause in [
        ({"version": 2}, "version 2"), ({"runs": [{}]}, "entry 0 of runs lacks a field"),
        ({"variations": [3]}, "entry 0 of variations"),
        ({"runs": []}, "lists no run"), ({"runs": [{"name": "x", "seed": 0, "workdir": "x/y"}]}, "no variation"),
        ({"name": 3}, "as 'name'"), ({"baseline": "hot"}, "baseline 'hot' has no run"),
    ]:  # fmt: skip
        (tmp_path / "sweep.json").write_text(json.dumps({**good, **change}))
        with pytest.raises(UserError, match=cause):
            read_comparison([tmp_path])


@pytest.mark.full
def test_it_imports_no_jax(sweep, tmp_path):
    code = "import sys, launch; assert launch.main(sys.argv[1:]) == 0; assert not {'jax', 'flax', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code, "compare", str(sweep), f"--output={tmp_path}"], check=True, capture_output=True)


def test_command_of_a_training_is_one_for_a_shell():
    command = train_command("configs/simclr.py:smoke", ["--config.views=('a', 'b')"], pathlib.Path("runs/a b"))
    assert shlex.split(command)[2:] == ["train", "--config=configs/simclr.py:smoke", "--config.views=('a', 'b')", "--workdir=runs/a b"]


@pytest.mark.full
def test_real_runs(tmp_path):
    """Two seeds of a recipe: their numbers, commands, curves and pictures."""
    for seed in (0, 1):
        assert main(["train", "--config=configs/rotation.py:smoke", f"--workdir={tmp_path / str(seed)}", f"--config.seed={seed}"]) == 0
    _, page = page_of([tmp_path / "0", tmp_path / "1"], tmp_path / "out")
    entries = json.loads((tmp_path / "0/evaluations.json").read_text())
    trained = max((entry for entry in entries if entry["subject"] == "trained"), key=lambda entry: entry["step"])
    assert f"0: {trained['metrics']['knn/top1']:.2f}" in page.text
    assert "2 of 2 seeds" in page.text and "rotation:smoke: 2 runs" in page.text and "not finished" not in page.text
    assert f"--config=configs/rotation.py:smoke --config.seed=1 --workdir={tmp_path / '1'}" in page.text
    assert "untrained" in page.text and page.tags.count("img") >= 1 and "polygon" in page.tags

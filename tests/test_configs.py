"""The tables of variants, `launch.py configs`, and `shrink`, which makes any config small."""

import importlib
import pathlib
import re
import subprocess
import sys

import pytest

from configs import common
from launch import main
from ssl_jax.engine import durations

ROOT = pathlib.Path(__file__).parent.parent
NAMES = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem not in ("__init__", "common"))
TABLES = {name: importlib.import_module(f"configs.{name}").VARIANTS for name in NAMES}
EVERY = [(name, variant.name) for name, table in TABLES.items() for variant in table]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("name", NAMES)
def test_table_of_variants_is_complete(name):
    table = TABLES[name]
    assert [variant.name for variant in table[:2]] == ["", "smoke"]
    assert len({variant.name for variant in table}) == len(table)
    for variant in table:
        assert re.fullmatch(r"\w*", variant.name)
        assert variant.about
        assert "\n" not in "".join(variant[2:])
        assert variant.source or not re.search(r"\d", variant.expected), f"{variant.name}: numbers without a source"


@pytest.mark.parametrize(("name", "variant"), EVERY)
def test_shrink_makes_every_config_small(name, variant):
    config = importlib.import_module(f"configs.{name}").get_config(variant)
    common.shrink(config, {"model.a_new_key": 3, "seed": 7})
    assert durations.to_steps(config.total, "config.total", config.batch_size, 512) == 8
    assert (config.batch_size, config.data.workers, config.model.a_new_key, config.seed) == (32, 0, 3, 7)
    assert config.data.train_split.endswith("[:512]")
    assert config.data.test_split.endswith("[:256]")
    for optimizer in config.optim.values():
        assert durations.to_steps(optimizer.get("warmup", "0 steps"), "config.optim.warmup", 32, 512) <= 1
    assert max((evaluation.get("examples", 0) for evaluation in config.evals.values()), default=0) <= 128
    once = config.to_json_best_effort()
    common.shrink(config)
    assert config.to_json_best_effort() == once


@pytest.mark.parametrize(("split", "expected"), [("train", "train[:5]"), ("train[:10%]", "train[:5]"), ("all", "all[:5]")])
def test_first_examples_of_a_split(split, expected):
    assert common.first(split, 5) == expected


def test_configs_lists_every_variant(capsys):
    assert main(["configs"]) == 0
    printed = capsys.readouterr().out
    for name, table in TABLES.items():
        line = re.search(rf"^{name}: .*\n    (.*)$", printed, re.M)[1]
        assert line.split(", ") == [variant.name or "(default)" for variant in table]


@pytest.mark.parametrize("asked", ["simclr", "simclr:cifar10", "configs/simclr.py"])
def test_configs_of_a_method_prints_all_fields(capsys, asked):
    assert main(["configs", asked]) == 0
    printed = capsys.readouterr().out
    for variant in TABLES["simclr"]:
        for field in (variant.name, *variant[2:]):
            assert field in printed
    assert "arXiv:2002.05709" in printed
    assert "no blur, no normalization" in printed  # from the variant's docstring


def test_configs_with_bad_input_is_one_line(capsys, tmp_path):
    assert main(["configs", "simclrr"]) == 2
    assert capsys.readouterr().err == "error: no config 'simclrr'; did you mean simclr?\n"
    assert main(["configs", "--config.a=1"]) == 2
    (tmp_path / "mine.py").write_text("def get_config(variant=''): pass\n")
    assert main(["configs", str(tmp_path / "mine.py")]) == 2
    assert "has no VARIANTS" in capsys.readouterr().err


def test_config_files_import_no_jax():
    """Listing them takes a fraction of a second; importing JAX takes two."""
    program = f"import importlib, sys; [importlib.import_module('configs.' + name) for name in {NAMES}]; print('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "False\n"

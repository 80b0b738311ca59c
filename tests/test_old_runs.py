"""Runs that an earlier version left: their configs are translated, and they go on, are evaluated, exported and stood upon.

tests/data/workdir_d65cb39.tar.gz holds what commit d65cb39 wrote: SimCLR up to step 4 of 8 with an export of step 8, a VQ-VAE with its
export, and the config of a prior on it.
"""

import json
import pathlib
import tarfile

import jax
import numpy as np
import pytest

import ssl_jax
from launch import main
from ssl_jax.engine.records import read_metrics
from ssl_jax.engine.renamed_keys import translate
from ssl_jax.errors import UserError
from ssl_jax.experiment import config as configs
from ssl_jax.experiment.build import build_experiment
from ssl_jax.experiment.evaluations import Evaluations
from ssl_jax.experiment.stages import open_stages
from ssl_jax.experiment.warm_start import warm_start
from ssl_jax.experiment.workdir import read_config
from ssl_jax.report.run import read_run

HERE = pathlib.Path(__file__).parent
SMOKE = f"--config={HERE.parent / 'configs' / 'simclr.py'}:smoke"
NARROW = (
    "--config.model.encoder.width=0.03125", "--config.model.head.widths=(8,4)", "--config.batch_size=16",
    "--config.data.train_split=train[:128]", "--config.data.test_split=test[:64]",
)  # fmt: skip
WHERE_IT_RUNS = ("--config.keep_checkpoints=4", "--config.checkpoint_every=4 steps", "--config.eval_batch_size=64",
                 "--config.baselines=('untrained',)")  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(HERE / "data" / "workdir_d65cb39.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / "runs_of_d65cb39"


def test_the_config_of_an_old_run_is_that_of_the_same_recipe_today(runs):
    before = json.loads((runs / "simclr" / "config.json").read_text())
    assert before["total_steps"] == 8  # it is an old one
    today = configs.plain(configs.load(SMOKE.removeprefix("--config="), (*NARROW, *WHERE_IT_RUNS)))
    assert configs.differences(translate(before), today) == [  # what only the data and the machine know
        "data.examples: 128 -> None", "data.image_shape: [48, 48, 3] -> []", "data.num_classes: 12 -> None", "dtype: float32 -> auto",
    ]  # fmt: skip
    assert translate(translate(before)) == translate(before)


@pytest.mark.full
def test_an_old_run_is_evaluated_exported_reported_and_goes_on(runs, tmp_path, capsys):
    """To the numbers that the earlier version came to, on other devices."""
    workdir = runs / "simclr"
    lines, scores = read_metrics(workdir), json.loads((workdir / "evaluations.json").read_text())
    assert read_run(workdir).total == 8

    assert main(["evaluate", f"--workdir={workdir}", "--step=4"]) == 0
    recorded = next(entry for entry in scores if (entry["subject"], entry["step"]) == ("trained", 4))
    again: dict[str, float] = {}  # what is measured in another way by now is an entry of its own
    for entry in json.loads((workdir / "evaluations.json").read_text()):
        again |= entry["metrics"] if (entry["subject"], entry["step"]) == ("trained", 4) else {}
    assert again == pytest.approx(recorded["metrics"], abs=1.6)  # one of 64 images may change sides

    export = ["export", f"--workdir={workdir}", "--format=safetensors", f"--output={tmp_path}"]
    assert main([*export, "--step=4"]) == 0
    images = np.random.default_rng(0).integers(0, 256, (2, 48, 48, 3), np.uint8)
    assert np.isfinite(ssl_jax.load(tmp_path / "safetensors")(images)["pooled"]).all()

    train = ["train", SMOKE, f"--workdir={workdir}", *NARROW, *WHERE_IT_RUNS]
    assert main([*train, "--config.total=7 steps"]) == 2
    assert "total: 8 steps -> 7 steps" in capsys.readouterr().err
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:4]))
    assert main(train) == 0
    assert "going on at step 4 of 8" in (workdir / "log.txt").read_text()
    for old, new in zip(lines[4:], read_metrics(workdir)[4:], strict=True):
        assert new["ssl/loss"] == pytest.approx(old["ssl/loss"], rel=1e-3)
    assert json.loads((workdir / "config.json").read_text())["total"] == "8 steps"

    # the weights of step 8, as the earlier version exported them and as this one does
    assert main(export) == 0
    ours, theirs = (ssl_jax.load(folder / "safetensors")(images)["pooled"] for folder in (tmp_path, workdir / "export"))
    np.testing.assert_allclose(ours, theirs, rtol=0.02, atol=0.02 * np.abs(theirs).max())


@pytest.mark.full
def test_a_warm_start_from_an_old_run(runs):
    config = configs.load(f"{HERE.parent}/configs/supervised.py:smoke", NARROW)
    state = build_experiment(config, jax.devices()[:1]).run.init()
    after = warm_start(state, str(runs / "simclr"), config.warm_start.rules)
    before, now = (jax.tree.leaves(jax.device_get(x.params["net"]["encoder"])) for x in (state, after))
    assert any(np.any(a != b) for a, b in zip(before, now, strict=True))


@pytest.mark.full
def test_an_old_tokenizer_is_restored_under_the_new_names_of_its_modules(runs):
    workdir = runs / "tokens"
    recorded = json.loads((workdir / "evaluations.json").read_text())[-1]["metrics"]
    assert main(["evaluate", f"--workdir={workdir}"]) == 0
    again = json.loads((workdir / "evaluations.json").read_text())[-1]["metrics"]
    assert again["reconstruction/psnr"] == pytest.approx(recorded["reconstruction/psnr"], rel=1e-3)
    assert again["codebook/perplexity"] == pytest.approx(recorded["codebook/perplexity"], rel=0.02)


@pytest.mark.full
def test_an_old_tokenizer_is_stood_upon_and_loaded(runs):
    """The prior's config holds that of its tokenizer; its weights have the fingerprint that the prior was started with."""
    config = read_config(runs / "prior")
    assert (config.stages.tokenizer.config.model.quantizer.normalize, config.optim.net.get("decay")) == (True, None)
    before = configs.plain(config)
    with config.unlocked():
        config.stages.tokenizer.workdir = str(runs / "tokens")
    opened, frozen = open_stages(config)
    assert configs.differences(before, configs.plain(opened)) == []
    quantizer = opened.stages.tokenizer.config.model.quantizer
    assert (quantizer.straight_through, quantizer.size) == ("normalized", 16)
    assert build_experiment(config, jax.devices()[:1]).run.abstract.frozen.keys() == frozen.keys()

    loaded = ssl_jax.load(runs / "tokens" / "export" / "orbax")
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    tokens = loaded.tokens(images)
    assert tokens.shape[0] == 2
    assert int(tokens.max()) < 16


def test_old_keys_of_every_kind_are_translated():
    old = {
        "total_steps": None, "total_epochs": 45.0, "total_examples": None,
        "evaluate_every_steps": None, "evaluate_every_epochs": None, "evaluate_every_examples": None,
        "checkpoint_every_examples": 3_000_000,
        "optim": {"net": {"lr": 0.1, "warmup_epochs": 0.1, "warmup_steps": None, "decay": [["a", 1.0]], "rates": [["b", 0.0]]},
                  "decay": {"name": "sgd"}},
        "model": {"quantiser": {"normalise": True, "straight_through": "normalised", "decay": 0.9, "update": "average"},
                  "ema": {"decay": 0.99}, "encoder": {"flavour": "simclr"}, "likelihood": "discretised_logistic", "total_steps": 3},
        "stages": {"t": {"workdir": "w", "config": {"total_epochs": 2.5, "model": {"quantiser": {"size": 3}}, "stages": {}}}},
    }  # fmt: skip
    new = {
        "total": "45 epochs",
        "evaluate_every": "0 steps",
        "checkpoint_every": "3000000 examples",
        "optim": {"net": {"lr": 0.1, "warmup": "0.1 epochs", "weight_decay_mask": [["a", 1.0]], "lr_multipliers": [["b", 0.0]]},
                  "decay": {"name": "sgd"}},
        "model": {"quantizer": {"normalize": True, "straight_through": "normalized", "decay": 0.9, "codebook_update": "average"},
                  "ema": {"decay": 0.99}, "encoder": {"flavor": "simclr"}, "likelihood": "discretized_logistic", "total_steps": 3},
        "stages": {"t": {"workdir": "w", "config": {"total": "2.5 epochs", "model": {"quantizer": {"size": 3}}, "stages": {}}}},
    }  # fmt: skip
    kept = json.dumps(old)
    assert translate(old) == new
    assert translate(new) == new
    assert json.dumps(old) == kept


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("total_epochs=45", "config.total_epochs was renamed: say --config.total='45 epochs'"),
        ("evaluate_every_steps=5", "config.evaluate_every_steps was renamed: say --config.evaluate_every='5 steps'"),
        ("optim.net.warmup_epochs=1.0", "config.optim.net.warmup_epochs was renamed: say --config.optim.net.warmup='1.0 epochs'"),
        ("optim.net.decay=()", "config.optim.net.decay was renamed: say --config.optim.net.weight_decay_mask=()"),
        ("model.encoder.flavour=simclr", "config.model.encoder.flavour was renamed: say --config.model.encoder.flavor=simclr"),
        ("model.quantiser.size=3", "config.model.quantiser.size was renamed: say --config.model.quantizer.size=3"),
        ("total=200", "config.total='200' has no unit; say '200 steps', '200 epochs' or '200 examples'"),
    ],
)
def test_an_old_name_on_the_command_line_is_one_line(override, message):
    def start():
        return configs.resolve(configs.load(SMOKE.removeprefix("--config="), (f"--config.{override}",)), 512)

    with pytest.raises(UserError) as caught:
        start()
    assert str(caught.value) == message


def test_an_old_value_on_the_command_line_is_one_line():
    message = "config.model.likelihood='discretised_logistic' was renamed: say 'discretized_logistic'"
    with pytest.raises(UserError, match=message):
        configs.load(f"{HERE.parent}/configs/vae.py", ("--config.model.likelihood=discretised_logistic",))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("config.total_steps = 8", "config.total_steps was renamed: say config.total = '8 steps'"),
        ("config.optim.net.rates = ()", "config.optim.net.rates was renamed: say config.optim.net.lr_multipliers"),
        ("config.optim.net.warmup_steps = 3", "config.optim.net.warmup_steps was renamed: say config.optim.net.warmup = '3 steps'"),
        ("config.model.likelihood = 'discretised_logistic'",
         "config.model.likelihood='discretised_logistic' was renamed: say 'discretized_logistic'"),
    ],
)  # fmt: skip
def test_an_old_name_in_a_config_file_is_one_line(tmp_path, line, message):
    path = tmp_path / "configs" / "mine.py"
    path.parent.mkdir()
    path.write_text(
        f"from configs import simclr\n\n"
        f"def get_config(variant=''):\n    config = simclr.get_config('smoke')\n    {line}\n    return config\n"
    )
    with pytest.raises(UserError) as caught:
        configs.load(str(path))
    assert str(caught.value) == message


def test_one_duration_written_in_two_ways_is_no_difference():
    assert configs.differences({"total": "45.0 epochs", "optim": {"net": {"warmup": "1000 steps"}}},
                               {"total": "45 epochs", "optim": {"net": {"warmup": "1k steps"}}}) == []  # fmt: skip
    assert configs.differences({"total": "45 epochs"}, {"total": "45 steps"}) == ["total: 45 epochs -> 45 steps"]


def test_protocols_of_before_are_comparable_with_those_of_now(tmp_path):
    old = "linear probe lbfgs, standardised frozen features; kNN normalisation=none, 10 neighbours of normalised, uncentred features"
    entry = {"subject": "trained", "step": 8, "metrics": {"knn/top1": 50.0}, "protocols": {"knn": old}}
    (tmp_path / "evaluations.json").write_text(json.dumps([entry]))
    (read,) = Evaluations(tmp_path, {}).entries
    assert read["protocols"]["knn"] == (
        "linear probe lbfgs, standardized frozen features; kNN normalization=none, 10 neighbors of normalized, uncentered features"
    )

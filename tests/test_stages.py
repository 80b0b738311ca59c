"""Stages, the earlier runs that a run uses: opened, recorded in its config, frozen, and refused where their weights differ."""

import pathlib

import jax
import numpy as np
import pytest

from ssl_jax.engine import loop
from ssl_jax.engine.checkpoint import Checkpoints, write_json
from ssl_jax.engine.method import inference_state
from ssl_jax.errors import UserError
from ssl_jax.experiment import config as configs
from ssl_jax.experiment.build import build_experiment
from ssl_jax.experiment.stages import open_stages
from ssl_jax.experiment.workdir import record_config

ROOT = pathlib.Path(__file__).parent.parent
RECIPE = "configs/supervised.py:smoke"


def small(recipe, *overrides):
    return configs.load(f"{ROOT}/{recipe}", ("--config.batch_size=16", *overrides))


def save_run(workdir, config, state, steps):
    saved = Checkpoints(workdir / "checkpoints")
    for step in steps:
        saved.save(state._replace(step=np.int32(step)), configs.plain(config))
    saved.close()
    write_json(workdir / "config.json", configs.plain(config))


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    workdir, experiment = tmp_path_factory.mktemp("stage"), build_experiment(small(RECIPE), jax.devices()[:2])
    state = experiment.run.init()
    save_run(workdir, experiment.config, state, (0, 5))
    return workdir, state


def with_stage(workdir, **fields):
    config = small(RECIPE)
    with config.unlocked():
        config.stages.teacher = dict(workdir=str(workdir), recipe=RECIPE, **fields)
    return config


@pytest.mark.full
def test_stage_is_part_of_the_config_and_of_the_frozen_state(stage):
    workdir, saved = stage
    experiment = build_experiment(with_stage(workdir), jax.devices()[:2])
    found = experiment.config.stages.teacher
    assert (found.step, found.config.method, len(found.fingerprint)) == (5, "supervised", 16)
    state = experiment.run.init()
    host = jax.device_get(state.frozen["teacher"]["params"])
    jax.tree.map(np.testing.assert_array_equal, host, jax.device_get(saved.params))
    batches = [{k: v for k, v in experiment.batches[0].items() if k != "_skipped"}]
    for batch in loop.to_device(batches, experiment.run.mesh, ahead=1):
        after, _ = experiment.run.step(state, batch, experiment.run.root)
    assert after.frozen is state.frozen  # neither donated nor copied
    assert "teacher" in inference_state(after)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(after.frozen["teacher"]["params"]), host)
    assert experiment.run.abstract.frozen is state.frozen  # a restored state includes it


@pytest.mark.full
def test_stage_keeps_the_checkpoint_that_the_run_was_started_with(stage):
    workdir, _ = stage
    config, _ = open_stages(with_stage(workdir, step=0))
    assert config.stages.teacher.step == 0
    reopened, _ = open_stages(config)
    assert reopened.stages.teacher.fingerprint == config.stages.teacher.fingerprint


@pytest.mark.full
def test_missing_or_changed_stage_is_one_line(stage, tmp_path):
    workdir, state = stage
    with pytest.raises(UserError, match=r"stages\.teacher\.workdir is not set.*--config=configs/supervised\.py:smoke"):
        open_stages(with_stage(""))
    with pytest.raises(UserError, match=r"holds no run \(no config\.json\)"):
        open_stages(with_stage(tmp_path))
    with pytest.raises(UserError, match=r"has no checkpoint 3; there are \[0, 5\]"):
        open_stages(with_stage(workdir, step=3))
    config, _ = open_stages(with_stage(workdir))
    save_run(tmp_path, config, state._replace(params=jax.tree.map(lambda x: x + 1, state.params)), (5,))
    with config.unlocked():
        config.stages.teacher.workdir = str(tmp_path)
    with pytest.raises(UserError, match=r"other weights \(\w{16}\) than this run was started with"):
        open_stages(config)


@pytest.mark.full
def test_run_resumes_with_a_moved_stage_but_not_with_another_checkpoint(stage, tmp_path):
    config = configs.plain(open_stages(with_stage(stage[0]))[0])
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)  # without one the workdir takes any config
    record_config(tmp_path, config, 5)
    teacher = config["stages"]["teacher"]
    teacher["workdir"], teacher["config"]["log_every_steps"], teacher["config"]["mesh"]["fsdp"] = "elsewhere", 7, 8
    record_config(tmp_path, config, 5)
    teacher["step"] = 6
    with pytest.raises(UserError, match=r"stages\.teacher\.step: 5 -> 6\).*\(--config\.stages\.teacher\.step=5\)"):
        record_config(tmp_path, config, 5)
    teacher["step"], teacher["config"]["batch_size"] = 5, 99
    with pytest.raises(UserError, match=r"stages\.teacher\.config\.batch_size: 16 -> 99"):
        record_config(tmp_path, config, 5)

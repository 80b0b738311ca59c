"""The order of saving and evaluating in the training loop, with a toy method."""

import contextlib
import types

import jax
import numpy as np
import optax
import pytest
from test_engine import SGD, two_phase_method

from ssl_jax.engine import loop, sharding
from ssl_jax.engine.checkpoint import Checkpoints
from ssl_jax.engine.metrics import MetricsWriter
from ssl_jax.engine.records import read_metrics

SETTINGS = dict(
    batch_size=8, log_every_steps=100, checkpoint_every_steps=4, evaluate_every_steps=2, on_nonfinite="stop", optim={},
)  # fmt: skip


@pytest.fixture
def train(tmp_path):
    """train(evaluate, total=4): train in `tmp_path` from the newest checkpoint; returns (shown lines, Checkpoints)."""
    method, mesh = two_phase_method(), sharding.make_mesh(dict(data=1), jax.devices()[:1])
    example = {"x": jax.ShapeDtypeStruct((8, 4), "float32")}
    schedules = {name: optax.constant_schedule(0.1) for name in SGD}
    run, _ = loop.compile_run(method, lambda _: (SGD, schedules), mesh, ((".*", "replicate"),), 0, example)
    watch = types.SimpleNamespace(stop=lambda step: None, save=lambda step: False, received=None)
    trace = types.SimpleNamespace(before=lambda *_: None, last=None)
    watchdog = types.SimpleNamespace(
        beat=lambda step: None, paused=contextlib.nullcontext, record_input_wait=lambda *_: None, slowest_input=dict
    )

    def train(evaluate, total=4):
        saved, shown = Checkpoints(tmp_path / "checkpoints", 1, "knn/top1"), []
        state = saved.restore_latest(run.abstract) or run.init()
        writer = MetricsWriter(tmp_path, int(state.step), tensorboard=False)
        batches = ({"x": np.full((8, 4), step, np.float32)} for step in range(int(state.step), total))
        try:
            loop.train(
                method, run, state, batches, total, writer, saved, SETTINGS, {}, schedules, evaluate,
                lambda step, line: shown.append((step, line)), watch, watchdog, trace,
            )  # fmt: skip
        finally:
            writer.close()
            saved.close()
        return shown, Checkpoints(tmp_path / "checkpoints", 1, "knn/top1", read_only=True)

    return train


@pytest.mark.full
def test_step_is_saved_before_it_is_evaluated(train, tmp_path):
    """An evaluation that fails, after hours, costs no step and no line of the metrics."""

    def fail(step, state):
        raise RuntimeError("no such label")

    with pytest.raises(RuntimeError, match="no such label"):
        train(fail)
    assert Checkpoints(tmp_path / "checkpoints", read_only=True).steps() == [2]
    (line,) = read_metrics(tmp_path)
    assert line["step"] == 2
    assert "d/loss" in line


def test_scores_are_added_to_the_line_and_to_the_checkpoint(train, tmp_path):
    shown, saved = train(lambda step, state: {"knn/top1": {2: 60.0, 4: 50.0}[step]})
    lines = {line["step"]: line for line in read_metrics(tmp_path)}
    assert {step: line["knn/top1"] for step, line in lines.items()} == {2: 60.0, 4: 50.0}
    assert all("d/loss" in line for line in lines.values())
    assert [(step, line["knn/top1"]) for step, line in shown] == [(2, 60.0), (4, 50.0)]
    assert saved.steps() == [2, 4]  # the best one, and the newest

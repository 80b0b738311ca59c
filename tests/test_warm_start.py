"""Which leaves are copied from another run's weights, and the error of a rule that copies none."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax.engine.method import State
from ssl_jax.errors import UserError
from ssl_jax.experiment import warm_start as subject
from ssl_jax.experiment.training import load_config

RECIPE = "configs/supervised.py:finetune"
THERE = {"net": {"encoder": {"kernel": np.ones((2, 3), np.float32)}, "head": {"bias": np.ones(3, np.float32)}}}


@pytest.fixture
def other(monkeypatch):
    """A finished run with the weights `THERE`."""
    source = {"params": THERE, "mutable": {}}
    checkpoints = types.SimpleNamespace(agreed_steps=lambda: [7], read=lambda step: source, close=lambda: None)
    monkeypatch.setattr(subject, "Checkpoints", lambda *_, **__: checkpoints)
    return "elsewhere"


def state():
    zeros = jax.tree.map(lambda x: jax.device_put(jnp.zeros(x.shape), jax.devices()[0]), THERE)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return State(jnp.int32(0), jax.device_put(zeros, whole), {}, {}, {})


def test_warm_start_copies_leaves_by_rules(other):
    after = subject.warm_start(state(), other, (("^net/encoder/", "net/encoder/"),)).params["net"]
    assert after["encoder"]["kernel"].min() == 1
    assert after["head"]["bias"].max() == 0


@pytest.mark.parametrize("rule", [("^net/backbone/", "net/encoder/"), ("^net/encoder/", "net/backbone/")])
def test_warm_start_rule_that_copies_nothing_is_named(other, rule):
    """It matches no leaf of the checkpoint, or gives a name that the new state lacks."""
    with pytest.raises(UserError, match="takes nothing from elsewhere"):
        subject.warm_start(state(), other, (rule,))


def test_recipe_with_warm_start_needs_a_workdir():
    """Fine-tuning from random weights must not happen by mistake."""
    with pytest.raises(UserError, match=r"give its directory with --config.warm_start.workdir=DIR"):
        load_config(RECIPE, ())
    for given in ("", "elsewhere"):
        assert load_config(RECIPE, (f"--config.warm_start.workdir={given}",)).warm_start.workdir == given


def table(rows, prefix=0):
    """Positions [1, prefix + rows * rows, 2] that are linear in row and column; a class token has -1."""
    y, x = np.mgrid[:rows, :rows] / (rows - 1)
    return np.concatenate([np.full((1, prefix, 2), -1.0), np.stack([y, x], -1).reshape(1, -1, 2)], 1).astype(np.float32)


@pytest.mark.parametrize(("there", "here"), [(0, 0), (1, 1), (1, 0), (0, 1)])
def test_positions_of_another_resolution_are_interpolated(there, here):
    """The class token is kept apart: taken where both have one, dropped or left fresh where one has not."""
    found = subject.positions(table(4, there), jnp.zeros((1, here + 64, 2)), "net/encoder/pos_embed")
    assert found.shape == (1, here + 64, 2)
    if here:
        assert found[0, 0].tolist() == [-1.0, -1.0] if there else [0.0, 0.0]
    grid = found[0, here:].reshape(8, 8, 2)
    given = table(4)[0].reshape(4, 4, 2)
    np.testing.assert_allclose(grid, jax.image.resize(given, (8, 8, 2), "cubic"), atol=1e-6)
    assert abs(np.diff(grid[2:-2, 3, 0]) - 1 / 6).max() < 0.02  # linear stays linear: a step is half of the old one, 1 / 3


def test_positions_that_form_no_square_or_of_another_width_are_left(other, monkeypatch):
    odd = table(4)[:, :15]
    assert subject.positions(odd, jnp.zeros((1, 64, 2)), "x") is odd
    assert subject.positions(table(4), jnp.zeros((1, 64, 3)), "x").shape == (1, 16, 2)
    assert subject.positions(table(4), jnp.zeros((1, 63, 2)), "x").shape == (1, 16, 2)


def test_warm_start_of_a_vit_of_another_resolution(monkeypatch):
    source = {"params": {"net": {"encoder": {"pos_embed": table(4, 1)}}}, "mutable": {}}
    checkpoints = types.SimpleNamespace(agreed_steps=lambda: [7], read=lambda step: source, close=lambda: None)
    monkeypatch.setattr(subject, "Checkpoints", lambda *_, **__: checkpoints)
    fresh = State(jnp.int32(0), {"net": {"encoder": {"pos_embed": jnp.zeros((1, 65, 2))}}}, {}, {}, {})
    after = subject.warm_start(fresh, "elsewhere", (("^net/encoder/", "net/encoder/"),)).params["net"]["encoder"]["pos_embed"]
    assert after.shape == (1, 65, 2)
    assert after[0, 0].tolist() == [-1.0, -1.0]

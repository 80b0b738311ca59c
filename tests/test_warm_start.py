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

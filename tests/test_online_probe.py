"""The online probe: a linear classifier on the features of the training pass, which changes nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from test_siamese import load

from ssl_jax.engine.method import State, groups
from ssl_jax.engine.online_probe import neighbor_accuracy, optimizers, with_online_probe
from ssl_jax.engine.optim import make_optimizers
from ssl_jax.engine.step import loss_and_grads, make_step
from ssl_jax.errors import UserError
from ssl_jax.experiment.build import fill_in
from ssl_jax.methods import build_method

METHODS = ("simclr", "moco", "byol", "simsiam", "barlow_twins", "vicreg", "swav", "dino", "ibot", "mae", "ijepa")
LABELS = np.arange(32, dtype=np.int32) % 10
BATCH = {"image": jnp.asarray(np.random.default_rng(0).integers(0, 256, (32, 48, 48, 3), np.uint8)), "label": jnp.asarray(LABELS)}


def begin(method):
    params, mutable = jax.jit(method.init)(jax.random.key(0), BATCH, {})
    return State(jnp.zeros((), jnp.int32), params, {}, mutable, {})


def step_of(config):
    """(method, one jitted train step, the first state)"""
    method = build_method(config)
    state = begin(method)
    made, _ = make_optimizers(optimizers(config), state.params, 8, 32, 512)
    return jax.jit(make_step(method, made)), state._replace(opt={g: made[g].init(p) for g, p in state.params.items()})


@pytest.mark.full
@pytest.mark.parametrize("name", METHODS)
def test_methods_report_the_features_of_their_training_pass(name):
    config = load(f"{name}.py:smoke", "--config.online_probe=0.001")
    plain, probed = build_method(load(f"{name}.py:smoke")), build_method(config)
    params, mutable = jax.eval_shape(probed.init, jax.random.key(0), BATCH, {})
    state = State(jnp.zeros((), jnp.int32), params, {}, mutable, {})
    trace = lambda method, params: jax.eval_shape(  # noqa: E731
        lambda s: loss_and_grads(method.phases[0], s.params, s, BATCH, jax.random.key(1)), state._replace(params=params)
    )
    _, _, metrics, grads = trace(probed, params)
    assert {"probe_loss", "probe_accuracy", "neighbor_accuracy"} <= set(metrics)
    assert all(x.shape == () for x in metrics.values())
    assert set(grads) == groups(plain) | {"probe"}
    _, _, without, _ = trace(plain, {group: params[group] for group in groups(plain)})
    assert set(metrics) - set(without) == {"probe_loss", "probe_accuracy", "neighbor_accuracy"}


@pytest.mark.full
@pytest.mark.parametrize("name", ["simclr", "moco", "mae"])
def test_a_probe_changes_neither_the_loss_nor_the_network(name):
    plain, state = step_of(load(f"{name}.py:smoke"))
    probed, with_probe = step_of(load(f"{name}.py:smoke", "--config.online_probe=0.01"))
    for i in range(3):
        state, metrics = plain(state, BATCH, jax.random.key(2))
        with_probe, more = probed(with_probe, BATCH, jax.random.key(2))
        for key, value in metrics.items():
            np.testing.assert_allclose(more[key], value, rtol=2e-4, err_msg=f"{key} of step {i}")
    for (path, a), (_, b) in zip(
        jax.tree.leaves_with_path(state.params), jax.tree.leaves_with_path({g: with_probe.params[g] for g in state.params}), strict=True
    ):
        np.testing.assert_allclose(b, a, atol=2e-3, err_msg=jax.tree_util.keystr(path))
    assert jnp.abs(with_probe.params["probe"]["kernel"]).max() > 0


@pytest.mark.full
def test_its_gradient_is_that_of_softmax_regression_on_all_views():
    method = build_method(load("simclr.py:smoke", "--config.online_probe=0.001"))
    state = begin(method)
    rng = np.random.default_rng(1)
    probe = {"kernel": rng.standard_normal(state.params["probe"]["kernel"].shape), "bias": rng.standard_normal(10)}
    state = state._replace(params={**state.params, "probe": jax.tree.map(jnp.float32, probe)})
    plain = build_method(load("simclr.py:smoke")).phases[0]
    features = jax.jit(lambda s: plain.loss(s.params, s, BATCH, jax.random.key(1))[1][1]["features"])(state)
    _, _, metrics, grads = jax.jit(lambda s: loss_and_grads(method.phases[0], s.params, s, BATCH, jax.random.key(1)))(state)
    x = np.asarray(features, np.float64).reshape(64, -1)
    labels = np.repeat(LABELS, 2)
    logits = x @ probe["kernel"] + probe["bias"]
    p = scipy.special.softmax(logits, -1)
    np.testing.assert_allclose(metrics["probe_loss"], -np.log(p[np.arange(64), labels]).mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["probe_accuracy"], (logits.argmax(-1) == labels).mean(), atol=1e-6)
    p[np.arange(64), labels] -= 1
    np.testing.assert_allclose(grads["probe"]["kernel"], x.T @ p / 64, atol=1e-4)
    np.testing.assert_allclose(grads["probe"]["bias"], p.mean(0), atol=1e-5)


def test_neighbors_are_other_images():
    x = jnp.array([[1.0, 0.0], [5.0, 0.5], [0.0, 1.0], [0.1, 3.0]])
    assert neighbor_accuracy(x, jnp.array([0, 0, 1, 1])) == 1.0
    assert neighbor_accuracy(x, jnp.array([0, 1, 1, 1])) == 0.5
    assert neighbor_accuracy(x, jnp.array([0, 1, 2, 3])) == 0.0


def test_bad_inputs_are_one_line():
    config = load("simclr.py:smoke", "--config.online_probe=0.001")
    with config.unlocked():
        config.data.num_classes = None
    with pytest.raises(UserError, match="online_probe needs labels that are classes"):
        build_method(config)
    silent = with_online_probe(build_method(load("supervised.py:smoke")), 10)
    state = jax.eval_shape(silent.init, jax.random.key(0), BATCH, {})
    state = State(jnp.zeros((), jnp.int32), state[0], {}, state[1], {})
    with pytest.raises(UserError, match="does not report the features"):
        jax.eval_shape(lambda s: silent.phases[0].loss(s.params, s, BATCH, jax.random.key(1)), state)


def test_a_run_with_a_probe_gets_an_optimizer_for_it():
    from ssl_jax.data.catalog import open_data, read_facts

    config = load("simclr.py:smoke", "--config.online_probe=0.002")
    filled = fill_in(config, read_facts(config.data, open_data(config.data, config.data.train_split), {}))
    assert filled.optim.probe.to_dict() == dict(name="adamw", lr=0.002, schedule="constant")
    assert "probe" not in config.optim

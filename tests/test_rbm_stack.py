"""Boltzmann machines against sums over all states and contrastive divergence; the stack and its unrolled autoencoder."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax.engine.method import State
from ssl_jax.engine.optim import make_optimizers
from ssl_jax.engine.step import make_step
from ssl_jax.errors import UserError
from ssl_jax.experiment import config as configs
from ssl_jax.methods import rbm_stack as subject
from ssl_jax.models.autoencoders import MLPDecoder, MLPEncoder
from ssl_jax.models.common import run
from ssl_jax.objectives import boltzmann

rng = np.random.default_rng(0)


def random_machine(below, above, scale=1.0):
    shapes = {"kernel": (below, above), "hidden_bias": (above,), "visible_bias": (below,)}
    return {name: jnp.float32(scale * rng.normal(size=shape)) for name, shape in shapes.items()}


def sigmoid(x):
    return 1 / (1 + np.exp(-np.float64(x)))


def test_free_energy_equals_sum_over_hidden_states():
    machine, v = random_machine(5, 4), np.float32(rng.integers(0, 2, (6, 5)))
    w, c, b = (np.float64(machine[name]) for name in ("kernel", "hidden_bias", "visible_bias"))
    states = np.array(list(itertools.product((0, 1), repeat=4)))
    exact = -np.log(np.exp(v @ b + states @ c[:, None] + states @ w.T @ v.T).sum(0))
    np.testing.assert_allclose(boltzmann.free_energy(machine, v), exact, rtol=1e-5)

    grid = np.linspace(-30, 30, 20_001)  # normal units: the integral over each by itself, exp(-(h - c)^2 / 2) at rest
    weights = np.exp(-0.5 * (grid - c[:, None]) ** 2 + grid * (v @ w)[..., None]).sum(-1) * (grid[1] - grid[0]) / np.sqrt(2 * np.pi)
    exact = -(v @ b) - np.log(weights).sum(-1)
    difference = np.asarray(boltzmann.free_energy(machine, v, normal=True)) - exact
    np.testing.assert_allclose(difference, difference[0], atol=1e-4)  # up to a constant that does not depend on v


@pytest.mark.parametrize("normal", [False, True])
def test_gradient_equals_contrastive_divergence_rule(normal):
    machine, v, key = random_machine(7, 3, 0.5), np.float32(rng.random((10, 7))), jax.random.key(1)

    def surrogate(machine):
        value, reconstruction = boltzmann.contrastive_divergence(machine, v, key, normal)
        return value.mean(), reconstruction

    grads, reconstruction = jax.jit(jax.grad(surrogate, has_aux=True))(machine)
    w, c, b = (np.float64(machine[name]) for name in ("kernel", "hidden_bias", "visible_bias"))

    def hidden_mean(v):
        return c + v @ w if normal else sigmoid(c + v @ w)

    noise = np.asarray(jax.random.normal(key, (10, 3)))
    hidden = hidden_mean(v) + noise if normal else jax.random.bernoulli(key, jnp.float32(hidden_mean(v)))
    visible = sigmoid(b + np.float64(hidden) @ w.T)
    np.testing.assert_allclose(reconstruction, visible, rtol=1e-5)
    expected = (visible.T @ hidden_mean(visible) - v.T @ hidden_mean(v)) / 10
    np.testing.assert_allclose(grads["kernel"], expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(grads["hidden_bias"], (hidden_mean(visible) - hidden_mean(v)).mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(grads["visible_bias"], (visible - v).mean(0), rtol=1e-4, atol=1e-6)


@pytest.mark.full
def test_contrastive_divergence_learns_binary_patterns():
    patterns = jnp.float32(np.random.default_rng(3).integers(0, 2, (4, 16)))
    machine, v = random_machine(16, 8, 0.1), jnp.tile(patterns, (8, 1))

    @jax.jit
    def step(m, key):
        grads = jax.grad(lambda m: boltzmann.contrastive_divergence(m, v, key)[0].mean())(m)
        return jax.tree.map(lambda w, g: w - 0.2 * g, m, grads)

    def error(m):
        return jnp.sum((boltzmann.visible(m, boltzmann.hidden(m, patterns)) - patterns) ** 2, -1).mean()

    before = error(machine)
    for key in jax.random.split(jax.random.key(0), 500):
        machine = step(machine, key)
    assert error(machine) < 0.25 * before


def test_unrolled_machines_equal_encoder_and_decoder():
    machines = [random_machine(12, 6, 0.5), random_machine(6, 4, 0.5), random_machine(4, 2, 0.5)]
    net = subject.unroll(machines)
    x = jnp.float32(rng.random((5, 2, 3, 2)))
    up = x.reshape(5, -1)
    for k, machine in enumerate(machines):
        up = boltzmann.hidden(machine, up, normal=k == 2)
    code = run(MLPEncoder(2, (6, 4), "sigmoid"), net["encoder"], {}, x, train=False)[0]["out"]
    np.testing.assert_allclose(code, up, rtol=1e-5)
    for machine in machines[::-1]:
        up = boltzmann.visible(machine, up)
    out = run(MLPDecoder((2, 3, 2), (4, 6), "sigmoid"), net["decoder"], {}, code, train=False)[0]
    np.testing.assert_allclose(jax.nn.sigmoid(out).reshape(5, -1), up, rtol=1e-5)


# ----------------------------------------------------------------------------------------------- the method


def load(variant, size, **model):
    config = configs.load(f"configs/rbm_stack.py:{variant}", ())
    with config.unlocked():
        config.dtype, config.data.image_shape = "float32", (size, size, 3)
        config.model.update(model)
    return config


def test_parameter_counts_of_the_published_model():
    method = subject.build(load("mnist", 28), {})
    images = jax.ShapeDtypeStruct((2, 28, 28, 3), np.uint8)
    params, _ = jax.eval_shape(method.init, jax.random.key(0), {"image": images}, {})
    assert sum(x.size for x in jax.tree.leaves(params["net"])) == 2_837_314
    assert [params[f"rbm{k}"]["kernel"].shape for k in range(1, 5)] == [(784, 1000), (1000, 500), (500, 250), (250, 30)]


IMAGES = rng.integers(0, 256, (16, 8, 8, 3), np.uint8)


@pytest.fixture(scope="module")
def stacked():
    """Two machines of two steps each, then tuning: the states around six steps, and the metrics of each step."""
    config = load("smoke", 8, widths=(12,), code_size=4, windows=((0, 2), (2, 4)), tuning_start=4)
    with config.unlocked():
        config.views = ((("random_crop", dict(size=8)),),)
    method = subject.build(config, {})
    params, mutable = jax.jit(method.init)(jax.random.key(0), {"image": IMAGES}, {})
    optimizers, _ = make_optimizers(config.optim, params, 7, 16, 100)
    opt = {group: optimizers[group].init(params[group]) for group in params}
    states, metrics = [State(jnp.zeros((), jnp.int32), params, opt, mutable, {})], []
    step = jax.jit(make_step(method, optimizers))
    for _ in range(6):
        state, step_metrics = step(states[-1], {"image": IMAGES}, jax.random.key(1))
        states.append(state)
        metrics.append(step_metrics)
    return method, states, metrics


@pytest.mark.full
def test_each_machine_trains_only_in_its_window(stacked):
    _, states, metrics = stacked
    changed = [
        {g for g in a.params if not jax.tree.all(jax.tree.map(np.array_equal, a.params[g], b.params[g]))}
        for a, b in itertools.pairwise(states)
    ]
    assert changed == [{"rbm1"}, {"rbm1"}, {"rbm2"}, {"rbm2"}, {"net"}, {"net"}]
    assert [[group for group in ("rbm1", "rbm2", "tuning") if np.isfinite(t[f"{group}/loss"])] for t in metrics] == [
        ["rbm1"], ["rbm1"], ["rbm2"], ["rbm2"], ["tuning"], ["tuning"]
    ]  # fmt: skip
    resting = [s.opt["rbm1"] for s in states[2:]]  # momentum too
    assert jax.tree.all(jax.tree.map(np.array_equal, resting[0], resting[-1]))


@pytest.mark.full
def test_second_machine_trains_on_hidden_units_of_the_first(stacked):
    _, states, metrics = stacked
    state = states[2]
    v = boltzmann.hidden(state.params["rbm1"], jnp.float32(IMAGES.reshape(16, -1)) / 255)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(jax.random.key(1), 2), 1), 0)
    value, reconstruction = boltzmann.contrastive_divergence(state.params["rbm2"], v, jax.random.split(key)[1], normal=True)
    np.testing.assert_allclose(metrics[2]["rbm2/loss"], value.mean(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(metrics[2]["rbm2/squared_error"], ((v - reconstruction) ** 2).sum(-1).mean(), rtol=1e-5)


@pytest.mark.full
def test_fine_tuning_gradients_equal_those_of_copied_weights(stacked):
    method, states, metrics = stacked
    start = states[4].params
    assert not any(np.any(x) for x in jax.tree.leaves(start["net"]))
    net = subject.unroll([start["rbm1"], start["rbm2"]])
    x = jnp.float32(IMAGES) / 255
    encoder, decoder = MLPEncoder(4, (12,), "sigmoid"), MLPDecoder((8, 8, 3), (12,), "sigmoid")

    @jax.jit
    def loss(net):
        code = run(encoder, net["encoder"], {}, x, train=False)[0]["out"]
        out = run(decoder, net["decoder"], {}, code, train=False)[0]
        return jnp.sum(jnp.logaddexp(0, out) - x * out, (1, 2, 3)).mean()

    np.testing.assert_allclose(metrics[4]["tuning/loss"], loss(net), rtol=1e-5)
    phase = method.phases[-1]
    gradient = jax.grad(lambda train: phase.loss(train, states[4], {"image": IMAGES}, jax.random.key(0))[0])
    ours = gradient({"net": start["net"]})["net"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), ours, jax.grad(loss)(net))
    features = method.encode(start, {}, IMAGES)
    np.testing.assert_allclose(features["code"], run(encoder, net["encoder"], {}, x, train=False)[0]["out"], rtol=1e-4, atol=1e-5)
    after = states[6].params
    assert np.abs(method.fns.reconstruct(after, {}, IMAGES) - method.fns.reconstruct(start, {}, IMAGES)).max() > 1e-5


def test_wrong_number_of_windows_raises_user_error():
    with pytest.raises(UserError, match=r"config.model.windows has 1 windows for 2 machines"):
        subject.build(load("smoke", 16, windows=((0, 2),)), {})

"""Split-brain autoencoders: the loss at the start, a float64 oracle, and halves that see nothing of each other."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax.augment import lab
from ssl_jax.engine.method import State
from ssl_jax.errors import UserError
from ssl_jax.experiment import config as configs
from ssl_jax.methods import build_method

ROOT = pathlib.Path(__file__).parent.parent


def load(*overrides, shape=(48, 48, 3)):
    config = configs.load(f"{ROOT}/configs/split_brain.py:smoke", [f"--config.{text}" for text in overrides])
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.data.image_shape, config.dtype = shape, "float32"
    return config


def pictures(count=4, side=48, seed=0):
    """uint8 [count, side, side, 3] with patches of saturated colors."""
    small = np.random.default_rng(seed).integers(0, 256, (count, 6, 6, 3))
    return small.repeat(side // 6, 1).repeat(side // 6, 2).astype(np.uint8)


def start(config):
    method = build_method(config)
    params, mutable = jax.jit(method.init)(jax.random.key(0), {"image": pictures()}, {})
    return method, params, State(jnp.int32(0), params, {}, mutable, {})


def first_loss(method, params, state, images):
    return jax.jit(method.phases[0].loss)(params, state, {"image": images}, jax.random.key(1))


@pytest.mark.full
def test_loss_at_start_is_the_sum_of_the_logs_of_the_bins():
    method, params, state = start(load())
    loss, (_, logs) = first_loss(method, params, state, pictures())
    np.testing.assert_allclose(logs["loss_from_lightness"], np.log(77), rtol=1e-5)
    np.testing.assert_allclose(logs["loss_from_color"], np.log(50), rtol=1e-5)
    np.testing.assert_allclose(loss, np.log(77) + np.log(50), rtol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_loss_equals_a_float64_loop(kind):
    """The biases of the last layers are the prediction, so that it is known."""
    method, params, state = start(load(f"model.loss={kind}", "views=((('random_crop', dict(size=48)),),)"))
    outputs = {half: params["net"]["head"][half]["linear"]["bias"].shape[0] for half in ("lightness", "color")}
    bias = {half: np.random.default_rng(0).standard_normal(count) for half, count in outputs.items()}
    for half, values in bias.items():
        params["net"]["head"][half]["linear"]["bias"] = jnp.array(values, jnp.float32)
    images = pictures(seed=1)
    loss, (_, logs) = first_loss(method, params, state, images)
    cells = lab._to_lab(images / 255, np).reshape(4, 12, 4, 12, 4, 3).mean((2, 4)).reshape(-1, 3)
    if kind == "classification":
        log_q = {half: x - np.log(np.exp(x).sum()) for half, x in bias.items()}
        nearest = [((lab.ab_bins(20).astype(np.float64) - ab) ** 2).sum(1).argmin() for ab in cells[:, 1:]]
        color = -log_q["lightness"][nearest].mean()
        lightness = -log_q["color"][np.minimum(np.floor(cells[:, 0] / 2).astype(int), 49)].mean()
    else:
        color = ((bias["lightness"] - cells[:, 1:] / 110) ** 2).mean()
        lightness = ((bias["color"] - (cells[:, :1] / 50 - 1)) ** 2).mean()
    np.testing.assert_allclose([logs["loss_from_lightness"], logs["loss_from_color"]], [color, lightness], rtol=2e-3)
    np.testing.assert_allclose(loss, color + lightness, rtol=2e-3)


@pytest.mark.full
def test_halves_do_not_see_the_input_of_each_other_at_any_layer(monkeypatch):
    """The derivatives of both halves of every layer, by the other half's channels, are exactly 0; by their own they are not."""
    monkeypatch.setattr(lab, "rgb_to_lab", lambda x: x)  # the images of this test are Lab already
    method, params, state = start(load())
    x = jax.random.uniform(jax.random.key(0), (2, 16, 16, 3))
    names = [name for name in jax.eval_shape(method.encode, params, state.mutable, x) if name not in ("lightness", "color")]
    assert {"stem", "layer1", "layer2", "layer3", "layer4", "pooled"} <= set(names)

    def halves(x):
        """[layers, 2]: sums of a function of the first and of the second half of the channels of each layer."""
        layers = method.encode(params, state.mutable, x)
        return jnp.array([[jnp.sum(jnp.sin(part)) for part in jnp.split(layers[name], 2, -1)] for name in names])

    gradient = np.asarray(jax.jit(jax.jacrev(halves))(x))  # [layers, 2, 2, 16, 16, 3]
    assert not gradient[:, 0, ..., 1:].any() and not gradient[:, 1, ..., :1].any()
    assert gradient[:, 0, ..., 0].any((1, 2, 3)).all() and gradient[:, 1, ..., 1:].any((1, 2, 3, 4)).all()


@pytest.mark.full
def test_each_loss_trains_its_own_half_only():
    method, params, state = start(load())
    kernel = params["net"]["head"]["lightness"]["linear"]["kernel"]
    params["net"]["head"]["lightness"]["linear"]["kernel"] = jax.random.normal(jax.random.key(0), kernel.shape)  # not 0

    def part(params):
        return method.phases[0].loss(params, state, {"image": pictures()}, jax.random.key(1))[1][1]["loss_from_lightness"]

    grads = jax.jit(jax.grad(part))(params)["net"]
    assert any(np.any(g) for g in jax.tree.leaves(grads["encoder"]["lightness"]))
    assert not any(np.any(g) for g in jax.tree.leaves((grads["encoder"]["color"], grads["head"]["color"])))


@pytest.mark.full
def test_features_are_both_halves_side_by_side():
    method, params, state = start(load())
    features = jax.jit(method.encode)(params, state.mutable, pictures())
    np.testing.assert_array_equal(features["pooled"], jnp.concatenate([features["lightness"], features["color"]], -1))
    assert features["layer1"].shape[-1] == 8 and features["pooled"].shape[-1] == 64


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.loss=l1", "config.model.loss='l1' is unknown; choose classification, regression"),
        ("model.stride=5", "config.model.stride=5 does not divide views of 32 x 32 pixels"),
        ("model.maps=('layer9',)", "config.model.maps has 'layer9', and the encoder has the maps stem, layer1"),
    ],
)
def test_bad_input_is_one_line(override, message):
    with pytest.raises(UserError, match=message):
        jax.eval_shape(lambda: start(load(override))[1])


def test_gray_data_are_refused():
    with pytest.raises(UserError, match="needs images in color, and 'scenes' has images of 1 channel"):
        build_method(load(shape=(48, 48, 1)))

"""Equivariance: the loss against float64, maps of a toy linear world, pairs, the joint term, and what is refused."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ssl_jax.engine.method import State
from ssl_jax.errors import UserError
from ssl_jax.methods import build_method
from ssl_jax.objectives.pairs import distances_after_maps, equivariance

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 48, 48, 3), np.uint8)
BATCH = {"image": IMAGES, "label": np.arange(6, dtype=np.int32)}


def load(variant="smoke", classes=12, **changes):
    """(config, method) with a network that compiles at once: one layer on the windows."""
    config = importlib.import_module("configs.equivariance").get_config(variant)
    with config.unlocked():
        config.data.image_shape, config.data.num_classes, config.dtype = (48, 48, 3), classes, "float32"
        config.model.encoder, config.model.layer = dict(name="mlp", widths=(9,), batch_norm=False), "pooled"
        config.model.head = dict(widths=(5,), batch_norm=False)
        config.update_from_flattened_dict(changes)
    return config, build_method(config)


def start(method, random_maps=True):
    params, mutable = jax.jit(method.init)(jax.random.key(0), BATCH, {})
    net = dict(params["net"])
    if random_maps:
        net["maps"] = net["maps"] + jnp.asarray(0.3 * np.random.default_rng(1).standard_normal(net["maps"].shape), jnp.float32)
    if "classifier" in net:
        kernel = np.random.default_rng(2).standard_normal(net["classifier"]["kernel"].shape)
        net["classifier"] = {**net["classifier"], "kernel": jnp.asarray(kernel, jnp.float32)}
    return State(jnp.int32(0), {"net": net}, {}, mutable, {})


# --- the objective


def test_distances_and_loss_equal_a_float64_loop():
    rng = np.random.default_rng(0)
    maps, first, second = rng.standard_normal((3, 4, 4)), rng.standard_normal((7, 4)), rng.standard_normal((7, 4))
    motions, others, margin = rng.integers(0, 3, 7), rng.uniform(0, 4, 7), 2.5
    far = np.array([[np.linalg.norm(m @ z - w) for m in maps] for z, w in zip(first, second, strict=True)])
    distances = distances_after_maps(*(jnp.asarray(x, jnp.float32) for x in (maps, first, second)))
    np.testing.assert_allclose(distances, far, rtol=1e-5)
    attract = np.mean([far[b, g] for b, g in enumerate(motions)])
    lacks = [max(margin - far[b, h], 0) for b, g in enumerate(motions) for h in range(3) if h != g]
    repel = np.mean(lacks + [max(margin - x, 0) for x in others])
    value, logs = equivariance(jnp.asarray(far), jnp.asarray(motions), jnp.asarray(others), margin)
    np.testing.assert_allclose(value, attract + repel, rtol=1e-5)
    np.testing.assert_allclose([logs["attract"], logs["repel"]], [attract, repel], rtol=1e-5)
    np.testing.assert_allclose(logs["accuracy"], (far.argmin(1) == motions).mean(), rtol=1e-6)


@pytest.mark.full
def test_features_that_collapse_to_zero_attract_but_pay_the_margin_for_each_negative():
    zero, maps = jnp.zeros((5, 4)), jnp.tile(jnp.eye(4), (3, 1, 1))
    distances = distances_after_maps(maps, zero, zero)
    value, logs = equivariance(distances, jnp.zeros(5, jnp.int32), distances[:, 0], 0.7)
    np.testing.assert_allclose([logs["attract"], logs["repel"], value], [0, 0.7, 0.7], atol=1e-5)
    answers = jnp.zeros(5, jnp.int32)
    gradient = jax.grad(lambda z: equivariance(distances_after_maps(maps, z, z), answers, distances[:, 0], 0.7)[0])(zero)
    assert np.isfinite(gradient).all()


def rotation(degrees):
    """float32 [4, 4]: a rotation of the first two of four numbers, and of the others by twice as much."""
    out = np.zeros((4, 4))
    for i, t in enumerate(np.radians([degrees, 2 * degrees])):
        out[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = [[np.cos(t), -np.sin(t)], [np.sin(t), np.cos(t)]]
    return out.astype(np.float32)


def test_maps_of_a_toy_linear_world_are_recovered():
    """Features that turn by 20, -20 and 40 degrees: the maps compose, invert and close the circle after 18 steps, as those do."""
    rng, angles = np.random.default_rng(0), (20, -20, 40)
    world = np.stack([rotation(a) for a in angles])
    first, motions = rng.standard_normal((300, 4)).astype(np.float32), rng.integers(0, 3, 300)
    first /= np.linalg.norm(first, axis=1, keepdims=True)
    second = np.einsum("bij,bj->bi", world[motions], first)

    def loss(maps):
        foreign = jnp.take_along_axis(distances_after_maps(maps, first, np.roll(second, 1, 0)), motions[:, None], 1)[:, 0]
        return equivariance(distances_after_maps(maps, first, second), jnp.asarray(motions), foreign, 0.05)[0]

    maps = jnp.tile(jnp.eye(4), (3, 1, 1))
    optimizer = optax.adam(optax.cosine_decay_schedule(0.02, 1500))
    step = jax.jit(lambda maps, state: optimizer.update(jax.grad(loss)(maps), state))
    state = optimizer.init(maps)
    for _ in range(1500):
        updates, state = step(maps, state)
        maps = optax.apply_updates(maps, updates)
    turn, back, twice = np.asarray(maps, np.float64)
    np.testing.assert_allclose(maps, world, atol=0.01)
    np.testing.assert_allclose(turn @ back, np.eye(4), atol=0.02)
    np.testing.assert_allclose(turn @ turn, twice, atol=0.02)
    np.testing.assert_allclose(np.linalg.matrix_power(turn, 18), np.eye(4), atol=0.1)
    np.testing.assert_allclose(np.sort(np.degrees(np.angle(np.linalg.eigvals(turn)))), [-40, -20, 20, 40], atol=1)


# --- the method


@pytest.mark.full
def test_loss_equals_a_float64_loop_with_the_joint_term_times_its_weight():
    config, method = load(**{"model.supervised.weight": 0.3})
    state, key = start(method), jax.random.key(5)
    value, (_, logs) = jax.jit(method.phases[0].loss)(state.params, state, BATCH, key)
    views = np.asarray(method.views(jnp.asarray(IMAGES), key))
    out = method.fns.pretext(state.params, state.mutable, BATCH, key)[""]
    chosen, net = np.asarray(out["answers"])[:, 0], jax.device_get(state.params["net"])

    def z(view):
        h = np.asarray(method.encode(state.params, state.mutable, jnp.asarray(view))["pooled"], np.float64)
        return h @ net["head"]["linear1"]["kernel"].astype(np.float64) + net["head"]["linear1"]["bias"]

    z1, z2, maps = z(views[:, 0]), z(views[:, 1]), net["maps"].astype(np.float64)
    far = np.array([[np.linalg.norm(m @ a - b) for m in maps] for a, b in zip(z1, z2, strict=True)])
    np.testing.assert_allclose(-out["logits"][:, 0], far, rtol=1e-4, atol=1e-5)
    others = [np.linalg.norm(maps[chosen[i]] @ z1[i] - z2[1 if i == 0 else i - 1]) for i in range(6)]
    lacks = [max(1 - far[i, g], 0) for i in range(6) for g in range(8) if g != chosen[i]] + [max(1 - x, 0) for x in others]
    logits = z1 @ net["classifier"]["kernel"] + net["classifier"]["bias"]
    entropy = np.mean([np.log(np.exp(row).sum()) - row[label] for row, label in zip(logits, BATCH["label"], strict=True)])
    np.testing.assert_allclose(value, far[np.arange(6), chosen].mean() + np.mean(lacks) + 0.3 * entropy, rtol=1e-4)
    np.testing.assert_allclose(logs["label_loss"], entropy, rtol=1e-4)
    assert logs["chance"] == 1 / 8 and config.model.margin == 1


def test_without_a_weight_there_are_no_labels():
    _, method = load("", classes=None)
    assert set(method.inputs) == {"image"} and not method.notes
    params, _ = jax.eval_shape(method.init, jax.random.key(0), {"image": IMAGES}, {})
    assert set(params["net"]) == {"encoder", "head", "maps"}
    _, joint = load("joint")
    assert set(joint.inputs) == {"image", "label"} and "labels" in joint.notes


def affine(view):
    """float64 [3, 3]: places in a window -> places in the picture, whose first channels are its coordinates."""
    y, x = np.mgrid[: view.shape[0], : view.shape[1]] - (view.shape[0] - 1) / 2
    inputs = np.stack([x.ravel(), y.ravel(), np.ones(x.size)], 1)
    found, *_ = np.linalg.lstsq(inputs, view[..., :2].reshape(-1, 2).astype(np.float64), rcond=None)
    return np.concatenate([found.T, [[0, 0, 1]]])


@pytest.mark.full
def test_the_second_window_is_the_first_after_the_motion_of_the_answer():
    """In the frame of the first window, wherever it is in the picture."""
    config, method = load()
    y, x = np.mgrid[:48, :48].astype(np.float32) - 23.5
    pictures = jnp.asarray(np.broadcast_to(np.stack([x, y, 0 * x], -1), (6, 48, 48, 3)))
    key, seen = jax.random.key(3), set()
    state = start(method)
    for number in range(8):
        key = jax.random.fold_in(key, number)
        views = np.asarray(method.views(pictures, key))
        answers = np.asarray(method.fns.pretext(state.params, state.mutable, {"image": pictures}, key)[""]["answers"])[:, 0]
        for (first, second), answer in zip(views, answers, strict=True):
            dx, dy, turn, log_zoom = config.model.pairs.motions[answer]
            scale = np.exp(log_zoom) * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
            between = np.linalg.inv(affine(second)) @ affine(first)
            np.testing.assert_allclose(between[:2], np.concatenate([scale, [[dx], [dy]]], 1), atol=1e-4)
            seen.add(int(answer))
    assert len(seen) == 8


@pytest.mark.full
def test_motions_are_equally_likely_and_depend_on_the_example_only():
    _, method = load()
    state = start(method)
    images = jnp.zeros((2000, 48, 48, 3), jnp.uint8)
    answers = np.asarray(method.fns.pretext(state.params, state.mutable, {"image": images}, jax.random.key(0))[""]["answers"])[:, 0]
    assert np.abs(np.bincount(answers, minlength=8) - 250).max() < 4 * np.sqrt(250)
    few = method.fns.pretext(state.params, state.mutable, {"image": images[:5]}, jax.random.key(0))[""]["answers"][:, 0]
    np.testing.assert_array_equal(few, answers[:5])


@pytest.mark.full
def test_pictures_show_the_first_window_after_the_motion_of_the_answer():
    _, method = load()
    state, batch = start(method), {"image": jnp.tile(IMAGES, (8, 1, 1, 1))}
    drawn = jax.device_get(jax.jit(method.fns.draw_pretext)(state.params, state.mutable, batch, jax.random.key(1)))
    assert drawn["pictures"].shape == (48, 2, 32, 64, 3) and 0 < drawn["right"].sum() < 48
    asked, answered = drawn["pictures"][:, 0], drawn["pictures"][:, 1]
    np.testing.assert_allclose(asked[:, :, :32], answered[:, :, :32], atol=1e-6)
    for right, one, other in zip(drawn["right"], asked, answered, strict=True):
        assert np.allclose(one[:, 32:], other[:, 32:], atol=1e-6) == right


@pytest.mark.parametrize(
    ("changes", "classes", "message"),
    [
        ({"model.pairs.motions": ((9.0, 0, 0, 0), (-9.0, 0, 0, 0))}, 12, "so that no border shows"),
        ({"model.pairs.motions": ((1.0, 0, 0, 0), (1.0, 0, 0, 0))}, 12, "two are the same; give different ones"),
        ({}, None, "needs labels that are classes, and 'scenes' has none; give --config.model.supervised.weight=0"),
        ({"model.layer": "layer9"}, 12, "config.model.layer='layer9' does not exist; the encoder has"),
    ],
)
def test_bad_input_is_one_line(changes, classes, message):
    with pytest.raises(UserError) as error:  # noqa: PT012 from `build`, or from tracing `init`
        _, method = load(classes=classes, **changes)
        jax.eval_shape(method.init, jax.random.key(0), BATCH, {})
    assert message in str(error.value) and "\n" not in str(error.value)

"""Egomotion: labels of pairs, tied weights, losses against float64, borders, and the evaluation of predicted motions."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eval_contexts import make_context

from ssl_jax.augment import motions
from ssl_jax.engine.method import State
from ssl_jax.errors import UserError
from ssl_jax.evals import run as evals
from ssl_jax.evals.kinds.motion import correlation
from ssl_jax.methods import build_method

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (2, 6, 48, 48, 3), np.uint8)
BATCH = {
    "image": IMAGES[0],
    "image2": IMAGES[1],
    "motion": RNG.uniform(-1, 1, (6, 4)).astype(np.float32) * np.array([4, 4, 0.25, 0.12], np.float32),
}
BINS = {"smoke": (9, 9, 9, 9), "synthetic": (7, 7, 20)}
every_source = pytest.mark.parametrize("variant", BINS)


def load(variant="smoke", **changes):
    """(config, method) with a network that compiles at once: one layer on the views."""
    config = importlib.import_module("configs.egomotion").get_config(variant)
    with config.unlocked():
        config.data.image_shape, config.dtype = (48, 48, 3), "float32"
        config.model.encoder, config.model.layer = dict(name="mlp", widths=(5,), batch_norm=False), "pooled"
        config.model.embed = config.model.head = dict(widths=())
        for key, value in changes.items():
            config.model[key] = value
    return config, build_method(config)


def start(method):
    """A state whose classifier, which starts at zero, has random weights."""
    params, mutable = jax.jit(method.init)(jax.random.key(0), BATCH, {})
    return State(jnp.int32(0), params, {}, mutable, {})


def with_random_classifier(state):
    classifier = state.params["net"]["classifier"]
    kernel = jnp.asarray(np.random.default_rng(1).standard_normal(classifier["kernel"].shape), jnp.float32)
    return state._replace(params={"net": {**state.params["net"], "classifier": {**classifier, "kernel": kernel}}})


def call(method, function, state, batch=BATCH, key=0):
    return jax.device_get(jax.jit(getattr(method.fns, function))(state.params, state.mutable, batch, jax.random.key(key)))


@every_source
@pytest.mark.full
def test_loss_starts_at_the_sum_of_the_logarithms_of_the_numbers_of_bins(variant):
    _, method = load(variant)
    state = start(method)
    value, (_, logs) = jax.jit(method.phases[0].loss)(state.params, state, BATCH, jax.random.key(1))
    np.testing.assert_allclose(value, np.log(BINS[variant]).sum(), rtol=1e-6)
    np.testing.assert_allclose([logs["chance_dx"], logs["chance_rotation"]], [1 / BINS[variant][0], 1 / BINS[variant][2]], rtol=1e-6)


@every_source
def test_loss_and_accuracies_equal_a_float64_loop_over_the_axes(variant):
    _, method = load(variant)
    state = with_random_classifier(start(method))
    value, (_, logs) = jax.jit(method.phases[0].loss)(state.params, state, BATCH, jax.random.key(1))
    total = 0
    for axis, asked in call(method, "pretext", state, key=1).items():
        rows, answers = asked["logits"][:, 0].astype(np.float64), asked["answers"][:, 0]
        total += np.mean([np.log(np.exp(row).sum()) - row[answer] for row, answer in zip(rows, answers, strict=True)])
        np.testing.assert_allclose(logs[f"accuracy_{axis}"], (rows.argmax(-1) == answers).mean(), rtol=1e-6)
    np.testing.assert_allclose(value, total, rtol=1e-5)
    assert abs(total - np.log(BINS[variant]).sum()) > 0.1


def test_both_views_pass_the_same_weights_and_swapping_them_swaps_the_halves_of_the_joined_features():
    _, method = load()
    state = with_random_classifier(start(method))
    first, second = (np.asarray(method.encode(state.params, state.mutable, BATCH[name])["pooled"]) for name in ("image", "image2"))
    kernel = np.asarray(state.params["net"]["classifier"]["kernel"])
    swapped = {**BATCH, "image": BATCH["image2"], "image2": BATCH["image"]}
    for batch, halves in ((BATCH, (first, second)), (swapped, (second, first))):
        logits = np.concatenate([asked["logits"][:, 0] for asked in call(method, "pretext", state, batch).values()], 1)
        np.testing.assert_allclose(logits, np.concatenate(halves, 1) @ kernel, rtol=1e-4, atol=1e-4)


def test_no_motion_is_in_the_middle_bin_swapped_pairs_in_mirrored_bins_and_large_motions_in_the_last():
    _, method = load()
    state, size = start(method), 9

    def answers(motion):
        return np.stack([a["answers"][:, 0] for a in call(method, "pretext", state, {**BATCH, "motion": motion}).values()], 1)

    assert (answers(np.zeros((6, 4), np.float32)) == size // 2).all()
    along = BATCH["motion"] * np.eye(4, dtype=np.float32)[[0, 1, 2, 3, 0, 2]]  # each along one axis
    np.testing.assert_array_equal(answers(np.asarray(motions.invert(along))), size - 1 - answers(along))
    assert (answers(np.full((6, 4), 99, np.float32)) == size - 1).all() and (answers(np.full((6, 4), -99, np.float32)) == 0).all()


def affine(view):
    """float64 [3, 3]: places in a window -> places in the picture, whose first channels are its coordinates."""
    y, x = np.mgrid[: view.shape[0], : view.shape[1]] - (view.shape[0] - 1) / 2
    inputs = np.stack([x.ravel(), y.ravel(), np.ones(x.size)], 1)
    found, *_ = np.linalg.lstsq(inputs, view[..., :2].reshape(-1, 2).astype(np.float64), rcond=None)
    return np.concatenate([found.T, [[0, 0, 1]]])


@pytest.mark.full
def test_labels_are_relative_motions_of_the_second_window_in_the_frame_of_the_first():
    """Both windows of a picture of coordinates, fitted by affine maps; the difference of their motions is not the label."""
    config, method = load("synthetic", axes=(("dx", 3.5, 7), ("dy", 3.5, 7), ("rotation", 0.5, 20), ("zoom", 0.2, 3)))
    y, x = np.mgrid[:48, :48].astype(np.float32) - 23.5
    pictures = jnp.asarray(np.broadcast_to(np.stack([x, y, 0 * x], -1), (6, 48, 48, 3)))
    views = np.asarray(method.views(pictures, jax.random.key(3)))
    labels = np.stack([found["true"] for found in call(method, "motion", start(method), {"image": pictures}, key=3).values()], 1)
    differences = []
    for (first, second), (dx, dy, turn, log_zoom) in zip(views, labels, strict=True):
        between = np.linalg.inv(affine(second)) @ affine(first)  # takes places of the first window to the second
        scale = np.exp(log_zoom) * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        np.testing.assert_allclose(between[:2], np.concatenate([scale, [[dx], [dy]]], 1), atol=1e-4)
        differences.append(affine(first)[:2, 2] - affine(second)[:2, 2] - [dx, dy])
    assert np.abs(differences).max() > 0.3
    assert np.abs(labels[:, :2] - np.round(labels[:, :2])).max() == 0  # whole pixels
    assert config.model.pairs.limits[3] == 0 and (labels[:, 3] == 0).all()


@pytest.mark.full
def test_windows_of_one_color_show_no_border():
    _, method = load("synthetic")
    views = method.views(jnp.full((6, 48, 48, 3), 200, jnp.uint8), jax.random.key(0))
    assert views.shape == (6, 2, 16, 16, 3)
    np.testing.assert_allclose(views, 200 / 255, atol=1e-6)


def test_predicted_motion_is_the_mean_of_the_centers_of_the_bins():
    _, method = load("synthetic")
    plain = start(method)
    assert all(np.abs(found["predicted"]).max() < 1e-6 for found in call(method, "motion", plain).values())
    state = with_random_classifier(plain)
    asked, found = call(method, "pretext", state), call(method, "motion", state)
    for axis, limit, bins in (("dx", 3.5, 7), ("dy", 3.5, 7), ("rotation", 0.5, 20)):
        edges = np.linspace(-limit, limit, bins + 1)
        p = np.exp(asked[axis]["logits"][:, 0].astype(np.float64))
        expected = (p / p.sum(1, keepdims=True)) @ ((edges[1:] + edges[:-1]) / 2)
        np.testing.assert_allclose(found[axis]["predicted"], expected, rtol=1e-4, atol=1e-5)
        inside = np.digitize(found[axis]["true"], edges[1:-1])
        np.testing.assert_array_equal(inside, asked[axis]["answers"][:, 0])


def context(method, state, batch=BATCH):
    """The evaluations' view of `state` and of the pairs of `batch` as the data."""
    fns = {name: getattr(method.fns, name) for name in ("pretext", "motion")}
    functions = {name: functools.partial(jax.jit(function), state.params, state.mutable) for name, function in fns.items()}
    columns = {name: batch[name] for name in ("image2", "motion")}
    inputs = ("image", "image2", "motion")
    return make_context(batch["image"], columns={"train": columns, "test": columns}, inputs=inputs, **functions)


@pytest.mark.full
def test_evaluations_have_the_numbers_of_every_axis_beside_chance():
    _, method = load()
    state = with_random_classifier(start(method))
    found = evals.run({"own": {"kind": "pretext"}, "motion": {"kind": "motion"}}, context(method, state))
    asked, moved = call(method, "pretext", state), call(method, "motion", state)
    for axis in ("dx", "dy", "rotation", "zoom"):
        right = asked[axis]["logits"].argmax(-1) == asked[axis]["answers"]
        assert found["own"].metrics[f"own/{axis}_accuracy"] == pytest.approx(100 * right.mean())
        assert found["own"].metrics[f"own/{axis}_chance"] == pytest.approx(100 / 9)
        predicted, true = (moved[axis][name].astype(np.float64) for name in ("predicted", "true"))
        metrics = {name: found["motion"].metrics[f"motion/{axis}_{name}"] for name in ("error", "error_constant", "correlation")}
        assert metrics["error"] == pytest.approx(np.abs(predicted - true).mean(), rel=1e-5)
        assert metrics["error_constant"] == pytest.approx(np.abs(true - np.median(true)).mean(), rel=1e-5)
        assert metrics["correlation"] == pytest.approx(np.corrcoef(predicted, true)[0, 1], rel=1e-4)
    assert found["own"].picture is None
    picture = found["motion"].picture
    assert picture.shape == (320, 1200, 3) and picture.dtype == np.uint8 and len(np.unique(picture)) > 20
    assert "1 questions with 9 answers about dx" in found["own"].protocol
    assert "motion dx, dy, rotation, zoom" in found["motion"].protocol


def test_constant_predictions_have_no_correlation():
    values = np.random.default_rng(0).standard_normal(50)
    assert correlation(np.full(50, 0.1), values) == 0
    assert correlation(3 * values + 1, values) == pytest.approx(1)
    assert correlation(-values, values) == pytest.approx(-1)


@pytest.mark.parametrize(
    ("variant", "changes", "message"),
    [
        ("synthetic", {"pairs": dict(name="synthetic", size=40, start=(0, 0, 0, 0), limits=(9, 9, 0, 0))}, "so that no border shows"),
        ("smoke", {"pairs": dict(name="poses")}, "config.model.pairs.name has no 'poses'; valid: data, synthetic"),
        ("smoke", {"axes": (("dx", 4.0, 9), ("dx", 4.0, 9))}, "are not different names of the 4 numbers of a motion"),
        ("smoke", {"pairs": dict(name="data", length=1)}, "are not different names of the 1 numbers"),
    ],
)
def test_bad_input_is_one_line(variant, changes, message):
    with pytest.raises(UserError) as error:
        load(variant, **changes)
    assert message in str(error.value) and "\n" not in str(error.value)

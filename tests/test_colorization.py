"""Colorization: the loss at the start, float64 oracles, rebalancing, and no gradient from colors to the encoder."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax.augment import hue, lab
from ssl_jax.augment.pixels import block_means
from ssl_jax.engine.method import State
from ssl_jax.errors import UserError
from ssl_jax.experiment import config as configs
from ssl_jax.methods import build_method, colorization
from ssl_jax.models.common import create, run
from ssl_jax.models.hypercolumns import HypercolumnHead, on_grid
from ssl_jax.objectives import histograms

ROOT = pathlib.Path(__file__).parent.parent


def load(*overrides, variant="smoke", shape=(48, 48, 3)):
    config = configs.load(f"{ROOT}/configs/colorization.py:{variant}", [f"--config.{text}" for text in overrides])
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.data.image_shape, config.dtype = shape, "float32"
    return config


def pictures(count=4, side=48, seed=0):
    """uint8 [count, side, side, 3] with large patches of saturated colors."""
    small = np.random.default_rng(seed).integers(0, 256, (count, 6, 6, 3))
    return small.repeat(side // 6, 1).repeat(side // 6, 2).astype(np.uint8)


def start(config, images):
    method = build_method(config)
    params, mutable = jax.jit(method.init)(jax.random.key(0), {"image": images}, {})
    return method, params, State(jnp.int32(0), params, {}, mutable, {})


def first_loss(config, images):
    method, params, state = start(config, images)
    return jax.jit(method.phases[0].loss)(params, state, {"image": images}, jax.random.key(1))


# --- losses


@pytest.mark.full
def test_loss_at_start_is_the_log_of_the_number_of_bins():
    images = pictures()
    for grid, bins in ((10, 261), (20, 77)):
        loss, (_, logs) = first_loss(load(f"model.target.grid={grid}"), images)
        np.testing.assert_allclose([loss, logs["nll"]], np.log(bins), rtol=1e-5)
        assert logs["colored"] == 1
    _, (_, logs) = first_loss(hue_config(), images)
    assert logs["hue"] < np.log(32) and logs["chroma"] < np.log(32)  # less the entropy of the targets


def regression_config():
    config = load()
    with config.unlocked():
        config.model.target = dict(name="ab_regression")
    return config


@pytest.mark.full
def test_squared_error_equals_a_float64_loop_and_decodes_to_gray_at_the_start():
    images = pictures(2, 48)
    method, params, state = start(regression_config(), images)
    rgb = jnp.asarray(images, jnp.float32) / 255
    target = colorization.ab_regression(4)
    logits = np.random.default_rng(0).standard_normal((2, 12, 12, 2)).astype(np.float32)
    value, (_, logs) = target.loss(logits, rgb, {}, 0)
    ab = np.asarray(lab.rgb_to_lab(rgb)[..., 1:], np.float64)
    errors = [
        (logits[b, row, column, c] - ab[b, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4, c].mean() / 110) ** 2
        for b, row, column, c in np.ndindex(logits.shape)
    ]
    np.testing.assert_allclose(value, np.mean(errors), rtol=1e-5)
    assert logs["colored"] == 1
    painted = np.asarray(method.fns.reconstruct(params, state.mutable, images))  # the last layer starts at zero
    assert np.ptp(painted, axis=-1).max() < 2e-3


def hue_config():
    config = load()
    with config.unlocked():
        config.model.target = dict(name="hue_chroma", bins=32, window=8, hue_weight=5.0)
    return config


def test_soft_cross_entropy_and_divergence_against_float64():
    rng = np.random.default_rng(0)
    logits, targets = rng.standard_normal((2, 3, 7)), rng.dirichlet(np.ones(7), (2, 3))
    targets[0, 0] = np.eye(7)[2]
    log_q = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(histograms.soft_cross_entropy(jnp.array(logits), targets), -(targets * log_q).sum(-1), rtol=1e-5)
    entropy = -np.where(targets > 0, targets * np.log(np.maximum(targets, 1e-300)), 0).sum(-1)
    np.testing.assert_allclose(histograms.entropy(jnp.array(targets)), entropy, atol=1e-6)
    np.testing.assert_allclose(histograms.divergence(jnp.array(logits), targets), -(targets * log_q).sum(-1) - entropy, rtol=1e-4)
    np.testing.assert_allclose(histograms.divergence(jnp.log(targets[1]), targets[1]), 0, atol=1e-6)


@pytest.mark.full
def test_loss_of_bins_equals_a_float64_loop():
    """Two images in color and a gray one; the frequencies are not uniform."""
    rgb = np.concatenate([pictures(2, 12), np.full((1, 12, 12, 3), 90)]) / np.float32(255)
    target = colorization.ab_bins(stride=4, grid=20, neighbors=3, sigma=5.0, rebalance=0.5)
    rng, bins = np.random.default_rng(0), lab.ab_bins(20).astype(np.float64)
    logits, frequencies = rng.standard_normal((3, 3, 3, len(bins))), rng.dirichlet(np.ones(len(bins)))
    value, (update, logs) = target.loss(
        jnp.array(logits, jnp.float32), jnp.array(rgb), {"frequencies": jnp.array(frequencies, jnp.float32)}, jnp.int32(9)
    )
    inverse = 1 / (0.5 * frequencies + 0.5 / len(bins))
    weights = inverse / (frequencies * inverse).sum()
    ab = lab._to_lab(rgb.astype(np.float64), np)[..., 1:].reshape(3, 3, 4, 3, 4, 2).mean((2, 4))
    total, nll, counts = 0.0, [], np.zeros(len(bins))
    for image, row, column in np.ndindex(3, 3, 3):
        distance = ((bins - ab[image, row, column]) ** 2).sum(-1)
        near = np.argsort(distance)[:3]
        soft = np.exp(-distance[near] / 50) / np.exp(-distance[near] / 50).sum()
        log_q = logits[image, row, column] - np.log(np.exp(logits[image, row, column]).sum())
        if image < 2:
            total -= weights[near[0]] * (soft * log_q[near]).sum()
            nll.append(-log_q[near[0]])
            counts[near[0]] += 1
    np.testing.assert_allclose(value, total / 27, rtol=1e-4)
    np.testing.assert_allclose(logs["nll"], np.mean(nll), rtol=1e-5)
    np.testing.assert_allclose(logs["colored"], 2 / 3, rtol=1e-6)
    np.testing.assert_allclose(update["frequencies"], 0.9 * frequencies + 0.1 * counts / 18, atol=1e-6)


@pytest.mark.full
def test_loss_of_hue_and_chroma_equals_a_float64_loop():
    rgb = pictures(2, 24).astype(np.float32) / 255
    target = colorization.hue_chroma(stride=4, bins=8, window=6, hue_weight=5.0)
    logits = np.random.default_rng(0).standard_normal((2, 6, 6, 16))
    value, _ = target.loss(jnp.array(logits, jnp.float32), jnp.array(rgb), {}, jnp.int32(0))
    angles, chroma = (np.asarray(x) for x in hue.hue_chroma(jnp.array(rgb)))
    padded = [np.pad(x, ((0, 0), (1, 1), (1, 1)), "edge") for x in (angles, chroma)]
    total = 0.0
    for image, row, column in np.ndindex(2, 6, 6):
        parts, cell = [], (image, slice(4 * row, 4 * row + 4), slice(4 * column, 4 * column + 4))
        for x, scores in zip(padded, np.split(logits[image, row, column], 2), strict=True):
            p = np.histogram(x[image, 4 * row : 4 * row + 6, 4 * column : 4 * column + 6], 8, (0, 1))[0] / 36
            log_q = scores - np.log(np.exp(scores).sum())
            parts.append(sum(a * (np.log(a) - b) for a, b in zip(p, log_q, strict=True) if a))
        gray = rgb.mean(-1)[cell]
        possible = np.clip(np.minimum(3 * gray, 3 - 3 * gray), 0, 1).mean()
        total += 5 * chroma[cell].mean() * parts[0] + possible * parts[1]
    np.testing.assert_allclose(value, total / 72, rtol=1e-4)


@pytest.mark.full
def test_rebalancing_weights_average_one_under_the_empirical_distribution():
    """After one step the frequencies are those of the batch, and the weights of its colors average 1."""
    images = pictures()
    _, (update, _) = first_loss(load(), images)
    frequencies = update["frequencies"]
    np.testing.assert_allclose(frequencies.sum(), 1, rtol=1e-5)
    weights = lab.rebalancing_weights(frequencies)
    np.testing.assert_allclose((frequencies * weights).sum(), 1, rtol=1e-5)
    config, bins = load(), lab.ab_bins(20)
    views = build_method(config).views(images, jax.random.key(1))[:, 0]
    codes = lab.nearest_bin(block_means(lab.rgb_to_lab(views)[..., 1:], 4), bins)
    np.testing.assert_allclose(np.asarray(weights)[np.asarray(codes)].mean(), 1, rtol=1e-4)


def test_frequencies_are_means_first_and_a_moving_average_later():
    rows = np.random.default_rng(0).dirichlet(np.ones(5), 300)
    p = jnp.full(5, 0.2)
    for step, row in enumerate(rows[:50]):
        p = histograms.update_frequencies(p, jnp.array(row), step)
    np.testing.assert_allclose(p, rows[:50].mean(0), atol=1e-6)
    after = histograms.update_frequencies(p, jnp.array(rows[60]), 1000)
    np.testing.assert_allclose(after, 0.99 * p + 0.01 * rows[60], rtol=1e-5)
    np.testing.assert_array_equal(histograms.update_frequencies(p, jnp.zeros(5), 3), p)


@pytest.mark.full
def test_gray_images_teach_nothing():
    images = np.repeat(np.random.default_rng(0).integers(0, 256, (4, 48, 48, 1), np.uint8), 3, -1)
    config = load()
    method, params, state = start(config, images)
    (loss, (update, logs)), grads = jax.value_and_grad(method.phases[0].loss, has_aux=True)(
        params, state, {"image": images}, jax.random.key(1)
    )
    assert loss == logs["colored"] == 0 and not any(np.any(g) for g in jax.tree.leaves(grads))
    np.testing.assert_array_equal(update["frequencies"], state.mutable["frequencies"])


# --- what the network sees


@pytest.mark.full
@pytest.mark.parametrize("variant", ["ab_bins", "hue_chroma"])
def test_encoder_gets_no_gradient_from_colors(variant, monkeypatch):
    """The derivative of every layer with respect to a and b is exactly 0, and that with respect to L is not."""
    monkeypatch.setattr(lab, "rgb_to_lab", lambda x: x)  # the images of this test are Lab already
    config = load() if variant == "ab_bins" else hue_config()
    method, params, state = start(config, pictures())

    def total(x):
        return sum(jnp.sum(jnp.sin(layer)) for layer in method.encode(params, state.mutable, x).values())

    x = jax.random.uniform(jax.random.key(0), (2, 16, 16, 3))
    gradient = np.asarray(jax.grad(total)(x))
    if variant == "ab_bins":
        assert not gradient[..., 1:].any() and gradient[..., 0].any()
    else:  # the mean of the channels: colors of one gray value are one image
        np.testing.assert_array_equal(gradient[..., :1].repeat(3, -1), gradient)
        assert gradient.any()


@pytest.mark.full
def test_encode_sees_bytes_and_floats_alike_and_ignores_colors():
    method, params, state = start(load(), pictures())
    images = pictures(seed=1)
    features = method.encode(params, state.mutable, images)
    same = method.encode(params, state.mutable, images / np.float32(255))
    np.testing.assert_allclose(features["pooled"], same["pooled"], rtol=1e-4, atol=1e-5)
    colors = lab.rgb_to_lab(jnp.array(images)) * jnp.array([1, 0, 0])
    gray = method.encode(params, state.mutable, lab.lab_to_rgb(colors))
    np.testing.assert_allclose(features["pooled"], gray["pooled"], rtol=1e-2, atol=1e-3)


@pytest.mark.full
def test_head_of_hypercolumns_equals_one_large_layer():
    keys = jax.random.split(jax.random.key(0), 4)
    maps = [jax.random.normal(key, (2, side, side, c)) for key, side, c in zip(keys[:3], (8, 4, 2), (3, 5, 7), strict=True)]
    head = HypercolumnHead(outputs=6, width=9)
    params, state = create(head, keys[3], maps, (8, 8))
    assert state == {} and not np.any(run(head, params, {}, maps, (8, 8), train=True)[0])
    params["linear"]["kernel"] = jax.random.normal(keys[3], (9, 6))
    params["bias"] = jnp.arange(9.0)
    first = jnp.concatenate([params[f"map{i}"]["kernel"] for i in (1, 2, 3)])
    hidden = jnp.maximum(on_grid(maps, (8, 8)) @ first + params["bias"], 0)
    out, _ = run(head, params, {}, maps, (8, 8), train=False)
    np.testing.assert_allclose(out, hidden @ params["linear"]["kernel"], rtol=1e-4, atol=1e-4)
    assert 0.5 < np.std(on_grid(maps, (8, 8)) @ first) / np.sqrt(2 * 0.7) < 1.5  # maps of one variance give a sum of that scale


@pytest.mark.parametrize("config", [load, regression_config, hue_config], ids=["ab_bins", "ab_regression", "hue_chroma"])
@pytest.mark.full
def test_certain_predictions_give_back_the_colors(config):
    """Decoded from the logarithms of the true distributions, patches of one color come back."""
    images = pictures(2, 48).astype(np.float32) / 255
    rgb = jnp.array(0.25 + images / 2)
    if config is load:
        target, bins = colorization.ab_bins(4, 10, 5, 5.0, 0.5), lab.ab_bins(10)
        logits = jnp.log(lab.soft_encode(block_means(lab.rgb_to_lab(rgb)[..., 1:], 4), bins) + 1e-9)
    elif config is regression_config:
        target = colorization.ab_regression(4)
        logits = block_means(lab.rgb_to_lab(rgb)[..., 1:], 4) / 110
    else:
        target = colorization.hue_chroma(4, 32, 4, 5.0)
        logits = jnp.concatenate([jnp.log(hue.local_histograms(x, 32, 4, 4) + 1e-9) for x in hue.hue_chroma(rgb)], -1)
    out = np.asarray(target.decode(logits, rgb))
    inside = (slice(None), slice(3, None, 8), slice(3, None, 8))  # between two patches the prediction is interpolated
    assert np.abs(out - rgb)[inside].mean() < 0.03


# --- bad input


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.stride=5", "config.model.stride=5 does not divide views of 32 x 32 pixels"),
        ("model.target.grid=1", "a grid of 1 for the bins of a and b is not allowed"),
        ("model.target.name=rgb", "config.model.target.name has no 'rgb'"),
        ("model.maps=('layer9',)", "config.model.maps has 'layer9', and the encoder has the maps stem, layer1"),
    ],
)
def test_bad_input_is_one_line(override, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        jax.eval_shape(lambda: start(load(override), pictures())[1])


def test_gray_data_are_refused():
    with pytest.raises(UserError, match="needs images in color, and 'scenes' has images of 1 channel"):
        build_method(load(shape=(48, 48, 1)))


def test_window_of_histograms_has_to_be_centered():
    config = hue_config()
    with config.unlocked():
        config.model.target.window = 7
    with pytest.raises(UserError, match=r"config.model.target.window=7 must be config.model.stride=4 plus 0, 2, 4"):
        build_method(config)

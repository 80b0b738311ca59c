"""The evaluation of reconstructed colors: areas and colorfulness in closed form, and reconstructions whose results are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eval_contexts import make_context, means, smooth, to_floats

from ssl_jax.augment import lab
from ssl_jax.errors import UserError
from ssl_jax.evals import run as evals
from ssl_jax.evals.kinds import colors

KINDS = np.arange(60) % 3
SPEC = {"colors": {"kind": "colors", "examples": 40}}


def in_color(count, seed):
    """uint8 [count, 12, 12, 3] whose label, 0 to 2, is the brightest channel."""
    images = 90 + smooth(seed, count) // 6
    images[np.arange(count), :, :, KINDS[:count]] += 100
    return images


def measure(reconstruct):
    labels = {"train": KINDS, "test": KINDS[:50]}
    functions = dict(reconstruct=jax.jit(reconstruct), extractor=lambda spec, mode: means(spec, mode))
    context = make_context(in_color(60, 0), in_color(50, 1), labels=labels, **functions)
    found = evals.run(SPEC, context)["colors"].metrics
    return {name.removeprefix("colors/"): value for name, value in found.items()}


def without_color(images):
    lightness = lab.rgb_to_lab(to_floats(images))[..., :1]
    return lab.lab_to_rgb(jnp.concatenate([lightness, jnp.zeros((*lightness.shape[:3], 2))], -1))


def test_area_is_one_minus_the_distance_over_150_also_by_thresholds():
    rng = np.random.default_rng(0)
    true, found = rng.uniform(-40, 40, (2, 3, 5, 5, 2))
    distances = np.linalg.norm(true - found, axis=-1).ravel()
    thresholds = (np.arange(15_000) + 0.5) / 100
    assert colors.areas(true, found)[0] == pytest.approx(100 * np.mean([(distances <= t).mean() for t in thresholds]), abs=1e-2)
    assert colors.areas(true, true) == (100, 100)
    assert colors.areas(true, true + np.array([0, 500]))[0] == 0


def test_balanced_area_counts_each_color_alike():
    true = np.array([[40.0, 30.0]] * 99 + [[-30.0, 30.0]])
    found = np.where(true[:, :1] > 0, true, true + np.array([0, 75]))  # the rare color is wrong by half of the range
    assert colors.areas(true, found) == pytest.approx((99.5, 75))


def test_colorfulness_equals_a_loop_and_gray_has_none():
    images = np.random.default_rng(0).random((3, 4, 5, 3))
    for image, found in zip(images, colors.colorfulness(images), strict=True):
        pixels = [tuple(255 * x) for x in image.reshape(-1, 3)]
        rg, yb = [r - g for r, g, b in pixels], [(r + g) / 2 - b for r, g, b in pixels]
        expected = np.hypot(np.std(rg), np.std(yb)) + 0.3 * np.hypot(np.mean(rg), np.mean(yb))
        assert found == pytest.approx(expected)
    assert np.allclose(colors.colorfulness(np.repeat(images[..., :1], 3, -1)), 0)


@pytest.mark.full
def test_true_colors_are_perfect():
    found = measure(to_floats)
    assert found["auc"] == found["auc_balanced"] == pytest.approx(100, abs=1e-3)
    assert found["top1_colorized"] == found["top1_true"] == 100
    assert found["colorfulness"] == pytest.approx(found["colorfulness_true"])


@pytest.mark.full
def test_images_that_stay_gray_are_as_good_as_gray_ones():
    found = measure(without_color)
    assert found["auc"] == pytest.approx(found["auc_gray"], abs=1e-2) and found["auc"] < 80
    assert found["auc_balanced"] == pytest.approx(found["auc_balanced_gray"], abs=1e-2)
    assert found["top1_colorized"] == found["top1_gray"] < found["top1_true"]
    assert found["colorfulness"] < 1 < 20 < found["colorfulness_true"]


def test_images_of_one_channel_are_refused():
    with pytest.raises(UserError, match="needs images in color, not of 1 channel"):
        evals.check_needs(SPEC, make_context(in_color(60, 0)[..., :1], reconstruct=to_floats))

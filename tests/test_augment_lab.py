"""Lab colors, their bins, hue and chroma: formulas of CIE 1976 in float64, scikit-image, OpenCV, colorsys, and closed forms."""

import colorsys

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax.augment import color, hue, lab
from ssl_jax.errors import UserError

CORNERS = np.array([[r, g, b] for r in (0, 1) for g in (0, 1) for b in (0, 1)], np.float64)


def random_colors(count=4000, seed=0):
    """float64 [count, 3]: random bytes, corners, and grays."""
    colors = np.random.default_rng(seed).integers(0, 256, (count, 3)) / 255
    grays = np.repeat(np.arange(256)[:, None] / 255, 3, axis=1)
    return np.concatenate([colors, CORNERS, grays])


def lab_of(rgb):
    """One color, from the definitions: sRGB, Rec. 709 primaries, D65, CIE 1976."""
    linear = [((c + 0.055) / 1.055) ** 2.4 if c > 0.04045 else c / 12.92 for c in rgb]
    matrix = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))
    xyz = [sum(m * c for m, c in zip(row, linear, strict=True)) for row in matrix]
    ratios = [v / white for v, white in zip(xyz, (0.95047, 1.0, 1.08883), strict=True)]
    x, y, z = (t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116 for t in ratios)
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def test_rgb_to_lab_equals_the_definition_and_its_ranges():
    colors = random_colors()
    out = jax.jit(lab.rgb_to_lab)(colors.astype(np.float32))
    want = np.array([lab_of(c) for c in colors])
    np.testing.assert_allclose(out, want, atol=2e-4)
    np.testing.assert_allclose(lab._to_lab(colors, np), want, atol=1e-10)  # the path of `ab_bins`
    low, high = np.min(out, 0), np.max(out, 0)
    np.testing.assert_allclose(low, [0, -86.18, -107.86], atol=0.01)
    np.testing.assert_allclose(high, [100, 98.23, 94.48], atol=0.01)
    assert np.abs(out[-256:, 1:]).max() < 0.01  # grays
    white = lab.rgb_to_lab(jnp.ones((1, 2, 3, 3)))
    np.testing.assert_allclose(white[..., 0], 100, atol=1e-3)


def test_rgb_to_lab_equals_scikit_image():
    skimage = pytest.importorskip("skimage.color", reason="scikit-image is not installed")
    colors = random_colors()
    np.testing.assert_allclose(lab._to_lab(colors, np), skimage.rgb2lab(colors), atol=1e-10)
    values = np.random.default_rng(1).uniform((0, -80, -80), (100, 80, 80), (2000, 3))  # many outside of sRGB
    y = (values[:, 0] + 16) / 116
    values = values[(y + values[:, 1] / 500 > 16 / 116) & (y - values[:, 2] / 200 > 16 / 116)]  # no negative light
    assert len(values) > 1000
    np.testing.assert_allclose(lab.lab_to_rgb(jnp.asarray(values, jnp.float32)), skimage.lab2rgb(values), atol=2e-4)


def test_rgb_to_lab_equals_opencv():
    colors = random_colors().astype(np.float32)
    want = cv2.cvtColor(colors[:, None], cv2.COLOR_RGB2Lab)[:, 0]
    np.testing.assert_allclose(lab.rgb_to_lab(jnp.asarray(colors)), want, atol=0.5)  # interpolates in tables


def test_bytes_and_floats_have_the_same_colors():
    colors = np.random.default_rng(0).integers(0, 256, (2, 3, 5, 3)).astype(np.uint8)
    floats = colors / np.float32(255)
    np.testing.assert_allclose(lab.rgb_to_lab(jnp.asarray(colors)), lab.rgb_to_lab(jnp.asarray(floats)), atol=1e-4)
    for a, b in zip(hue.hue_chroma(jnp.asarray(colors)), hue.hue_chroma(jnp.asarray(floats)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_lab_to_rgb_is_the_inverse_and_clips():
    colors = random_colors().astype(np.float32)
    back = jax.jit(lambda x: lab.lab_to_rgb(lab.rgb_to_lab(x)))(colors)
    np.testing.assert_allclose(back, colors, atol=2e-5)
    outside = np.array(lab.lab_to_rgb(jnp.array([[50.0, 120, 0], [100, 0, 120], [0, -50, 30]])))
    assert outside.min() >= 0 and outside.max() <= 1


@pytest.mark.full
def test_lab_has_finite_gradients_that_equal_differences():
    def curve(x):
        return jnp.sum(jnp.sin(lab.lab_to_rgb(lab.rgb_to_lab(x) + jnp.array([0, 1.0, -1.0]))))

    edges = jnp.array([[0.0] * 3, [1.0] * 3, [0.5] * 3, [0, 1, 0.04045]])
    for function in (curve, lambda x: jnp.sum(lab.rgb_to_lab(x))):
        assert np.isfinite(jax.jit(jax.grad(function))(edges)).all()
    x = jnp.array([0.3, 0.6, 0.45])
    numeric = [
        (np.array(lab_of(x + 1e-4 * e)).sum() - np.array(lab_of(x - 1e-4 * e)).sum()) / 2e-4 for e in np.eye(3)
    ]
    np.testing.assert_allclose(jax.grad(lambda x: jnp.sum(lab.rgb_to_lab(x)))(x), numeric, rtol=1e-3)


# Bins of a and b
@pytest.mark.parametrize(("grid", "count"), [(10, 261), (15, 126), (20, 77)])
def test_ab_bins_are_those_of_the_colors_of_srgb(grid, count):
    """261 at a grid of 10."""
    bins = lab.ab_bins(grid)
    assert bins.shape == (count, 2) and bins.dtype == np.float32 and (bins % grid == 0).all()
    assert (np.lexsort((bins[:, 1], bins[:, 0])) == np.arange(count)).all()
    levels = np.arange(0, 256, 15) / 255
    cube = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(-1, 3)
    ab = lab._to_lab(cube, np)[:, 1:]
    found = np.unique(np.round(ab / grid) * grid, axis=0)
    assert {tuple(b) for b in found} <= {tuple(b) for b in bins}
    nearest = bins[lab.nearest_bin(jnp.asarray(ab, jnp.float32), bins)]
    assert np.linalg.norm(nearest - ab, axis=1).max() <= grid * np.sqrt(0.5) + 1e-3


@pytest.mark.slow
def test_ab_bins_equal_those_of_all_colors_of_256_levels():
    levels, found = np.arange(256) / 255, set()
    for red in levels:
        colors = np.stack(np.meshgrid([red], levels, levels), -1).reshape(-1, 3)
        found |= {tuple(b) for b in np.unique(np.round(lab._to_lab(colors, np)[:, 1:] / 10) * 10, axis=0)}
    assert found == {tuple(b) for b in lab.ab_bins(10)}


@pytest.mark.parametrize("grid", [0, 1, -10, 101])
def test_an_impossible_grid_raises_user_error(grid):
    with pytest.raises(UserError, match=f"a grid of {grid} for the bins of a and b is not allowed; give 2 to 100"):
        lab.ab_bins(grid)


@pytest.mark.parametrize("neighbors", [1, 5, 10])
def test_soft_encode_against_a_loop(neighbors):
    bins = lab.ab_bins(10)
    ab = np.concatenate([np.random.default_rng(0).uniform(-80, 80, (60, 2)), bins[:3], [[150, -150]]])
    out = np.asarray(jax.jit(lambda x: lab.soft_encode(x, bins, neighbors, 5.0))(ab.astype(np.float32).reshape(8, 8, 2)))
    assert out.shape == (8, 8, 261)
    for row, color_ in zip(out.reshape(64, 261), ab, strict=True):
        distance = np.linalg.norm(bins - color_, axis=1)
        reach = np.sort(distance)[neighbors - 1]
        log_weight = np.where(distance <= reach + 1e-4, -(distance**2) / 50, -np.inf)
        want = np.exp(log_weight - log_weight.max())
        np.testing.assert_allclose(row, want / want.sum(), atol=1e-4)
        np.testing.assert_allclose(row.sum(), 1, rtol=1e-5)
        assert np.isclose(distance[row.argmax()], distance.min(), atol=1e-3)  # the likeliest is the nearest


def test_rebalancing_weights_closed_forms():
    p = jnp.array([0.5, 0.25, 0.15, 0.1])
    weights = np.asarray(lab.rebalancing_weights(p))
    want = 1 / (0.5 * np.asarray(p) + 0.5 / 4)
    np.testing.assert_allclose(weights, want / (np.asarray(p) * want).sum(), rtol=1e-6)
    assert (np.diff(weights) > 0).all()  # larger for rarer bins
    np.testing.assert_allclose(lab.rebalancing_weights(p, 1.0), 1, rtol=1e-6)
    for q in (p, jnp.array([0.7, 0.3, 0, 0]), jnp.array([1.0])):
        for mixture in (0.0, 0.5, 1.0):
            weights = np.asarray(lab.rebalancing_weights(q, mixture))
            np.testing.assert_allclose((np.asarray(q) * weights).sum(), 1, rtol=1e-5)
            assert np.isfinite(weights).all()
    weights = np.asarray(lab.rebalancing_weights(jnp.array([0.7, 0.3, 0, 0])))
    assert weights[2] == weights[1] == weights[3] > weights[0]


def test_annealed_mean_from_the_mean_to_the_mode():
    bins = lab.ab_bins(10)
    logits = 3 * jax.random.normal(jax.random.key(0), (2, 3, 261))
    softmax = jax.nn.softmax(logits)
    np.testing.assert_allclose(lab.annealed_mean(logits, bins, 1.0), np.asarray(softmax, np.float64) @ bins, atol=1e-3)
    np.testing.assert_allclose(lab.annealed_mean(logits, bins, 1e-3), bins[np.argmax(logits, -1)], atol=1e-3)
    q = np.exp(np.log(np.asarray(softmax, np.float64)) / 0.38)  # equation 5 of the paper
    np.testing.assert_allclose(lab.annealed_mean(logits, bins), q / q.sum(-1, keepdims=True) @ bins, atol=1e-3)
    certain = 100 * jax.nn.one_hot(jnp.arange(261), 261)
    np.testing.assert_allclose(lab.annealed_mean(certain, bins), bins, atol=1e-3)


def test_has_color_tells_gray_images():
    ab = np.zeros((3, 4, 5, 2), np.float32)
    ab[1, 2, 2, 1], ab[2, 0, 0, 0] = -5.1, 4.9
    np.testing.assert_array_equal(lab.has_color(ab), [False, True, False])


# Hue and chroma
def test_hue_and_chroma_against_colorsys_and_back():
    colors = random_colors(1000)
    h, c = jax.jit(hue.hue_chroma)(colors.astype(np.float32))
    want = np.array([colorsys.rgb_to_hsv(*color_)[0] for color_ in colors])
    off = (np.asarray(h) - want + 0.5) % 1 - 0.5
    np.testing.assert_allclose(off, 0, atol=2e-6)
    assert np.min(h) >= 0 and np.max(h) < 1
    np.testing.assert_allclose(c, colors.max(1) - colors.min(1), atol=1e-6)
    back = hue.color_from_hue(jnp.asarray(colors.mean(1), jnp.float32), h, c)
    np.testing.assert_allclose(back, colors, atol=2e-6)


@pytest.mark.parametrize(("height", "width", "bins", "window", "stride"), [(9, 12, 8, 7, 1), (10, 7, 32, 3, 2), (5, 5, 4, 5, 1)])
def test_local_histograms_against_a_loop(height, width, bins, window, stride):
    values = np.random.default_rng(0).random((2, height, width), dtype=np.float32)
    values[0, 0, 0] = 1.0  # in the last bin
    out = hue.local_histograms(jnp.asarray(values), bins, window, stride)
    assert out.shape == (2, (height - window) // stride + 1, (width - window) // stride + 1, bins)
    for i, r, c in np.ndindex(out.shape[:3]):
        part = values[i, r * stride :, c * stride :][:window, :window]
        want = np.histogram(part, bins, (0, 1))[0] / window**2
        np.testing.assert_allclose(out[i, r, c], want, atol=1e-6)


def test_a_shift_of_all_hues_by_a_bin_shifts_the_histogram_in_a_circle():
    values = (np.random.default_rng(0).integers(0, 64, (1, 8, 8)) + 0.5).astype(np.float32) / 64
    first = hue.local_histograms(jnp.asarray(values), 16)
    moved = hue.local_histograms(jnp.asarray((values + 1 / 16) % 1), 16)
    np.testing.assert_allclose(np.roll(first, 1, axis=-1), moved, atol=1e-6)


def test_a_window_larger_than_the_image_raises_user_error():
    with pytest.raises(UserError, match="a window of 7 pixels for histograms does not fit images of 6 x 9; use a smaller one"):
        jax.eval_shape(hue.local_histograms, jnp.zeros((1, 6, 9)))


def test_possible_chroma_is_a_trapezoid():
    gray = jnp.array([0, 1 / 6, 1 / 3, 0.5, 2 / 3, 0.9, 1])
    np.testing.assert_allclose(hue.possible_chroma(gray), [0, 0.5, 1, 1, 1, 0.3, 0], atol=1e-6)


@pytest.mark.full
def test_expected_color_of_certain_and_of_contradictory_hues():
    gray, bins = jnp.array([0.4]), 32
    one = jax.nn.one_hot
    certain = hue.expected_color(gray, one(jnp.array([5]), bins), one(jnp.array([6]), bins))
    want = hue.color_from_hue(gray, jnp.array([5.5 / 32]), jnp.array([6.5 / 32]))
    np.testing.assert_allclose(certain, want, atol=1e-5)
    opposite = (one(jnp.array([5]), bins) + one(jnp.array([21]), bins)) / 2
    np.testing.assert_allclose(hue.expected_color(gray, opposite, one(jnp.array([6]), bins)), 0.4, atol=1e-4)  # faded
    chroma = 0.3 * one(jnp.array([2]), bins) + 0.3 * one(jnp.array([6]), bins) + 0.4 * one(jnp.array([9]), bins)
    np.testing.assert_allclose(hue.expected_color(gray, one(jnp.array([5]), bins), chroma), want, atol=1e-5)  # the median


# Against chromatic aberration
@pytest.mark.full
def test_drop_colors_leaves_one_channel_and_faint_noise():
    images = np.random.default_rng(0).random((90, 16, 16, 3), dtype=np.float32)
    out = jax.jit(jax.vmap(color.drop_colors))(images, jax.random.split(jax.random.key(0), 90))
    kept = [np.flatnonzero((np.asarray(o) == i).all((0, 1))) for o, i in zip(out, images, strict=True)]
    assert all(len(k) == 1 for k in kept)
    counts = np.bincount([k[0] for k in kept], minlength=3)
    assert counts.min() > 15
    for o, i, (k,) in zip(np.asarray(out), images, kept, strict=True):
        others = np.delete(o, k, axis=-1)
        assert abs(others.mean() - i[..., k].mean()) < 1e-3
        assert 0.007 < others.std() / i[..., k].std() < 0.013
    sometimes = jax.jit(jax.vmap(lambda image, key: color.drop_colors(image, key, 0.5)))
    with_p = sometimes(images, jax.random.split(jax.random.key(1), 90))
    unchanged = (np.asarray(with_p) == images).all((1, 2, 3)).sum()
    assert 25 < unchanged < 65


def test_project_colors_removes_the_axis_from_green_to_magenta():
    a = np.array([[-1.0, 2, -1]])
    projection = np.eye(3) - a.T @ a / (a @ a.T)
    np.testing.assert_allclose(color.PROJECTION, projection, atol=1e-12)
    image = np.random.default_rng(0).uniform(0.3, 0.7, (5, 6, 3)).astype(np.float32)  # nothing to clip
    out = color.project_colors(image, jax.random.key(0))
    np.testing.assert_allclose(out, image @ projection, atol=1e-6)
    np.testing.assert_allclose(out @ a[0], 0, atol=1e-6)
    np.testing.assert_allclose(color.project_colors(out, jax.random.key(0)), out, atol=1e-6)  # a projection
    gray = jnp.full((2, 2, 3), 0.8)
    np.testing.assert_allclose(color.project_colors(gray, jax.random.key(0)), gray, atol=1e-6)
    extreme = color.project_colors(jnp.array([[[1.0, 0, 0], [0, 0, 1.0]]]), jax.random.key(0))
    assert np.min(extreme) >= 0 and np.max(extreme) <= 1

"""Device-side augmentations: golden pixels, parity with torch, torchvision and PIL, crop and jitter distributions."""

import colorsys
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from torch_reference import require_torch, require_torchvision

from ssl_jax.augment import blur, color, geometry
from ssl_jax.augment.pixels import to_input
from ssl_jax.augment.views import OPERATIONS

GOLDEN = np.array([[(0.2, 0.4, 0.6), (0.9, 0.1, 0.3)], [(0.5, 0.5, 0.5), (0, 0.7, 0.2)]], np.float32)
NEUTRAL = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0}
adjust = jax.jit(color.adjust_colors, static_argnames="style")


def random_image(height, width, seed=0):
    return np.random.default_rng(seed).random((height, width, 3), dtype=np.float32)


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


# Color: expected pixels with 5 digits, before the clip, computed with TensorFlow and torchvision.
@pytest.mark.parametrize(
    ("style", "change", "expected"),
    [
        ("simclr_v2", {"brightness": 1.5}, 1.5 * GOLDEN),
        ("torchvision", {"brightness": 1.5}, 1.5 * GOLDEN),
        ("simclr_v1", {"brightness": 0.25}, GOLDEN + 0.25),
        ("simclr_v1", {"brightness": -0.25}, GOLDEN - 0.25),
        (
            "simclr_v2",
            {"contrast": 1.5},
            [(0.1, 0.3875, 0.7), (1.15, -0.0625, 0.25), (0.55, 0.5375, 0.55), (-0.2, 0.8375, 0.1)],
        ),
        (
            "torchvision",
            {"contrast": 1.5},
            [(0.09268, 0.39268, 0.69268), (1, 0, 0.24268), (0.54268,) * 3, (0, 0.84268, 0.09268)],
        ),
        ("simclr_v2", {"saturation": 1.5}, [(0, 0.3, 0.6), (0.9, 0, 0.225), (0.5,) * 3, (0, 0.7, 0.2)]),
        ("simclr_v1", {"saturation": 0.5}, [(0.4, 0.5, 0.6), (0.9, 0.5, 0.6), (0.5,) * 3, (0.35, 0.7, 0.45)]),
        (
            "torchvision",
            {"saturation": 1.5},
            [(0.11851, 0.41851, 0.71851), (1, 0, 0.26905), (0.50002,) * 3, (0, 0.83315, 0.08315)],
        ),
        (
            "torchvision",
            {"saturation": 0.5},
            [(0.28149, 0.38149, 0.48149), (0.63096, 0.23096, 0.33096), (0.49997,) * 3, (0.21685, 0.56685, 0.31685)],
        ),
        ("simclr_v2", {"hue": 0.1}, [(0.24, 0.2, 0.6), (0.9, 0.38, 0.1), (0.5,) * 3, (0, 0.7, 0.62)]),
        ("torchvision", {"hue": 0.1}, [(0.24, 0.2, 0.6), (0.9, 0.38, 0.1), (0.5,) * 3, (0, 0.7, 0.62)]),
    ],
)
def test_color_jitter_golden_pixels(style, change, expected):
    neutral = NEUTRAL | ({"brightness": 0.0} if style == "simclr_v1" else {})
    out = adjust(GOLDEN, jnp.arange(4), **(neutral | change), style=style)
    np.testing.assert_allclose(out, np.clip(np.reshape(expected, (2, 2, 3)), 0, 1), atol=2e-5)


def test_grayscale_and_solarize_golden_pixels():
    gray = np.reshape([0.36298, 0.36191, 0.49995, 0.43370], (2, 2, 1)) * np.ones(3)
    np.testing.assert_allclose(color.to_grayscale(GOLDEN), gray, atol=2e-5)
    solar = np.reshape([(0.2, 0.4, 0.4), (0.1, 0.1, 0.3), (0.5,) * 3, (0, 0.3, 0.2)], (2, 2, 3))
    np.testing.assert_allclose(color.invert_above(GOLDEN, 0.5), solar, atol=1e-6)


def test_to_input_is_the_same_for_bytes_and_floats():
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    bytes_ = np.round(GOLDEN * 255).astype(np.uint8)
    expected = (bytes_ / 255 - np.array(mean)) / np.array(std)
    np.testing.assert_allclose(to_input(jnp.asarray(bytes_), mean, std), expected, atol=1e-5)
    np.testing.assert_allclose(to_input(jnp.asarray(bytes_ / 255), mean, std), expected, atol=1e-5)


def slow_jitter(image, order, values, additive):
    """TensorFlow's color semantics in float64, pixel by pixel, with the standard library's HSV."""
    image = image.astype(np.float64)
    for operation in order:
        value = float(values[operation])
        if operation == color.BRIGHTNESS:
            image = image + value if additive else image * value
        elif operation == color.CONTRAST:
            mean = image.mean((0, 1))
            image = mean + value * (image - mean)
        else:
            for pixel in np.ndindex(image.shape[:2]):
                h, s, v = colorsys.rgb_to_hsv(*image[pixel])
                if operation == color.HUE:
                    h = (h + value) % 1.0
                else:
                    s = min(s * value, 1.0)
                image[pixel] = colorsys.hsv_to_rgb(h, s, v)
        image = np.clip(image, 0, 1)
    return image


@pytest.mark.parametrize("style", ["simclr_v1", "simclr_v2"])
def test_jitter_in_every_order_against_a_loop(style):
    image = random_image(5, 4)
    image[0, 0], image[0, 1], image[0, 2] = 0.3, 1.0, 0.0  # gray pixels have no hue
    values = (0.3 if style == "simclr_v1" else 1.6, 1.7, 1.8, -0.17)
    orders = np.array(list(itertools.permutations(range(4))))
    out = jax.jit(jax.vmap(lambda order: color.adjust_colors(image, order, *values, style)))(orders)
    assert len({np.asarray(o).round(4).tobytes() for o in out}) > 12  # the order matters
    for order, jittered in zip(orders, out, strict=True):
        np.testing.assert_allclose(jittered, slow_jitter(image, order, values, style == "simclr_v1"), atol=3e-6)


@pytest.mark.parametrize(
    ("values", "order"), [((1.4, 0.3, 1.9, 0.4), (2, 0, 3, 1)), ((0.5, 1.8, 0.2, -0.3), (1, 3, 2, 0))]
)
@pytest.mark.full
def test_jitter_matches_torchvision(values, order):
    torch, functional = require_torch(), require_torchvision().transforms.functional
    image = random_image(9, 7, seed=1)
    expected = torch.from_numpy(image).permute(2, 0, 1)
    names = ("adjust_brightness", "adjust_contrast", "adjust_saturation", "adjust_hue")
    for operation in order:
        expected = getattr(functional, names[operation])(expected, values[operation])
    out = adjust(image, jnp.array(order), *values, style="torchvision")
    np.testing.assert_allclose(out, expected.permute(1, 2, 0).numpy(), atol=2e-5)
    solar = functional.solarize(expected, 0.4).permute(1, 2, 0).numpy()
    np.testing.assert_allclose(color.invert_above(expected.permute(1, 2, 0).numpy(), 0.4), solar, atol=1e-6)


def test_sampled_jitter_is_uniform():
    sample = jax.jit(jax.vmap(lambda key: color.sample_jitter(key, 0.8, 0.4, 1.2, 0.2, "simclr_v2")))
    order, brightness, contrast, saturation, hue = sample(keys(4800))
    _, counts = np.unique(np.asarray(order), axis=0, return_counts=True)
    assert len(counts) == 24
    assert np.sum((counts - 200.0) ** 2 / 200.0) < 49.7  # chi-square, 23 degrees of freedom, 0.1 %
    ranges = ((brightness, 0.2, 1.8), (contrast, 0.6, 1.4), (saturation, 0.0, 2.2), (hue, -0.2, 0.2))
    for values, low, high in ranges:
        unit = (np.asarray(values) - low) / (high - low)
        assert -1e-6 <= unit.min() < 0.005 < 0.995 < unit.max() <= 1 + 1e-6
        assert abs(unit.mean() - 0.5) < 0.02
    together = np.stack([np.asarray(v) for v, _, _ in ranges] + list(np.asarray(order).T[:3]))
    off_diagonal = np.corrcoef(together)[:4] - np.eye(4, 7)
    assert np.abs(off_diagonal).max() < 0.06  # independent samples
    additive = jax.vmap(lambda key: color.sample_jitter(key, 0.4, 0, 0, 0, "simclr_v1")[1])(keys(500))
    assert -0.4 <= additive.min() < -0.35 < 0.35 < additive.max() <= 0.4


# Blur
@pytest.mark.parametrize(("height", "taps"), [(224, 23), (96, 9), (64, 7), (32, 3), (20, 3), (19, 1)])
def test_blur_size(height, taps):
    assert 2 * blur.blur_radius(height) + 1 == taps


@pytest.mark.parametrize(
    ("sigma", "taps"), [(1.0, (0.27407, 0.45186, 0.27407)), (0.1, (0, 1, 0)), (2.0, (0.31917, 0.36166, 0.31917))]
)
def test_blur_taps(sigma, taps):
    weights = blur.blur_weights(32, sigma, blur.blur_radius(32))
    np.testing.assert_allclose(weights[5, 5:8], taps, atol=1e-5)
    np.testing.assert_allclose(weights.sum(1), 1.0, atol=1e-6)
    assert np.count_nonzero(weights > 1e-7) == 32 * np.count_nonzero(taps)


def test_blur_borders():
    white = jnp.ones((224, 224, 3))
    dark = blur.gaussian_blur(white, 2.0, "zero")
    np.testing.assert_allclose(dark[0, 100], 0.59974, atol=1e-5)
    np.testing.assert_allclose(dark[-1, -1], 0.35968, atol=1e-5)
    np.testing.assert_allclose(dark[112, 112], 1.0, atol=1e-5)
    np.testing.assert_allclose(blur.gaussian_blur(white, 2.0, "edge"), 1.0, atol=1e-5)


@pytest.mark.parametrize("padding", ["zero", "edge"])
def test_blur_against_convolution(padding):
    image, radius, sigma = random_image(43, 31), 2, 1.3
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    kernel = np.outer(taps, taps) / taps.sum() ** 2
    mode = {"mode": "edge"} if padding == "edge" else {"mode": "constant"}
    padded = np.pad(image.astype(np.float64), ((radius, radius), (radius, radius), (0, 0)), **mode)
    windows = np.lib.stride_tricks.sliding_window_view(padded, kernel.shape, axis=(0, 1))
    expected = np.einsum("hwcij,ij->hwc", windows, kernel)
    np.testing.assert_allclose(blur.gaussian_blur(image, sigma, padding), expected, atol=1e-6)


# Crops
BOXES = [((3, 5, 31, 22), (16, 24)), ((0, 0, 40, 50), (24, 24)), ((10, 7, 9, 12), (20, 30))]  # inner, whole, enlarged


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("box", "size"), BOXES)
@pytest.mark.full
def test_crop_matches_torch_pil_and_jax(box, size, interpolation):
    torch = require_torch()
    from PIL import Image

    # PIL clips to 8 bits between its two passes: no extreme values here.
    pixels = np.random.default_rng(2).integers(80, 176, (40, 50, 3), dtype=np.uint8)
    image = pixels.astype(np.float32) / 255
    top, left, height, width = box
    cut = (slice(top, top + height), slice(left, left + width))
    out = geometry.crop_and_resize(image, box, size, interpolation)
    channels_first = torch.from_numpy(image[cut]).permute(2, 0, 1)[None]
    expected = torch.nn.functional.interpolate(channels_first, size, mode=interpolation, antialias=True)
    np.testing.assert_allclose(out, expected[0].permute(1, 2, 0).clamp(0, 1), atol=2e-6)

    resample = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}[interpolation]
    pil = np.asarray(Image.fromarray(pixels[cut]).resize(size[::-1], resample), np.float32)
    assert np.abs(np.asarray(out) * 255 - pil).max() < 1.5  # PIL rounds to 8 bits twice

    plain = geometry.crop_and_resize(image, box, size, interpolation, antialias=False)
    method = {"bicubic": "cubic", "bilinear": "linear"}[interpolation]
    expected = jax.image.resize(image[cut], (*size, 3), method, antialias=False)
    np.testing.assert_allclose(plain, jnp.clip(expected, 0, 1), atol=2e-6)


def sampled_crops(sampling, image_hw, count, **ranges):
    sample = jax.jit(jax.vmap(lambda key: geometry.sample_crop(key, image_hw, sampling=sampling, **ranges)))
    return (np.asarray(part) for part in sample(keys(count)))


@pytest.mark.parametrize(
    ("sampling", "mean_area", "least_area", "portrait"),
    [("torchvision", 0.453, 0.08, 0.5), ("simclr", 0.409, 0.10, 0.426), ("clamp", 0.523, 0.08, 0.5)],
)
def test_crop_distributions(sampling, mean_area, least_area, portrait):
    top, left, height, width = sampled_crops(sampling, (400, 500), 20_000)
    for part in (top, left, height, width):
        np.testing.assert_array_equal(part, np.round(part))
    assert min(top.min(), left.min()) == 0
    assert min(height.min(), width.min()) > 0
    assert max((top + height).max() - 400, (left + width).max() - 500) == 0
    if sampling == "simclr":
        assert (top + height)[height < 400].max() == 399  # TensorFlow's half-open range
    share = height * width / (400 * 500)
    assert abs(share.mean() - mean_area) < 0.006
    assert share.min() == pytest.approx(least_area, abs=0.002)
    # Sampled aspect ratios, of crops so small that none is rejected or clamped. Only in SimCLR they are uniform.
    _, _, height, width = sampled_crops(sampling, (400, 500), 20_000, area=(0.2, 0.4))
    assert abs(np.mean(width < height) - portrait) < 0.015


def test_torchvision_crops_have_torchvisions_distribution():
    torch, torchvision = require_torch(), require_torchvision()
    stats = pytest.importorskip("scipy.stats")
    torch.manual_seed(0)
    image, get_params = torch.empty(3, 40, 50), torchvision.transforms.RandomResizedCrop.get_params
    theirs = np.array([get_params(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(3000)]).T
    ours = list(sampled_crops("torchvision", (40, 50), 3000))
    for mine, reference in zip([*ours, ours[2] * ours[3]], [*theirs, theirs[2] * theirs[3]], strict=True):
        assert stats.ks_2samp(mine, reference).pvalue > 1e-3


def test_crop_fallbacks():
    """If no try fits into a long image: the largest valid center crop, or for SimCLR the whole image."""
    wide = {"image_hw": (20, 100), "count": 10, "area": (0.9, 1.0)}
    for part, expected in zip(sampled_crops("torchvision", **wide), (0, 36, 20, 27), strict=True):
        np.testing.assert_array_equal(part, expected)
    for part, expected in zip(sampled_crops("simclr", **wide), (0, 0, 20, 100), strict=True):
        np.testing.assert_array_equal(part, expected)
    _, _, height, width = sampled_crops("torchvision", (100, 20), 10, area=(0.9, 1.0))
    assert set(zip(height, width, strict=True)) == {(27.0, 20.0)}


def test_random_crop_with_padding():
    image = random_image(6, 5) * 0.9 + 0.1
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)))
    windows = {(y, x): padded[y : y + 6, x : x + 5] for y in range(3) for x in range(3)}
    seen = []
    for crop in np.asarray(jax.vmap(lambda key: geometry.random_crop(image, key, (6, 5), pad=1))(keys(200))):
        seen += [offset for offset, window in windows.items() if np.abs(crop - window).max() < 1e-6]
    assert len(seen) == 200
    assert set(seen) == set(windows)


# Random application
@pytest.mark.parametrize("name", ["flip", "color_jitter", "grayscale", "blur", "solarize"])
def test_probability_of_application(name):
    image, operation = random_image(20, 20, seed=4), OPERATIONS[name]
    out = jax.jit(jax.vmap(lambda key, p: operation(image, key, p=p), (0, None)))  # one compilation for every p
    everything = keys(800, seed=3)
    changed = np.any(np.asarray(out(everything, 0.3)) != image, axis=(1, 2, 3))
    assert abs(changed.mean() - 0.3) < 0.05
    np.testing.assert_array_equal(out(everything, 0.0)[:50], np.broadcast_to(image, (50, 20, 20, 3)))
    always = np.asarray(out(everything, 1.0))
    assert np.any(np.abs(always - image) > 1e-3, axis=(1, 2, 3)).mean() > (0.9 if name == "blur" else 0.999)
    assert always.min() >= 0
    assert always.max() <= 1
    if name == "flip":
        np.testing.assert_array_equal(always[0], image[:, ::-1])

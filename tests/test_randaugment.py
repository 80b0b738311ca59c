"""RandAugment and random erasing: each operation against Pillow with timm's strengths, and the distribution of the draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps
from torch_reference import require_timm

from ssl_jax.augment import erasing, randaugment
from ssl_jax.augment.views import make_views
from ssl_jax.errors import UserError

apply = jax.jit(randaugment.apply_operation)
FILL = randaugment.FILL


def picture(seed=0, height=24, width=30):
    """Smooth colors with noise, so that histograms have gaps and no channel is flat."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [128 + 70 * np.sin(x / 5 + i) * np.cos(y / (4 + i)) for i in range(3)]
    return np.clip(np.stack(waves, -1) + generator.normal(0, 8, (height, width, 3)), 20, 230).astype(np.uint8)


def affine(image, matrix):
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=FILL)


def solarize_add(image, level):
    added = min(128, int(level / 10 * 110))
    return image.point([min(255, i + added) if i < 128 else i for i in range(256)] * 3)


def factor(level, sign):
    return max(0.1, 1 + sign * level / 10 * 0.9)


PILLOW = {  # the operations of timm's 'increasing' set, with its strengths
    "auto_contrast": lambda im, level, sign: ImageOps.autocontrast(im),
    "equalize": lambda im, level, sign: ImageOps.equalize(im),
    "invert": lambda im, level, sign: ImageOps.invert(im),
    "posterize": lambda im, level, sign: ImageOps.posterize(im, 4 - int(level / 10 * 4)),
    "solarize": lambda im, level, sign: ImageOps.solarize(im, 256 - min(256, int(level / 10 * 256))),
    "solarize_add": lambda im, level, sign: solarize_add(im, level),
    "color": lambda im, level, sign: ImageEnhance.Color(im).enhance(factor(level, sign)),
    "contrast": lambda im, level, sign: ImageEnhance.Contrast(im).enhance(factor(level, sign)),
    "brightness": lambda im, level, sign: ImageEnhance.Brightness(im).enhance(factor(level, sign)),
    "sharpness": lambda im, level, sign: ImageEnhance.Sharpness(im).enhance(factor(level, sign)),
    "rotate": lambda im, level, sign: im.rotate(sign * level / 10 * 30, Image.Resampling.BILINEAR, fillcolor=FILL),
    "shear_x": lambda im, level, sign: affine(im, (1, sign * level / 10 * 0.3, 0, 0, 1, 0)),
    "shear_y": lambda im, level, sign: affine(im, (1, 0, 0, sign * level / 10 * 0.3, 1, 0)),
    "translate_x": lambda im, level, sign: affine(im, (1, 0, sign * level / 10 * 0.45 * im.size[0], 0, 1, 0)),
    "translate_y": lambda im, level, sign: affine(im, (1, 0, 0, 0, 1, sign * level / 10 * 0.45 * im.size[1])),
}


@pytest.mark.parametrize("name", randaugment.OPERATIONS)
def test_operation_equals_pillows(name):
    """Up to one gray level where a float is rounded, and up to a pixel in a thousand at the border of an affine map."""
    for seed, level, sign in ((0, 9.3, 1), (1, 6.1, -1), (2, 1.7, 1), (3, 8.6, -1)):
        image = picture(seed)
        expected = np.asarray(PILLOW[name](Image.fromarray(image), level, sign), np.int32)
        found = np.asarray(apply(jnp.asarray(image, jnp.int32), randaugment.OPERATIONS.index(name), level, sign))
        wrong = np.abs(found - expected).max(-1) > 1
        assert wrong.mean() <= (0.002 if name in randaugment.AFFINE else 0), (level, sign, np.abs(found - expected).max())
        assert np.abs(expected - image.astype(np.int32)).max() > 0, "the case shows nothing"


def test_flat_channels_are_not_stretched():
    flat = jnp.full((6, 6, 3), 77, jnp.int32)
    for name in ("auto_contrast", "equalize"):
        np.testing.assert_array_equal(apply(flat, randaugment.OPERATIONS.index(name), 9.0, 1.0), flat)


@pytest.mark.full
def test_names_and_strengths_are_those_of_timm():
    timm = require_timm()
    from timm.data import auto_augment

    assert timm and len(auto_augment._RAND_INCREASING_TRANSFORMS) == len(randaugment.OPERATIONS)
    image, timms = Image.fromarray(picture(5)), {name.lower(): name for name in auto_augment._RAND_INCREASING_TRANSFORMS}
    alike = {"posterize": "posterizeincreasing", "solarize": "solarizeincreasing", "translate_x": "translatexrel",
             "translate_y": "translateyrel", "auto_contrast": "autocontrast", "solarize_add": "solarizeadd", "shear_x": "shearx",
             "shear_y": "sheary", **{name: f"{name}increasing" for name in randaugment.BLENDS}}  # fmt: skip
    options = dict(fillcolor=FILL, resample=Image.Resampling.BILINEAR)
    for name in randaugment.OPERATIONS:
        theirs = timms[alike.get(name, name)]
        to_args = auto_augment.LEVEL_TO_ARG[theirs]
        args = to_args(7.3, {"translate_pct": 0.45}) if to_args else ()
        ours = [np.asarray(PILLOW[name](image, 7.3, sign)) for sign in (1, -1)]
        result = np.asarray(auto_augment.NAME_TO_OP[theirs](image, *args, **options))
        assert any(np.array_equal(result, each) for each in ours), name


@pytest.mark.full
def test_half_of_the_drawn_operations_are_applied():
    """With two layers a quarter of the images stays as it is, but for draws that change nothing."""
    image = jnp.asarray(picture(), jnp.float32) / 255
    out = jax.jit(jax.vmap(lambda key: randaugment.rand_augment(image, key)))(jax.random.split(jax.random.key(0), 512))
    same = np.asarray(jnp.abs(out - image).max((1, 2, 3)) < 1e-6).mean()
    assert 0.19 < same < 0.33
    assert out.min() >= 0 and out.max() <= 1


@pytest.mark.full
def test_a_recipe_with_randaugment_has_views_in_range():
    recipe = (("flip", {}), ("rand_augment", dict(layers=2, magnitude=9.0, deviation=0.5)))
    images = np.stack([picture(seed) for seed in range(8)])
    views = jax.jit(make_views([recipe]))(images, jax.random.key(1))
    assert views.shape == (8, 1, 24, 30, 3) and views.min() >= 0 and views.max() <= 1


def test_randaugment_refuses_strengths_out_of_range():
    with pytest.raises(UserError, match=r"rand_augment: magnitude=11 is not allowed; give a strength from 0 to 10"):
        make_views([(("rand_augment", dict(magnitude=11)),)])
    with pytest.raises(UserError, match=r"rand_augment: layers=0 is not allowed"):
        make_views([(("rand_augment", dict(layers=0)),)])


@pytest.mark.full
def test_erased_area_has_the_distribution_of_random_erasing():
    """Against the draws of Zhong et al.'s algorithm in NumPy; what is not erased stays, and the noise is normal."""
    size, count, generator = 32, 4000, np.random.default_rng(0)
    image = jnp.full((size, size, 3), 2.0)  # a value that the noise hardly takes
    out = jax.jit(jax.vmap(lambda key: erasing.erase(image, key, p=1.0)))(jax.random.split(jax.random.key(0), count))
    erased = np.asarray(out[..., 0] != 2.0)
    shapes = [(mask.any(1).sum(), mask.any(0).sum()) for mask in erased]
    found, expected = np.array([(h * w / size**2, np.log(h / w)) for h, w in shapes]), []
    np.testing.assert_allclose(found[:, 0], erased.mean((1, 2)))  # rectangles
    for _ in range(count):
        for _ in range(10):
            area = generator.uniform(0.02, 1 / 3) * size * size
            ratio = np.exp(generator.uniform(np.log(0.3), np.log(1 / 0.3)))
            h, w = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
            if h < size and w < size:
                expected.append((h * w / size**2, np.log(h / w)))
                break
    for q in (5, 25, 50, 75, 95):
        share, ratio = np.abs(np.percentile(found, q, axis=0) - np.percentile(expected, q, axis=0))
        assert share < 0.012 and ratio < 0.08, q
    assert np.abs(erased.mean(0) - erased.mean(0)[::-1, ::-1]).max() < 0.05  # no side is preferred
    noise = (np.asarray(out)[erased] - erasing.MEAN) / erasing.STD
    np.testing.assert_allclose([noise.mean(), noise.std()], [0, 1], atol=0.01)
    kept = jax.vmap(lambda key: erasing.erase(image, key, p=0.25))(jax.random.split(jax.random.key(1), 2000))
    assert abs(np.asarray((kept != 2.0).any((1, 2, 3))).mean() - 0.25) < 0.04

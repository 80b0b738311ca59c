"""Recipes and views: validation, the rule of random keys, independence of the number of devices."""

import re

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ssl_jax.augment import color
from ssl_jax.augment.views import OPERATIONS, check_recipes, make_views, output_size
from ssl_jax.errors import UserError

SIZE = 20
SIMCLR = (
    ("random_resized_crop", {"size": SIZE, "sampling": "simclr"}),
    ("flip", {}),
    ("color_jitter", {}),
    ("grayscale", {}),
    ("blur", {}),
)
SOLARIZED = (*SIMCLR[:4], ("solarize", {"p": 1.0}))


def batch(count, height=24, width=28, views=None):
    shape = (count, height, width, 3) if views is None else (count, views, height, width, 3)
    return np.random.default_rng(7).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture(scope="module")
def simclr_views():
    return jax.jit(make_views([SIMCLR, SIMCLR]))


@pytest.mark.full
def test_views_are_distinct_and_in_range(simclr_views):
    """Two views of sixteen copies of one image: 32 different images."""
    same = np.repeat(batch(1), 16, axis=0)
    views = simclr_views(same, jax.random.key(0))
    assert views.shape == (16, 2, SIZE, SIZE, 3)
    assert views.dtype == jnp.float32
    assert 0.0 <= views.min() <= views.max() <= 1.0
    flat = np.asarray(views).reshape(32, -1)
    distance = np.abs(flat[:, None] - flat[None]).mean(-1) + np.eye(32)
    assert distance.min() > 1e-3
    repeated, other = simclr_views(same, jax.random.key(0)), simclr_views(same, jax.random.key(1))
    np.testing.assert_array_equal(repeated, views)
    assert np.all(np.abs(other - views).mean((2, 3, 4)) > 1e-3)


@pytest.mark.full
def test_views_do_not_depend_on_devices(simclr_views):
    images = batch(16)
    alone = simclr_views(images, jax.random.key(5))
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",), axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec("data"))
    sharded = jax.jit(make_views([SIMCLR, SIMCLR]), in_shardings=(split, None), out_shardings=split)
    compiled = sharded.lower(images, jax.random.key(5)).compile()
    out = compiled(jax.device_put(images, split), jax.random.key(5))
    assert len(out.sharding.device_set) == 8
    np.testing.assert_allclose(out, alone, rtol=0, atol=5e-6)  # rounding; a gray level is 4e-3
    assert not re.search(r"all-gather|all-reduce|all-to-all|collective-permute", compiled.as_text())


@pytest.mark.full
def test_views_follow_the_rule_of_random_keys():
    """Different recipes, host crops, and an explicit loop over examples give the same images."""
    images, key = batch(3, views=2), jax.random.key(9)
    views = jax.jit(make_views([SIMCLR, SOLARIZED]))(images, key)

    @jax.jit
    def by_hand(image, example, view):
        view_key = jax.random.fold_in(jax.random.fold_in(key, example), view)
        image = image / jnp.float32(255)
        crop, flip, jitter, gray, last = (
            OPERATIONS[name] for name in ("random_resized_crop", "flip", "color_jitter", "grayscale", "blur")
        )
        image = crop(image, jax.random.fold_in(view_key, 0), SIZE, sampling="simclr")
        image = flip(image, jax.random.fold_in(view_key, 1))
        image = jitter(image, jax.random.fold_in(view_key, 2))
        image = gray(image, jax.random.fold_in(view_key, 3))
        solarized = color.invert_above(image, 0.5)
        return last(image, jax.random.fold_in(view_key, 4)), solarized

    for example in range(3):
        np.testing.assert_allclose(views[example, 0], by_hand(images[example, 0], example, 0)[0], atol=2e-6)
        solarized = by_hand(images[example, 1], example, 1)[1]
        # A value at the threshold may be inverted in only one of both.
        assert np.mean(np.abs(views[example, 1] - solarized) > 1e-4) < 0.01


def test_shared_image_equals_repeated_host_crops(simclr_views):
    images, key = batch(16), jax.random.key(2)
    repeated = np.repeat(images[:, None], 2, axis=1)
    np.testing.assert_allclose(simclr_views(repeated, key), simclr_views(images, key), atol=1e-6)


def test_invalid_images_raise_value_error(simclr_views):
    with pytest.raises(ValueError, match="uint8"):
        simclr_views(batch(2).astype(np.float32), jax.random.key(0))
    with pytest.raises(ValueError, match="3 crops per image for 2 views"):
        simclr_views(batch(2, views=3), jax.random.key(0))


@pytest.mark.parametrize(
    ("recipes", "message"),
    [
        ([], "give a list of recipes"),
        ("simclr", "give a list of recipes"),
        ([("flip", {})], r"views\[0\]\[0\]='flip' is not a pair"),
        ([["flip"]], "is not a pair"),
        ([SIMCLR, [("colour_jitter", {})]], r"views\[1\]\[0\].*did you mean 'color_jitter'\? valid: .*flip"),
        (
            [[("color_jitter", {"brightnes": 0.4})]],
            "color_jitter: .*'brightnes'.*'brightness'.*valid: brightness, contrast",
        ),
        ([[("flip", {"image": 1})]], "unknown argument 'image'"),
        ([[("random_resized_crop", {})]], "'size' is missing"),
        ([[("random_resized_crop", {"size": -3})]], "size=-3"),
        ([[("random_resized_crop", {"size": (8, 8, 3)})]], "size="),
        ([[("random_resized_crop", {"size": 8, "area": (0.5, 0.2)})]], "area=.*least <= most"),
        ([[("random_resized_crop", {"size": 8, "area": (0.5, 1.2)})]], "area="),
        ([[("random_resized_crop", {"size": 8, "ratio": 1.0})]], "ratio="),
        ([[("random_resized_crop", {"size": 8, "sampling": "byol"})]], "sampling='byol'.*clamp"),
        ([[("random_resized_crop", {"size": 8, "sampling": "simclr", "area": (0.05, 0.1)})]], "simclr.*torchvision"),
        ([[("flip", {"p": 1.5})]], "p=1.5.*from 0 to 1"),
        ([[("flip", {"p": True})]], "p=True"),
        ([[("flip", {"p": float("nan")})]], "p=nan"),
        ([[("color_jitter", {"hue": 0.7})]], "hue=0.7"),
        ([[("blur", {"sigma": (0.0, 2.0)})]], "sigma="),
    ],
)
def test_invalid_recipe_is_a_user_error(recipes, message):
    with pytest.raises(UserError, match=message) as error:
        check_recipes(recipes)
    assert "\n" not in str(error.value)


def test_recipes_from_a_config_dict():
    config = ml_collections.ConfigDict({"views": [SIMCLR, [[n, dict(a)] for n, a in SIMCLR]]})
    first, second = check_recipes(config.views)
    assert first == second
    assert first[0] == ("random_resized_crop", {"size": SIZE, "sampling": "simclr"})
    nested = ml_collections.ConfigDict({"arguments": {"size": 8, "area": [0.2, 1.0]}})
    assert check_recipes([[("random_resized_crop", nested.arguments)]])[0][0][1]["area"] == (0.2, 1.0)


def test_output_size():
    assert output_size([SIMCLR, SIMCLR], (24, 28)) == (SIZE, SIZE)
    assert output_size([[("flip", {})]], (24, 28)) == (24, 28)
    assert output_size([[("random_crop", {"size": (32, 30), "pad": 4})]], (24, 28)) == (32, 30)
    with pytest.raises(UserError, match=r"random_crop: size=33 does not fit an image of 24 x 28 pixels with pad=4"):
        output_size([[("random_crop", {"size": 33, "pad": 4})]], (24, 28))
    with pytest.raises(UserError, match=r"differ in size.*\(20, 20\), \(24, 28\)"):
        output_size([SIMCLR, [("flip", {})]], (24, 28))

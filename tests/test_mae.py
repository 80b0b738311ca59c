"""Masked autoencoders: patches, masks, targets, what gets a gradient, published sizes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax.augment.patches import patchify, random_order, unpatchify
from ssl_jax.engine.method import State
from ssl_jax.errors import UserError
from ssl_jax.experiment import config as configs
from ssl_jax.methods import build_method, mae

ROOT = __file__.rsplit("/", 2)[0]
IMAGES = np.random.default_rng(0).integers(0, 256, (6, 48, 48, 3), np.uint8)


def load(name, *overrides, size=48):
    config = configs.load(f"{ROOT}/configs/{name}", overrides)
    with config.unlocked():
        config.data.image_shape, config.data.num_classes, config.data.examples, config.dtype = (size, size, 3), 10, 512, "float32"
    return config


@functools.cache
def begin(*overrides):
    method = build_method(load("mae.py:smoke", *overrides))
    params, mutable = jax.jit(method.init)(jax.random.key(0), {"image": IMAGES}, {})
    return method, State(jnp.zeros((), jnp.int32), params, {}, mutable, {})


def test_patches_are_rows_of_pixels_and_come_back():
    image = np.arange(16).reshape(1, 4, 4, 1)
    assert patchify(jnp.asarray(image), 2)[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    three = jnp.asarray(np.arange(48).reshape(1, 3, 4, 4).transpose(0, 2, 3, 1))  # the published example, with channels last
    assert patchify(three, 2)[0, 0].tolist() == [0, 16, 32, 1, 17, 33, 4, 20, 36, 5, 21, 37]
    x = jax.random.normal(jax.random.key(0), (2, 6, 10, 3))
    assert (unpatchify(patchify(x, 2), 2, (3, 5)) == x).all()


def test_every_image_has_an_order_of_its_own():
    order = np.asarray(random_order(jax.random.key(0), 50, 16))
    assert (np.sort(order, 1) == np.arange(16)).all() and len(np.unique(order, axis=0)) == 50
    assert np.bincount(order[:, :4].ravel(), minlength=16).min() > 0


@pytest.mark.parametrize(("values", "expected"), [(768, 0.998698), (48, 0.979167)])
def test_zero_prediction_of_normalized_patches_has_the_loss_of_the_unbiased_variance(values, expected):
    patches = jax.random.normal(jax.random.key(0), (3, 5, values)) * 3 + 1
    assert jnp.mean(mae.target(patches, True) ** 2) == pytest.approx(expected, abs=1e-5)
    assert (mae.target(patches, False) == patches).all()


@pytest.mark.full
def test_loss_is_a_mean_over_hidden_patches_and_blind_to_their_pixels_in_the_encoder():
    """Without augmentation: changing one hidden patch changes its own error alone, since the decoder's answer stays."""
    method, state = begin("--config.views=((),)", "--config.model.norm_pix=False")
    key = jax.random.key(1)
    order = random_order(jax.random.split(key, 3)[1], len(IMAGES), 16)
    hidden, seen = int(order[0, -1]), int(order[0, 0])

    @jax.jit
    def value(images):
        return method.phases[0].loss(state.params, state, {"image": images}, key)[0]

    def with_patch(number, value):
        images = IMAGES.copy()
        row, column = divmod(number, 4)
        images[0, 12 * row : 12 * row + 12, 12 * column : 12 * column + 12] = value
        return images

    black, white, gray = (float(value(with_patch(hidden, v))) for v in (0, 255, 127.5))
    std = np.array([0.229, 0.224, 0.225])
    # (p - 0)^2 + (p - 1)^2 - 2 (p - 1/2)^2 = 1/2 for any answer p, in units of the deviation; 6 x 12 patches are hidden
    expected = np.mean(0.5 / std**2) / (6 * 12)
    assert black + white - 2 * gray == pytest.approx(expected, rel=0.05)
    black, white, gray = (float(value(with_patch(seen, v))) for v in (0, 255, 127.5))
    assert abs(black + white - 2 * gray - expected) > 0.1 * expected


@pytest.mark.full
def test_masks_of_a_step_leave_a_quarter():
    method, state = begin()
    found = jax.jit(method.fns.inpaint)(state.params, state.mutable, IMAGES)
    assert found["removed"].mean() == 0.75 and found["pictures"].shape == (6, 48, 48, 3)
    shown = ~np.asarray(found["removed"])
    np.testing.assert_allclose(np.asarray(found["pictures"])[shown], (IMAGES / 255)[shown], atol=1e-6)
    assert "true mean" in method.notes["painted"]


@pytest.mark.full
@pytest.mark.parametrize(("variant", "encoder", "decoder"), [("imagenet", 85_798_656, 26_109_184)])
def test_parameters_of_the_published_networks(variant, encoder, decoder):
    """Counted with the fixed positions, as the official networks have them."""
    method = build_method(load(f"mae.py:{variant}", size=224))
    params, _ = jax.eval_shape(method.init, jax.random.key(0), {"image": jax.ShapeDtypeStruct((2, 224, 224, 3), np.uint8)}, {})
    counts = {name: sum(x.size for x in jax.tree.leaves(tree)) for name, tree in params["net"].items()}
    assert counts["encoder"] in (encoder, encoder - 197 * 768) and counts["decoder"] in (decoder, decoder - 197 * 512), counts
    assert sum(counts.values()) == 111_655_680


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--config.model.mask_ratio=1.0"], "leaves 0 of 16 patches"),
        (["--config.model.mask_ratio=0.0"], "leaves 16 of 16 patches"),
        (["--config.model.encoder.name=resnet"], "masked autoencoders hide patches; give 'vit'"),
    ],
)
def test_bad_configs_are_one_line(overrides, message):
    with pytest.raises(UserError, match=message):
        build_method(load("mae.py:smoke", *overrides))

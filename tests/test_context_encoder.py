"""Context encoders: removed pixels leak nothing, the loss by hand, and the layer that connects all places of a channel."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax.augment import masks
from ssl_jax.engine.method import State
from ssl_jax.errors import UserError
from ssl_jax.experiment import config as configs
from ssl_jax.methods import build_method
from ssl_jax.models.common import create, run
from ssl_jax.models.inpainting import ChannelwiseDense, InpaintingDecoder

ROOT = pathlib.Path(__file__).parent.parent
REGIONS = {"name": "random_region", "area": (0.2, 0.3), "cell": 8}
NOBODY = "model.adversary.weight=0.0"
WHOLE = "views=((('random_crop', dict(size=32)),),)"  # no flip, so that the view is known


def load(*overrides, mask=None):
    config = configs.load(f"{ROOT}/configs/context_encoder.py:smoke", [f"--config.{text}" for text in (WHOLE, *overrides)])
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.data.image_shape, config.dtype = (32, 32, 3), "float32"
        config.model.mask = mask or config.model.mask
    return config


def pictures(count=4, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3)).astype(np.uint8)


def start(config):
    method = build_method(config)
    params, mutable = jax.jit(method.init)(jax.random.key(0), {"image": pictures()}, {})
    return method, params, State(jnp.int32(0), params, {}, mutable, {})


def regions(count):
    """The regions that `reconstruct` removes."""
    return np.asarray(jax.jit(lambda key: masks.random_region_masks(key, count, (32, 32), (0.2, 0.3), 8))(jax.random.key(0)))


def first_loss(method, params, state, images):
    return jax.jit(method.phases[-1].loss)(params, state, {"image": images}, jax.random.key(1))


@pytest.mark.full
def test_loss_of_a_painting_of_one_color_equals_a_float64_loop():
    """All weights of the decoder are 0, so it paints its bias; pixels of the ring around the hole weigh ten times as much."""
    method, params, state = start(load(NOBODY))
    decoder = jax.tree.map(jnp.zeros_like, params["net"]["decoder"])
    decoder["bias"] = jnp.array([0.4, -0.2, 0.0])
    images = pictures(seed=1)
    loss, (_, logs) = first_loss(method, {"net": {**params["net"], "decoder": decoder}}, state, images)
    color = 0.5 + 0.25 * np.array([0.4, -0.2, 0.0])
    error, total, hole = ((images / 255 - color) ** 2).mean(-1), 0.0, []
    for image, row, column in np.ndindex(4, 32, 32):
        if 8 <= row < 24 and 8 <= column < 24:
            total += error[image, row, column]
            hole.append(error[image, row, column])
        elif 6 <= row < 26 and 6 <= column < 26:
            total += 10 * error[image, row, column]
    np.testing.assert_allclose(logs["mse"], np.mean(hole), rtol=1e-5)
    np.testing.assert_allclose(loss, total / (4 * 20 * 20), rtol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("mask", [None, REGIONS], ids=["center", "regions"])
def test_removed_pixels_leak_nothing(mask):
    """The derivative of what is painted with respect to removed pixels is exactly 0, and with respect to others it is not."""
    method, params, state = start(load(mask=mask))
    kernel = params["net"]["decoder"]["conv1"]["kernel"]
    params["net"]["decoder"]["conv1"]["kernel"] = 10 * kernel  # far from the picture of one color at the start
    removed = np.broadcast_to(masks.center_mask((32, 32), 16), (2, 32, 32)) if mask is None else regions(2)
    x = jax.random.uniform(jax.random.key(0), (2, 32, 32, 3))

    def painted(x):
        return jnp.sum(jnp.sin(9 * method.fns.reconstruct(params, state.mutable, x)) * removed[..., None])

    gradient = np.asarray(jax.jit(jax.grad(painted))(x))
    assert not gradient[removed].any() and gradient[~removed].any()


@pytest.mark.full
def test_the_adversary_is_a_part_of_the_loss_as_in_the_papers_code():
    """(1 - w) of the squared error, and w softplus(-logit) of what is painted; without it there is no discriminator."""
    images = pictures(seed=2)
    method, params, state = start(load())
    loss, (updates, logs) = first_loss(method, {"net": params["net"]}, state, images)
    plain, plain_params, plain_state = start(load(NOBODY))
    assert [phase.name for phase in plain.phases] == ["inpaint"] and set(plain_params) == {"net"}
    assert [phase.name for phase in method.phases] == ["d", "inpaint"]
    alone, _ = first_loss(plain, {"net": params["net"]}, plain_state._replace(mutable=state.mutable), images)
    np.testing.assert_allclose(loss, 0.999 * alone + 0.001 * logs["adversarial"], rtol=1e-5)
    assert set(updates) == {"batch_stats", "discriminator"}


@pytest.mark.full
def test_the_adversary_sees_the_hole_alone():
    """A hole in the center is judged without its context (section 3.2), 20 x 20 pixels of real pictures and of painted ones."""
    method, params, state = start(load())
    phase, images = method.phases[0], pictures(seed=3)
    other = images.copy()
    other[:, :6], other[:, :, 26:] = 255 - other[:, :6], 255 - other[:, :, 26:]  # the context alone

    def judged(pixels):
        return jax.jit(phase.loss)({"discriminator": params["discriminator"]}, state, {"image": pixels}, jax.random.key(1))[0]

    net = jax.tree.map(jnp.zeros_like, params["net"]["decoder"])  # paints one color, whatever it sees
    state = state._replace(params={**params, "net": {**params["net"], "decoder": net}})
    np.testing.assert_array_equal(judged(images), judged(other))
    other[:, 6] = 255 - other[:, 6]
    assert (judged(images) != judged(other)).any()


@pytest.mark.full
def test_holes_are_painted_and_the_rest_is_the_image():
    method, params, state = start(load(mask=REGIONS))
    images = pictures(3)
    out = np.asarray(jax.jit(method.fns.reconstruct)(params, state.mutable, images))
    removed = regions(3)
    np.testing.assert_allclose(out[~removed], images[~removed] / 255, atol=1e-6)
    assert np.abs(out[removed] - images[removed] / 255).mean() > 0.05
    assert removed.mean((1, 2)).min() >= 0.2 and removed.mean((1, 2)).max() <= 0.3
    assert (removed[0] != removed[1]).any()


@pytest.mark.full
def test_channelwise_layer_equals_a_loop_and_keeps_channels_apart():
    x = jax.random.normal(jax.random.key(0), (2, 3, 2, 5))
    params = {"kernel": jax.random.normal(jax.random.key(1), (5, 6, 6)), "bias": jax.random.normal(jax.random.key(2), (6, 5))}
    layer = ChannelwiseDense()
    out = layer.apply({"params": params}, x)
    want = np.zeros((2, 6, 5))
    for image, channel in np.ndindex(2, 5):
        column = np.asarray(x, np.float64)[image].reshape(6, 5)[:, channel]
        want[image, :, channel] = column @ np.asarray(params["kernel"], np.float64)[channel]
    np.testing.assert_allclose(out.reshape(2, 6, 5), want + np.asarray(params["bias"]), atol=1e-4)
    jacobian = np.asarray(jax.jacrev(lambda x: layer.apply({"params": params}, x[None])[0])(x[0])).reshape(6, 5, 6, 5)
    for a, b in np.ndindex(5, 5):
        assert jacobian[:, a, :, b].all() if a == b else not jacobian[:, a, :, b].any()


def test_channelwise_layer_of_the_paper_has_331776_weights():
    shapes = jax.eval_shape(ChannelwiseDense().init, jax.random.key(0), jnp.zeros((1, 6, 6, 256)))
    assert shapes["params"]["kernel"].size == 331_776


def test_decoder_doubles_and_resizes_to_the_picture():
    for side, size in ((2, (32, 32)), (3, (40, 44))):
        decoder, x = InpaintingDecoder(widths=(8, 4, 4, 4)), jax.random.normal(jax.random.key(0), (2, side, side, 6))

        def paint(key, x, decoder=decoder, size=size):
            return run(decoder, *create(decoder, key, x, size), x, size, train=True)[0]

        out = jax.eval_shape(paint, jax.random.key(1), x)
        assert out.shape == (2, *size, 3) and out.dtype == jnp.float32


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.mask.size=40", "a mask of 36 x 36 pixels does not leave anything of images of 32 x 32 pixels"),
        ("model.mask.overlap=10", "a mask of 0 x 0 pixels does not leave anything"),
        ("model.mask.name=circle", "config.model.mask.name has no 'circle'"),
        ("model.adversary.discriminator.name=alexnet", "config.model.discriminator.name has no 'alexnet'"),
        ("model.map=pooled", "config.model.map='pooled' is no map of the encoder; it has stem, layer1"),
    ],
)
def test_bad_input_is_one_line(override, message):
    with pytest.raises(UserError, match=message):
        jax.eval_shape(lambda: start(load(override))[1])


def test_impossible_area_is_one_line():
    with pytest.raises(UserError, match=r"masks of area=\(0.5, 0.2\) are not possible"):
        build_method(load(mask={**REGIONS, "area": (0.5, 0.2)}))


@pytest.mark.full
def test_images_of_another_size_are_not_painted():
    method, params, state = start(load())
    with pytest.raises(UserError, match="paints images of the size of its views, 32 x 32, and these have 48 x 48"):
        jax.eval_shape(method.fns.reconstruct, params, state.mutable, jnp.zeros((2, 48, 48, 3)))

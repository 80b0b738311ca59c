"""SS-GAN: rotation losses of both networks, and training on rotations alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax.augment.rotation import rotations
from ssl_jax.engine.method import State
from ssl_jax.errors import UserError
from ssl_jax.experiment import config as configs
from ssl_jax.methods import build_method
from ssl_jax.models.common import run
from ssl_jax.models.gan.sngan import SNGANDiscriminator
from ssl_jax.models.gan.spectral import power_step
from ssl_jax.objectives.classification import cross_entropy

IMAGES = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), np.uint8)


def smoke(**overrides):
    config = configs.load("configs/ssgan.py:smoke", ())
    with config.unlocked():
        config.data.image_shape, config.dtype = (32, 32, 3), "float32"
        config.views = ((),)
        config.model.weights.update(overrides)
    return config, build_method(config)


def start(method):
    batch = {"image": jnp.asarray(IMAGES)}
    params, mutable = method.init(jax.random.key(0), batch, {})
    return State(jnp.int32(0), params, {}, mutable, {}), batch


def loss(method, phase, state, batch):
    """(train -> loss, metrics) of one phase, and train."""
    phase = next(p for p in method.phases if p.name == phase)

    def function(train):
        value, (_, logs) = phase.loss(train, state, batch, jax.random.key(7))
        return value, logs

    return function, {group: state.params[group] for group in phase.trains}


def gradient(method, state, batch):
    """(loss, metrics), gradients of the discriminator."""
    function, train = loss(method, "d", state, batch)
    return jax.jit(jax.value_and_grad(function, has_aux=True))(train)


def equal(a, b):
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


@pytest.mark.full
def test_each_network_uses_only_its_own_rotation_weight():
    results, (state, batch) = {}, start(smoke()[1])
    for name, weights in (("as it is", {}), ("generator", {"generator": 5.0}), ("discriminator", {"discriminator": 5.0})):
        _, method = smoke(**weights)
        for phase in ("d", "g"):
            function, train = loss(method, phase, state, batch)
            results[name, phase] = function(train)
    for phase, mine, other, weight in (("d", "discriminator", "generator", 1.0), ("g", "generator", "discriminator", 0.2)):
        value, logs = results["as it is", phase]
        assert results[other, phase][0] == value
        np.testing.assert_allclose(results[mine, phase][0] - value, (5.0 - weight) * logs["rotation_loss"], rtol=1e-4)


@pytest.mark.full
def test_rotation_head_learns_from_real_images_only():
    """Other fakes, same real images: the gradient of the head for rotations is the same."""
    _, method = smoke()
    state, batch = start(method)
    louder = jax.tree.map(lambda x: 3 * x, state.params["generator"])
    other = state._replace(params={**state.params, "generator": louder})
    step = jax.jit(lambda state: gradient(method, state, batch)[1]["discriminator"])
    one, two = step(state), step(other)
    assert equal(one["rotation"], two["rotation"])
    assert not equal(one["net"], two["net"])


@pytest.mark.full
def test_without_adversarial_loss_it_is_rotation_prediction():
    config, method = smoke(game=0.0)
    state, batch = start(method)
    (value, logs), grads = gradient(method, state, batch)
    net, channels = SNGANDiscriminator(channels=4), config.model.rotated
    spectral = state.mutable["discriminator"]["net"]
    for _ in range(2):  # the passes of real and fake images advance the power iterations
        _, spectral = run(net, state.params["discriminator"]["net"], spectral, jnp.zeros((1, 32, 32, 3)), train=True)

    def rotation_prediction(params):
        rotated, labels = rotations(jnp.asarray(IMAGES[-channels:] / 127.5 - 1, jnp.float32))
        (_, features), _ = run(net, params["net"], spectral, rotated.reshape(-1, 32, 32, 3), train=True)
        kernel = params["rotation"]["kernel"]
        sigma, _ = power_step(kernel, state.mutable["discriminator"]["rotation"]["spectral"]["u"])
        logits = features["pooled"] @ (kernel / sigma) + params["rotation"]["bias"]
        return cross_entropy(logits, labels.ravel())[0]

    want, theirs = jax.jit(jax.value_and_grad(rotation_prediction))(state.params["discriminator"])
    np.testing.assert_allclose(value, want, rtol=1e-5)
    np.testing.assert_allclose(logs["rotation_loss"], want, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), grads["discriminator"], theirs)


def test_more_rotated_images_than_the_batch_raises_user_error():
    config, _ = smoke()
    with config.unlocked():
        config.model.rotated = 17
    with pytest.raises(UserError, match=r"rotated=17 must be positive and at most the 16"):
        build_method(config)

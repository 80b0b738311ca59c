"""StyleGAN: style mixing, truncation, EMA, lazy phases, adaptive augmentation, error messages."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax.engine.method import State
from ssl_jax.errors import UserError
from ssl_jax.experiment import config as configs
from ssl_jax.methods import build_method
from ssl_jax.methods import stylegan as subject
from ssl_jax.models.gan.networks import STYLE_NETWORKS, build_network
from ssl_jax.objectives.adversarial import r1

ROOT = pathlib.Path(__file__).parent.parent


def load(variant="smoke", size=8, classes=10, **model):
    config = configs.load(f"{ROOT}/configs/stylegan.py:{variant}", ())
    with config.unlocked():
        config.data.image_shape, config.data.num_classes, config.dtype = (size, size, 3), classes, "float32"
        config.batch_size = 8
        config.model.update(model)
    return config


def batch(n=8, size=8):
    rng = np.random.default_rng(0)
    return {"image": rng.integers(0, 256, (n, size, size, 3), np.uint8), "label": rng.integers(0, 10, n)}


@functools.cache
def initialized():
    """(method, params, mutable) of the smoke variant, with nonzero noise strengths."""
    method = build_method(load())
    params, mutable = jax.jit(method.init, static_argnums=2)(jax.random.key(0), batch(), None)
    loud = jax.tree_util.tree_map_with_path(lambda path, x: x + 0.3 * ("noise_strength" in str(path)), mutable["ema"])
    return method, params, {**mutable, "ema": loud}


def test_style_mixing_by_layer():
    a, b = jnp.ones((3, 5)), jnp.zeros((3, 5))
    np.testing.assert_array_equal(subject.mix_styles(a, b, 2, 4)[:, :, 0], [[1, 1, 0, 0]] * 3)
    np.testing.assert_array_equal(subject.mix_styles(a, b, 4, 4), jnp.ones((3, 4, 5)))


def test_truncation_pulls_the_first_layers_to_the_center():
    ws, center = jnp.asarray(np.random.default_rng(0).standard_normal((3, 4, 5))), jnp.arange(5.0)
    np.testing.assert_allclose(subject.truncate_styles(ws, center, 1.0, 4), ws, rtol=1e-6)
    np.testing.assert_allclose(subject.truncate_styles(ws, center, 0.0, 4), jnp.broadcast_to(center, ws.shape))
    half = subject.truncate_styles(ws, center, 0.5, 2)
    np.testing.assert_allclose(half[:, :2], (ws[:, :2] + center) / 2, rtol=1e-6)
    np.testing.assert_array_equal(half[:, 2:], ws[:, 2:])


def test_ema_decay_from_half_life_in_images():
    assert float(subject.ema_decay(jnp.int32(7), 32, 10_000, 0.0)) == pytest.approx(0.9977844, abs=1e-6)
    assert float(subject.ema_decay(jnp.int32(0), 32, 10_000, 0.05)) == 0  # the first average is the weights themselves
    assert float(subject.ema_decay(jnp.int32(100), 32, 10_000, 0.05)) == pytest.approx(0.5 ** (32 / 160))
    assert float(subject.ema_decay(jnp.int32(10**6), 64, 500_000, 0.05)) == pytest.approx(0.5 ** (64 / 500_000))


@pytest.mark.full
def test_samples_depend_on_truncation_and_mixed_latents():
    method, params, mutable = initialized()
    sample, mix, generator = jax.jit(method.sampler.sample), jax.jit(method.sampler.mix), method.sampler.prepare(params, mutable, None)
    a, b = (method.sampler.latents(jax.random.key(i), 4) for i in (1, 2))
    plain = sample(generator, a, 1.0)
    assert plain.shape == (4, 8, 8, 3)
    assert plain.min() >= 0
    assert plain.max() <= 1
    np.testing.assert_allclose(sample(generator, a, None), plain, atol=1e-6)
    same_noise = {**a, "noise": jnp.full(4, 7, jnp.uint32)}
    assert np.ptp(sample(generator, same_noise, 0.0), axis=0).max() < 1e-6  # one image for all
    assert np.ptp(sample(generator, a, 0.0), axis=0).max() > 1e-3  # the noise differs
    np.testing.assert_allclose(mix(generator, a, b, 4), sample(generator, {**a, "noise": b["noise"]}, 1.0), atol=1e-6)
    np.testing.assert_allclose(mix(generator, a, b, 0), sample(generator, b, 1.0), atol=1e-6)
    assert np.abs(mix(generator, a, b, 2) - sample(generator, b, 1.0)).max() > 1e-3


@functools.cache
def after_one_loss(name):
    method, params, mutable = initialized()
    phase = next(phase for phase in method.phases if phase.name == name)
    state = State(jnp.int32(3), params, {}, {**mutable, "augment": {"p": jnp.float32(0.25), "certainty": jnp.float32(0.75)}}, {})
    train = {group: params[group] for group in phase.trains}
    value, (update, logs) = jax.jit(phase.loss)(train, state, batch(), jax.random.key(5))
    return state, float(value), update, {k: float(v) for k, v in logs.items()}


@pytest.mark.full
def test_lazy_phases_and_state_that_each_updates():
    method, _, _ = initialized()
    assert [(phase.name, phase.trains) for phase in method.phases] == [
        ("g", ("generator",)), ("path", ("generator",)), ("d", ("discriminator",)), ("r1", ("discriminator",)),
    ]  # fmt: skip
    default = {phase.name: phase.when for phase in build_method(load("", size=32)).phases}
    assert [step for step in range(48) if default["r1"](step)] == [15, 31, 47]
    assert [step for step in range(12) if default["path"](step)] == [3, 7, 11]  # so steps divisible by the interval have the metric
    assert default["g"] is default["d"] is None
    updated = {name: set(after_one_loss(name)[2]) for name in ("g", "path", "d", "r1")}
    assert updated == {"g": {"w_average"}, "path": {"path_length"}, "d": {"augment"}, "r1": set()}


@pytest.mark.full
def test_lazy_losses_are_scaled_by_their_interval():
    _, value, _, logs = after_one_loss("r1")
    assert value == pytest.approx(2 * logs["penalty"], rel=1e-5)
    state, value, update, logs = after_one_loss("path")
    assert float(update["path_length"]) == pytest.approx(logs["length"])
    assert value > 0
    assert float(state.mutable["path_length"]) == 0 < logs["length"]


@pytest.mark.full
def test_truncation_center_is_a_running_mean_of_w():
    state, _, update, _ = after_one_loss("g")
    change = update["w_average"] - state.mutable["w_average"]
    assert 0 < float(jnp.linalg.norm(change)) < 0.02 * float(jnp.linalg.norm(state.mutable["w_average"]))


@pytest.mark.full
def test_augmentation_probability_changes_every_fourth_step():
    _, _, update, logs = after_one_loss("d")  # step 3: the last batch of an interval of four
    signs = 2 * logs["accuracy_real"] - 1
    expected = 0.25 + np.sign(0.75 + signs / 4 - 0.6) * 4 * 8 / 500_000
    assert float(update["augment"]["p"]) == pytest.approx(expected, abs=1e-7)
    assert logs["augment_p"] == float(update["augment"]["p"])
    assert float(update["augment"]["certainty"]) == 0


@pytest.mark.full
def test_stylegan1_r1_penalty_is_part_of_the_discriminator_loss():
    model = dict(r1=dict(weight=7.0, interval=1), path_length=dict(weight=0.0, interval=4), augment=dict(policy=(), target=0.0))
    config = load(**model)
    with config.unlocked():
        config.views = ((),)
        config.model.generator = dict(name="stylegan1", channel_base=128, channel_max=16, features=16, mapping_layers=2)
        config.model.discriminator = dict(name="stylegan1", channel_base=128, channel_max=16, group=4)
    method = build_method(config)
    assert [phase.name for phase in method.phases] == ["g", "d"]
    params, mutable = jax.jit(method.init, static_argnums=2)(jax.random.key(0), batch(), None)
    state = State(jnp.int32(0), params, {}, mutable, {})
    train = {"discriminator": params["discriminator"]}
    _, (_, logs) = jax.jit(method.phases[1].loss)(train, state, batch(), jax.random.key(0))
    network = build_network("discriminator", config.model.discriminator, 8, 0, "float32", STYLE_NETWORKS)
    real = batch()["image"] / np.float32(127.5) - 1
    expected = 7 * r1(lambda x: network.apply({"params": train["discriminator"]}, x, train=True)[0], real)
    np.testing.assert_allclose(logs["penalty"], expected, rtol=1e-4)


@pytest.mark.full
def test_mixed_samples_are_truncated_like_samples():
    method, params, mutable = initialized()
    generator, latents = method.sampler.prepare(params, mutable, None), method.sampler.latents(jax.random.key(1), 4)
    mix = jax.jit(method.sampler.mix)
    np.testing.assert_allclose(mix(generator, latents, latents, 2, 0.3), method.sampler.sample(generator, latents, 0.3), atol=1e-6)
    assert np.abs(mix(generator, latents, latents, 2, 0.3) - mix(generator, latents, latents, 2)).max() > 1e-3


@pytest.mark.full
def test_interpolations_are_float32_and_keep_the_class():
    exact, rounded = load(conditional=True), load(conditional=True)
    with rounded.unlocked():
        rounded.dtype = "bfloat16"
    exact, rounded = build_method(exact), build_method(rounded)
    params, mutable = jax.jit(exact.init, static_argnums=2)(jax.random.key(0), batch(), None)
    generator = exact.sampler.prepare(params, mutable, None)
    start, end = (exact.sampler.latents(jax.random.key(i), 4) for i in (1, 2))
    other = {**end, "label": (start["label"] + 1) % 10}
    for space in ("w", "z"):
        way = jax.jit(exact.sampler.between[space])(generator, start, end, jnp.full(4, 0.5))
        np.testing.assert_array_equal(jax.jit(rounded.sampler.between[space])(generator, start, end, jnp.full(4, 0.5)), way)
        np.testing.assert_array_equal(jax.jit(exact.sampler.between[space])(generator, start, other, jnp.full(4, 0.5)), way)
    images = [method.sampler.sample(generator, start) for method in (rounded, exact)]
    assert np.abs(images[0] - images[1]).max() > 1e-3  # samples are bfloat16


@pytest.mark.full
def test_conditional_networks_and_invalid_configs():
    config = load(conditional=True)
    method = build_method(config)
    assert set(method.inputs) == {"image", "label"}
    assert method.fns.discriminate is None
    latents = method.sampler.latents(jax.random.key(0), 50)
    assert set(np.unique(latents["label"])) == set(range(10))
    shapes = jax.eval_shape(method.init, jax.random.key(0), batch(), None)[0]
    assert shapes["generator"]["mapping"]["embed"]["kernel"].shape == (10, 16)
    with pytest.raises(UserError, match=r"has none; give --config\.model\.conditional=False"):
        build_method(load(conditional=True, classes=None))
    for changes, message in (
        (dict(generator=dict(name="stylegan3")), "generator.name has no 'stylegan3'; did you mean 'stylegan2' or 'stylegan1'"),
        (dict(discriminator=dict(name="stylegan2", widht=3)), r"discriminator \(stylegan2\) has no 'widht'"),
        (dict(augment=dict(policy=("blur",), target=0.0)), "policy has no 'blur'"),
        (dict(conditional=True, discriminator=dict(name="stylegan1")), "'stylegan1' takes no labels; choose stylegan2"),
    ):
        config = load()
        with config.unlocked():
            for key, value in changes.items():
                config.model[key] = value
        with pytest.raises(UserError, match=message):
            build_method(config)


@pytest.mark.parametrize(("interval", "rate", "b2"), [(16, 0.941176, 0.990585), (4, 0.8, 0.991992)])
def test_learning_rate_and_beta2_of_lazy_regularization(interval, rate, b2):
    config = load("ffhq1024", size=1024)
    spec = config.optim.discriminator if interval == 16 else config.optim.generator
    lazy = interval / (interval + 1)
    assert spec.lr / 0.002 == pytest.approx(rate, abs=1e-6) == lazy
    assert spec.b2 == pytest.approx(b2) == pytest.approx(0.99**lazy, abs=1e-6)

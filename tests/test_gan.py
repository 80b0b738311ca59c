"""Networks of the first GAN papers, and `methods/gan.py`: losses, penalties, EMA, samples, error messages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax.augment.views import make_views
from ssl_jax.data.catalog import facts
from ssl_jax.engine.method import ModelFns
from ssl_jax.errors import UserError
from ssl_jax.experiment import config as configs
from ssl_jax.experiment.build import fill_in
from ssl_jax.methods import build_method
from ssl_jax.models.build import construct
from ssl_jax.models.common import create, run
from ssl_jax.models.gan.networks import build_network
from ssl_jax.models.heads import ProjectionHead
from ssl_jax.objectives import adversarial


def count(module, *shape):
    params, _ = jax.eval_shape(lambda: create(module, jax.random.key(0), jnp.zeros(shape)))
    return sum(x.size for x in jax.tree.leaves(params))


@pytest.mark.parametrize(
    ("generator", "discriminator", "size", "latent", "expected"),
    [
        (dict(name="dcgan"), dict(name="dcgan", head_bias=False), 64, 100, (3_576_704, 2_765_568)),  # pytorch/examples
        (
            dict(name="dcgan", channels=128, kernel=5),
            dict(name="dcgan", channels=128, kernel=5, head_bias=False),
            64,
            100,
            (18_855_040, 17_232_768),  # the authors' code
        ),
        (dict(name="mlp"), dict(name="mlp"), 28, 100, (4_387_152, 3_113_041)),
        (dict(name="sngan"), dict(name="sngan"), 32, 128, (4_276_739, 1_053_824)),
    ],
    ids=["dcgan", "dcgan k5", "2014", "sngan"],
)
def test_parameter_counts(generator, discriminator, size, latent, expected):
    stages = {} if generator["name"] in ("mlp", "sngan") else {"stages": 4}
    first = count(build_network("generator", {**generator, **stages}, size, 0, "float32"), 2, latent)
    assert (first, count(build_network("discriminator", discriminator, size, 0, "float32"), 2, size, size, 3)) == expected


NETWORKS = [
    (dict(name="mlp", width=16), dict(name="mlp", width=4)),
    (dict(name="dcgan", channels=4, stages=3), dict(name="dcgan", channels=4, stages=3)),
    (dict(name="dcgan", channels=4, stages=3, final_kernel=3), dict(name="sndcgan", channels=4, norm="spectral")),
    (dict(name="sngan", channels=4), dict(name="sngan", channels=4)),
]


@pytest.mark.full
@pytest.mark.parametrize("size", [32, 48])
@pytest.mark.parametrize(("generator", "discriminator"), NETWORKS, ids=lambda spec: spec["name"])
def test_range_of_images_and_shapes_of_features(generator, discriminator, size):
    generator = build_network("generator", generator, size, 0, "float32")
    discriminator = build_network("discriminator", discriminator, size, 0, "float32")
    z = jax.random.normal(jax.random.key(0), (6, 8))
    params, state = create(generator, jax.random.key(1), z)
    images, new_state = run(generator, params, state, z, train=True)
    assert images.shape == (6, size, size, 3)
    assert images.dtype == jnp.float32
    assert -1 <= images.min() < 0 < images.max() <= 1
    keys = {"params": jax.random.key(2), "dropout": jax.random.key(3)}
    d_params, d_state = create(discriminator, keys, images)
    (logits, features), _ = run(discriminator, d_params, d_state, images, train=True, key=keys["dropout"])
    assert logits.shape == (6,)
    assert features["pooled"].ndim == 2
    still, same = run(generator, params, new_state, z, train=False)
    assert same is new_state
    one, _ = run(generator, params, new_state, z[:1], train=False)
    np.testing.assert_allclose(one[0], still[0], atol=1e-5)


@pytest.mark.full
def test_dcgan_equals_pytorch():
    """The generator of pytorch/examples on copied weights, with batch statistics: order of channels, padding, kernels."""
    from torch_reference import require_torch

    torch = require_torch()
    layers, widths = [], [16, 8, 4]
    for before, after in zip([6, *widths], [*widths, 3], strict=True):
        first = before == 6
        layers.append(torch.nn.ConvTranspose2d(before, after, 4, 1 if first else 2, 0 if first else 1, bias=False))
        layers += [torch.nn.Tanh()] if after == 3 else [torch.nn.BatchNorm2d(after), torch.nn.ReLU()]
    theirs = torch.nn.Sequential(*layers).train()
    ours = build_network("generator", dict(name="dcgan", channels=4, stages=3), 32, 0, "float32")
    z = np.random.default_rng(0).normal(size=(5, 6)).astype("f")
    params, state = create(ours, jax.random.key(0), jnp.asarray(z))
    kernels = [layer.weight.detach().numpy().transpose(2, 3, 0, 1) for layer in layers if hasattr(layer, "output_padding")]
    params["Dense_0"]["kernel"] = kernels[0].transpose(2, 0, 1, 3).reshape(6, -1)
    for i, kernel in enumerate(kernels[1:]):
        params[f"TransposedConv_{i}"]["kernel"] = kernel
    for i in range(3):
        params[f"BatchNorm_{i}"]["scale"] = np.ones(widths[i], "f")
    images, _ = run(ours, params, state, jnp.asarray(z), train=True)
    expected = theirs(torch.tensor(z)[:, :, None, None]).detach().numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(images, expected, atol=2e-5)


def test_unknown_networks_and_fields_raise_user_error():
    with pytest.raises(UserError, match=r"generator.name has no 'dcgn'; did you mean 'dcgan'"):
        build_network("generator", dict(name="dcgn"), 32, 0, "float32")
    with pytest.raises(UserError, match=r"config.model.discriminator \(sngan\) has no 'chanels'; did you mean 'channels'"):
        build_network("discriminator", dict(name="sngan", chanels=4), 32, 0, "float32")
    with pytest.raises(UserError, match=r"config.model.generator \(dcgan\) needs 'stages'"):
        build_network("generator", dict(name="dcgan"), 32, 0, "float32")
    with pytest.raises(UserError, match=r"'dcgan' takes no labels; choose biggan or biggan_deep, or config.model.conditional=False"):
        build_network("generator", dict(name="dcgan", stages=3), 32, 10, "float32")


def test_missing_config_field_is_user_error_and_bugs_keep_traceback(monkeypatch):
    config = configs.load("configs/gan.py:smoke")
    config = fill_in(config, facts(config.data))
    with config.unlocked():
        del config.model["latent"]
    with pytest.raises(UserError, match=r"config.model has no 'latent', which method 'gan' needs; there are discriminator, .*penalty"):
        build_method(config)
    with config.unlocked():
        config.model.latent = dict(kind="normal", siz=8)
    with pytest.raises(UserError, match=r"config.model.latent has no 'size', which method 'gan' needs; did you mean 'siz'"):
        build_method(config)
    bugs = {
        "make_views.. got an unexpected keyword argument 'vews'": lambda config, stages: make_views(vews=config.views),
        "missing 1 required positional argument": lambda config, stages: make_views(),
        "unexpected keyword argument 'score'": lambda config, stages: ModelFns(score=None),
        "no attribute 'loss'": lambda config, stages: None.loss,
        "unsupported operand": lambda config, stages: 1 + "1",
    }
    for message, bug in bugs.items():
        monkeypatch.setattr("ssl_jax.methods.gan.build", bug)
        with pytest.raises((AttributeError, TypeError), match=message):
            build_method(config)


def test_projection_head_fields_are_checked_against_its_signature():
    with pytest.raises(UserError, match=r"config.model.head has no 'width'; did you mean 'widths'"):
        construct(ProjectionHead, "head", dict(width=(8, 8)), dtype="float32")
    with pytest.raises(UserError, match=r"config.model.head has no 'dtype'"):  # the config may not set it
        construct(ProjectionHead, "head", dict(dtype="float32"), dtype="float32")
    with pytest.raises(UserError, match=r"config.model.part needs 'a'"):
        construct(lambda a, b=1: a, "part", {})
    with pytest.raises(TypeError, match="unexpected keyword argument 'nonsense'"):  # of the code, not of the config
        construct(lambda a: ProjectionHead(nonsense=a), "part", dict(a=1))


def smoke(*overrides):
    config = configs.load("configs/gan.py:smoke", overrides)
    config = fill_in(config, facts(config.data))
    return config, build_method(config)


@pytest.fixture(scope="module")
def initialized():
    config, method = smoke()
    images = np.random.default_rng(0).integers(0, 256, (16, 16, 16, 3), np.uint8)
    params, mutable = method.init(jax.random.key(0), {"image": images}, {})
    return config, method, params, mutable, {"image": images}


@pytest.mark.full
def test_generator_ema_starts_late_and_decays(initialized):
    """A constant source is a fixed point; the weight of the start after n steps is decay^n."""
    from ssl_jax.engine.method import State

    config, method, params, mutable, _ = initialized
    decay, start = config.model.ema.decay, config.model.ema.start
    ones, zeros = (jax.tree.map(lambda x, v=v: jnp.full_like(x, v), params["generator"]) for v in (1.0, 0.0))
    state = State(jnp.int32(start - 1), {**params, "generator": ones}, {}, {**mutable, "ema": zeros}, {})
    mutable = method.after(state)
    np.testing.assert_array_equal(mutable["ema"]["Dense_0"]["kernel"], 1.0)  # before the start it is a copy
    state = state._replace(params={**params, "generator": zeros}, step=jnp.int32(start))
    for _ in range(10):
        state = state._replace(mutable=method.after(state._replace(mutable=mutable)))
        mutable = state.mutable
    np.testing.assert_allclose(mutable["ema"]["Dense_0"]["kernel"], decay**10, rtol=1e-5)


@pytest.mark.full
def test_phases_update_only_their_state_and_log_health(initialized):
    from ssl_jax.engine.method import State

    config, method, params, mutable, batch = initialized
    state = State(jnp.int32(0), params, {}, mutable, {})
    _, (update, logs) = method.phases[0].loss({"discriminator": params["discriminator"]}, state, batch, jax.random.key(0))
    assert set(update) == {"discriminator"}  # the discriminator's steps do not update the generator's statistics
    assert {"accuracy_real", "accuracy_fake", "logit_std", "diversity"} <= set(logs)
    _, (update, _) = method.phases[1].loss({"generator": params["generator"]}, state, batch, jax.random.key(0))
    assert set(update) == {"generator", "discriminator"}
    before, after = (tree["discriminator"]["spectral"]["SpectralConv_0"]["u"] for tree in (mutable, update))
    assert not np.array_equal(before, after)  # each call advances the power iterations
    assert config.model.discriminator_steps == method.phases[0].repeat == 2


@pytest.mark.full
@pytest.mark.parametrize("name", ["gradient_penalty", "r1", "r2"])
def test_penalties_are_added_with_their_weight(name):
    from ssl_jax.engine.method import State

    totals = []
    for weight in (0.0, 3.0):
        _, method = smoke(f"--config.model.penalty.name={name}", f"--config.model.penalty.weight={weight}")
        images = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)
        params, mutable = method.init(jax.random.key(0), {"image": images}, {})
        state = State(jnp.int32(0), params, {}, mutable, {})
        loss, (_, logs) = method.phases[0].loss(params, state, {"image": images}, jax.random.key(1))
        totals.append(loss)
    assert logs["penalty"] > 0
    np.testing.assert_allclose(totals[1] - totals[0], 3 * logs["penalty"], rtol=1e-4)
    other = state._replace(params={**params, "generator": jax.tree.map(lambda x: 2 * x, params["generator"])})
    _, (_, other_logs) = method.phases[0].loss(params, other, {"image": images}, jax.random.key(1))
    assert (other_logs["penalty"] == logs["penalty"]) == (name == "r1")  # only R1 does not depend on samples


@pytest.mark.full
def test_samples_are_reproducible_and_truncation_reduces_diversity(initialized):
    _, method, params, mutable, _ = initialized
    prepared = jax.jit(method.sampler.prepare)(params, mutable, jax.random.key(0))
    latents = method.sampler.latents(jax.random.key(1), 32)
    free, repeated = (method.sampler.sample(prepared, latents) for _ in range(2))
    np.testing.assert_array_equal(free, repeated)
    assert 0 <= free.min() < free.max() <= 1
    shortened = jax.jit(method.sampler.prepare)(params, mutable, jax.random.key(0), 0.2)  # its statistics are those of such latents
    statistics = [np.concatenate([x.ravel() for x in jax.tree.leaves(tree["state"]["batch_stats"])]) for tree in (prepared, shortened)]
    assert np.abs(statistics[1] - statistics[0]).max() > 0.1 * np.abs(statistics[0]).max()
    near = method.sampler.sample(prepared, latents, 0.2)
    assert adversarial.diversity(free, near) < 0.6
    with pytest.raises(UserError, match="only normal latents can be truncated"):
        smoke("--config.model.latent.kind=uniform")[1].sampler.sample(prepared, latents, 0.5)


def test_unknown_game_or_penalty_raises_user_error():
    for override, message in (("game=hing", "config.model.game='hing'"), ("penalty.name=r3", "config.model.penalty.name='r3'")):
        with pytest.raises(UserError, match=message):
            smoke(f"--config.model.{override}")

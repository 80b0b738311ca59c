"""BigGAN and BigGAN-deep: published sizes, and each part against its formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from ssl_jax.engine.method import State
from ssl_jax.engine.sharding import BATCH, leaf_names, make_mesh, match, spec_of
from ssl_jax.errors import UserError
from ssl_jax.experiment import config as configs
from ssl_jax.methods import build_method
from ssl_jax.methods.biggan import interleave, kernels
from ssl_jax.models.common import create, run
from ssl_jax.models.gan.biggan import (
    BigGANDiscriminator,
    BigGANGenerator,
    BigGANTrunk,
    ConditionalNorm,
    DiscriminatorBlock,
    NonLocal,
    ProjectionHead,
)
from ssl_jax.models.gan.biggan_deep import (
    TENSOR_RULES,
    DeepDiscriminator,
    DeepDiscriminatorBlock,
    DeepGenerator,
    DeepGeneratorBlock,
)
from ssl_jax.models.gan.networks import build_network
from ssl_jax.models.gan.spectral import power_step
from ssl_jax.models.gan.standing_stats import standing_stats
from ssl_jax.sampling.latents import sample_latents

LABEL = jnp.zeros(2, jnp.int32)


def count(module, *args):
    params, _ = jax.eval_shape(lambda key: create(module, key, *args, LABEL), jax.random.key(0))
    return sum(x.size for x in jax.tree.leaves(params))


def normalized(params, state):
    """A kernel divided by the estimate that inference takes."""
    return np.asarray(params["kernel"] / power_step(params["kernel"], state["u"])[0], np.float64)


@pytest.mark.parametrize(
    ("size", "latent", "attention", "parameters"),
    [(128, 120, 64, 70_433_988), (256, 140, 128, 82_097_604), (256, 140, 64, 82_235_844), (512, 160, 64, 82_468_068)],
)
@pytest.mark.full
def test_parameter_counts_of_generators(size, latent, attention, parameters):
    generator = BigGANGenerator(size, classes=1000, attention=(attention,))
    assert count(generator, jnp.zeros((2, latent))) == parameters


@pytest.mark.parametrize(
    ("size", "project_equal", "parameters"),
    [
        (128, True, 87_982_370),
        (256, False, 98_635_298),
        (256, True, 99_225_890),
        (512, False, 98_801_378),
        (512, True, 99_401_282),
    ],
)
def test_parameter_counts_of_discriminators(size, project_equal, parameters):
    discriminator = BigGANDiscriminator(size, classes=1000, attention=(64,), project_equal=project_equal)
    assert count(discriminator, jnp.zeros((2, size, size, 3))) == parameters


@pytest.mark.full
@pytest.mark.parametrize(
    ("size", "generator", "discriminator"),
    [(128, 50_244_484, 34_590_210), (256, 55_736_708, 38_247_426), (512, 56_019_780, 38_301_122)],
)
def test_parameter_counts_of_biggan_deep(size, generator, discriminator):
    assert count(DeepGenerator(size, classes=1000), jnp.zeros((2, 128))) == generator
    assert count(DeepDiscriminator(size, classes=1000), jnp.zeros((2, size, size, 3))) == discriminator


@pytest.mark.full
def test_biggan_deep_at_32_pixels_shapes_and_range():
    z, label = jax.random.normal(jax.random.key(0), (3, 8)), jnp.arange(3)
    generator = DeepGenerator(32, channels=8, classes=3, embedding=4, attention=(16,))
    params, state = create(generator, jax.random.key(1), z, label)
    images, new_state = jax.jit(lambda *a: run(generator, *a, train=True))(params, state, z, label)
    assert images.shape == (3, 32, 32, 3)
    assert -1 <= images.min() < images.max() <= 1
    assert set(new_state) == set(state)
    discriminator = DeepDiscriminator(32, channels=8, classes=3, attention=(16,))
    params, state = create(discriminator, jax.random.key(2), images, label)
    (logits, features), _ = jax.jit(lambda *a: run(discriminator, *a, train=False))(params, state, images, label)
    assert logits.shape == (3,)
    assert features["layer3"].shape == (3, 4, 4, 32)
    assert not np.array_equal(logits, run(discriminator, params, state, images, (label + 1) % 3, train=False)[0][0])
    assert count(DeepGenerator(64), jnp.zeros((2, 8))) > count(DeepGenerator(32), jnp.zeros((2, 8)))


def test_parameter_counts_for_cifar10_and_table_1():
    generator = BigGANGenerator(32, classes=10, attention=(16,))
    assert count(generator, jnp.zeros((2, 80))) == 9_416_196
    assert round((70_433_988 + 87_982_370) / 1e6, 1) == 158.4  # table 1 says 158.3 for both networks


def test_latent_chunks_and_shared_embedding_condition_the_blocks():
    generator = BigGANGenerator(128, classes=1000)
    params, _ = jax.eval_shape(lambda key: create(generator, key, jnp.zeros((2, 120)), LABEL), jax.random.key(0))
    assert params["project"]["kernel"].shape[0] == 20
    assert params["block3"]["norm2"]["gain"]["kernel"].shape == (148, 96 * 4)
    assert set(params["block3"]["norm2"]) == {"gain", "shift"}
    assert params["embed"]["embedding"].shape == (1000, 128)
    with pytest.raises(UserError, match="size=128 is no multiple of 6"):
        count(generator, jnp.zeros((2, 128)))
    with pytest.raises(UserError, match="48 pixels"):
        BigGANTrunk(48)
    with pytest.raises(UserError, match="4 multiples needs a size that is a multiple of 8, not 36"):
        BigGANTrunk(36, multiples=(1, 2, 4, 8))


@pytest.fixture(scope="module")
def small():
    """A conditional generator with attention, its variables and some latents."""
    generator = BigGANGenerator(32, channels=4, classes=3, embedding=8, attention=(16,))
    z = sample_latents("normal", jax.random.key(0), (6, 16))
    return generator, *create(generator, jax.random.key(1), z, jnp.zeros(6, jnp.int32)), z


@pytest.mark.full
def test_images_depend_on_class_and_on_each_latent_chunk(small):
    generator, params, state, z = small
    make = jax.jit(lambda z, label: run(generator, params, state, z, label, train=False)[0])
    label = jnp.array([0, 1, 2, 0, 1, 2])
    images = make(z, label)
    assert images.shape == (6, 32, 32, 3)
    assert images.dtype == jnp.float32
    assert jnp.abs(images).max() <= 1
    assert jnp.std(images) > 0.05
    other = make(z, label.at[0].set(1))
    assert jnp.abs(other - images)[0].max() > 1e-3
    np.testing.assert_allclose(other[1:], images[1:], atol=1e-5)
    for chunk in range(4):
        assert jnp.abs(make(z.at[0, 4 * chunk].add(1.0), label) - images)[0].max() > 1e-4
    np.testing.assert_allclose(make(z, None), make(z, jnp.zeros_like(label)), atol=1e-5)


@pytest.mark.full
def test_conditional_batch_norm_equals_formula():
    x, c = jax.random.normal(jax.random.key(0), (8, 3, 5, 4)) * 3 + 1, jax.random.normal(jax.random.key(1), (8, 7))
    module = ConditionalNorm("orthogonal", jnp.float32)
    params, state = create(module, jax.random.key(2), x, c)
    got, new_state = run(module, params, state, x, c, train=True)
    wide = np.asarray(x, np.float64)
    mean, variance = wide.mean((0, 1, 2)), wide.var((0, 1, 2))
    gain, shift = (np.asarray(c) @ normalized(params[n], state["spectral"][n]) for n in ("gain", "shift"))
    want = (wide - mean) / np.sqrt(variance + 1e-5) * (1 + gain)[:, None, None] + shift[:, None, None]
    np.testing.assert_allclose(got, want, atol=2e-5)
    np.testing.assert_allclose(new_state["batch_stats"]["norm"]["mean"], 0.1 * mean, rtol=1e-4)


@pytest.mark.full
def test_attention_starts_as_identity_and_equals_formula():
    x = jax.random.normal(jax.random.key(0), (2, 4, 6, 16))
    module = NonLocal("normal", jnp.float32)
    params, state = create(module, jax.random.key(1), x)
    np.testing.assert_array_equal(run(module, params, state, x, train=True)[0], x)
    params = {**params, "gamma": jnp.float32(0.7), "query": {"kernel": params["query"]["kernel"] * 5}}
    got, _ = run(module, params, state, x, train=False)
    wide = np.asarray(x, np.float64)

    def project(x, name):
        return x @ normalized(params[name], state["spectral"][name])[0, 0]

    def pool(x):
        return x.reshape(2, 2, 2, 3, 2, -1).max((2, 4)).reshape(2, 6, -1)

    scores = project(wide, "query").reshape(2, 24, 2) @ pool(project(wide, "key")).transpose(0, 2, 1)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    mixed = (weights @ pool(project(wide, "value"))).reshape(2, 4, 6, 8)
    np.testing.assert_allclose(got, wide + 0.7 * project(mixed, "output"), atol=1e-4)


@pytest.mark.full
def test_discriminator_sum_pooling_and_label_projection():
    x, label = jax.random.uniform(jax.random.key(0), (4, 32, 32, 3)) * 2 - 1, jnp.array([0, 2, 1, 2])
    module = BigGANDiscriminator(32, channels=4, classes=3, attention=(16,))
    params, state = create(module, jax.random.key(1), x, label)
    assert set(state) == {"spectral"}
    (logits, features), new_state = run(module, params, state, x, label, train=True)
    assert [features[f"layer{n}"].shape for n in (1, 2, 3, 4)] == [(4, 16, 16, 16), *[(4, 8, 8, 16)] * 3]
    pooled = features["pooled"]
    np.testing.assert_allclose(pooled, jax.nn.relu(features["layer4"]).sum((1, 2)), rtol=1e-5)
    table, u = params["head"]["embed"]["embedding"], state["spectral"]["head"]["embed"]["u"]
    rows = (table / power_step(table, u)[0])[label]
    linear = params["head"]["linear"]["kernel"][:, 0]
    np.testing.assert_allclose(logits, pooled @ linear / jnp.linalg.norm(linear) + (pooled * rows).sum(-1), rtol=1e-4)
    assert not jax.tree.all(jax.tree.map(np.array_equal, new_state, state))
    narrow = BigGANTrunk(48, channels=4, multiples=(1, 2, 4))
    shapes = jax.eval_shape(lambda key: narrow.init_with_output(key, jnp.zeros((4, 48, 48, 3)), True)[0], jax.random.key(0))
    assert [shapes[f"layer{n}"].shape for n in (1, 2, 3)] == [(4, 24, 24, 4), (4, 12, 12, 8), (4, 12, 12, 16)]
    alone = ProjectionHead(0, "orthogonal")
    assert set(create(alone, jax.random.key(0), pooled, None)[0]) == {"linear"}


@pytest.mark.full
def test_first_discriminator_block_has_no_relu_on_the_image():
    image = -jnp.ones((1, 4, 4, 3))
    for first in (True, False):
        block = DiscriminatorBlock(4, first, True, True, "orthogonal", jnp.float32)
        params, state = create(block, jax.random.key(0), image)
        params["shortcut"]["kernel"] = jnp.ones_like(params["shortcut"]["kernel"]) * 1e-6  # its norm is divided out
        inner = jnp.abs(run(block, params, state, image, train=False)[0] - run(block, params, state, image * 0, train=False)[0])
        shortcut = jnp.abs(image[0, 0, 0].sum()) * normalized(params["shortcut"], state["spectral"]["shortcut"])[0, 0, 0, 0]
        assert (jnp.abs(inner - shortcut).max() < 1e-5) == (not first)  # relu(-1) = 0: only the shortcut is left


@pytest.mark.full
def test_shortcuts_of_biggan_deep_drop_and_append_channels():
    x, c = jax.random.normal(jax.random.key(0), (2, 4, 4, 16)), jax.random.normal(jax.random.key(1), (2, 5))

    def only_first_channel_of_branch(block, *args):
        params, state = create(block, jax.random.key(2), *args)
        params["conv4"]["kernel"] = jnp.zeros_like(params["conv4"]["kernel"]).at[..., 0].set(1.0)
        return run(block, params, state, *args, train=False)[0], params, state

    y, _, _ = only_first_channel_of_branch(DeepGeneratorBlock(8, True, "orthogonal", jnp.float32), x, c)
    assert y.shape == (2, 8, 8, 8)
    np.testing.assert_allclose(y[..., 1:], np.asarray(x)[..., 1:8].repeat(2, 1).repeat(2, 2), atol=1e-5)
    y, params, state = only_first_channel_of_branch(DeepDiscriminatorBlock(24, True, "orthogonal", jnp.float32), x)
    halved = np.asarray(x).reshape(2, 2, 2, 2, 2, 16).mean((2, 4))
    np.testing.assert_allclose(y[..., 1:16], halved[..., 1:], atol=1e-5)
    np.testing.assert_allclose(y[..., 16:], halved @ normalized(params["shortcut"], state["spectral"]["shortcut"])[0, 0], atol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("kind", [DeepGeneratorBlock, DeepDiscriminatorBlock])
def test_tensor_sharding_of_biggan_deep_keeps_outputs(kind):
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, jax.devices()[:8])
    generates = kind is DeepGeneratorBlock
    block = kind(16 if generates else 24, True, "orthogonal", jnp.float32)
    args = [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(((8, 4, 4, 16), (8, 6)))][: 1 + generates]
    params, state = create(block, jax.random.key(2), *args)
    names = [f"block1_0/{name}" for name in leaf_names(params)]
    rules = (*TENSOR_RULES[: 4 if generates else 3], (".*", "fsdp"))
    shardings = [
        NamedSharding(mesh, spec_of(rule, x.shape, mesh, name))
        for rule, x, name in zip(match(rules, names, "test"), jax.tree.leaves(params), names, strict=True)
    ]
    split = {name for name, sharding in zip(names, shardings, strict=True) if "tensor" in sharding.spec}
    assert split >= {f"block1_0/conv{i}/kernel" for i in (1, 2, 3, 4)}
    sharded = jax.device_put(params, jax.tree.unflatten(jax.tree.structure(params), shardings))
    forward = jax.jit(lambda params, *args: run(block, params, state, *args, train=True))
    with jax.set_mesh(mesh):
        together = forward(sharded, *(jax.device_put(x, NamedSharding(mesh, BATCH)) for x in args))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), together, forward(params, *args))


@pytest.mark.full
def test_power_iterations_converge_during_standing_statistics(small):
    generator, params, state, _ = small

    def batch(key):
        return sample_latents("normal", key, (8, 16)), jnp.zeros(8, jnp.int32)

    new_state = {**params, "project": {**params["project"], "kernel": jax.random.normal(jax.random.key(5), (4, 256))}}
    got = jax.jit(lambda key: standing_stats(generator, new_state, state, batch, key, 30))(jax.random.key(1))
    kernel, u = new_state["project"]["kernel"], got["spectral"]["project"]["u"]
    assert float(jnp.linalg.norm(kernel @ u)) == pytest.approx(np.linalg.svd(np.asarray(kernel, np.float64))[1][0], rel=1e-2)


def smoke(**overrides):
    config = configs.load("configs/biggan.py:smoke", ())
    with config.unlocked():
        config.data.image_shape, config.data.num_classes, config.dtype, config.eval_batch_size = (32, 32, 3), 3, "float32", 16
        config.views = ((),)
        config.model.update(overrides)
    return config, build_method(config)


@pytest.fixture(scope="module")
def built():
    """The method, a state and a batch."""
    _, method = smoke()
    images = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), np.uint8)
    batch = {"image": jnp.asarray(images), "label": jnp.arange(16) % 3}
    params, mutable = jax.jit(lambda key: method.init(key, batch, {}))(jax.random.key(0))
    return method, State(jnp.int32(0), params, {}, mutable, {}), batch


@pytest.mark.full
def test_labels_of_real_images_and_uniform_labels_of_fakes(built):
    method, state, batch = built
    latents = method.sampler.latents(jax.random.key(0), 30_000)
    np.testing.assert_allclose(np.bincount(latents["label"]), 10_000, rtol=0.03)
    assert latents["z"].shape == (30_000, 12)
    assert set(method.inputs) == {"image", "label"}
    _, unconditional = smoke(conditional=False)
    assert set(unconditional.inputs) == {"image"}
    assert set(unconditional.sampler.latents(jax.random.key(0), 2)) == {"z"}
    train = {"discriminator": state.params["discriminator"]}
    value = jax.jit(lambda batch: method.phases[0].loss(train, state, batch, jax.random.key(1))[0])
    other = {**batch, "label": (batch["label"] + 1) % 3}
    assert abs(value(batch) - value(other)) > 1e-4
    logits = [method.fns.discriminate(state.params, state.mutable, batch["image"], jnp.full(16, n)) for n in range(3)]
    whole = method.fns.discriminate(state.params, state.mutable, batch["image"])
    np.testing.assert_allclose(whole, np.mean(logits, 0), rtol=1e-4, atol=1e-5)


@pytest.mark.full
def test_joint_pass_of_real_and_fake_images_equals_separate_passes(built):
    """Equals separate passes, each after one power iteration; interleaving keeps every image on its device."""
    method, state, batch = built
    config, _ = smoke()
    generator, discriminator = (build_network(r, config.model[r], 32, 3, "float32") for r in ("generator", "discriminator"))
    params, mutable = state.params, state.mutable

    def separate_passes(key):
        latents = method.sampler.latents(jax.random.split(key)[1], 16)
        fake, _ = run(generator, params["generator"], mutable["generator"], latents["z"], latents["label"], train=True)
        scored = [
            run(discriminator, params["discriminator"], mutable["discriminator"], x, label, train=True)
            for x, label in ((batch["image"] / 127.5 - 1, batch["label"]), (fake, latents["label"]))
        ]
        (((real, _), new_state), ((fake, _), _)) = scored
        return jax.nn.relu(1 - real).mean() + jax.nn.relu(1 + fake).mean(), new_state

    train = {"discriminator": params["discriminator"]}
    value, (new_state, _) = jax.jit(lambda key: method.phases[0].loss(train, state, batch, key))(jax.random.key(1))
    expected, once = jax.jit(separate_passes)(jax.random.key(1))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), new_state["discriminator"], once)
    x = jnp.arange(3)[:, None]
    np.testing.assert_array_equal(interleave(x, -x)[:, 0], [0, 0, 1, -1, 2, -2])


def test_discriminator_with_batch_norm_is_refused():
    """They would mix real and generated images."""
    config, _ = smoke(conditional=False)
    with config.unlocked():
        config.model.discriminator = dict(name="dcgan", channels=4, stages=2)
    with pytest.raises(UserError, match=r"dcgan.*sngan, biggan, biggan_deep"):
        build_method(config)


@pytest.mark.full
def test_orthogonal_regularization_of_all_kernels_without_embeddings(built):
    _, state, batch = built
    train = {"generator": state.params["generator"]}
    names = ["/".join(k.key for k in path) for path, leaf in jax.tree_util.tree_leaves_with_path(train["generator"]) if leaf.ndim > 1]
    assert len(kernels(train["generator"])) == len(names) - 1
    assert "embed/embedding" in names
    rough = {"generator": jax.tree.map(lambda x: x + 0.1 * (x.ndim > 1), train["generator"])}
    results = [jax.jit(smoke(orthogonal=w)[1].phases[1].loss)(rough, state, batch, jax.random.key(1)) for w in (0.0, 1e-2)]
    by_hand = 0.0
    for kernel in kernels(rough["generator"]):
        w = np.asarray(kernel, np.float64).reshape(-1, kernel.shape[-1])
        by_hand += ((w.T @ w * (1 - np.eye(w.shape[1]))) ** 2).sum()
    np.testing.assert_allclose(results[1][0] - results[0][0], 1e-2 * by_hand, rtol=1e-4)
    np.testing.assert_allclose(results[1][1][1]["orthogonality"], by_hand, rtol=1e-4)


@pytest.mark.full
def test_ema_start_and_truncated_samples(built):
    method, state, _ = built
    new_state = state._replace(params={**state.params, "generator": jax.tree.map(lambda x: x + 1, state.params["generator"])})
    for step, share in ((0, 1.0), (1, 1.0), (2, 0.1), (50, 0.1)):
        ema = method.after(new_state._replace(step=jnp.int32(step)))["ema"]
        jax.tree.map(lambda a, b, s=share: np.testing.assert_allclose(a - b, s, rtol=1e-3), ema, state.mutable["ema"])
    prepared = jax.jit(method.sampler.prepare)(state.params, state.mutable, jax.random.key(0))
    latents = method.sampler.latents(jax.random.key(1), 16)
    latents["label"] = jnp.zeros_like(latents["label"])
    sample = jax.jit(method.sampler.sample)
    images = {tau: sample(prepared, latents, tau) for tau in (0.0, 1e9, 0.3)}
    assert images[0.0].shape == (16, 32, 32, 3)
    assert 0 <= images[0.0].min() < images[0.0].max() <= 1
    np.testing.assert_allclose(images[1e9], images[0.0], atol=1e-4)
    assert images[0.3].std(0).mean() < 0.6 * images[0.0].std(0).mean()

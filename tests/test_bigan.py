"""BiGAN: published network sizes, losses that start at ln 2, and simultaneous gradients for each loss group."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from torch_reference import require_torch

from ssl_jax.engine.method import ModelFns, Phase, State
from ssl_jax.engine.step import loss_and_grads, make_step
from ssl_jax.errors import UserError
from ssl_jax.evals.context import Context, EvaluatedModel
from ssl_jax.evals.kinds import reconstruction
from ssl_jax.experiment import config as configs
from ssl_jax.methods import bigan as subject
from ssl_jax.models import common
from ssl_jax.models.gan import bigan as models
from ssl_jax.objectives import adversarial

MLP = dict(
    generator=dict(name="mlp", shape=(28, 28, 1)), encoder=dict(name="mlp"), discriminator=dict(name="mlp"), latent=dict(size=50)
)


def create(module, key, *args):
    return jax.jit(lambda key, *args: common.create(module, key, *args))(key, *args)


def run(module, params, state, *args, train):
    return jax.jit(lambda *all: common.run(module, *all, train=train))(params, state, *args)


def load(variant, size=None, **model):
    config = configs.load(f"configs/bigan.py:{variant}", ())
    with config.unlocked():
        config.dtype = "float32"
        config.data.image_shape = (size or config.model.generator.shape[0],) * 2 + (3,)
        config.model.update(model)
    return config


def count(module, *shapes):
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    params, _ = jax.eval_shape(lambda key, *args: common.create(module, key, *args), jax.random.key(0), *args)
    return sum(x.size for x in jax.tree.leaves(params))


def test_permutation_invariant_networks_have_the_published_sizes():
    generator, encoder, discriminator = models.build_nets(MLP, "float32")
    x, z = (2, 28, 28, 1), (2, 50)
    assert (count(generator, z), count(encoder, x), count(discriminator, x, z)) == (1_953_792, 1_902_592, 1_903_616)


def conv_nets(size, widths):
    spec = dict(
        generator=dict(name="conv", shape=(size, size, 3), widths=widths),
        encoder=dict(name="conv", widths=widths[::-1]),
        discriminator=dict(name="conv", widths=widths[::-1]),
        latent=dict(size=6),
    )
    return models.build_nets(spec, "float32")


@pytest.mark.parametrize(("size", "widths", "side"), [(32, (16, 8, 4), 4), (48, (16, 8, 4), 6), (64, (32, 16, 8, 4), 4)])
def test_output_shapes_of_convolutional_networks(size, widths, side):
    shapes = ((4, 6),), ((4, size, size, 3),), ((4, size, size, 3), (4, 6))
    x, codes, logits = (
        jax.eval_shape(lambda key, *args, net=net: net.init_with_output(key, *args, train=True)[0], jax.random.key(0),
                       *(jax.ShapeDtypeStruct(s, jnp.float32) for s in args))
        for net, args in zip(conv_nets(size, widths), shapes, strict=True)
    )  # fmt: skip
    assert x.shape == (4, size, size, 3)
    assert codes[f"layer{len(widths)}"].shape == (4, side, side, widths[0])
    assert (codes["pooled"].shape, codes["latent"].shape, logits.shape) == ((4, widths[0]), (4, 6), (4,))


@pytest.mark.full
def test_convolutional_networks_range_state_and_conditioning():
    generator, encoder, discriminator = conv_nets(16, (8, 4))
    z = jax.random.uniform(jax.random.key(0), (4, 6), minval=-1)
    params, state = create(generator, jax.random.key(1), z)
    x, new_state = run(generator, params, state, z, train=True)
    assert x.dtype == jnp.float32
    assert x.min() >= 0
    assert x.max() <= 1
    assert x.std() > 1e-3
    assert set(state) == {"batch_stats"}
    assert not np.array_equal(*(s["batch_stats"]["bn0"]["mean"] for s in (state, new_state)))

    params, state = create(encoder, jax.random.key(2), x)
    out, _ = run(encoder, params, state, x, train=True)
    np.testing.assert_allclose(out["pooled"], out["layer2"].mean((1, 2)), rtol=1e-5)

    params, state = create(discriminator, jax.random.key(3), x, z)
    np.testing.assert_array_equal(run(discriminator, params, state, x, z, train=True)[0], np.zeros(4))
    score = params["score"]["kernel"]
    params["score"]["kernel"] = jax.random.normal(jax.random.key(4), score.shape)
    with_z, without = (run(discriminator, params, state, x, code, train=True)[0] for code in (z, 0 * z))
    assert np.abs(with_z - without).max() > 1e-3  # z conditions the score


@pytest.mark.full
def test_alexnet_trunk_equals_pytorch():
    """Shapes, groups and pools of conv1 to conv5 against torch layers with the same weights."""
    torch = require_torch()
    x = np.random.default_rng(0).standard_normal((2, 64, 64, 3)).astype(np.float32)
    module = models.AlexNetTrunk()
    params, state = create(module, jax.random.key(0), jnp.asarray(x), None)
    out, _ = run(module, params, state, jnp.asarray(x), None, train=True)
    h = torch.from_numpy(x).permute(0, 3, 1, 2)
    for i, (kernel, stride, groups) in enumerate(((11, 4, 1), (5, 1, 2), (3, 1, 1), (3, 1, 2), (3, 1, 2)), 1):
        if i in (2, 3):
            h = torch.nn.functional.max_pool2d(h, 3, 2, 1)
        weight = torch.from_numpy(np.array(params[f"conv{i}"]["kernel"])).permute(3, 2, 0, 1)
        h = torch.nn.functional.conv2d(h, weight, None, stride, kernel // 2, groups=groups)
        if i > 1:
            h = torch.nn.functional.batch_norm(h, None, None, training=True, eps=1e-5)
        h = torch.nn.functional.leaky_relu(h, 0.2)
        np.testing.assert_allclose(out[i - 1], h.permute(0, 2, 3, 1), atol=2e-4)
    assert [h.shape[1:] for h in out] == [(16, 16, 96), (8, 8, 256), (4, 4, 384), (4, 4, 384), (4, 4, 256)]


def test_unknown_network_or_field_raises_user_error():
    with pytest.raises(UserError, match=r"config.model.encoder.name has no 'vit'; .*valid: mlp, conv, alexnet"):
        models.build_nets({**MLP, "encoder": dict(name="vit")}, "float32")
    with pytest.raises(UserError, match=r"config.model.generator \(mlp\) has no 'depth'; .*valid: shape, widths"):
        models.build_nets({**MLP, "generator": dict(name="mlp", shape=(8, 8, 3), depth=2)}, "float32")
    with pytest.raises(UserError, match="multiples of 8"):
        models.build_nets({**MLP, "generator": dict(name="conv", shape=(28, 28, 3), widths=(8, 8, 8))}, "float32")


# ----------------------------------------------------------------------------------------------- simultaneous losses


def small_bigan():
    """BiGAN's losses on linear nets and a joint discriminator of two layers, with a state and a batch."""
    rng = np.random.default_rng(0)
    shapes = dict(g=(4, 9), e=(9, 4), x=(9, 8), z=(4, 8), o=(8,))
    w = {k: jnp.asarray(rng.standard_normal(s) / 3, jnp.float32) for k, s in shapes.items()}
    params = {"generator": w["g"], "encoder": w["e"], "discriminator": {k: w[k] for k in "xzo"}}
    state = State(jnp.zeros((), jnp.int32), params, {}, {}, {})
    batch = {"image": jnp.asarray(rng.standard_normal((16, 9)), jnp.float32)}

    def discriminate(d, x, z):
        return jnp.tanh(x @ d["x"] + z @ d["z"]) @ d["o"]

    def losses(train, batch, key):
        x, z = batch["image"], jax.random.normal(key, (16, 4))
        real = discriminate(train["discriminator"], x, x @ train["encoder"])
        return adversarial.bigan(real, discriminate(train["discriminator"], z @ train["generator"], z))

    return losses, state, batch


LOSS_GROUPS = (("discriminator",), ("generator", "encoder"))


def joint_phase(losses):
    return Phase("game", LOSS_GROUPS, lambda train, state, batch, key: (losses(train, batch, key), ({}, {})))


@pytest.mark.full
def test_simultaneous_losses_give_each_group_its_own_gradient():
    losses, state, batch = small_bigan()
    key = jax.random.key(0)
    terms, _, _, grads = jax.jit(lambda *args: loss_and_grads(joint_phase(losses), *args))(state.params, state, batch, key)
    d, ge = losses(state.params, batch, key)
    np.testing.assert_allclose([terms["loss/discriminator"], terms["loss/generator+encoder"]], [d, ge], rtol=1e-6)
    assert set(grads) == {"generator", "encoder", "discriminator"}
    for i, groups in enumerate(LOSS_GROUPS):
        alone = jax.grad(lambda train, i=i: losses(train, batch, key)[i])(state.params)
        for group in groups:
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), grads[group], alone[group])
    other = jax.grad(lambda train: losses(train, batch, key)[0])(state.params)  # the gradient of the wrong loss
    assert np.abs(grads["encoder"] - other["encoder"]).max() > 1e-2


@pytest.mark.full
def test_simultaneous_losses_ignore_the_losses_of_other_groups():
    losses, state, batch = small_bigan()
    key = jax.random.key(0)

    def changed(train, batch, key):
        d, ge = losses(train, batch, key)
        return d, 7 * ge + jnp.sum(train["discriminator"]["o"] ** 2)  # also of the discriminator's weights

    *_, before = loss_and_grads(joint_phase(losses), state.params, state, batch, key)
    *_, after = loss_and_grads(joint_phase(changed), state.params, state, batch, key)
    jax.tree.map(np.testing.assert_array_equal, before["discriminator"], after["discriminator"])
    np.testing.assert_allclose(after["encoder"], 7 * before["encoder"], rtol=1e-5, atol=1e-7)


# ----------------------------------------------------------------------------------------------- the method


class ZeroUpdate:
    """An optimizer whose updates are zero."""

    def update(self, grads, state, params, **_):
        return jax.tree.map(jnp.zeros_like, grads), state


def begin(config, batch=16, seed=0):
    method = subject.build(config, ())
    shape = (batch, *config.data.image_shape)
    images = {"image": np.random.default_rng(seed).integers(0, 256, shape, np.uint8)}
    params, mutable = jax.jit(method.init)(jax.random.key(seed), images, {})
    fns, sampler = jax.tree.map(jax.jit, (method.fns, method.sampler._replace(latents=None)))
    state = State(jnp.zeros((), jnp.int32), params, dict.fromkeys(params), mutable, {})
    sampler = sampler._replace(latents=method.sampler.latents)
    return method._replace(encode=jax.jit(method.encode), fns=fns, sampler=sampler), state, images


@pytest.mark.full
@pytest.mark.parametrize("variant", ["smoke", "mnist"])
def test_initial_scores_are_zero_and_both_losses_are_ln2(variant):
    config = load(variant)
    if variant == "mnist":
        with config.unlocked():
            for part in ("generator", "encoder", "discriminator"):
                config.model[part].widths = (32, 32)
    method, state, batch = begin(config)
    _, metrics = jax.jit(make_step(method, {group: ZeroUpdate() for group in state.params}))(state, batch, jax.random.key(0))
    np.testing.assert_allclose(metrics["game/loss/discriminator"], 0.6931472, atol=1e-6)
    np.testing.assert_allclose(metrics["game/loss/generator+encoder"], 0.6931472, atol=1e-6)
    assert metrics["game/grad_norm/discriminator"] > 0 == metrics["game/grad_norm/encoder"] == metrics["game/grad_norm/generator"]
    np.testing.assert_allclose(metrics["game/reconstruction_ratio"], 1, atol=0.1)  # untrained codes carry no information


@pytest.mark.full
def test_losses_equal_the_paper_written_out():
    """One step of the method against losses written out: real pairs have codes of real images, fake ones the latents."""
    config = load("smoke")
    with config.unlocked():
        config.views = ((("random_crop", dict(size=32)),),)
    method, state, batch = begin(config)
    score = state.params["discriminator"]["score"]["kernel"]
    state.params["discriminator"]["score"]["kernel"] = 0.1 * jax.random.normal(jax.random.key(9), score.shape)
    key, (phase,) = jax.random.key(5), method.phases
    (d, ge), (new_state, logs) = jax.jit(phase.loss)(state.params, state, batch, key)

    generator, encoder, discriminator = models.build_nets(config.model, "float32")
    p, s = state.params, state.mutable
    z = method.sampler.latents(jax.random.split(key)[1], 16)["z"]
    assert z.shape == (16, 8)
    assert -1 <= z.min() < -0.8 < 0.8 < z.max() <= 1
    x = batch["image"] / np.float32(127.5) - 1
    fake = 2 * run(generator, p["generator"], s["generator"], z, train=True)[0] - 1
    codes = run(encoder, p["encoder"], s["encoder"], x, train=True)[0]["latent"]
    pairs = (x, codes), (fake, z)
    real, fake = (run(discriminator, p["discriminator"], s["discriminator"], *pair, train=True)[0] for pair in pairs)
    cross_entropy = lambda yes, no: -np.mean(np.log(jax.nn.sigmoid(yes))) - np.mean(np.log(1 - jax.nn.sigmoid(no)))  # noqa: E731
    np.testing.assert_allclose((d, ge), (cross_entropy(real, fake) / 2, cross_entropy(fake, real) / 2), rtol=1e-5)
    np.testing.assert_allclose(logs["code_variance"], np.var(codes, 0).mean(), rtol=1e-5)
    assert set(new_state) == {"generator", "encoder", "discriminator"}
    for group in new_state:  # the statistics of all three are kept
        same = jax.tree.map(np.array_equal, new_state[group], state.mutable[group])
        assert not any(jax.tree.leaves(same)), group


@pytest.mark.full
def test_reconstructions_samples_and_per_image_encoder():
    config = load("smoke")
    method, state, batch = begin(config)
    images = batch["image"]
    reconstructed = method.fns.reconstruct(state.params, state.mutable, images)
    assert reconstructed.shape == (16, 32, 32, 3)
    assert reconstructed.min() >= 0
    assert reconstructed.max() <= 1
    features = method.encode(state.params, state.mutable, images)
    one = method.encode(state.params, state.mutable, images[:1])
    np.testing.assert_allclose(one["latent"], features["latent"][:1], rtol=1e-4, atol=1e-6)
    z = {"z": features["latent"]}
    prepared = {"params": state.params["generator"], "state": state.mutable["generator"]}
    np.testing.assert_allclose(method.sampler.sample(prepared, z), reconstructed, atol=1e-6)  # G(E(x))
    prepared = method.sampler.prepare(state.params, state.mutable, jax.random.key(0))
    samples = method.sampler.sample(prepared, method.sampler.latents(jax.random.key(1), 4))
    assert samples.shape == (4, 32, 32, 3)
    assert np.isfinite(samples).all()
    assert method.fns.discriminate(state.params, state.mutable, images).shape == (16,)
    with pytest.raises(UserError, match="only normal latents can be truncated"):
        method.sampler.sample(prepared, z, 0.5)


@pytest.mark.full
def test_grayscale_images_and_generator_smaller_than_views():
    config = load("mnist", generator=dict(widths=(16, 16)), encoder=dict(widths=(16, 16)), discriminator=dict(widths=(16, 16)))
    method, state, batch = begin(config)
    reconstructed = method.fns.reconstruct(state.params, state.mutable, batch["image"])
    assert reconstructed.shape == (16, 28, 28, 3)
    np.testing.assert_array_equal(reconstructed[..., 0], reconstructed[..., 2])
    colorless = np.repeat(batch["image"].mean(-1, keepdims=True).astype(np.float32) / 255, 3, -1)
    same = [method.encode(state.params, state.mutable, x)["latent"] for x in (batch["image"], colorless)]
    np.testing.assert_allclose(*same, atol=1e-6)

    config = load("smoke", size=48)
    with config.unlocked():
        config.views = ((("random_crop", dict(size=48)),),)
    method, state, batch = begin(config, batch=8)
    assert method.encode(state.params, state.mutable, batch["image"])["layer1"].shape == (8, 24, 24, 8)
    assert method.fns.reconstruct(state.params, state.mutable, batch["image"]).shape == (8, 32, 32, 3)
    assert method.fns.discriminate(state.params, state.mutable, batch["image"]).shape == (8,)


def test_distance_is_the_norm_over_all_pixels():
    x, y = (np.random.default_rng(i).random((5, 4, 4, 3)) for i in range(2))
    by_hand = np.mean([np.linalg.norm(a - b) for a, b in zip(x, y, strict=True)])
    np.testing.assert_allclose(subject.distance(jnp.asarray(x), jnp.asarray(y)), by_hand, rtol=1e-5)


def test_reconstruction_distance_to_own_and_shuffled_images():
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), np.uint8)

    def open_batches(split):  # the last batch is padded
        yield {"image": images[:8], "_valid": np.ones(8)}
        yield {"image": np.concatenate([images[8:], images[:4]]), "_valid": np.arange(8) < 4}

    def measured(reconstruct, **options):
        context = Context(lambda x: x, open_batches, model=EvaluatedModel(None, {}, ModelFns(reconstruct=jax.jit(reconstruct))))
        return reconstruction.evaluate(context, **options)

    exact = measured(lambda x: x / 255.0)
    assert exact.metrics["distance"] < 1e-5 < exact.metrics["distance_shuffled"]
    assert "test(12)" in exact.protocol
    above, below = exact.picture[2:10], exact.picture[12:20]  # a row of originals and one of reconstructions, 2 pixels apart
    np.testing.assert_array_equal(above[:, 12:20], images[1])
    np.testing.assert_array_equal(below[:, 12:20], images[1])
    gray = measured(lambda x: jnp.full(x.shape, 0.5), examples=12)
    np.testing.assert_allclose(gray.metrics["ratio"], 1, rtol=1e-6)
    np.testing.assert_allclose(gray.metrics["distance"], np.mean([np.linalg.norm(x / 255 - 0.5) for x in images]), rtol=1e-5)
    smaller = measured(lambda x: jax.image.resize(x / 255.0, (len(x), 4, 4, 3), "cubic").clip(0, 1), examples=12)
    assert smaller.metrics["distance"] < 1e-5
    assert "D=48" in smaller.protocol

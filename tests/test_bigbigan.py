"""BigBiGAN: published sizes, three hinges, gradients and state of each phase, features of the encoder."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax.engine.method import State
from ssl_jax.errors import UserError
from ssl_jax.experiment import config as configs
from ssl_jax.methods import bigbigan as subject
from ssl_jax.models import common
from ssl_jax.models.gan import bigbigan as models
from ssl_jax.objectives import adversarial


@pytest.mark.full
def test_published_sizes():
    """Donahue and Simonyan 2019 with BigGAN-128: H sees 120 latents, J the 1536 features of F and the 2048 of H."""

    def count(dim):
        module, x = models.ResidualMLP(), jax.ShapeDtypeStruct((2, dim), jnp.float32)
        params, state = jax.eval_shape(lambda key, x: common.create(module, key, x), jax.random.key(0), x)
        assert set(state) == {"spectral"}
        return sum(leaf.size for leaf in jax.tree.leaves(params))

    assert (count(120), count(1536 + 2048)) == (29_622_272, 36_716_544)
    whole = models.build_discriminator(dict(attention=(64,)), 128, "float32")
    x, z = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, 128, 128, 3), (2, 120)))
    (scores, variables) = jax.eval_shape(lambda x, z: whole.init_with_output(jax.random.key(0), x, z, train=True), x, z)
    assert {name: s.shape for name, s in scores.items()} == {"x": (2,), "z": (2,), "xz": (2,)}
    assert variables["params"]["J"]["linear1"]["kernel"].shape == (3584, 2048)


@pytest.mark.full
def test_residual_mlp_equals_numpy():
    module, x = models.ResidualMLP(5, 3), np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    params, state = common.create(module, jax.random.key(0), jnp.asarray(x))
    for _ in range(50):  # power iterations
        got, state = common.run(module, params, state, jnp.asarray(x), train=True)
    weights = [np.array(params[f"linear{i}"]["kernel"], np.float64) for i in (1, 2, 3)]
    first, *others = (w / np.linalg.norm(w, 2) for w in weights)
    h = x @ first
    for w in others:
        h = h + np.maximum(h, 0) @ w
    np.testing.assert_allclose(got, np.maximum(h, 0), rtol=1e-3, atol=1e-4)


# ----------------------------------------------------------------------------------------------- the method


def load(variant="smoke", **more):
    config = configs.load(f"configs/bigbigan.py:{variant}", ())
    with config.unlocked():
        config.dtype = "float32"
        config.data.image_shape = (32, 32, 3)
        config.update(more)
    return config


@pytest.fixture(scope="module")
def initialized():
    config = load(views=((("random_crop", dict(size=32)),),))
    method = subject.build(config, ())
    batch = {"image": np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), np.uint8)}
    rng = np.random.default_rng(1)

    def fill(x):  # faster than compiling the initialization
        return jnp.asarray(rng.uniform(0.5, 1, x.shape) if x.ndim < 2 else rng.standard_normal(x.shape) / 4, x.dtype)

    params, mutable = jax.tree.map(fill, jax.eval_shape(method.init, jax.random.key(0), batch, {}))
    mutable["ema"] = params["generator"]
    return config, method, State(jnp.zeros((), jnp.int32), params, dict.fromkeys(params), mutable, {}), batch


def by_hand(config, state, images, key):
    """The terms of section 2, from the networks alone: {'enc': scores of (x, E(x)), 'gen': of (G(z), z)} as functions of params."""
    from ssl_jax.models.gan.networks import build_network

    generator = build_network("generator", config.model.generator, 32, 0, "float32")
    encoder = models.build_bigbigan_encoder(config.model.encoder, 12, "float32")
    discriminator = models.build_discriminator(config.model.discriminator, 32, "float32")
    z_key, code_key = jax.random.split(key)
    z, noise = jax.random.normal(z_key, (len(images), 12)), jax.random.normal(code_key, (len(images), 12))
    x = images / np.float32(127.5) - 1

    def scores(params):
        fake, _ = common.run(generator, params["generator"], state.mutable["generator"], z, train=True)
        out, _ = common.run(encoder, params["encoder"], state.mutable["encoder"], x, train=True)
        code = out["mean"] + out["deviation"] * noise
        enc, new_state = common.run(discriminator, params["discriminator"], state.mutable["discriminator"], x, code, train=True)
        gen, _ = common.run(discriminator, params["discriminator"], new_state, fake, z, train=True)
        return {"enc": enc, "gen": gen}

    return scores


@pytest.mark.full
def test_encoder_and_generator_gradients_come_through_their_scores(initialized):
    """Phase 'ge': the encoder learns from s_z and s_xz of its codes only, the generator from s_x and s_xz of its images only."""
    config, method, state, batch = initialized
    key, phase = jax.random.key(3), method.phases[1]
    train = {group: state.params[group] for group in phase.trains}
    (value, (new_state, logs)), grads = jax.jit(jax.value_and_grad(phase.loss, has_aux=True))(train, state, batch, key)
    scores = by_hand(config, state, batch["image"][::2], jax.random.split(key)[1])  # its half of the batch

    @jax.jit
    def backwards(train):
        scored, vjp = jax.vjp(lambda train: jax.tree.map(jnp.mean, scores({**state.params, **train})), train)

        def gradient_of(*terms):
            return vjp({kind: {k: jnp.float32((kind, k) in terms) for k in ("x", "z", "xz")} for kind in ("enc", "gen")})[0]

        terms = (("enc", "z"), ("enc", "xz")), (("gen", "x"), ("gen", "xz")), (("enc", "x"), ("gen", "z"))
        return scored, *(gradient_of(*pair) for pair in terms)

    scored, code_terms, image_terms, other_terms = backwards(train)
    np.testing.assert_allclose(value, sum(scored["enc"].values()) - sum(scored["gen"].values()), rtol=1e-5)
    largest = lambda tree: max(np.abs(x).max() for x in jax.tree.leaves(tree))  # noqa: E731

    def close(got, expected):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * largest(expected)), got, expected)

    close(grads["encoder"], code_terms["encoder"])
    close(grads["generator"], jax.tree.map(jnp.negative, image_terms["generator"]))
    assert min(largest(grads["encoder"]), largest(grads["generator"])) > 1e-3
    assert largest(code_terms["generator"]) == largest(image_terms["encoder"]) == largest(other_terms) == 0
    assert set(new_state) == {"generator", "encoder", "discriminator"}
    assert set(logs) == {"mean_squared", "mean_variance", "deviation", "correlation"}


@pytest.mark.full
def test_discriminator_phase_hinges_each_score_and_updates_only_its_state(initialized):
    config, method, state, batch = initialized
    key, phase = jax.random.key(4), method.phases[0]
    assert (phase.repeat, phase.trains) == (2, ("discriminator",))
    train = {"discriminator": state.params["discriminator"]}
    value, (new_state, logs) = jax.jit(phase.loss)(train, state, batch, key)
    scored = jax.jit(by_hand(config, state, batch["image"], jax.random.split(key)[1]))(state.params)
    hinges = [np.maximum(0, 1 - scored["enc"][k]).mean() + np.maximum(0, 1 + scored["gen"][k]).mean() for k in ("x", "z", "xz")]
    np.testing.assert_allclose(value, sum(hinges), rtol=1e-5)
    assert set(new_state) == {"discriminator"}
    np.testing.assert_allclose(logs["score_z_gap"], scored["enc"]["z"].mean() - scored["gen"]["z"].mean(), atol=1e-5)


@pytest.mark.full
def test_features_reconstructions_and_samples(initialized):
    _, method, state, batch = initialized
    out = jax.jit(method.encode)(state.params, state.mutable, batch["image"])
    pooled, crelu = out["pooled"], out["crelu"]
    assert (out["mean"].shape, crelu.shape, crelu.dtype) == ((16, 12), (16, 2 * pooled.shape[1]), jnp.float32)
    assert out["deviation"].min() > 0
    stats = state.mutable["encoder"]["batch_stats"]["crelu"]
    unit = (pooled - stats["mean"]) / np.sqrt(stats["var"] + 1e-5)
    np.testing.assert_allclose(crelu, np.concatenate([np.maximum(unit, 0), np.maximum(-unit, 0)], -1), rtol=1e-6, atol=1e-5)
    reconstructed = jax.jit(method.fns.reconstruct)(state.params, state.mutable, batch["image"])
    prepared = jax.jit(method.sampler.prepare)(state.params, state.mutable, jax.random.key(0))
    samples = jax.jit(method.sampler.sample)(prepared, {"z": out["mean"]})
    for images in (reconstructed, samples):
        assert images.shape == (16, 32, 32, 3)
        assert images.min() >= 0
        assert images.max() <= 1
    assert jax.jit(method.fns.discriminate)(state.params, state.mutable, batch["image"]).shape == (16,)


@pytest.mark.full
def test_generator_ema_copies_weights_before_its_start(initialized):
    _, method, state, _ = initialized
    params = {**state.params, "generator": jax.tree.map(lambda x: x + 1, state.params["generator"])}
    early, late = (method.after(state._replace(params=params, step=jnp.asarray(step)))["ema"] for step in (1, 5))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b), early, params["generator"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b + 0.1, atol=1e-6), late, state.params["generator"])


@pytest.mark.full
def test_encoder_sees_larger_images_than_discriminator():
    config = load(views=((("random_crop", dict(size=64)),),))
    config.data.image_shape = (64, 64, 3)
    method = subject.build(config, ())
    batch = {"image": jax.ShapeDtypeStruct((8, 64, 64, 3), jnp.uint8)}
    params, mutable = jax.eval_shape(method.init, jax.random.key(0), batch, {})
    out = jax.eval_shape(method.encode, params, mutable, batch["image"])
    assert out["layer1"].shape[1:3] == (32, 32)
    assert jax.eval_shape(method.fns.reconstruct, params, mutable, batch["image"]).shape == (8, 32, 32, 3)
    assert jax.eval_shape(method.fns.discriminate, params, mutable, batch["image"]).shape == (8,)
    with config.unlocked():
        config.model.size = 48
    with pytest.raises(UserError, match=r"config.model.size=48 must divide the 64 pixels"):
        subject.build(config, ())
    with pytest.raises(UserError, match=r"config.model.discriminator \(joint\) has no 'depth'"):
        models.build_discriminator(dict(depth=3), 32, "float32")


@pytest.mark.full
def test_code_metrics_of_standard_normal_and_collapsed_codes():
    code = jax.random.normal(jax.random.key(0), (20_000, 6))
    metrics = subject.code_metrics(code, jnp.zeros_like(code), code)
    np.testing.assert_allclose([metrics["mean_squared"], metrics["mean_variance"], metrics["correlation"]], [1, 1, 0], atol=0.03)
    one = jnp.broadcast_to(code[:, :1], code.shape)
    np.testing.assert_allclose(subject.code_metrics(one, one, one)["correlation"], 1, rtol=1e-4)
    collapsed = jnp.ones((50, 6))
    metrics = subject.code_metrics(collapsed, collapsed, collapsed)
    assert metrics["mean_variance"] == 0
    assert np.isfinite(list(metrics.values())).all()


def test_loss_is_three_times_that_of_the_released_code():
    """google-deepmind's notebook averages over the 3 N scores where the paper sums."""
    encoded, generated = ([jnp.asarray(np.random.default_rng(i + j).standard_normal(8)) for i in range(3)] for j in (0, 3))
    d, _ = adversarial.bigbigan(encoded, generated)
    e, g = np.concatenate(encoded), np.concatenate(generated)
    np.testing.assert_allclose(d / 3, np.maximum(0, 1 - e).mean() + np.maximum(0, 1 + g).mean(), rtol=1e-5)

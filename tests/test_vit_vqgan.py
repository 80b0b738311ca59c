"""ViT-VQGAN: the sum of losses written out, the discriminator's phases, tokens, adaptive weight, perceptual losses."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax.engine.method import Method, Stage, State
from ssl_jax.errors import UserError
from ssl_jax.experiment import config as configs
from ssl_jax.methods import vit_vqgan as subject
from ssl_jax.models import common
from ssl_jax.models.tokenizers import networks
from ssl_jax.objectives import likelihood
from ssl_jax.objectives.perceptual import feature_distance, random_features, random_kernels

RUN = jax.jit(common.run, static_argnums=0, static_argnames="train")
ORDER = ("tokenizer", "d", "r1")


def load(variant="smoke", **model):
    config = configs.load(f"configs/vit_vqgan.py:{variant}", ())
    with config.unlocked():
        config.dtype, config.data.image_shape = "float32", (8, 8, 3)
        config.views = ((),)
        for name, value in model.items():
            if isinstance(value, dict):
                config.model[name].update(value)
            else:
                config.model[name] = value
    return config


def begin(config, stages=None, frozen=None, batch=4):
    method = subject.build(config, stages or {})
    images = np.random.default_rng(0).integers(0, 256, (batch, *config.data.image_shape), np.uint8)
    params, mutable = jax.jit(method.init)(jax.random.key(0), {"image": images}, frozen or {})
    frozen = {**(frozen or {}), **{name: read() for name, read in method.frozen.items()}}
    return method, State(jnp.zeros((), jnp.int32), params, {}, mutable, frozen), images


def phase(method, name):
    return next(p for p in method.phases if p.name == name)


def gradient(method, state, images, key=0):
    """((loss, (update, logs)), gradients) of the tokenizer."""
    loss = phase(method, "tokenizer").loss
    train = {"tokenizer": state.params["tokenizer"]}
    return jax.jit(jax.value_and_grad(loss, has_aux=True))(train, state, {"image": images}, jax.random.key(key))


@pytest.fixture(scope="module")
def smoke():
    config = load()
    method, state, images = begin(config)
    fns = jax.tree.map(jax.jit, method.fns)
    return config, method._replace(fns=fns, encode=jax.jit(method.encode)), state, images


def nets(config):
    return (
        networks.build_encoder(config.model.encoder, config.model.quantizer.dim, "float32"),
        networks.build_decoder(config.model.decoder, 6, "float32"),
        networks.build_discriminator(config.model.discriminator, 8, "float32"),
    )


def written_out(config, state, images):
    """(decoder's output [B, h, w, 6], vectors and codes of norm 1) with the networks alone."""
    encoder, decoder, _ = nets(config)
    net = state.params["tokenizer"]
    z = np.asarray(RUN(encoder, net["encoder"], {}, images / np.float32(127.5) - 1, train=True)[0]["out"])
    z = z / np.linalg.norm(z, axis=-1, keepdims=True)
    codes = np.asarray(net["quantizer"]["codebook"])
    codes = codes / np.linalg.norm(codes, axis=-1, keepdims=True)
    e = codes[(z @ codes.T).argmax(-1)]
    return RUN(decoder, net["decoder"], {}, e, train=True)[0], z, e


@pytest.mark.full
def test_tokenizer_loss_equals_the_paper_written_out(smoke):
    """Codes (MEAN over elements) + squared error + 0.1 logit-Laplace + 0.1 adversarial, the last one non-saturating."""
    config, method, state, images = smoke
    (loss, (update, logs)), grads = gradient(method, state, images)
    out, z, e = written_out(config, state, images)
    x, (mean, log_scale) = images / np.float32(255), np.split(np.asarray(out), 2, -1)
    reconstructed = np.clip((1 / (1 + np.exp(-mean)) - 0.1) / 0.8, 0, 1)
    shrunk = 0.8 * x + 0.1
    nll = np.log(2 * shrunk * (1 - shrunk)) + log_scale + np.abs(np.log(shrunk / (1 - shrunk)) - mean) * np.exp(-log_scale)
    _, _, discriminator = nets(config)
    (logits, _), _ = RUN(discriminator, state.params["discriminator"], {}, 2 * reconstructed - 1, train=True)
    terms = {
        "quantizer": 1.25 * np.mean((z - e) ** 2), "squared": np.mean((reconstructed - x) ** 2), "logit_laplace": nll.mean(),
        "adversarial": np.mean(np.log1p(np.exp(-np.asarray(logits)))),
    }  # fmt: skip
    for name, value in terms.items():
        np.testing.assert_allclose(logs[name], value, rtol=2e-5, err_msg=name)
    expected = terms["quantizer"] + terms["squared"] + 0.1 * terms["logit_laplace"] + 0.1 * terms["adversarial"]
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert set(grads) == {"tokenizer"}
    assert set(update) == {"codebook"}
    reached = jax.tree.map(lambda g: float(np.abs(g).max()) > 0, grads["tokenizer"])
    assert all(jax.tree.leaves(reached)), reached
    assert method.couples_batch
    assert [p.name for p in method.phases] == list(ORDER)


@pytest.mark.full
def test_tokens_decode_to_the_reconstruction(smoke):
    config, method, state, images = smoke
    tokens = method.fns.tokens(state.params, state.mutable, images)
    assert (tokens.shape, tokens.dtype) == ((4, 2, 2), jnp.int32)
    reconstructed = method.fns.reconstruct(state.params, state.mutable, images)
    np.testing.assert_array_equal(method.fns.decode(state.params, state.mutable, tokens), reconstructed)
    out, *_ = written_out(config, state, images)
    np.testing.assert_allclose(reconstructed, likelihood.logit_laplace_image(out[..., :3]), atol=1e-5)
    codebook = method.fns.codebook(state.params, state.mutable)
    assert codebook.shape == (64, 8)
    np.testing.assert_allclose(np.linalg.norm(codebook, axis=-1), 1, rtol=1e-5)
    features = method.encode(state.params, state.mutable, images)
    assert (features["pooled"].shape, features["layer1"].shape) == ((4, 32), (4, 2, 2, 32))
    np.testing.assert_allclose(features["pooled"], features["features"].mean((1, 2)), rtol=1e-5)
    assert method.fns.discriminate(state.params, state.mutable, images).shape == (4,)


@pytest.mark.full
def test_discriminator_loss_on_images_and_reconstructions(smoke):
    _, method, state, images = smoke
    train = {"discriminator": state.params["discriminator"]}
    loss, (update, logs) = jax.jit(phase(method, "d").loss)(train, state, {"image": images}, jax.random.key(0))
    real = method.fns.discriminate(state.params, state.mutable, images)
    fake = method.fns.discriminate(state.params, state.mutable, method.fns.reconstruct(state.params, state.mutable, images))
    expected = np.mean(np.logaddexp(0, -real)) + np.mean(np.logaddexp(0, fake))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(logs["accuracy_real"], np.mean(real > 0))
    assert update["discriminator"] == {}


@pytest.mark.full
def test_r1_penalty_is_lazy_and_per_image(smoke):
    """interval x gamma / 2 x mean over images of the squared norm, over all pixels, of the gradient of its own score."""
    config, method, state, images = smoke
    lazy, (_, _, discriminator) = phase(method, "r1"), nets(config)
    assert [bool(lazy.when(step)) for step in range(4)] == [False, True, False, True]
    value, (_, logs) = jax.jit(lazy.loss)(
        {"discriminator": state.params["discriminator"]}, state, {"image": images}, jax.random.key(0)
    )
    score = jax.jit(jax.grad(lambda x: common.run(discriminator, state.params["discriminator"], {}, x, train=True)[0][0][0]))
    norms = [np.sum(np.asarray(score(x[None] / np.float32(127.5) - 1)) ** 2) for x in images]
    np.testing.assert_allclose(logs["penalty"], 0.5 * np.mean(norms), rtol=1e-4)
    np.testing.assert_allclose(value, 2 * 10 * 0.5 * np.mean(norms), rtol=1e-4)


@pytest.mark.full
def test_discriminator_has_no_effect_before_its_start(smoke):
    _, _, state, images = smoke
    late = subject.build(load(adversarial=dict(start=3)), {})
    loss, train = jax.jit(phase(late, "tokenizer").loss), {"tokenizer": state.params["tokenizer"]}
    values = []
    for step in (2, 3):
        value, (_, logs) = loss(train, state._replace(step=jnp.int32(step)), {"image": images}, jax.random.key(0))
        values.append(value)
        assert [bool(phase(late, name).when(step)) for name in ("d", "r1")] == [step >= 3] * 2
    np.testing.assert_allclose(values[1] - values[0], 0.1 * logs["adversarial"], rtol=1e-4)
    assert not bool(phase(late, "r1").when(4))


@pytest.mark.full
def test_without_discriminator_there_is_one_phase():
    config = load("", adversarial=dict(weight=0.0), quantizer=dict(size=16))
    method = subject.build(config, {})
    params, mutable = jax.eval_shape(
        method.init, jax.random.key(0), {"image": jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.uint8)}, {}
    )
    assert (set(params), set(mutable), [p.name for p in method.phases]) == ({"tokenizer"}, {"codebook"}, ["tokenizer"])
    assert not method.couples_batch
    assert method.fns.discriminate is None
    assert dict(method.notes) == {"tokenizer": "trained with perceptual=none"}
    assert params["tokenizer"]["decoder"]["head"]["kernel"].shape == (512, 4 * 4 * 3)  # no scale without a likelihood


# ------------------------------------------------------------------------------------------- VQGAN, adaptive weight


def vqgan(weight):
    part = dict(name="vqgan", width=4, multiples=(1, 1), blocks=1, attention=(), features=4)
    config = load("cnn_vqgan", adversarial=dict(weight=weight, start=0), discriminator=dict(width=4, layers=1))
    with config.unlocked():
        config.model.encoder, config.model.decoder = dict(part), dict(part)
        config.model.quantizer.update(size=16, dim=4)
    return config


@pytest.mark.full
def test_adaptive_weight_equalizes_last_layer_gradients():
    """0.8 lambda |gradient of the adversarial loss| = 0.8 |that of the reconstruction| there, with the networks of VQGAN."""
    method, state, images = begin(vqgan(0.8))
    assert set(state.mutable["discriminator"]) == {"batch_stats"}
    assert [p.name for p in method.phases] == ["tokenizer", "d"]

    def last_layer_gradient(weight):
        (_, (_, logs)), grads = gradient(subject.build(vqgan(weight), {}), state, images)
        return np.asarray(grads["tokenizer"]["decoder"]["head"]["kernel"]), logs

    (alone, _), (both, logs) = last_layer_gradient(0.0), last_layer_gradient(0.8)
    assert 0 < logs["adaptive_weight"] < 1e4
    np.testing.assert_allclose(np.linalg.norm(both - alone) / np.linalg.norm(alone), 0.8, rtol=0.01)
    train = {"discriminator": state.params["discriminator"]}
    _, (update, _) = jax.jit(phase(method, "d").loss)(train, state, {"image": images}, jax.random.key(0))
    assert not np.array_equal(*(
        m["discriminator"]["batch_stats"]["norm1"]["mean"] for m in (state.mutable, update)
    ))  # fmt: skip
    assert method.fns.discriminate(state.params, state.mutable, images).shape == (4,)


# ------------------------------------------------------------------------------------------------------ perceptual


def unclipped_reconstruction(config, method, state, images):
    """The reconstruction that the losses see, not clipped."""
    tokens = jax.jit(method.fns.tokens)(state.params, state.mutable, images)
    codes = method.fns.codebook(state.params, state.mutable)[tokens]
    decoder = networks.build_decoder(config.model.decoder, 3, "float32")
    return (RUN(decoder, state.params["tokenizer"]["decoder"], {}, codes, train=True)[0] + 1) / 2


@pytest.mark.full
def test_random_conv_perceptual_loss_and_notes():
    config = load("", perceptual=dict(kind="random_conv"), quantizer=dict(size=16), encoder=dict(size="mu"), decoder=dict(size="mu"))
    method, state, images = begin(config)
    (loss, (_, logs)), _ = gradient(method, state, images)
    x = images / np.float32(255)
    pair = x, unclipped_reconstruction(config, method, state, images)
    distance = feature_distance(*(random_features(random_kernels(), y) for y in pair)).mean()
    np.testing.assert_allclose(logs["perceptual"], distance, rtol=1e-4)
    np.testing.assert_allclose(loss, logs["quantizer"] + logs["squared"] + 0.1 * distance, rtol=1e-5)
    assert method.notes["tokenizer"] == "trained with perceptual=random_conv"
    assert "perceptual" not in state.mutable  # mutable is part of every checkpoint


def test_missing_lpips_file_raises_only_when_read():
    method = subject.build(load(perceptual=dict(kind="vgg_lpips", path="/no/file.npz")), {})
    with pytest.raises(UserError, match=r"perceptual.path='/no/file.npz' is no file; create it once"):
        method.frozen["perceptual"]()


def test_invalid_config_raises_user_error():
    for model, message in (
        (dict(perceptual=dict(kind="dct")), r"perceptual.kind='dct' is unknown; choose none, vgg_lpips, random_conv or self_encoder"),
        (dict(adversarial=dict(game="chess")), r"adversarial.game='chess' is unknown; choose minimax"),
        (dict(discriminator=dict(name="vit")), r"config.model.discriminator.name has no 'vit'; .*valid: stylegan2, patch"),
    ):
        with pytest.raises(UserError, match=message):
            subject.build(load(**model), {})
    config = load()
    with config.unlocked():
        config.data.image_shape = (8, 12, 3)
    with pytest.raises(UserError, match="images of 8 x 12 pixels; make them square"):
        subject.build(config, {})


@pytest.mark.full
def test_self_encoder_perceptual_loss_of_an_earlier_run():
    """Its weights are a frozen stage: the loss depends on them, but they are not trained."""
    w = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)

    def encode(params, mutable, images):
        maps = jax.nn.relu(images @ params["net"]["w"])
        return {"layer1": maps, "pooled": maps.mean((1, 2))}

    stage = Stage(types.SimpleNamespace(method="simclr"), Method({}, None, (), encode))
    config = load("scenes_encoder", encoder=dict(size="mu"), decoder=dict(size="mu"), quantizer=dict(size=16))
    frozen = {"encoder": {"params": {"net": {"w": w}}, "mutable": {}}}
    method, state, images = begin(config, {"encoder": stage}, frozen)
    (_, (_, logs)), grads = gradient(method, state, images)
    assert set(grads) == {"tokenizer"}
    assert "perceptual" not in {**state.mutable, **method.frozen}
    with pytest.raises(UserError, match="has no spatial features, only pooled"):
        subject.feature_maps({"pooled": jnp.zeros((2, 5))})
    pair = images / np.float32(255), unclipped_reconstruction(config, method, state, images)
    maps = [np.asarray(jax.nn.relu(y @ w)) for y in pair]
    np.testing.assert_allclose(logs["perceptual"], feature_distance(maps[:1], maps[1:]).mean(), rtol=1e-4)
    assert method.notes["tokenizer"] == "trained with perceptual=self_encoder (simclr)"
    with pytest.raises(UserError, match=r"needs a run; set config.stages.encoder.workdir"):
        subject.build(config, {})

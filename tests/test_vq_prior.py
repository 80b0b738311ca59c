"""The causal prior over tokens of a frozen tokenizer: likelihoods, labels, guidance, completions, the published schedule."""

import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from token_stage import CODES, COLORS, FROZEN, STAGE, images_of_tokens, tokens

from ssl_jax.engine import optim, sharding
from ssl_jax.engine.method import ModelFns, Stage, State, inference_state
from ssl_jax.errors import UserError
from ssl_jax.experiment import config as configs
from ssl_jax.methods import vq_prior as subject
from ssl_jax.models.common import run
from ssl_jax.models.tokenizers.prior import CausalPrior
from ssl_jax.sampling.tokens import gumbel

GRID = np.random.default_rng(1).integers(0, CODES, (8, 4, 4)).astype(np.int32)
IMAGES, LABELS = images_of_tokens(GRID), np.arange(8, dtype=np.int32) % 3
BATCH = {"image": IMAGES, "label": LABELS}


def load(variant="smoke", classes=3, **model):
    config = configs.load(f"configs/vq_prior.py:{variant}", ())
    with config.unlocked():
        config.dtype, config.data.image_shape, config.data.num_classes = "float32", (16, 16, 3), classes
        for name, value in model.items():
            config.model[name].update(value) if isinstance(value, dict) else config.model.update({name: value})
    return config


def build(**model):
    return subject.build(load(**model), {"tokenizer": STAGE})


def begin(method):
    """A state with noisy parameters; the head starts at 0."""
    params, mutable = jax.jit(method.init)(jax.random.key(0), BATCH, FROZEN)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + rng.normal(0, 0.2, x.shape).astype(np.float32), params)
    return State(jnp.zeros((), jnp.int32), params, {}, mutable, FROZEN)


@pytest.fixture(scope="module")
def built():
    method = build()
    return method, begin(method)


def with_classes(state, classes):
    """`state` with the embeddings of the first `classes` classes only."""
    net = state.params["net"]
    return state._replace(params={"net": {**net, "labels": {"embedding": net["labels"]["embedding"][:classes]}}})


@pytest.fixture(scope="module")
def sampled(built):
    """(latents, prepared, samples)"""
    method, state = built
    latents = method.sampler.latents(jax.random.key(4), 16)
    prepared = method.sampler.prepare(state.params, inference_state(state), jax.random.key(0))
    return latents, prepared, jax.jit(method.sampler.sample)(prepared, latents)


def test_token_stage_round_trip():
    assert STAGE.method.fns.tokens(*FROZEN["tokenizer"].values(), IMAGES).tolist() == GRID.tolist()


def test_initial_nll_per_token_is_log_k(built):
    method, state = built
    params, _ = jax.jit(method.init)(jax.random.key(0), BATCH, FROZEN)
    likelihoods = jax.jit(method.fns.token_nll)(params, inference_state(state), IMAGES, LABELS)
    np.testing.assert_allclose(likelihoods["nll"], 16 * np.log(CODES), rtol=1e-6)
    np.testing.assert_array_equal(likelihoods["tokens"], GRID.reshape(8, 16))


@pytest.mark.full
def test_nll_equals_the_loss_and_depends_on_the_class(built):
    """Without dropout, flips and label dropout the two agree; padding has label -1."""
    config = load(transformer=dict(dropout=0.0), label_dropout=0.0, sampling=dict(guidance=1.0))
    with config.unlocked():
        config.views = ((),)
    method, state = subject.build(config, {"tokenizer": STAGE}), with_classes(built[1], 3)
    loss, (_, logs) = jax.jit(method.phases[0].loss)(state.params, state, BATCH, jax.random.key(1))
    nll = jax.jit(method.fns.token_nll)
    expected = nll(state.params, inference_state(state), IMAGES, LABELS)["nll"]
    np.testing.assert_allclose(loss, expected.mean() / 16, rtol=1e-5)
    np.testing.assert_allclose(logs["bits_per_token"], loss / np.log(2), rtol=1e-6)
    frequencies = np.bincount(GRID.reshape(-1), minlength=CODES) / GRID.size
    np.testing.assert_allclose(logs["unigram_bits"], -np.sum(frequencies * np.log2(frequencies)), rtol=1e-5)
    other = nll(state.params, inference_state(state), IMAGES, (LABELS + 1) % 3)["nll"]
    assert (np.abs(other - expected) > 1e-3).all()
    assert np.isfinite(nll(state.params, inference_state(state), IMAGES, np.full(8, -1))["nll"]).all()


@pytest.mark.full
def test_tokenizer_is_frozen_and_null_class_gets_gradients(built):
    method, state = build(label_dropout=0.5, transformer=dict(dropout=0.0)), built[1]
    gradient = jax.jit(jax.grad(lambda train: method.phases[0].loss(train, state, BATCH, jax.random.key(0))[0]))(state.params)
    assert set(gradient) == set(state.params) == {"net"}
    rows = np.abs(gradient["net"]["labels"]["embedding"]).max(-1)
    assert rows.shape == (4,)
    assert rows[3] > 1e-4  # about half of the eight labels are dropped
    assert (rows[:3] > 1e-4).any()


def test_features_per_block_are_independent_of_other_images(built):
    method, state = built
    encode = jax.jit(method.encode)
    features = encode(state.params, inference_state(state), IMAGES)
    assert set(features) == {"pooled", "embedding", "block0", "block1"}
    np.testing.assert_array_equal(features["pooled"], features["block1"])
    order = np.random.default_rng(0).permutation(8)
    permuted = encode(state.params, inference_state(state), IMAGES[order])["pooled"]
    np.testing.assert_allclose(permuted, features["pooled"][order], atol=1e-6)
    last = images_of_tokens(GRID)
    last[:, -4:, -4:] = 255 - last[:, -4:, -4:]  # the last token is no input
    np.testing.assert_array_equal(encode(state.params, inference_state(state), last)["pooled"], features["pooled"])


@pytest.mark.full
def test_samples_depend_only_on_their_seed_and_use_the_codebook(built, sampled):
    method, _ = built
    latents, prepared, samples = sampled
    assert latents["seed"].shape == (16, 2)
    assert latents["seed"].dtype == jnp.uint32
    assert latents["label"].max() < 3
    assert samples.shape == (16, 16, 16, 3)
    distance = np.abs(np.asarray(samples)[:, ::4, ::4, None] - COLORS).max(-1)
    np.testing.assert_allclose(distance.min(-1), 0, atol=1e-6)
    reversed_latents = {k: v[::-1] for k, v in latents.items()}
    np.testing.assert_array_equal(jax.jit(method.sampler.sample)(prepared, reversed_latents), samples[::-1])
    assert len(np.unique(np.asarray(samples).reshape(16, -1), axis=0)) == 16
    with pytest.raises(UserError, match="no truncation"):
        method.sampler.sample(prepared, latents, 0.5)


@pytest.mark.full
def test_guidance_mixes_the_logits_with_and_without_a_class(built, sampled):
    """The first token of each sample is the argmax of 2 l_class - l_none plus its noise."""
    _, state = built
    latents, _, samples = sampled
    prior = CausalPrior(CODES, 16, classes=3, null=True, **load().model.transformer)
    first = jax.jit(lambda label: run(prior, state.params["net"], {}, jnp.zeros((16, 16), int), label, train=False)[0][0][:, 0])
    mixed = 2 * first(latents["label"]) - first(jnp.full(16, 3))
    noise = gumbel(jax.random.wrap_key_data(latents["seed"]), 0, (CODES,))
    first_tokens = tokens(*FROZEN["tokenizer"].values(), samples)[:, 0, 0]
    np.testing.assert_array_equal(first_tokens, np.argmax(mixed + noise, -1))
    assert (np.argmax(first(latents["label"]) + noise, -1) != first_tokens).any()


@pytest.mark.full
def test_completions_keep_the_upper_half_of_tokens(built, sampled):
    method, _ = built
    latents, prepared, _ = sampled
    latents = {k: v[:8] for k, v in latents.items()}
    completed = np.asarray(jax.jit(method.sampler.complete)(prepared, latents, IMAGES))
    completed_tokens = np.asarray(tokens(*FROZEN["tokenizer"].values(), completed))
    np.testing.assert_array_equal(completed_tokens[:, :2], GRID[:, :2])
    assert (completed_tokens[:, 2:] != GRID[:, 2:]).any((1, 2)).all()


def test_unconditional_model_equals_one_class(built):
    method = build(conditional=False, label_dropout=0.0, sampling=dict(guidance=1.0))
    assert set(method.inputs) == {"image"}
    state, one = with_classes(built[1], 1), build(classes=1, label_dropout=0.0, sampling=dict(guidance=1.0))
    args = state.params, inference_state(state), IMAGES, LABELS * 0
    ours, theirs = (jax.jit(m.fns.token_nll)(*args)["nll"] for m in (method, one))
    np.testing.assert_array_equal(ours, theirs)
    assert set(method.sampler.latents(jax.random.key(0), 2)) == {"seed"}


def test_protocols_name_tokenizer_block_and_sampling(built):
    method, _ = built
    assert method.notes["tokenizer"] == "colors of squares"
    assert method.notes["prior"] == (
        "class-conditional, pooled=normalized output of block 1, mean over places (the start and all tokens but the last)"
    )
    assert method.notes["sampling"] == "guidance=2 temperature=1 top_k=0 top_p=1"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(classes=None), "needs labels"),
        (dict(conditional=False), "label_dropout=0.1 must be"),
        (dict(label_dropout=0.0), "guidance=2.0 needs a model trained with label_dropout"),
        (dict(probe_block=2), "probe_block=2 must be at least 0 and below 2"),
        (dict(sampling=dict(top_p=0.0)), "top_p=0.0"),
    ],
)
def test_invalid_config_raises_user_error(change, message):
    with pytest.raises(UserError, match=message):
        build(**change)


def test_stage_without_tokens_raises_user_error():
    other = Stage(STAGE.config, STAGE.method._replace(fns=ModelFns(decode=STAGE.method.fns.decode)))
    with pytest.raises(UserError, match=r"stages\.tokenizer: its method has no function 'codebook'"):
        subject.build(load(), {"tokenizer": other})


@pytest.mark.parametrize(
    ("config", "override"),
    [
        ("vq_prior.py", "stages.tokenizer.step=4"),
        ("vit_vqgan.py", "model.quantizer.revive=0.1"),
        ("vit_vqgan.py", "evals.reconstruction.extractor=inception:/weights"),
        ("vqvae.py", "model.quantizer.init=k_means"),
        ("stylegan.py", "evals.path.distance=lpips"),
    ],
)
def test_optional_config_fields_can_be_set_on_the_command_line(config, override):
    at, value = configs.load(f"configs/{config}", (f"--config.{override}",)), override.partition("=")[2]
    for part in override.partition("=")[0].split("."):
        at = at[part]
    assert str(at) == value


def test_tokenizer_of_another_image_size_raises_user_error():
    """Convolutions would accept other sizes."""
    large = Stage(types.SimpleNamespace(views=((),), data=types.SimpleNamespace(image_shape=(24, 24, 3))), STAGE.method)
    with pytest.raises(UserError, match="was trained on images of 24 x 24 pixels, but these views have 16 x 16"):
        subject.build(load(), {"tokenizer": large})


# ---------------------------------------------------------------- published recipes


def test_published_learning_rate_schedule():
    """450,000 steps at batch 1024: 5,000 of warm-up, 4.5e-4 up to 80,000, then x 0.99998971 in each to 1e-5."""
    config = load("imagenet256_large")
    optimizer = config.optim.net.to_dict()
    assert (optimizer["name"], optimizer["b2"], config.batch_size) == ("adam", 0.96, 1024)
    _, rate = optim.make_optimizer("net", optimizer, {"w": jnp.zeros(1)}, 450_000, 1024, 1_281_167)
    for step, value in ((0, 0), (2500, 2.25e-4), (5000, 4.5e-4), (80_000, 4.5e-4), (450_000, 1e-5)):
        np.testing.assert_allclose(rate(step), value, rtol=1e-4)
    np.testing.assert_allclose(float(rate(81_000)) / 4.5e-4, 0.99998971**1000, rtol=1e-4)


@pytest.mark.parametrize("variant", ["imagenet256_large", "imagenet256_large_adafactor"])
def test_large_prior_is_sharded_over_all_devices(variant):
    """Shapes and shardings only: on fsdp 4 x tensor 2, Adafactor's on fsdp 8, each device holds an eighth of the large arrays."""
    config = load(variant)
    with config.unlocked():
        config.data.image_shape, config.data.num_classes = (128, 128, 3), 1000
        config.views = ((),)
    codes = {"tokenizer": {"params": {"net": {"codes": jax.ShapeDtypeStruct((8192, 3), jnp.float32)}}, "mutable": {}}}
    method = subject.build(config, {"tokenizer": Stage(config, STAGE.method)})  # 32 x 32 tokens
    batch = {"image": jax.ShapeDtypeStruct((2, 128, 128, 3), np.uint8), "label": jax.ShapeDtypeStruct((2,), np.int32)}
    params, _ = jax.eval_shape(method.init, jax.random.key(0), batch, codes)
    count = sum(x.size for x in jax.tree.leaves(params))
    assert count == 1_848_561_664 + 1000 * 2048
    optimizers, _ = optim.make_optimizers(config.optim, params, 450_000, 1024, 1_281_167)
    state = State(0, params, {"net": jax.eval_shape(optimizers["net"].init, params["net"])}, {}, {})
    mesh = sharding.make_mesh(dict(data=1, fsdp=8) if "adafactor" in variant else dict(data=1, fsdp=4, tensor=2))
    shardings = sharding.shard_state(config.sharding, state, mesh)

    def bytes_of(tree, shardings):
        """(bytes of all devices, of one device)"""
        leaves = list(zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True))
        return tuple(sum(math.prod(shape(x, s)) * x.dtype.itemsize for x, s in leaves)
                     for shape in (lambda x, s: x.shape, lambda x, s: s.shard_shape(x.shape)))  # fmt: skip

    whole, own = bytes_of(state.params, shardings.params)
    assert own < 1.02 * whole / 8
    moments, own = bytes_of(state.opt, shardings.opt)
    assert own < 1.02 * moments / 8
    np.testing.assert_allclose(moments / whole, 0.5 if "adafactor" in variant else 2, rtol=0.01)

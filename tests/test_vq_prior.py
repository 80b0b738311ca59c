"""The prior over tokens of a frozen stage: what it is told, what it learns from, how it goes on, and its published schedule."""

import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from token_stage import CODES, COLORS, FROZEN, STAGE, of_tokens, tokens

from ssl_jax.engine import optim, sharding
from ssl_jax.engine.method import ModelFns, Stage, State, inference_state
from ssl_jax.errors import UserError
from ssl_jax.experiment import config as configs
from ssl_jax.methods import vq_prior as method
from ssl_jax.models.common import run
from ssl_jax.models.tokenizers.prior import CausalPrior
from ssl_jax.sampling.tokens import gumbel

GRID = np.random.default_rng(1).integers(0, CODES, (8, 4, 4)).astype(np.int32)
IMAGES, LABELS = of_tokens(GRID), np.arange(8, dtype=np.int32) % 3
BATCH = {"image": IMAGES, "label": LABELS}


def load(variant="smoke", classes=3, **model):
    config = configs.load(f"configs/vq_prior.py:{variant}", ())
    with config.unlocked():
        config.dtype, config.data.image_shape, config.data.num_classes = "float32", (16, 16, 3), classes
        for name, value in model.items():
            config.model[name].update(value) if isinstance(value, dict) else config.model.update({name: value})
    return config


def build(**model):
    return method.build(load(**model), {"tokenizer": STAGE})


def begin(this):
    """A state whose head, which starts at 0, says something."""
    params, mutable = jax.jit(this.init)(jax.random.key(0), BATCH, FROZEN)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + rng.normal(0, 0.2, x.shape).astype(np.float32), params)
    return State(jnp.zeros((), jnp.int32), params, {}, mutable, FROZEN)


@pytest.fixture(scope="module")
def made():
    this = build()
    return this, begin(this)


def told(state, classes):
    """The state of a model that is told the first so many classes, and knows no other."""
    net = state.params["net"]
    return state._replace(params={"net": {**net, "labels": {"embedding": net["labels"]["embedding"][:classes]}}})


@pytest.fixture(scope="module")
def sampled(made):
    """(drawn, prepared, pictures)"""
    this, state = made
    drawn = this.sampler.latents(jax.random.key(4), 16)
    prepared = this.sampler.prepare(state.params, inference_state(state), jax.random.key(0))
    return drawn, prepared, jax.jit(this.sampler.sample)(prepared, drawn)


def test_the_stage_stands_for_the_pictures():
    assert STAGE.method.fns.tokens(*FROZEN["tokenizer"].values(), IMAGES).tolist() == GRID.tolist()


def test_at_the_start_a_token_costs_log_k(made):
    this, state = made
    params, _ = jax.jit(this.init)(jax.random.key(0), BATCH, FROZEN)
    told = jax.jit(this.fns.token_nll)(params, inference_state(state), IMAGES, LABELS)
    np.testing.assert_allclose(told["nll"], 16 * np.log(CODES), rtol=1e-6)
    np.testing.assert_array_equal(told["tokens"], GRID.reshape(8, 16))


def test_nll_is_that_of_the_loss_and_knows_the_class(made):
    """Without dropout, flips and forgotten labels both are one function; padding has no class."""
    config = load(transformer=dict(dropout=0.0), label_dropout=0.0, sampling=dict(guidance=1.0))
    with config.unlocked():
        config.views = ((),)
    this, state = method.build(config, {"tokenizer": STAGE}), told(made[1], 3)
    loss, (_, logs) = jax.jit(this.phases[0].loss)(state.params, state, BATCH, jax.random.key(1))
    nll = jax.jit(this.fns.token_nll)
    expected = nll(state.params, inference_state(state), IMAGES, LABELS)["nll"]
    np.testing.assert_allclose(loss, expected.mean() / 16, rtol=1e-5)
    np.testing.assert_allclose(logs["bits_per_token"], loss / np.log(2), rtol=1e-6)
    frequencies = np.bincount(GRID.reshape(-1), minlength=CODES) / GRID.size
    np.testing.assert_allclose(logs["unigram_bits"], -np.sum(frequencies * np.log2(frequencies)), rtol=1e-5)
    other = nll(state.params, inference_state(state), IMAGES, (LABELS + 1) % 3)["nll"]
    assert (np.abs(other - expected) > 1e-3).all()
    assert np.isfinite(nll(state.params, inference_state(state), IMAGES, np.full(8, -1))["nll"]).all()


def test_nothing_of_the_stage_is_trained_and_the_null_class_is_learned(made):
    this, state = build(label_dropout=0.5, transformer=dict(dropout=0.0)), made[1]
    gradient = jax.jit(jax.grad(lambda train: this.phases[0].loss(train, state, BATCH, jax.random.key(0))[0]))(state.params)
    assert set(gradient) == set(state.params) == {"net"}
    rows = np.abs(gradient["net"]["labels"]["embedding"]).max(-1)
    assert rows.shape == (4,)
    assert rows[3] > 1e-4  # half of the eight are told no class
    assert (rows[:3] > 1e-4).any()


def test_features_are_of_each_block_and_of_no_other_image(made):
    this, state = made
    encode = jax.jit(this.encode)
    features = encode(state.params, inference_state(state), IMAGES)
    assert set(features) == {"pooled", "embedding", "block0", "block1"}
    np.testing.assert_array_equal(features["pooled"], features["block1"])
    order = np.random.default_rng(0).permutation(8)
    np.testing.assert_allclose(encode(state.params, inference_state(state), IMAGES[order])["pooled"], features["pooled"][order], atol=1e-6)
    last = of_tokens(GRID)
    last[:, -4:, -4:] = 255 - last[:, -4:, -4:]  # the last token is no input
    np.testing.assert_array_equal(encode(state.params, inference_state(state), last)["pooled"], features["pooled"])


@pytest.mark.full
def test_samples_are_pictures_of_the_codebook_and_of_their_own_seed(made, sampled):
    this, _ = made
    drawn, prepared, pictures = sampled
    assert drawn["seed"].shape == (16, 2)
    assert drawn["seed"].dtype == jnp.uint32
    assert drawn["label"].max() < 3
    assert pictures.shape == (16, 16, 16, 3)
    distance = np.abs(np.asarray(pictures)[:, ::4, ::4, None] - COLORS).max(-1)
    np.testing.assert_allclose(distance.min(-1), 0, atol=1e-6)
    turned = {k: v[::-1] for k, v in drawn.items()}
    np.testing.assert_array_equal(jax.jit(this.sampler.sample)(prepared, turned), pictures[::-1])
    assert len(np.unique(np.asarray(pictures).reshape(16, -1), axis=0)) == 16
    with pytest.raises(UserError, match="no truncation"):
        this.sampler.sample(prepared, drawn, 0.5)


@pytest.mark.full
def test_guidance_mixes_the_logits_with_and_without_a_class(made, sampled):
    """The first token of each picture is the largest of 2 l_class - l_none and its noise."""
    _, state = made
    drawn, _, pictures = sampled
    prior = CausalPrior(CODES, 16, classes=3, null=True, **load().model.transformer)
    first = jax.jit(lambda label: run(prior, state.params["net"], {}, jnp.zeros((16, 16), int), label, train=False)[0][0][:, 0])
    mixed = 2 * first(drawn["label"]) - first(jnp.full(16, 3))
    noise = gumbel(jax.random.wrap_key_data(drawn["seed"]), 0, (CODES,))
    drawn_first = tokens(*FROZEN["tokenizer"].values(), pictures)[:, 0, 0]
    np.testing.assert_array_equal(drawn_first, np.argmax(mixed + noise, -1))
    assert (np.argmax(first(drawn["label"]) + noise, -1) != drawn_first).any()


@pytest.mark.full
def test_completions_keep_the_upper_half(made, sampled):
    this, _ = made
    drawn, prepared, _ = sampled
    drawn = {k: v[:8] for k, v in drawn.items()}
    completed = np.asarray(jax.jit(this.sampler.complete)(prepared, drawn, IMAGES))
    again = np.asarray(tokens(*FROZEN["tokenizer"].values(), completed))
    np.testing.assert_array_equal(again[:, :2], GRID[:, :2])
    assert (again[:, 2:] != GRID[:, 2:]).any((1, 2)).all()


def test_without_classes_it_is_a_model_of_one_class(made):
    this = build(conditional=False, label_dropout=0.0, sampling=dict(guidance=1.0))
    assert set(this.inputs) == {"image"}
    state, one = told(made[1], 1), build(classes=1, label_dropout=0.0, sampling=dict(guidance=1.0))
    ours, theirs = (jax.jit(each.fns.token_nll)(state.params, inference_state(state), IMAGES, LABELS * 0)["nll"] for each in (this, one))
    np.testing.assert_array_equal(ours, theirs)
    assert set(this.sampler.latents(jax.random.key(0), 2)) == {"seed"}


def test_protocols_name_tokenizer_block_and_sampling(made):
    this, _ = made
    assert this.notes["tokenizer"] == "colors of squares"
    assert this.notes["prior"] == (
        "class-conditional, pooled=normalized output of block 1, mean over places (the start and all tokens but the last)"
    )
    assert this.notes["sampling"] == "guidance=2 temperature=1 top_k=0 top_p=1"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (dict(classes=None), "needs labels"),
        (dict(conditional=False), "label_dropout=0.1 must be"),
        (dict(label_dropout=0.0), "guidance=2.0 needs a model trained with label_dropout"),
        (dict(probe_block=2), "probe_block=2 must be at least 0 and below 2"),
        (dict(sampling=dict(top_p=0.0)), "top_p=0.0"),
    ],
)
def test_mistakes_are_one_line(change, told):
    with pytest.raises(UserError, match=told):
        build(**change)


def test_a_stage_that_makes_no_tokens_is_named():
    other = Stage(STAGE.config, STAGE.method._replace(fns=ModelFns(decode=STAGE.method.fns.decode)))
    with pytest.raises(UserError, match=r"stages\.tokenizer: its method has no function 'codebook'"):
        method.build(load(), {"tokenizer": other})


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
def test_what_a_config_leaves_as_it_is_can_be_given(config, override):
    at, value = configs.load(f"configs/{config}", (f"--config.{override}",)), override.partition("=")[2]
    for part in override.partition("=")[0].split("."):
        at = at[part]
    assert str(at) == value


def test_a_tokenizer_of_images_of_another_size_is_named():
    """Convolutions would take them."""
    large = Stage(types.SimpleNamespace(views=((),), data=types.SimpleNamespace(image_shape=(24, 24, 3))), STAGE.method)
    with pytest.raises(UserError, match="was trained on images of 24 x 24 pixels, but these views have 16 x 16"):
        method.build(load(), {"tokenizer": large})


# ---------------------------------------------------------------- published recipes


def test_the_published_rate():
    """450,000 steps at batch 1024: 5,000 of warm-up, 4.5e-4 up to 80,000, then x 0.99998971 in each to 1e-5."""
    config = load("imagenet256_large")
    optimizer = config.optim.net.to_dict()
    assert (optimizer["name"], optimizer["b2"], config.batch_size) == ("adam", 0.96, 1024)
    _, rate = optim.make_optimizer("net", optimizer, {"w": jnp.zeros(1)}, 450_000, 1024, 1_281_167)
    for step, value in ((0, 0), (2500, 2.25e-4), (5000, 4.5e-4), (80_000, 4.5e-4), (450_000, 1e-5)):
        np.testing.assert_allclose(rate(step), value, rtol=1e-4)
    np.testing.assert_allclose(float(rate(81_000)) / 4.5e-4, 0.99998971**1000, rtol=1e-4)


@pytest.mark.parametrize("variant", ["imagenet256_large", "imagenet256_large_adafactor"])
def test_the_large_prior_is_spread_over_all_devices(variant):
    """Shapes and places only: on fsdp 4 x tensor 2, and Adafactor's on fsdp 8, each device has an eighth of what is large."""
    config = load(variant)
    with config.unlocked():
        config.data.image_shape, config.data.num_classes = (128, 128, 3), 1000
        config.views = ((),)
    codes = {"tokenizer": {"params": {"net": {"codes": jax.ShapeDtypeStruct((8192, 3), jnp.float32)}}, "mutable": {}}}
    this = method.build(config, {"tokenizer": Stage(config, STAGE.method)})  # 32 x 32 tokens
    batch = {"image": jax.ShapeDtypeStruct((2, 128, 128, 3), np.uint8), "label": jax.ShapeDtypeStruct((2,), np.int32)}
    params, _ = jax.eval_shape(this.init, jax.random.key(0), batch, codes)
    count = sum(x.size for x in jax.tree.leaves(params))
    assert count == 1_848_561_664 + 1000 * 2048
    made, _ = optim.make_optimizers(config.optim, params, 450_000, 1024, 1_281_167)
    state = State(0, params, {"net": jax.eval_shape(made["net"].init, params["net"])}, {}, {})
    mesh = sharding.make_mesh(dict(data=1, fsdp=8) if "adafactor" in variant else dict(data=1, fsdp=4, tensor=2))
    placed = sharding.shard_state(config.sharding, state, mesh)

    def bytes_of(tree, where):
        """(of all, of one device)"""
        leaves = list(zip(jax.tree.leaves(tree), jax.tree.leaves(where), strict=True))
        return tuple(sum(math.prod(shape(x, s)) * x.dtype.itemsize for x, s in leaves)
                     for shape in (lambda x, s: x.shape, lambda x, s: s.shard_shape(x.shape)))  # fmt: skip

    whole, own = bytes_of(state.params, placed.params)
    assert own < 1.02 * whole / 8
    moments, own = bytes_of(state.opt, placed.opt)
    assert own < 1.02 * moments / 8
    np.testing.assert_allclose(moments / whole, 0.5 if "adafactor" in variant else 2, rtol=0.01)

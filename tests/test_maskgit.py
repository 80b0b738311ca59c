"""MaskGIT on a frozen tokenizer: masks, the loss on masked tokens, parallel decoding, samples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from token_stage import CODES, FROZEN, STAGE, images_of_tokens, tokens

from ssl_jax.engine.method import State, inference_state
from ssl_jax.errors import UserError
from ssl_jax.experiment import config as configs
from ssl_jax.methods import maskgit as subject
from ssl_jax.objectives.tokens import masked_counts
from ssl_jax.sampling.tokens import SamplingConfig

GRID = np.random.default_rng(1).integers(0, CODES, (8, 4, 4)).astype(np.int32)
BATCH = {"image": images_of_tokens(GRID), "label": np.arange(8, dtype=np.int32) % 3}


def build(classes=3, views=None, **model):
    config = configs.load("configs/maskgit.py:smoke", ())
    with config.unlocked():
        config.dtype, config.data.image_shape, config.data.num_classes = "float32", (16, 16, 3), classes
        config.views = config.views if views is None else views
        for name, value in model.items():
            config.model[name].update(value) if isinstance(value, dict) else config.model.update({name: value})
    return subject.build(config, {"tokenizer": STAGE})


@pytest.fixture(scope="module")
def built():
    method = build()
    params, mutable = jax.jit(method.init)(jax.random.key(0), BATCH, FROZEN)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + rng.normal(0, 0.2, x.shape).astype(np.float32), params)
    return method, State(jnp.zeros((), jnp.int32), params, {}, mutable, FROZEN)


@pytest.fixture(scope="module")
def prepared(built):
    method, state = built
    return method.sampler.prepare(state.params, inference_state(state), None)


# ---------------------------------------------------------------- parallel decoding


def preferring(tokens):
    """Logits [B, T, CODES]: position t prefers code t, the more so the more tokens of its row are known."""
    known = (tokens < CODES).mean(-1)[:, None, None]
    return (1 + known) * jax.nn.one_hot(jnp.arange(tokens.shape[1]) % CODES, CODES) + 0.0 * tokens[..., None]


@pytest.mark.parametrize(("unknown", "choice_temperature"), [(32, 0.0), (20, 4.5), (5, 4.5)])
@pytest.mark.full
def test_parallel_decoding_follows_mask_counts_and_keeps_known_tokens(unknown, choice_temperature):
    """8 steps; with fewer masked tokens than steps, all are filled in early."""
    counts = masked_counts(unknown, 8, "cosine")
    known = jax.random.randint(jax.random.key(0), (6, 32), 0, CODES)
    masked = jnp.argsort(jax.random.uniform(jax.random.key(1), (6, 32)), -1) < unknown
    begin = jnp.where(masked, CODES, known)
    keys = jax.random.split(jax.random.key(2), 6)
    trace = np.asarray(jax.jit(lambda x: subject.decode_in_parallel(preferring, x, CODES, counts, keys, choice_temperature))(begin))
    before = np.asarray(begin)
    for now, count in zip(trace, counts, strict=True):
        assert ((now == CODES).sum(-1) == count).all()
        was_known = before < CODES
        np.testing.assert_array_equal(now[was_known], before[was_known])
        before = now
    assert (trace[-1] < CODES).all()


@pytest.mark.full
def test_parallel_decoding_without_noise_keeps_most_confident_tokens():
    """One step with greedy tokens: positions whose best code is least probable stay masked."""
    logits = 3 * jax.random.normal(jax.random.key(0), (4, 10, CODES))
    begin, keys = jnp.full((4, 10), CODES), jax.random.split(jax.random.key(1), 4)
    decode = jax.jit(lambda x: subject.decode_in_parallel(lambda _: logits, x, CODES, (6, 0), keys, 0.0, SamplingConfig(top_k=1)))
    trace = decode(begin)
    best = np.asarray(jax.nn.softmax(logits).max(-1))
    for row, p in zip(trace[0], best, strict=True):
        kept = np.flatnonzero(row < CODES)
        assert set(kept) == set(np.argsort(p)[-4:])
    np.testing.assert_array_equal(trace[1], logits.argmax(-1))


def test_confidence_noise_changes_the_choice_but_not_the_samples():
    """Equal confidence everywhere: without noise all rows keep the same positions, with noise each row keeps others."""
    begin, keys = jnp.full((64, 10), CODES), jax.random.split(jax.random.key(1), 64)

    @jax.jit
    def decode(choice_temperature):
        return subject.decode_in_parallel(lambda x: jnp.zeros((*x.shape, CODES)), begin, CODES, (5, 0), keys, choice_temperature)

    plain, noisy = np.asarray(decode(0.0)), np.asarray(decode(4.5))
    assert ((plain[0] < CODES) == (plain[0, 0] < CODES)).all()
    share = (noisy[0] < CODES).mean(0)
    assert (share > 0.25).all()
    assert (share < 0.75).all()
    both = (noisy[0] == CODES) & (plain[0] == CODES)  # token noise does not depend on the choice noise
    np.testing.assert_array_equal(noisy[1][both], plain[1][both])


def test_sampled_codes_follow_the_probabilities():
    p = np.array([0.6, 0.3, 0.1])
    trace = subject.decode_in_parallel(
        lambda tokens: jnp.broadcast_to(jnp.log(jnp.asarray(p)), (*tokens.shape, 3)),
        jnp.full((500, 12), 3), 3, (9, 5, 0), jax.random.split(jax.random.key(0), 500), 1000.0,
    )  # fmt: skip  # a random choice does not bias the samples
    np.testing.assert_allclose(np.bincount(np.asarray(trace[-1]).ravel(), minlength=3) / 6000, p, atol=0.03)


# ---------------------------------------------------------------- the method


@pytest.mark.full
def test_loss_is_the_mean_over_masked_tokens(built):
    """The stage's gradient is not taken; without dropout, the loss of a model that says nothing is log K of what is masked."""
    method, state = build(transformer=dict(dropout=0.0), smoothing=0.0, views=((),)), built[1]
    silent = jax.tree.map(jnp.zeros_like, state.params)
    loss = jax.jit(method.phases[0].loss)
    for key in jax.random.split(jax.random.key(0), 3):
        value, (_, logs) = loss(silent, state, BATCH, key)
        np.testing.assert_allclose(value, np.log(CODES), rtol=1e-6)
        np.testing.assert_allclose(logs["bits_per_masked_token"], np.log2(CODES), rtol=1e-6)
        assert 1 / 16 <= logs["masked"] <= 1
    bias = silent["net"]["bias"].at[0].set(100.0)  # sure of code 0: right or wrong by 100 nats
    sure, (_, logs) = loss({"net": {**silent["net"], "bias": bias}}, state, BATCH, jax.random.key(5))
    np.testing.assert_allclose(sure, 100 * (1 - logs["accuracy"]), rtol=1e-5)


def test_features_per_block_are_independent_of_other_images(built):
    method, state = built
    encode = jax.jit(method.encode)
    features = encode(state.params, inference_state(state), BATCH["image"])
    assert set(features) == {"pooled", "embedding", "block0", "block1"}
    assert features["pooled"].shape == (8, 32)
    reversed_pooled = encode(state.params, inference_state(state), BATCH["image"][::-1])["pooled"]
    np.testing.assert_allclose(reversed_pooled[::-1], features["pooled"], atol=1e-6)


@pytest.mark.full
def test_samples_depend_only_on_their_seed_and_class(built, prepared):
    method, _ = built
    latents, sample = method.sampler.latents(jax.random.key(4), 8), jax.jit(method.sampler.sample)
    samples = sample(prepared, latents)
    assert samples.shape == (8, 16, 16, 3)
    np.testing.assert_array_equal(sample(prepared, {k: v[::-1] for k, v in latents.items()}), samples[::-1])
    assert (sample(prepared, {**latents, "label": (latents["label"] + 1) % 3}) != samples).any()
    assert len(np.unique(np.asarray(samples).reshape(8, -1), axis=0)) == 8
    with pytest.raises(UserError, match="no truncation"):
        method.sampler.sample(prepared, latents, 0.5)


@pytest.mark.full
def test_completions_keep_the_upper_half_of_tokens(built, prepared):
    method, _ = built
    completed = jax.jit(method.sampler.complete)(prepared, method.sampler.latents(jax.random.key(4), 8), BATCH["image"])
    completed_tokens = np.asarray(tokens(*FROZEN["tokenizer"].values(), completed))
    np.testing.assert_array_equal(completed_tokens[:, :2], GRID[:, :2])
    assert (completed_tokens[:, 2:] != GRID[:, 2:]).any((1, 2)).all()


def test_protocols_name_tokenizer_block_and_sampling(built):
    method, _ = built
    assert method.notes["tokenizer"] == "colors of squares"
    assert method.notes["sampling"].startswith("schedule=cosine choice_temperature=4.5 steps=3")
    assert method.fns.token_nll is None  # masked tokens have no likelihood of an image
    assert set(build(conditional=False).inputs) == {"image"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(classes=None), "needs labels"),
        (dict(schedule="sine"), "schedule='sine' is unknown; choose cosine"),
        (dict(sampling=dict(steps=0)), "steps must be 1 or more"),
        (dict(probe_block=7), "probe_block=7 must be"),
    ],
)
def test_invalid_config_raises_user_error(change, message):
    with pytest.raises(UserError, match=message):
        build(**change)

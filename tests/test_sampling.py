"""Token sampling: filtered distributions in closed form, and autoregressive loops with and without a cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax.errors import UserError
from ssl_jax.models.common import create, run
from ssl_jax.models.tokenizers.prior import CausalPrior
from ssl_jax.sampling import tokens as sampling
from ssl_jax.sampling.tokens import SamplingConfig

P = np.array([0.5, 0.05, 0.3, 0.15], np.float32)


def probabilities(**options):
    return np.asarray(jax.nn.softmax(sampling.filter_logits(jnp.log(P), SamplingConfig(**options))))


def test_temperature_top_k_and_top_p_in_closed_form():
    np.testing.assert_allclose(probabilities(), P, rtol=1e-6)
    np.testing.assert_allclose(probabilities(temperature=0.5), P**2 / (P**2).sum(), rtol=1e-5)
    np.testing.assert_allclose(probabilities(top_k=2), [0.5 / 0.8, 0, 0.3 / 0.8, 0], rtol=1e-6)
    np.testing.assert_allclose(probabilities(top_k=9), P, rtol=1e-6)
    np.testing.assert_allclose(probabilities(top_p=0.79), [0.5 / 0.8, 0, 0.3 / 0.8, 0], rtol=1e-6)
    np.testing.assert_allclose(probabilities(top_p=0.81), np.array([0.5, 0, 0.3, 0.15]) / 0.95, rtol=1e-6)
    np.testing.assert_allclose(probabilities(top_k=3, top_p=0.5), [1, 0, 0, 0])  # the total before the second token is not below 0.5
    squared = P**2 / (P**2).sum()
    assert squared[0] > 0.65  # so temperature must be applied first
    np.testing.assert_allclose(probabilities(temperature=0.5, top_p=0.65), [1, 0, 0, 0])


@pytest.mark.parametrize("logits", [[0.0] * 5, [50.0, 0.0, 0.0, 0.0, 0.0], [-1e4, -2e4, -3e4, -4e4, -5e4]])
def test_top_p_keeps_at_least_one_token(logits):
    kept = sampling.filter_logits(jnp.array(logits), SamplingConfig(top_p=1e-9))
    assert np.isfinite(kept).any()
    assert jnp.argmax(kept) == 0


@pytest.mark.full
def test_sample_token_has_softmax_frequencies():
    """Tokens with different indices are independent."""
    keys, logits = jax.random.split(jax.random.key(0), 6000), jnp.broadcast_to(jnp.log(P), (6000, 4))
    first, second = (np.asarray(sampling.sample_token(logits, keys, i, SamplingConfig())) for i in (0, 1))
    for tokens in (first, second):
        np.testing.assert_allclose(np.bincount(tokens, minlength=4) / 6000, P, atol=0.025)
    assert abs(np.mean(first == second) - (P**2).sum()) < 0.025
    np.testing.assert_array_equal(sampling.sample_token(logits[:4], keys[:4], 0, SamplingConfig()), first[:4])
    assert not sampling.sample_token(logits, keys, 0, SamplingConfig(top_k=1)).any()


def test_guidance_scale_one_is_conditional_and_zero_unconditional():
    conditional, unconditional = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
    both = jnp.stack([conditional, unconditional], 1).reshape(6, 5)
    np.testing.assert_allclose(sampling.guided(both, 1.0), conditional, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(sampling.guided(both, 0.0), unconditional)
    np.testing.assert_allclose(sampling.guided(both, 3.0), 3 * conditional - 2 * unconditional, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def loops():
    """(cached, uncached), both (prefix, label, keys) -> tokens, of a model with perturbed parameters."""
    module, length = CausalPrior(codes=9, length=7, classes=2, depth=2, width=16, heads=2, hidden=32), 7
    params, _ = create(module, jax.random.key(0), jnp.zeros((1, length), int), train=False)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + rng.normal(0, 0.4, x.shape).astype(np.float32), params)
    call, config = functools.partial(run, module, params, {}, train=False), SamplingConfig(0.9, 6, 0.95)

    @jax.jit
    def cached(prefix, label, keys):
        prefill = lambda tokens: call(tokens, label, method="prefill")[0]  # noqa: E731
        decode = lambda *args: call(*args, method="decode")[0]  # noqa: E731
        return sampling.autoregress(prefill, decode, prefix, length, keys, config)

    @jax.jit
    def uncached(prefix, label, keys):
        return sampling.autoregress_uncached(lambda tokens: call(tokens, label)[0][0], prefix, length, keys, config)

    return cached, uncached


@pytest.mark.full
@pytest.mark.parametrize("begin", [0, 3])
def test_cached_and_uncached_autoregression_sample_equal_tokens(loops, begin):
    cached, uncached = loops
    prefix = jnp.arange(32 * begin).reshape(32, begin) % 9
    keys, label = jax.random.split(jax.random.key(1), 32), jnp.arange(32) % 2
    tokens = cached(prefix, label, keys)
    assert tokens.shape == (32, 7)
    np.testing.assert_array_equal(tokens, uncached(prefix, label, keys))
    np.testing.assert_array_equal(tokens[:, :begin], prefix)
    assert len(np.unique(tokens[:, begin:])) > 4


@pytest.mark.full
def test_a_sample_does_not_depend_on_its_batch(loops):
    cached, _ = loops
    keys, label = jax.random.split(jax.random.key(1), 32), jnp.arange(32) % 2
    order = np.random.default_rng(0).permutation(32)
    prefix = jnp.zeros((32, 0), int)
    np.testing.assert_array_equal(cached(prefix, label[order], keys[order]), cached(prefix, label, keys)[order])


@pytest.mark.parametrize("options", [dict(temperature=0.0), dict(top_k=-1), dict(top_p=0.0), dict(top_p=1.5)])
def test_invalid_sampling_config_raises_user_error(options):
    with pytest.raises(UserError, match=next(iter(options))):
        sampling.check(SamplingConfig(**options))

"""Losses and masks of tokens against explicit sums and torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax.objectives import tokens as objective

LOGITS = np.random.default_rng(0).normal(0, 2, (3, 5, 7)).astype(np.float32)
TOKENS = np.random.default_rng(1).integers(0, 7, (3, 5)).astype(np.int32)


def test_token_nll_equals_log_softmax():
    p = np.exp(LOGITS.astype(np.float64))
    p /= p.sum(-1, keepdims=True)
    chosen = np.take_along_axis(p, TOKENS[..., None], -1)[..., 0]
    nll = objective.token_nll(LOGITS, TOKENS)
    np.testing.assert_allclose(nll, -np.log(chosen), rtol=1e-5)
    np.testing.assert_allclose(nll.sum(-1), -np.log(chosen.prod(-1)), rtol=1e-5)
    np.testing.assert_allclose(objective.token_nll(np.zeros((1, 8192)), np.array([5])), 9.0109, atol=5e-5)
    assert objective.token_nll(jnp.asarray(LOGITS, jnp.bfloat16), TOKENS).dtype == jnp.float32


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_label_smoothing_equals_torch(smoothing):
    torch = pytest.importorskip("torch")
    theirs = torch.nn.functional.cross_entropy(
        torch.from_numpy(LOGITS.reshape(-1, 7)), torch.from_numpy(TOKENS.reshape(-1)).long(),
        label_smoothing=smoothing, reduction="none",
    )  # fmt: skip
    np.testing.assert_allclose(objective.token_nll(LOGITS, TOKENS, smoothing).reshape(-1), theirs, rtol=1e-5)


def test_masked_mean_weights_sequences_equally():
    values = jnp.array([[1.0, 2.0, 9.0], [4.0, 9.0, 9.0], [9.0, 9.0, 9.0]])
    mask = jnp.array([[True, True, False], [True, False, False], [False, False, False]])
    value, gradient = jax.value_and_grad(objective.masked_mean)(values, mask)
    np.testing.assert_allclose(value, (1.5 + 4 + 0) / 3, rtol=1e-6)
    np.testing.assert_allclose(gradient, np.array([[0.5, 0.5, 0], [1, 0, 0], [0, 0, 0]]) / 3, rtol=1e-6)


@pytest.mark.full
def test_unigram_bits_equal_histogram_entropy():
    assert objective.unigram_bits(jnp.arange(64).reshape(4, 16) % 8, 8) == 3
    assert objective.unigram_bits(jnp.zeros((4, 16), int), 8) == 0
    p = np.array([1, 1, 2]) / 4
    np.testing.assert_allclose(objective.unigram_bits(jnp.array([0, 3, 3, 1]), 6), -(p * np.log2(p)).sum(), rtol=1e-6)


def test_lowest_marks_exactly_count_scores():
    scores = jnp.array([[3.0, 1.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0], [jnp.inf, 5.0, jnp.inf, 4.0]])
    expected = [[0, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]]
    np.testing.assert_array_equal(objective.lowest(scores, jnp.array([1, 3, 0])), np.array(expected, bool))
    np.testing.assert_array_equal(objective.lowest(scores, 2)[2], [False, True, False, True])


@pytest.mark.parametrize("name", objective.SCHEDULES)
def test_mask_schedules_fall_from_one_to_zero(name):
    ratio = objective.SCHEDULES[name](np.linspace(0, 1, 101))
    np.testing.assert_allclose([ratio[0], ratio[-1]], [1, 0], atol=1e-6)
    assert (np.diff(ratio) < 0).all()
    assert (ratio[50] > 0.5) == (name in ("cosine", "square", "cubic"))  # slow at first, while few tokens are known


@pytest.mark.parametrize("name", objective.SCHEDULES)
def test_masked_counts_decrease_in_every_step_to_zero(name):
    for unknown, steps in ((256, 8), (256, 12), (64, 64), (16, 5), (5, 8), (1, 1)):
        counts = np.array((unknown, *objective.masked_counts(unknown, steps, name)))
        assert len(counts) == steps + 1
        assert counts[-1] == 0
        assert ((np.diff(counts) < 0) | (counts[:-1] == 0)).all()
        assert unknown < steps or (counts[:-1] > 0).all()


def test_masked_counts_equal_published_cosine_schedule():
    """256 tokens in 8 steps. The published code ends with 1, but its last prediction has already filled that token."""
    assert objective.masked_counts(256, 8, "cosine") == (251, 236, 212, 181, 142, 97, 49, 0)


def test_random_masks_have_scheduled_shares_at_uniform_positions():
    masks = np.asarray(objective.random_masks(jax.random.key(0), (4000, 32), "cosine"))
    share = masks.mean(-1)
    assert abs(share.mean() - 2 / np.pi) < 0.02  # E cos(pi r / 2), 0.637
    assert masks.sum(-1).min() == 1
    assert abs(np.quantile(share, 0.5) - np.cos(np.pi / 4)) < 0.04
    assert np.ptp(masks.mean(0)) < 0.06  # uniform over positions

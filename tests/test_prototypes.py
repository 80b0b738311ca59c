"""Objectives on prototypes against golden values, closed forms and lightly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from torch_reference import require_lightly, require_torch

from ssl_jax.errors import UserError
from ssl_jax.objectives import prototypes as subject

A = np.sin(1 + 8 * np.arange(4)[:, None] + np.arange(8))
B = np.cos(2 + 0.5 * (8 * np.arange(4)[:, None] + np.arange(8)))
SCORES = 0.2 * np.sin(1 + 0.7 * np.arange(20)).reshape(4, 5)
OTHER = 0.2 * np.cos(0.9 * np.arange(20)).reshape(4, 5)


def test_sinkhorn_has_the_golden_values():
    q = subject.sinkhorn(SCORES, 0.05, 3)
    expected = [0.12718563587757767, 0.4225219448948722, 0.4375421922480268, 0.012513252482087005, 0.000236974497436269]
    np.testing.assert_allclose(q[0], expected, rtol=1e-4)
    np.testing.assert_allclose(q.sum(0), [0.738316, 0.728942, 0.762714, 0.873199, 0.896828], rtol=1e-4)
    np.testing.assert_allclose(subject.sinkhorn(SCORES, 0.05, 100).sum(0), 0.8, rtol=1e-4)
    np.testing.assert_allclose(subject.sinkhorn(A, 0.07, 3)[0, :3], [0.36512046, 0.19437159, 4.425e-07], rtol=1e-3)


def test_sinkhorn_of_uniform_and_of_huge_scores():
    np.testing.assert_allclose(subject.sinkhorn(np.zeros((6, 4)), 0.05, 3), 0.25, rtol=1e-6)
    q = subject.sinkhorn(1e4 * SCORES, 0.05, 3)
    assert np.isfinite(q).all()
    np.testing.assert_allclose(q.sum(1), 1, rtol=1e-5)
    assert not np.any(jax.grad(lambda s: jnp.sum(subject.sinkhorn(s, 0.05, 3) ** 2))(jnp.float32(SCORES)))
    with pytest.raises(UserError, match="epsilon=0 must be positive"):
        subject.sinkhorn(SCORES, 0, 3)


def test_swapped_prediction_of_swav_and_dino():
    views = np.stack([SCORES, OTHER], 1)
    q = np.stack([subject.sinkhorn(x, 0.05, 3) for x in (SCORES, OTHER)], 1)
    assert subject.swapped(q, views / 0.1) == pytest.approx(2.9110720898710936, rel=1e-5)
    teachers, students = np.stack([A, B], 1), np.stack([A / 2, B / 2], 1)
    value = subject.swapped(jax.nn.softmax(teachers / 0.04), students / 0.1)
    assert value == pytest.approx(4.213707489042743, rel=1e-5)


def test_collapse_has_the_entropy_of_all_prototypes():
    uniform = np.zeros((3, 2, 65536), np.float32)
    assert subject.swapped(jax.nn.softmax(uniform), uniform) == pytest.approx(np.log(65536), rel=1e-5)
    assert subject.entropy(jnp.full(16, 1 / 16)) == pytest.approx(np.log(16), rel=1e-6)


def test_own_view_is_no_target():
    """Views beyond the global ones are predicted from, never predicted; each global view is compared with all others."""
    q = jax.nn.softmax(np.random.default_rng(0).standard_normal((5, 2, 7)))
    logits = np.random.default_rng(1).standard_normal((5, 4, 7))
    terms = [
        -np.mean([np.sum(q[n, g] * np.log(np.exp(logits[n, v]) / np.exp(logits[n, v]).sum())) for n in range(5)])
        for g in range(2) for v in range(4) if g != v
    ]  # fmt: skip
    assert subject.swapped(q, logits) == pytest.approx(np.mean(terms), rel=1e-5)


def test_koleo_has_the_golden_values_and_depends_on_its_group():
    assert subject.koleo(A, 4) == pytest.approx(-0.2358401222514103, abs=1e-5)
    assert subject.koleo(B, 4) == pytest.approx(0.038608653108618746, abs=1e-5)
    x = np.random.default_rng(0).standard_normal((64, 8))
    assert subject.koleo(x, 64) > subject.koleo(x, 8)
    with pytest.raises(UserError, match="koleo_group=5 does not divide the 64 images"):
        subject.koleo(x, 5)


@pytest.mark.full
def test_equal_to_lightly():
    lightly, torch = require_lightly(), require_torch()
    rng = np.random.default_rng(0)
    high, low = rng.uniform(-0.2, 0.2, (2, 2, 16, 9))
    loss = lightly.SwaVLoss()([torch.tensor(x) for x in high], [torch.tensor(x) for x in low]).item()
    q = np.stack([subject.sinkhorn(x, 0.05, 3) for x in high], 1)
    ours = subject.swapped(q, np.stack([*high, *low], 1) / 0.1)
    assert ours == pytest.approx(loss, rel=1e-4)

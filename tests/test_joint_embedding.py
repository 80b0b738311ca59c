"""Objectives of joint-embedding methods against golden values, float64 loops and lightly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from torch_reference import require_lightly, require_torch

from ssl_jax.objectives import contrastive
from ssl_jax.objectives import joint_embedding as subject

A = np.sin(1 + 8 * np.arange(4)[:, None] + np.arange(8))
B = np.cos(2 + 0.5 * (8 * np.arange(4)[:, None] + np.arange(8)))
QUEUE = np.sin(0.3 * np.arange(48)).reshape(8, 6).T  # six keys of width 8


def lightly_loss(name, *args, **options):
    lightly, torch = require_lightly(), require_torch()
    return getattr(lightly, name)(**options)(*(torch.tensor(np.asarray(x, np.float64)) for x in args)).item()


# ---- golden values: A and B as above, in float64 by independent code


def test_negative_cosine_and_the_distance_of_byol():
    assert subject.negative_cosine(A, B) == pytest.approx(-0.017379436389385286, abs=1e-6)
    assert 2 + 2 * subject.negative_cosine(A, B) == pytest.approx(1.9652411272212293, abs=1e-6)
    assert subject.negative_cosine(A, 3 * A) == pytest.approx(-1, abs=1e-6)


def test_barlow_twins():
    value, logs = subject.barlow_twins(A, B, 0.0051)
    np.testing.assert_allclose((logs["on_diagonal"], logs["off_diagonal"]), (10.383168422744337, 18.021529754363463), rtol=1e-5)
    assert value == pytest.approx(10.47507822449159, rel=1e-5)
    assert subject.barlow_twins(A, B, 0.005)[0] == pytest.approx(10.473276071516153, rel=1e-5)


def test_vicreg():
    terms = subject.vicreg(A, B)
    assert terms.invariance == pytest.approx(0.9737472666602066, rel=1e-5)
    assert 2 * terms.variance == pytest.approx(0.40361375407, rel=1e-5)
    assert terms.covariance == pytest.approx(2.558478153620518, rel=1e-5)
    assert 25 * terms.invariance + 25 * terms.variance + terms.covariance == pytest.approx(31.947331746005652, rel=1e-5)


def test_moco_with_a_queue_and_version_3():
    keys = QUEUE / np.linalg.norm(QUEUE, axis=1, keepdims=True)
    for temperature, expected in ((0.2, 2.0471605478353494), (0.07, 2.872194424544887)):
        assert contrastive.queue_info_nce(A, B, keys, temperature)[0] == pytest.approx(expected, rel=1e-5)
    for temperature, expected in ((0.2, 1.8257926733722387), (1.0, 5.6987869957510995)):
        both = contrastive.info_nce(A, B, temperature)[0] + contrastive.info_nce(B, A, temperature)[0]
        assert 2 * temperature * both == pytest.approx(expected, rel=1e-5)


# ---- lightly


@pytest.mark.full
@pytest.mark.parametrize("seed", [0, 1])
def test_equal_to_lightly(seed):
    x, y = np.random.default_rng(seed).standard_normal((2, 16, 12))
    assert subject.negative_cosine(x, y) == pytest.approx(lightly_loss("NegativeCosineSimilarity", x, y), abs=1e-6)
    assert subject.barlow_twins(x, y, 0.005)[0] == pytest.approx(lightly_loss("BarlowTwinsLoss", x, y, lambda_param=0.005), rel=1e-4)
    terms = subject.vicreg(x, y)
    ours = 25 * terms.invariance + 25 * terms.variance + terms.covariance
    assert ours == pytest.approx(lightly_loss("VICRegLoss", x, y), rel=1e-4)


# ---- closed forms


def test_collapse_has_known_losses():
    constant = np.tile(np.arange(8.0), (6, 1))
    assert subject.barlow_twins(constant, constant, 0.005)[0] == pytest.approx(8)  # D
    terms = subject.vicreg(constant, constant)
    assert 25 * terms.variance == pytest.approx(24.75, rel=1e-6) and terms.covariance == terms.invariance == 0
    assert subject.spread(constant) == pytest.approx(0, abs=1e-6)
    both, n = contrastive.info_nce(constant, constant, 1.0)[0], 6
    assert both == pytest.approx(np.log(n))
    assert contrastive.queue_info_nce(constant, constant, constant, 1.0)[0] == pytest.approx(np.log(n + 1))


def test_independent_embeddings_have_known_losses():
    rng = np.random.default_rng(0)
    n, d = 4096, 32
    x, y = rng.standard_normal((2, n, d)).astype(np.float32)
    _, logs = subject.barlow_twins(x, y, 1.0)
    assert logs["on_diagonal"] == pytest.approx(d * (1 + 1 / n), rel=0.05)
    assert logs["off_diagonal"] == pytest.approx(d * (d - 1) / n, rel=0.1)
    assert subject.spread(x) == pytest.approx(1, abs=0.02)
    queue = rng.standard_normal((8192, 128))
    x, y = rng.standard_normal((2, 512, 128))
    expected = np.log(8193) + 1 / (2 * 0.2**2 * 128)
    assert contrastive.queue_info_nce(x, y, queue, 0.2)[0] == pytest.approx(expected, rel=0.02)


def test_invariances():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 64, 8))
    scale, shift = rng.uniform(0.5, 2, 8), rng.standard_normal(8)
    first = subject.barlow_twins(x, y, 0.005)[0]
    assert subject.barlow_twins(scale * x + shift, y, 0.005)[0] == pytest.approx(first, rel=1e-3)  # but for epsilon
    gradient = jax.grad(lambda x: subject.barlow_twins(x, y, 0.005)[0])(jnp.float32(x))
    np.testing.assert_allclose(gradient.sum(0), 0, atol=1e-5)  # so the bias of a last linear layer gets none
    np.testing.assert_allclose(subject.vicreg(x + shift, y + shift), subject.vicreg(x, y), rtol=1e-4, atol=1e-6)
    wide = 3 * x
    assert subject.vicreg(wide, wide).variance == 0
    white = np.linalg.qr(x - x.mean(0))[0]
    assert subject.vicreg(white, white).covariance == pytest.approx(0, abs=1e-6)


def test_gradients_of_collapsed_and_zero_embeddings_are_finite():
    zeros = jnp.zeros((4, 8))
    for function in (
        lambda x: subject.negative_cosine(x, B), lambda x: subject.barlow_twins(x, B, 0.005)[0], lambda x: sum(subject.vicreg(x, B)),
        lambda x: contrastive.queue_info_nce(x, B, A, 0.2)[0],
    ):  # fmt: skip
        assert np.isfinite(jax.grad(function)(zeros)).all()

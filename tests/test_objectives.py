"""Contrastive losses and cross-entropy against float64 loops, golden values, lightly and torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from torch_reference import require_lightly, require_torch

from ssl_jax.engine import sharding
from ssl_jax.errors import UserError
from ssl_jax.objectives import contrastive
from ssl_jax.objectives.classification import cross_entropy
from ssl_jax.objectives.contrastive import clip, info_nce, loss_of_views, nt_xent, unit

A = np.sin(1 + 8 * np.arange(4)[:, None] + np.arange(8)[None])
B = np.cos(2 + 0.5 * (8 * np.arange(4)[:, None] + np.arange(8)[None]))


def nt_xent_loop(a, b, temperature):
    """The mean over anchors of eq. 1 of the paper, term by term in float64."""
    z = np.concatenate([a, b]).astype(np.float64)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    n, total = len(a), 0.0
    for i in range(2 * n):
        partner = (i + n) % (2 * n)
        others = [np.exp(z[i] @ z[k] / temperature) for k in range(2 * n) if k != i]
        total -= np.log(np.exp(z[i] @ z[partner] / temperature) / np.sum(others))
    return total / (2 * n)


def stack(a, b):
    return jnp.stack([jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)], 1)


@pytest.mark.parametrize(("temperature", "golden"), [(0.1, 5.070721444459873), (0.5, 2.018646155621925)])
@pytest.mark.full
def test_nt_xent_equals_golden_value_and_loop(temperature, golden):
    assert nt_xent_loop(A, B, temperature) == pytest.approx(golden, abs=1e-12)
    assert float(nt_xent(stack(A, B), temperature)[0]) == pytest.approx(golden, rel=1e-5)
    # The official code returns the sum of both directions, twice this value.
    assert 2 * nt_xent_loop(A, B, temperature) == pytest.approx({0.1: 10.141442888919748, 0.5: 4.037292311243851}[temperature])


@pytest.mark.full
def test_nt_xent_value_and_gradient_equal_lightly():
    lightly, torch = require_lightly(), require_torch()
    a, b = torch.tensor(A, requires_grad=True), torch.tensor(B, requires_grad=True)
    loss = lightly.NTXentLoss(temperature=0.2)(a, b)
    loss.backward()
    ours, grad = jax.value_and_grad(lambda z: nt_xent(z, 0.2)[0])(stack(A, B))
    assert float(ours) == pytest.approx(float(loss.detach()), rel=1e-5)
    np.testing.assert_allclose(grad[:, 0], a.grad, atol=2e-6)
    np.testing.assert_allclose(grad[:, 1], b.grad, atol=2e-6)


@pytest.mark.parametrize(("n", "expected"), [(4, 1.945910), (256, 6.236370)])
@pytest.mark.full
def test_nt_xent_of_collapsed_embeddings_is_log_2n_minus_1(n, expected):
    loss, _logs = nt_xent(jnp.ones((n, 2, 16)), 0.1)
    assert float(loss) == pytest.approx(expected, abs=1e-5) == pytest.approx(np.log(2 * n - 1), abs=1e-5)


def test_nt_xent_of_aligned_orthogonal_pairs():
    n, tau = 4, 0.5
    z = jnp.repeat(jnp.eye(n, 16)[:, None], 2, 1)
    loss, logs = nt_xent(z, tau)
    assert float(loss) == pytest.approx(-1 / tau + np.log(np.exp(1 / tau) + 2 * n - 2), abs=1e-5)
    assert float(logs["accuracy"]) == 1.0


def test_nt_xent_of_random_directions():
    """log(2N - 1) + 1 / (2 tau^2 d) for unaligned Gaussian directions."""
    z = jax.random.normal(jax.random.key(0), (256, 2, 128))
    assert float(nt_xent(z, 0.5)[0]) == pytest.approx(6.2677, abs=0.02)


def info_nce_loop(q, k, temperature):
    """Cross-entropy of the similarities of each query, term by term in float64."""
    q, k = (x.astype(np.float64) / np.linalg.norm(x, axis=1, keepdims=True) for x in (q, k))
    return -np.mean([np.log(np.exp(q[i] @ k[i] / temperature) / np.exp(k @ q[i] / temperature).sum()) for i in range(len(q))])


@pytest.mark.full
def test_info_nce_and_clip_equal_loops():
    assert float(info_nce(jnp.asarray(A), jnp.asarray(B), 0.2)[0]) == pytest.approx(info_nce_loop(A, B, 0.2), rel=1e-5)
    both = (info_nce_loop(A, B, 0.2) + info_nce_loop(B, A, 0.2)) / 2
    assert float(clip(jnp.asarray(A), jnp.asarray(B), 5.0)[0]) == pytest.approx(both, rel=1e-5)
    assert float(info_nce(jnp.ones((256, 8)), jnp.ones((256, 8)), 0.1)[0]) == pytest.approx(np.log(256), rel=1e-5)
    close = info_nce(jnp.eye(8), jnp.eye(8), 0.5)
    assert (float(close[0]), float(close[1]["accuracy"])) == (pytest.approx(-2 + np.log(np.exp(2) + 7), rel=1e-5), 1.0)


@pytest.mark.full
def test_losses_of_two_views_by_name():
    z = stack(A, B)

    def loss_and_grad(name):
        return jax.value_and_grad(lambda z: loss_of_views(name, 0.2, "dense")(z)[0])(z)

    assert float(loss_and_grad("nt_xent")[0]) == pytest.approx(nt_xent_loop(A, B, 0.2), rel=1e-5)
    assert float(loss_and_grad("nt_xent_sum")[0]) == pytest.approx(2 * nt_xent_loop(A, B, 0.2), rel=1e-5)
    both = (info_nce_loop(A, B, 0.2) + info_nce_loop(B, A, 0.2)) / 2
    (moco, one_sided), (clip_loss, gradient) = loss_and_grad("moco"), loss_and_grad("clip")
    assert float(moco) == pytest.approx(both, rel=1e-5) and float(clip_loss) == pytest.approx(both, rel=1e-5)
    expected = jax.grad(lambda q: (info_nce(q[:, 0], B, 0.2)[0] + info_nce(q[:, 1], A, 0.2)[0]) / 2)(z)
    np.testing.assert_allclose(one_sided, expected, atol=1e-6)
    assert np.abs(gradient - one_sided).max() > 1e-3
    with pytest.raises(UserError, match="loss='npair' is unknown; choose nt_xent, nt_xent_sum, moco, clip"):
        loss_of_views("npair", 0.2, "dense")


OBJECTIVES = {
    **{name: lambda z, way, name=name: loss_of_views(name, 0.1, way)(z) for name in contrastive.LOSSES},
    "info_nce": lambda z, way: info_nce(z[:, 0], z[:, 1], 0.1, way),
}


@pytest.mark.full
@pytest.mark.parametrize("way", ["chunked", "ring"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_chunked_and_ring_similarities_equal_dense_in_values_and_gradients(name, way, monkeypatch):
    """On a mesh data 2 x fsdp 2 x tensor 2 with blocks of 8 columns; some rows are far from all others."""
    monkeypatch.setattr(contrastive, "CHUNK", 8)
    z = np.random.default_rng(0).normal(size=(24, 2, 16)).astype(np.float32) + 1
    z[::5] *= -1
    objective = OBJECTIVES[name]
    (value, logs), gradient = jax.value_and_grad(lambda z: objective(z, "dense"), has_aux=True)(z)
    mesh = sharding.make_mesh(dict(data=2, fsdp=2, tensor=2))
    sharded = jax.device_put(z, jax.sharding.NamedSharding(mesh, sharding.BATCH))
    with jax.set_mesh(mesh):
        step = jax.jit(jax.value_and_grad(lambda z: objective(z, way), has_aux=True))
        (other, metrics), other_gradient = step(sharded)
        text = step.lower(sharded).compile().as_text()
    assert float(other) == pytest.approx(float(value), rel=1e-6)
    assert float(metrics["accuracy"]) == pytest.approx(float(logs["accuracy"]), abs=1e-6)
    assert 0 < float(logs["accuracy"]) < 1
    np.testing.assert_allclose(other_gradient, gradient, rtol=1e-5, atol=1e-5 * np.abs(gradient).max())
    if way == "ring":
        assert "collective-permute" in text
        assert "all-gather" not in text
        assert "f32[48,48]" not in text and "f32[24,24]" not in text  # no device holds all similarities


@pytest.mark.full
@pytest.mark.parametrize("name", contrastive.LOSSES)
def test_ring_memory_per_device_halves_with_twice_the_devices(name):
    """The whole step: the backward pass must not store the rows of all devices."""
    temporaries = []
    for devices in (4, 8):
        mesh = sharding.make_mesh(dict(data=devices, fsdp=1, tensor=1), jax.devices()[:devices])
        z = jax.ShapeDtypeStruct((512, 2, 256), np.float32, sharding=jax.sharding.NamedSharding(mesh, sharding.BATCH))
        with jax.set_mesh(mesh):
            step = jax.jit(jax.value_and_grad(lambda z: loss_of_views(name, 0.1, "ring")(z)[0]))
            temporaries.append(step.lower(z).compile().memory_analysis().temp_size_in_bytes)
    assert temporaries[1] < 0.55 * temporaries[0]


@pytest.mark.full
def test_ring_on_one_device_and_batch_of_one():
    z = stack(A, B)
    assert float(nt_xent(z, 0.2, "ring")[0]) == pytest.approx(float(nt_xent(z, 0.2)[0]))
    for way in contrastive.WAYS:
        loss, gradient = jax.value_and_grad(lambda z: nt_xent(z, 0.2, way)[0])(z[:1])  # noqa: B023
        assert float(loss) == 0
        assert np.isfinite(gradient).all()
    with pytest.raises(UserError, match="similarities='sparse' is unknown; choose dense, chunked, ring"):
        contrastive.check_way("sparse")


def test_nt_xent_is_invariant_to_scale_rotation_and_permutation():
    z = stack(A, B)
    value = float(nt_xent(z, 0.2)[0])
    scales = jnp.asarray(np.random.default_rng(0).uniform(0.1, 9, (4, 2, 1)), jnp.float32)
    rotation = jnp.asarray(np.linalg.qr(np.random.default_rng(1).normal(size=(8, 8)))[0], jnp.float32)
    for other in (z * scales, z @ rotation, z[:, ::-1], z[jnp.array([2, 0, 3, 1])]):
        assert float(nt_xent(other, 0.2)[0]) == pytest.approx(value, rel=1e-5)
    grad = jax.grad(lambda z: nt_xent(z, 0.2)[0])(z)
    np.testing.assert_allclose(jnp.sum(z * grad, -1), 0, atol=1e-5)  # invariance to length


def test_unit_has_a_finite_gradient_at_zero():
    assert np.isfinite(jax.grad(lambda x: unit(x).sum())(jnp.zeros(3))).all()


def test_cross_entropy_equals_a_loop_and_torch():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(6, 5)) * 3, rng.integers(0, 5, 6)
    loss, logs = cross_entropy(jnp.asarray(logits, jnp.float32), jnp.asarray(labels))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert float(loss) == pytest.approx(-np.mean([np.log(p[i, y]) for i, y in enumerate(labels)]), rel=1e-5)
    assert float(logs["accuracy"]) == pytest.approx(np.mean(logits.argmax(1) == labels))
    torch = require_torch()
    expected = torch.nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(labels), label_smoothing=0.1)
    smoothed = cross_entropy(jnp.asarray(logits, jnp.float32), jnp.asarray(labels), 0.1)[0]
    assert float(smoothed) == pytest.approx(float(expected), rel=1e-5)
    assert float(cross_entropy(jnp.zeros((4, 10)), jnp.arange(4))[0]) == pytest.approx(np.log(10), rel=1e-6)

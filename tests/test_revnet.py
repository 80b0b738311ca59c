"""Reversible networks: inverse of a stack, published parameter counts, rematerialization."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax.errors import UserError
from ssl_jax.models.backbones import revnet
from ssl_jax.models.common import create, run


def filled(module, *shapes, seed=0):
    """Variables of `module` with random numbers in every leaf, so that no branch starts as zero."""
    params, state = jax.eval_shape(
        lambda key, *x: create(module, key, *x), jax.random.key(0), *(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)
    )
    rng = np.random.default_rng(seed)

    def fill(x):
        return jnp.asarray(rng.uniform(0.5, 1, x.shape) if x.ndim == 1 else rng.standard_normal(x.shape) / 4, x.dtype)

    return jax.tree.map(fill, (params, state))


@pytest.mark.full
def test_stack_of_units_is_invertible():
    """Five units with real branches, normalized by the statistics of the batch, then undone one by one from the output alone."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 6, 6, 16)), jnp.float32)
    module = revnet.Branch(8, jnp.float32)
    branches = []
    for seed in range(5):
        params, state = filled(module, (4, 6, 6, 8), seed=seed)
        branches.append(lambda half, params=params, state=state: run(module, params, state, half, train=True)[0])
    y = x
    for branch in branches:
        before, y = y, revnet.couple(branch, y)
        np.testing.assert_array_equal(y[..., :8], before[..., 8:])  # one half passes, the other changes
        assert np.abs(y[..., 8:] - before[..., :8]).max() > 0.1
    for branch in reversed(branches):
        one, other = jnp.split(y, 2, axis=-1)
        y = jnp.concatenate([other - branch(one), one], axis=-1)
    np.testing.assert_allclose(y, x, atol=1e-4)


def test_two_units_equal_a_block_of_gomez_et_al():
    """y1 = x1 + F(x2), y2 = x2 + G(y1)."""
    x1, x2 = (np.random.default_rng(i).standard_normal((2, 3)) for i in range(2))
    f, g = (lambda h: h**2), np.sin
    y = revnet.couple(g, revnet.couple(f, jnp.concatenate([x1, x2], -1)))
    y1 = x1 + f(x2)
    np.testing.assert_allclose(y, np.concatenate([y1, x2 + g(y1)], -1), rtol=1e-5)


def test_downsampling_averages_pixels_and_pads_channels():
    x = np.arange(32, dtype=np.float32).reshape(1, 4, 4, 2)
    y = revnet.double(jnp.asarray(x))
    assert y.shape == (1, 2, 2, 4)
    np.testing.assert_array_equal(y[..., 1:3], x.reshape(1, 2, 2, 2, 2, 2).mean((2, 4)))
    np.testing.assert_array_equal(y[..., [0, 3]], 0)


@pytest.mark.full
@pytest.mark.parametrize(("width", "millions", "dim"), [(1, 5.4, 2048), (4, 86, 8192)])
def test_parameter_counts_and_shapes_of_published_networks(width, millions, dim):
    """86 M as in the table of Chen et al. 2020 (arXiv:2002.05709) that has BigBiGAN; by hand to the last one."""
    module = revnet.RevNet(50, width)
    out, variables = jax.eval_shape(
        lambda x: module.init_with_output(jax.random.key(0), x, train=True), jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
    )
    halves = [(128 * width * 2**group, units) for group, units in enumerate((3, 4, 6, 3))]
    by_hand = 7 * 7 * 3 * 256 * width + 2 * dim
    by_hand += sum(units * (2 * h * h // 4 + 9 * (h // 4) ** 2 + 2 * (h + 2 * (h // 4))) for h, units in halves)
    counted = sum(x.size for x in jax.tree.leaves(variables["params"]))
    assert counted == by_hand
    assert counted / 1e6 == pytest.approx(millions, rel=0.01)
    assert out["pooled"].shape == (2, dim)
    assert [out[f"layer{i}"].shape[1:3] for i in range(1, 5)] == [(56, 56), (28, 28), (14, 14), (7, 7)]


@pytest.mark.full
def test_remat_keeps_gradients(monkeypatch):
    monkeypatch.setitem(revnet.DEPTHS, 10, (1, 1))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 16, 16, 3)), jnp.float32)
    grads = []
    for remat in (False, True):
        module = revnet.RevNet(10, 1 / 32, "stride2", remat)
        params, state = filled(module, x.shape)

        def loss(params, module=module, state=state):
            return jnp.sum(run(module, params, state, x, train=True)[0]["pooled"] ** 3)

        assert remat == ("remat" in str(jax.make_jaxpr(loss)(params)))
        grads.append(jax.jit(jax.grad(loss))(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=5e-4, atol=1e-5), *grads)
    assert np.abs(grads[0]["layer1_0"]["conv1"]["kernel"]).max() > 0


def test_invalid_fields_raise_user_error():
    with pytest.raises(UserError, match="revnet has no depth 42"):
        revnet.RevNet(42)
    with pytest.raises(UserError, match="revnet has no stem 'cifar'"):
        revnet.RevNet(50, stem="cifar")
    with pytest.raises(UserError, match="multiple of 1/32"):
        revnet.RevNet(50, 0.01)

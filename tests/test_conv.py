"""Fast CPU gradients equal XLA's for the strides and paddings of the models; other cases are XLA's own."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from ssl_jax.models import conv as subject

CASES = [  # batch, side, channels, features, kernel, stride, padding
    (6, 8, 3, 4, 3, 1, 1),
    (6, 9, 4, 8, 3, 2, 1),
    (5, 8, 4, 8, 3, 2, "SAME"),
    (4, 8, 4, 8, 1, 2, 0),
    (3, 15, 3, 4, 7, 2, 3),
    (4, 8, 4, 2, 3, 1, "VALID"),
    (2, 11, 3, 2, 4, (3, 2), ((2, 0), (0, 1))),
    (2, 10, 3, 2, 2, 3, 0),  # kernel smaller than stride; the last column is unused
]


def layers(features, kernel, stride, padding, **fields):
    plain = nn.Conv(features, (kernel, kernel), strides=stride, padding=padding, use_bias=False, **fields)
    return plain.clone(conv_general_dilated=subject.conv), plain


@functools.partial(jax.jit, static_argnums=0)
def gradients(layer, params, x, cotangent):
    y, backward = jax.vjp(layer.apply, params, x)
    dparams, dx = backward(cotangent)
    return y, dparams["params"]["kernel"], dx


def jaxpr_of_gradient(layer, params, x):
    return str(jax.make_jaxpr(jax.grad(lambda p: jnp.sum(layer.apply(p, x))))(params))


@pytest.mark.full
@pytest.mark.parametrize("chunk_bytes", [1, 2**12])
@pytest.mark.parametrize("case", CASES)
def test_value_and_gradients_equal_lax(case, chunk_bytes, monkeypatch):
    monkeypatch.setattr(subject, "CHUNK_BYTES", chunk_bytes)
    batch, side, channels, *fields = case
    fast, plain = layers(*fields)
    x = jax.random.normal(jax.random.key(0), (batch, side, side, channels))
    params = plain.init(jax.random.key(1), x)
    cotangent = jax.random.normal(jax.random.key(2), plain.apply(params, x).shape)
    assert "scan" in jaxpr_of_gradient(fast, params, x)
    expected = gradients(plain, params, x, cotangent)
    for got, want in zip(gradients(fast, params, x, cotangent), expected, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5 * float(jnp.abs(want).max()))


@pytest.mark.full
def test_second_order_and_bfloat16_gradients_equal_lax():
    fast, plain = layers(4, 3, 2, 1)
    x = jax.random.normal(jax.random.key(0), (4, 6, 6, 3))
    params = plain.init(jax.random.key(1), x)

    def penalty(layer, params):  # the shape of R1: a gradient norm, differentiated again
        score = lambda x: jnp.sum(jnp.tanh(layer.apply(params, x)))  # noqa: E731
        return jnp.sum(jax.grad(score)(x) ** 2)

    got, expected = (jax.grad(penalty, 1)(layer, params)["params"]["kernel"] for layer in (fast, plain))
    np.testing.assert_allclose(got, expected, atol=1e-5 * float(jnp.abs(expected).max()))

    fast, plain = layers(4, 3, 1, 1, dtype=jnp.bfloat16)
    got, expected = (
        jax.grad(lambda p, layer=layer: jnp.sum(layer.apply(p, x).astype(jnp.float32) ** 2))(params)["params"]["kernel"]
        for layer in (fast, plain)
    )
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, atol=2e-2 * float(jnp.abs(expected).max()))


def test_several_devices_groups_and_large_kernels_use_xla_gradients():
    x = jnp.ones((8, 16, 16, 4))
    for fields in ((4, 3, 1, 1, {"feature_group_count": 2}), (4, 3, 1, 1, {"kernel_dilation": 2}), (4, 8, 8, 0, {})):
        fast, plain = layers(*fields[:4], **fields[4])
        params = plain.init(jax.random.key(0), x)
        assert jaxpr_of_gradient(fast, params, x) == jaxpr_of_gradient(plain, params, x)
    fast, plain = layers(4, 3, 1, 1)
    params = plain.init(jax.random.key(0), x)
    assert jaxpr_of_gradient(fast, params, x) != jaxpr_of_gradient(plain, params, x)
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:2]), ("data",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        x = jax.device_put(x, jax.NamedSharding(mesh, PartitionSpec("data")))
        assert jaxpr_of_gradient(fast, params, x) == jaxpr_of_gradient(plain, params, x)


def test_compiled_for_accelerators_uses_xla_gradients():
    fast, plain = layers(4, 3, 1, 1)
    x = jnp.ones((2, 8, 8, 3))
    params = plain.init(jax.random.key(0), x)

    def text(layer, platform):
        step = jax.jit(jax.grad(lambda p: jnp.sum(layer.apply(p, x) ** 2)))
        return jax.export.export(step, platforms=[platform])(params).mlir_module()

    for platform in ("tpu", "cuda"):
        ours, theirs = (text(layer, platform).count("stablehlo.convolution") for layer in (fast, plain))
        assert ours == theirs > 0
        assert "stablehlo.dot_general" not in text(fast, platform)
    assert "stablehlo.dot_general" in text(fast, "cpu")


@pytest.mark.full
@pytest.mark.parametrize(("kernel", "stride"), [(4, 2), (5, 2), (3, 2), (2, 2), (6, 3), (3, 1)])
def test_transposed_convolution_equals_gradient_of_convolution(kernel, stride):
    """Values against the transposition that JAX derives; gradients of any order against those of that map."""
    generator = np.random.default_rng(0)
    x = jnp.asarray(generator.normal(size=(5, 4, 6, 3)), jnp.float32)
    w = jnp.asarray(generator.normal(size=(kernel, kernel, 3, 2)), jnp.float32)

    def reference(x, w):
        like = jax.ShapeDtypeStruct((5, 4 * stride, 6 * stride, 2), jnp.float32)
        forward = functools.partial(
            jax.lax.conv_general_dilated, rhs=w.swapaxes(2, 3), window_strides=(stride, stride), padding="SAME",
            dimension_numbers=subject.LAYOUT,
        )  # fmt: skip
        return jax.linear_transpose(forward, like)(x)[0]

    np.testing.assert_allclose(subject.conv_transpose(x, w, stride), reference(x, w), rtol=1e-5, atol=1e-5)

    def twice(function):
        first = jax.grad(lambda x, w: jnp.sum(jnp.sin(function(x, w))), argnums=1)
        return jax.grad(lambda x: jnp.sum(first(x, w) ** 2))(x), first(x, w)

    for ours, theirs in zip(twice(lambda x, w: subject.conv_transpose(x, w, stride)), twice(reference), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-3)


def test_transposed_convolution_equals_pytorch():
    from torch_reference import require_torch

    torch = require_torch()
    generator = np.random.default_rng(0)
    x, w = generator.normal(size=(2, 5, 5, 3)).astype("f"), generator.normal(size=(4, 4, 3, 2)).astype("f")
    theirs = torch.nn.functional.conv_transpose2d(
        torch.tensor(x.transpose(0, 3, 1, 2)), torch.tensor(w.transpose(2, 3, 0, 1)), stride=2, padding=1
    )
    np.testing.assert_allclose(subject.conv_transpose(x, w, 2), theirs.numpy().transpose(0, 2, 3, 1), rtol=1e-4, atol=1e-5)

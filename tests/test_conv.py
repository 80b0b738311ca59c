"""Fast convolutions of CPUs, and all their gradients, equal XLA's for the strides and paddings of the models."""

import functools
import math
import pathlib
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from ssl_jax.errors import UserError
from ssl_jax.models import conv as subject
from ssl_jax.models import onednn
from ssl_jax.models.portable import portable
from ssl_jax.rehearsal import flops

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


@pytest.fixture(params=["xla", "onednn"])
def backend(request, monkeypatch):
    """Who computes convolutions; every shape is allowed to oneDNN, however slow."""
    if request.param == "onednn":
        library = onednn.load()
        if isinstance(library, str):
            pytest.skip(library)
        monkeypatch.setattr(subject, "_unfolding_is_faster", lambda *_: False)
    monkeypatch.setattr(subject, "_backend", request.param)
    return request.param


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
def test_value_and_gradients_equal_lax(case, chunk_bytes, backend, monkeypatch):
    if backend == "onednn" and chunk_bytes > 1:
        pytest.skip("oneDNN unfolds nothing")
    monkeypatch.setattr(subject, "CHUNK_BYTES", chunk_bytes)
    batch, side, channels, *fields = case
    fast, plain = layers(*fields)
    x = jax.random.normal(jax.random.key(0), (batch, side, side, channels))
    params = plain.init(jax.random.key(1), x)
    cotangent = jax.random.normal(jax.random.key(2), plain.apply(params, x).shape)
    assert {"xla": "scan", "onednn": onednn.TARGET}[backend] in jaxpr_of_gradient(fast, params, x)
    expected = gradients(plain, params, x, cotangent)
    for got, want in zip(gradients(fast, params, x, cotangent), expected, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5 * float(jnp.abs(want).max()))


@pytest.mark.full
def test_second_order_and_bfloat16_gradients_equal_lax(backend):
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
    with portable():  # an exported program runs where there is no oneDNN
        assert "stablehlo.dot_general" in text(fast, "cpu")
        assert onednn.TARGET not in text(fast, "cpu")


@pytest.mark.full
@pytest.mark.parametrize(("kernel", "stride"), [(4, 2), (5, 2), (3, 2), (2, 2), (6, 3), (3, 1)])
def test_transposed_convolution_equals_gradient_of_convolution(kernel, stride, backend):
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


@pytest.mark.parametrize(("stride", "padding"), [(1, 1), (2, "VALID")])
@pytest.mark.parametrize("backend", ["onednn"], indirect=True)  # without it gradients of strided ones multiply zeros, which count
def test_flops_of_a_convolution_and_its_gradients_are_counted(stride, padding, backend):
    layer = layers(8, 3, stride, padding)[0]
    x = jnp.zeros((6, 9, 9, 4))
    params = layer.init(jax.random.key(0), x)
    loss = lambda params, x: jnp.sum(layer.apply(params, x) ** 2)  # noqa: E731
    out = layer.apply(params, x).shape
    found = flops.count(jax.make_jaxpr(jax.grad(loss, (0, 1)))(params, x)).flops
    assert found == pytest.approx(3 * 2 * math.prod(out) * 9 * 4, rel=0.1)


@pytest.mark.parametrize("shape", [(64, 96), (3, 5, 96), (2, 96)])
def test_dense_layer_and_its_gradients_equal_lax(shape, backend, monkeypatch):
    monkeypatch.setattr(subject, "SMALLEST_PRODUCT", 0)
    monkeypatch.setattr(subject, "SMALLEST_ROWS", 1)
    x, w = (jax.random.normal(jax.random.key(i), size) for i, size in enumerate((shape, (96, 32))))
    axes = (((len(shape) - 1,), (0,)), ((), ()))

    def twice(product):
        loss = lambda x, w: jnp.sum(jnp.sin(product(x, w, axes)))  # noqa: E731
        first = jax.jit(jax.grad(loss, (0, 1)))
        return (jax.jit(product, static_argnums=2)(x, w, axes), *first(x, w), jax.grad(lambda w: jnp.sum(first(x, w)[0] ** 2))(w))

    for ours, theirs in zip(twice(subject.dense), twice(jax.lax.dot_general), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * float(jnp.abs(theirs).max()))


def test_batched_by_vmap_equals_a_loop(backend):
    x, w = jax.random.normal(jax.random.key(0), (3, 2, 6, 6, 3)), jax.random.normal(jax.random.key(1), (3, 3, 3, 4))
    run = functools.partial(layers(4, 3, 1, 1)[0].apply, {"params": {"kernel": w}})
    np.testing.assert_allclose(jax.vmap(run)(x), jnp.stack([run(each) for each in x]), rtol=1e-5, atol=1e-5)


def test_failure_inside_onednn_is_an_exception_that_names_it(backend, monkeypatch):
    if backend == "xla":
        pytest.skip("of oneDNN")

    def fail(*_):
        raise RuntimeError("oneDNN: primitive_execute failed with status 1")

    monkeypatch.setattr(onednn.Convolution, "__call__", fail)
    w = jnp.ones((3, 3, 3, 4))
    with pytest.raises(jax.errors.JaxRuntimeError, match="primitive_execute failed with status 1"):
        jax.block_until_ready(layers(4, 3, 1, 1)[0].apply({"params": {"kernel": w}}, jnp.ones((1, 5, 5, 3))))


def test_calls_from_several_threads_agree(backend):
    """XLA runs handlers of one program at the same time: two towers of many convolutions."""
    w = jax.random.normal(jax.random.key(1), (3, 3, 8, 8)) / 8
    run = functools.partial(layers(8, 3, 1, 1)[0].apply, {"params": {"kernel": w}})

    @jax.jit
    def towers(x):
        out = [x * (i + 1) for i in range(4)]
        for _ in range(6):
            out = [jnp.tanh(run(each)) for each in out]
        return jnp.stack(out)

    x = jax.random.normal(jax.random.key(0), (2, 16, 16, 8))
    first = towers(x)
    for _ in range(20):
        np.testing.assert_array_equal(towers(x), first)


def test_choice_of_convolutions(monkeypatch):
    monkeypatch.setattr(subject, "_backend", "auto")
    subject.use_convolutions("xla")
    assert not subject._uses_onednn()
    assert subject.convolutions() == "xla"
    with pytest.raises(UserError, match="convolutions='cudnn' is unknown; choose one of auto, xla, onednn"):
        subject.use_convolutions("cudnn")
    monkeypatch.setattr(onednn, "load", lambda: "libdnnl is missing; pip install")
    subject.use_convolutions("auto")
    assert not subject._uses_onednn()
    assert subject.convolutions() == "xla (libdnnl is missing; pip install)"
    with pytest.raises(UserError, match="convolutions='onednn': libdnnl is missing; pip install"):
        subject.use_convolutions("onednn")


def test_what_onednn_cannot_do_is_computed_by_xla(backend, monkeypatch):
    def refuse(*_):
        raise onednn.Unsupported("status 3")

    fast, plain = layers(4, 3, 1, 1)
    x = jax.random.normal(jax.random.key(0), (2, 7, 7, 3))
    params = plain.init(jax.random.key(1), x)
    monkeypatch.setattr(onednn, "Convolution", refuse)
    assert onednn.TARGET not in jaxpr_of_gradient(fast, params, x)
    half = jax.jit(plain.clone(conv_general_dilated=subject.conv, dtype=jnp.float16).apply)(params, x)
    np.testing.assert_allclose(half, plain.apply(params, x), atol=1e-2)


@pytest.mark.full
def test_program_that_ends_while_a_convolution_runs_exits_with_0(backend):
    if backend == "xla":
        pytest.skip("of oneDNN")
    script = """
import jax, jax.numpy as jnp, os
from ssl_jax.models import conv, onednn
run = jax.jit(lambda x, w: conv._convolve(0, x, w, x.shape, (1, 1), ((1, 1), (1, 1)), None))
x = jnp.ones((64, 64, 64, 32))
for _ in range(20):
    x = run(x, jnp.full((3, 3, 32, 32), 1e-3))
print(onednn.load().primitives is not None, os.environ.get("OMP_WAIT_POLICY"))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True None\n", "")


@pytest.mark.full
def test_run_started_with_onednn_goes_on_with_xla(tmp_path):
    """Losses of SimCLR within 1e-5, whoever computes the convolutions of which step."""
    if isinstance(reason := onednn.load(), str):
        pytest.skip(reason)
    from test_conformance import load, losses, steps

    from ssl_jax.engine.checkpoint import Checkpoints
    from ssl_jax.experiment.build import build_experiment

    def build(name):
        overrides = (f"--config.convolutions={name}", "--config.seed=1")  # with seed 0 rounding may move a ReLU over zero
        return build_experiment(load("simclr", "smoke", *overrides), jax.devices()[:1])

    exp = build("xla")
    _, expected = steps(exp, 4, exp.run.init())
    ours = build("onednn")
    state, history = steps(ours, 2, ours.run.init())
    calls = len(onednn.load().primitives)
    assert calls > 0
    saved = Checkpoints(tmp_path / "c")
    saved.save(state, {})
    saved.wait()
    _, rest = steps(build("xla"), 2, saved.restore_latest(exp.run.abstract), start=2)
    saved.close()
    assert len(onednn.load().primitives) == calls
    np.testing.assert_allclose(losses(history + rest), losses(expected), rtol=1e-5, atol=1e-5)
    ours = build("onednn")
    _, with_onednn = steps(ours, 4, ours.run.init())
    np.testing.assert_allclose(losses(with_onednn), losses(expected), rtol=1e-5, atol=1e-5)


DROPPED = """
import jax, jax.numpy as jnp
from launch import run
from ssl_jax.models.common import Conv
from ssl_jax.models.conv import use_convolutions

def drop_a_running_program(argv):
    use_convolutions("onednn")
    layer, x = Conv(64, (3, 3)), jnp.ones((64, 32, 32, 64))
    params = layer.init(jax.random.key(0), x)
    program = jax.jit(lambda params, x: sum(layer.apply(params, x + i).sum() for i in range(60)))
    jax.block_until_ready(program(params, x))
    program(params, x)
    return 3

run(drop_a_running_program, [])
"""


@pytest.mark.full
def test_a_program_whose_results_were_dropped_does_not_keep_a_verb_from_ending():
    """Python's own end would crash here, or wait for ever: kernels of the running program are Python functions."""
    if isinstance(library := onednn.load(), str):
        pytest.skip(library)
    ended = subprocess.run([sys.executable, "-c", DROPPED], cwd=pathlib.Path(__file__).parents[1], timeout=120)
    assert ended.returncode == 3

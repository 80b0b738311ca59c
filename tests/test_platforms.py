"""Platform-dependent choices: the attention kernel and compiler options. On CPUs the tests check the choice, not the kernel."""

import importlib.util
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax.engine.xla_options import SETS, xla_options
from ssl_jax.errors import UserError
from ssl_jax.models.common import attention, even_lengths
from ssl_jax.models.portable import portable


@pytest.mark.parametrize("causal", [False, True])
def test_attention_equals_softmax_in_numpy(causal):
    q, k, v = np.random.default_rng(0).normal(size=(3, 2, 5, 3, 4))
    out = np.zeros((2, 5, 3, 4))
    for b, n, h in np.ndindex(2, 5, 3):
        seen = n + 1 if causal else 5
        logits = k[b, :seen, h] @ q[b, n, h] / 2  # sqrt of 4
        weights = np.exp(logits - logits.max())
        out[b, n, h] = weights @ v[b, :seen, h] / weights.sum()
    np.testing.assert_allclose(attention(*map(jnp.float32, (q, k, v)), causal), out, atol=1e-5)


@pytest.mark.parametrize(
    ("backend", "dtype", "width", "length", "chosen"),
    [
        ("gpu", jnp.bfloat16, 64, 196, "cudnn"),
        ("gpu", jnp.float16, 128, 2, "cudnn"),
        ("gpu", jnp.bfloat16, 64, 197, "cudnn"),  # a class token
        ("gpu", jnp.float32, 64, 2, "xla"),
        ("gpu", jnp.bfloat16, 12, 2, "xla"),
        ("gpu", jnp.bfloat16, 512, 2, "xla"),  # the one head of a VQGAN
        ("tpu", jnp.bfloat16, 64, 2, "xla"),
        ("cpu", jnp.bfloat16, 64, 2, "xla"),
    ],
)
def test_cudnn_attention_is_used_where_supported(monkeypatch, backend, dtype, width, length, chosen):
    asked = []
    monkeypatch.setattr(jax, "default_backend", lambda: backend)

    def attend(query, *_, implementation, **__):
        asked.append(implementation)
        return query

    monkeypatch.setattr(jax.nn, "dot_product_attention", attend)
    attention(*[jnp.zeros((1, length, 1, width), dtype)] * 3)
    with portable():  # as exports are traced
        attention(*[jnp.zeros((1, length, 1, width), dtype)] * 3)
    assert asked == [chosen, "xla"]


@pytest.mark.full
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("n", "m"), [(5, 5), (4, 7), (6, 6)])
def test_padding_odd_lengths_for_cudnn_does_not_change_attention(n, m, causal):
    """Values and gradients, with XLA's attention instead of cuDNN's."""
    q, k, v = (jax.random.normal(jax.random.key(i), (2, length, 3, 8)) for i, length in enumerate((n, m, m)))
    shapes = []

    def attend(query, key, value, **lengths):
        shapes.append((query.shape[1], key.shape[1], value.shape[1], bool(lengths)))
        return jax.nn.dot_product_attention(query, key, value, is_causal=causal, implementation="xla", **lengths)

    def value_and_gradients(attend):
        return jax.value_and_grad(lambda *x: jnp.sum(jnp.sin(attend(*x))), argnums=(0, 1, 2))(q, k, v)

    padded = value_and_gradients(lambda *x: even_lengths(attend, *x))
    assert shapes == [(n + n % 2, m + m % 2, m + m % 2, bool(n % 2 or m % 2))]
    plain = value_and_gradients(lambda *x: attention(*x, causal))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), padded, plain)


def test_unknown_xla_option_set_is_a_one_line_error():
    with pytest.raises(UserError, match=r"config.xla='fast' is unknown; choose one of default, overlap"):
        xla_options("fast", "tpu")
    assert xla_options("overlap", "cpu") == {}


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu: pip install -r requirements-rehearse.txt")
def test_tpu_compiler_accepts_all_xla_options():
    """It refuses unknown options."""
    text = f"""
from ssl_jax.rehearsal.topology import open_topology
devices = open_topology("v5e:2x2").devices
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
mesh = jax.sharding.Mesh(devices, ("data",))
x = jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("data")))
for options in {[SETS[name].get("tpu", {}) for name in SETS]}:
    jax.jit(lambda x: x @ x, compiler_options=options).lower(x).compile()
try:
    jax.jit(lambda x: x @ x, compiler_options={{"xla_tpu_no_such_option": True}}).lower(x).compile()
except jax.errors.JaxRuntimeError as error:
    print("refused:", error)
"""
    environment = {**os.environ, "XLA_FLAGS": ""}
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "refused:" in done.stdout and "no_such_option" in done.stdout

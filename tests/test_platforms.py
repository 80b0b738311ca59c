"""What differs from platform to platform: the kernel of attention, the options of the compiler. A CPU can only show the choice."""

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
from ssl_jax.models.common import attention, portable


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_a_softmax_of_products(causal):
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
        ("gpu", jnp.bfloat16, 64, 197, "xla"),  # a class token; cuDNN has no gradient of odd lengths
        ("gpu", jnp.float32, 64, 2, "xla"),
        ("gpu", jnp.bfloat16, 12, 2, "xla"),
        ("gpu", jnp.bfloat16, 512, 2, "xla"),  # the one head of a VQGAN
        ("tpu", jnp.bfloat16, 64, 2, "xla"),
        ("cpu", jnp.bfloat16, 64, 2, "xla"),
    ],
)
def test_cudnn_where_it_has_type_width_and_length(monkeypatch, backend, dtype, width, length, chosen):
    asked = []
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *_, implementation, **__: asked.append(implementation))
    attention(*[jnp.zeros((1, length, 1, width), dtype)] * 3)
    with portable():  # as exports are traced
        attention(*[jnp.zeros((1, length, 1, width), dtype)] * 3)
    assert asked == [chosen, "xla"]


def test_an_unknown_set_is_one_line():
    with pytest.raises(UserError, match=r"config.xla='fast' is unknown; choose of default, overlap"):
        xla_options("fast", "tpu")
    assert xla_options("overlap", "cpu") == {}


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu: pip install -r requirements-rehearse.txt")
def test_the_compiler_of_tpus_knows_every_option():
    """It refuses unknown ones."""
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
except Exception as error:
    print("refused:", error)
"""
    environment = {**os.environ, "XLA_FLAGS": ""}
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "refused:" in done.stdout and "no_such_option" in done.stdout

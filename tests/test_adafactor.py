"""Adafactor against a NumPy reference in float64; shapes and shardings of its state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ssl_jax.engine import optim, sharding
from ssl_jax.engine.method import State

RNG = np.random.default_rng(0)
WEIGHTS = {"blocks": {"kernel": RNG.normal(size=(3, 8, 16)), "bias": RNG.normal(size=(3, 16))}}
GRADIENTS = [jax.tree.map(lambda x: RNG.normal(size=x.shape) * 10.0**RNG.integers(-3, 3, x.shape), WEIGHTS) for _ in range(3)]
SPEC = dict(name="adafactor", lr=0.1, schedule="constant", weight_decay=0.05, factored_from=8)


def in_float32(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def updated(spec, steps):
    params = in_float32(WEIGHTS)
    optimizer, _ = optim.make_optimizer("net", spec, params, 10, 1, 10)
    state = optimizer.init(params)
    for step, gradient in enumerate(GRADIENTS[:steps]):
        updates, state = optimizer.update(in_float32(gradient), state, params, step=step)
        params = optax.apply_updates(params, updates)
    return params, state


def reference(b1, steps):
    """Each matrix of a stack has its own row and column moments; the updates of the stack are clipped together."""
    params = jax.tree.map(np.copy, WEIGHTS)
    rows, columns, plain, first = np.zeros((3, 8)), np.zeros((3, 16)), np.zeros((3, 16)), [np.zeros((3, 8, 16)), np.zeros((3, 16))]
    for t, gradient in enumerate(GRADIENTS[:steps], 1):
        g, b, decay = gradient["blocks"]["kernel"], gradient["blocks"]["bias"], 1 - t**-0.8
        rows = decay * rows + (1 - decay) * (g**2).mean(2)
        columns = decay * columns + (1 - decay) * (g**2).mean(1)
        plain = decay * plain + (1 - decay) * b**2
        second = rows[:, :, None] * columns[:, None, :] / rows.mean(1)[:, None, None]
        for i, (name, u) in enumerate((("kernel", g / np.sqrt(second)), ("bias", b / np.sqrt(plain)))):
            u = u / max(1, np.sqrt((u**2).mean()))
            first[i] = b1 * first[i] + (1 - b1) * u
            w = params["blocks"][name]
            params["blocks"][name] = w - 0.1 * (first[i] + 0.05 * (name == "kernel") * w)
    return params


def test_adafactor_updates_equal_the_reference():
    for b1, tolerance in ((0.0, 1e-5), (0.9, 2e-3)):  # the first moment is kept in bfloat16
        ours, _ = updated({**SPEC, "b1": b1}, 3)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(reference(b1, 3)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=tolerance)


def test_adafactor_state_is_factored_and_sharded_like_parameters():
    params, state = updated(SPEC, 1)
    kernel = [x for path, x in jax.tree.leaves_with_path(state) if "kernel" in jax.tree_util.keystr(path)]
    assert sorted((x.shape, str(x.dtype)) for x in kernel) == [
        ((1,), "float32"), ((3, 8), "float32"), ((3, 8, 16), "bfloat16"), ((3, 16), "float32"),
    ]  # fmt: skip
    params = {"net": {"blocks": {"kernel": jnp.zeros((2, 1024, 256))}}}
    optimizer, _ = optim.make_optimizer("net", SPEC, params["net"], 10, 1, 10)
    mesh = sharding.make_mesh(dict(data=4, fsdp=2))
    state = State(jnp.int32(0), params, {"net": optimizer.init(params["net"])}, {}, {})
    placed = sharding.shard_state(((".*", "fsdp"),), jax.eval_shape(lambda: state), mesh).opt["net"]
    where = {x.shape: s.spec for x, s in zip(jax.tree.leaves(state.opt["net"]), jax.tree.leaves(placed), strict=True)}
    assert where[2, 1024, 256] == sharding.P(None, "fsdp", None)
    assert where[2, 1024] == sharding.P(None, "fsdp")
    mesh = sharding.make_mesh(dict(data=1, fsdp=4, tensor=2))
    placed = sharding.shard_state(((".*", ("fsdp", "tensor")),), jax.eval_shape(lambda: state), mesh).opt["net"]
    where = {x.shape: s.spec for x, s in zip(jax.tree.leaves(state.opt["net"]), jax.tree.leaves(placed), strict=True)}
    assert where[2, 1024, 256] == sharding.P(None, "fsdp", "tensor")
    assert where[2, 1024] == sharding.P(None, "fsdp") and where[1,] == sharding.P()  # the rule's axes only fit the parameter

"""Facts of DINO: head, schedules, centering, the frozen start, per-array clipping, and decay that rises."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_siamese import begin, load, loss_of

from ssl_jax.engine import optim
from ssl_jax.engine.method import encoder_weights
from ssl_jax.models.heads import PrototypeHead


@pytest.mark.parametrize(("width", "expected"), [(384, 22_352_128), (768, 23_138_560), (2048, 25_760_000)])
def test_parameters_of_the_published_head(width, expected):
    """The published counts have a length of each prototype, also where it is fixed at 1."""
    variables = jax.eval_shape(lambda: PrototypeHead(last_scale=True).init(jax.random.key(0), jnp.zeros((2, width)), train=True))
    assert sum(x.size for x in jax.tree.leaves(variables)) == expected
    fixed = jax.eval_shape(lambda: PrototypeHead().init(jax.random.key(0), jnp.zeros((2, width)), train=True))
    assert sum(x.size for x in jax.tree.leaves(fixed)) == expected - 65536


def test_logits_of_the_head_are_cosines():
    head = PrototypeHead(widths=(8,), bottleneck=4, prototypes=5)
    x = jax.random.normal(jax.random.key(0), (6, 3))
    variables = head.init(jax.random.key(1), x, train=True)
    *_, z, logits = head.apply(variables, x, train=True)
    p = np.asarray(variables["params"]["prototypes"])
    expected = (z / np.linalg.norm(z, axis=1, keepdims=True)) @ (p / np.linalg.norm(p, axis=1, keepdims=True)).T
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.full
def test_center_follows_the_teacher_and_prototypes_start_frozen():
    method, state = begin("dino.py:smoke")
    run = jax.jit(lambda state: loss_of(method, state))
    _, (update, logs) = run(state)
    assert np.abs(update["center"]).max() > 0 and logs["teacher_entropy"] <= np.log(24) + 1e-5
    shifted = state._replace(mutable={**state.mutable, "center": jnp.full(24, 2.0)})
    np.testing.assert_allclose(run(shifted)[1][0]["center"], 0.9 * 2 + update["center"], rtol=1e-5)  # .9 c + .1 of the same mean
    grads = jax.jit(jax.grad(lambda params, step: loss_of(method, state._replace(params=params, step=step))[0]))
    frozen, free = (grads(state.params, jnp.int32(step))["net"]["projector"]["prototypes"] for step in (1, 2))
    assert not np.any(frozen) and np.any(free)


@pytest.mark.full
def test_features_are_those_of_the_teacher():
    method, state = begin("dino.py:smoke")
    images = np.random.default_rng(1).integers(0, 256, (4, 48, 48, 3), np.uint8)
    before = method.encode(state.params, state.mutable, images)["pooled"]
    zeros = jax.tree.map(jnp.zeros_like, state.params)
    np.testing.assert_array_equal(method.encode(zeros, state.mutable, images)["pooled"], before)
    assert encoder_weights(method, state.params, state.mutable) is state.mutable["teacher"]["net"]["encoder"]


@pytest.mark.full
def test_paths_of_the_student_are_dropped_and_those_of_the_teacher_are_not():
    method, state = begin("dino.py:smoke_crops", "--config.model.encoder.drop_path=0.9")
    _, (first, _) = loss_of(method, state)
    other = method.phases[0].loss(state.params, state, {"image": np.zeros((32, 48, 48, 3), np.uint8)}, jax.random.key(1))
    assert np.isfinite(other[0]) and set(first) == {"batch_stats", "teacher", "center"}


def optimizer(**options):
    spec = dict(name="sgd", lr=1.0, momentum=0.0, schedule="constant", weight_decay_mask=((".*", 1.0),), **options)
    return optim.make_optimizer("net", spec, {"a": jnp.zeros(2), "b": jnp.zeros(2)}, total=1000, batch_size=8, examples=64)[0]


def updates_of(transformation, grads, params, step=0):
    return transformation.update(grads, transformation.init(params), params, step=jnp.int32(step))[0]


def test_each_array_is_clipped_by_itself():
    grads = {"a": jnp.array([30.0, 40.0]), "b": jnp.array([0.3, 0.4])}
    found = updates_of(optimizer(clip_tensor_norm=3.0), grads, jax.tree.map(jnp.zeros_like, grads))
    np.testing.assert_allclose(found["a"], [-1.8, -2.4], rtol=1e-4)
    np.testing.assert_allclose(found["b"], [-0.3, -0.4], rtol=1e-6)
    together = updates_of(optimizer(clip_norm=3.0), grads, jax.tree.map(jnp.zeros_like, grads))
    assert optax.global_norm(together) == pytest.approx(3, rel=1e-4)


def test_weight_decay_rises_as_published():
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    rising = optimizer(weight_decay=0.04, weight_decay_end=0.4)
    found = [-float(updates_of(rising, zeros, params, step)["a"][0]) for step in (0, 500, 999)]
    np.testing.assert_allclose(found, (0.04, 0.22, 0.3999991), rtol=1e-6)
    assert -float(updates_of(optimizer(weight_decay=0.1), zeros, params, 700)["a"][0]) == pytest.approx(0.1)


def test_published_config_has_ten_small_crops():
    assert {name: len(views) for name, views in load("dino.py:imagenet_vit_s", size=256).views.items()} == {"large": 2, "small": 10}

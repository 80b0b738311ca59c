"""Facts of the methods that share `engine.siamese`: heads, teachers, queues, BatchNorm in groups, and what gets a gradient."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax.engine.method import State
from ssl_jax.engine.siamese import enqueue, follow, momentum_schedule
from ssl_jax.errors import UserError
from ssl_jax.experiment import config as configs
from ssl_jax.methods import build_method, moco

ROOT = __file__.rsplit("/", 2)[0]
IMAGES = np.random.default_rng(0).integers(0, 256, (32, 48, 48, 3), np.uint8)


def load(name, *overrides, size=48):
    config = configs.load(f"{ROOT}/configs/{name}", overrides)
    with config.unlocked():
        config.data.image_shape, config.data.num_classes, config.data.examples, config.dtype = (size, size, 3), 10, 512, "float32"
    return config


def begin(name, *overrides):
    method = build_method(load(name, *overrides))
    params, mutable = jax.jit(method.init)(jax.random.key(0), {"image": IMAGES}, {})
    return method, State(jnp.zeros((), jnp.int32), params, {}, mutable, {})


def loss_of(method, state, images=IMAGES):
    return method.phases[0].loss(state.params, state, {"image": images}, jax.random.key(1))


# ---- parameter counts of the published heads


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "projector", "predictor"),
    [
        ("byol.py:imagenet", 9_449_472, 2_109_440),
        ("simsiam.py:imagenet", 12_591_104, 2_100_224),
        ("barlow_twins.py:imagenet", 151_027_712, None),
        ("vicreg.py:imagenet", 151_044_096, None),
        ("moco.py:imagenet", 4_458_624, None),
        ("moco.py:imagenet_v3", 9_445_376, 2_105_344),
        ("moco.py:imagenet_v3_vit_s", 19_415_040, None),
    ],
)
def test_parameters_of_published_heads(name, projector, predictor):
    short = ("--config.model.queue=64",) if name == "moco.py:imagenet" else ()
    config = load(name, "--config.batch_size=16", *short, size=224)
    with config.unlocked():
        config.data.image_shape = (2, 224, 224, 3)
    method = build_method(config)
    params, _ = jax.eval_shape(method.init, jax.random.key(0), {"image": jax.ShapeDtypeStruct((16, 2, 224, 224, 3), np.uint8)}, {})
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))  # noqa: E731
    assert count(params["net"]["projector"]) == projector
    assert predictor is None or count(params["predictor"]) == predictor


# ---- teachers


def test_momentum_rises_as_published():
    config = load("byol.py:smoke", "--config.model.momentum=0.996")
    with config.unlocked():
        config.total = "1000 steps"
    momentum = momentum_schedule(config)
    values = [float(momentum(step)) for step in (0, 250, 500, 750, 1000)]
    np.testing.assert_allclose(values, (0.996, 0.9965858, 0.998, 0.9994142, 1.0), atol=1e-6)
    with config.unlocked():
        config.model.momentum, config.total = 0.99, "300 steps"
    values = [float(momentum_schedule(config)(step)) for step in (0, 75, 150, 225, 300)]
    np.testing.assert_allclose(values, (0.99, 0.991464, 0.995, 0.998536, 1.0), atol=1e-6)


def teacher_after(momentum, steps=1):
    student, teacher = {"w": jnp.full(3, 2.0)}, {"net": {"w": jnp.full(3, 7.0)}, "batch_stats": {"m": jnp.ones(2)}}
    state = State(jnp.int32(0), {"net": student}, {}, {"teacher": teacher, "other": jnp.zeros(1)}, {})
    for step in range(steps):
        state = state._replace(step=jnp.int32(step), mutable=follow(lambda _: jnp.float32(momentum))(state))
    return state.mutable


def test_teacher_keeps_copies_and_approaches():
    assert (teacher_after(1.0)["teacher"]["net"]["w"] == 7).all()
    assert (teacher_after(0.0)["teacher"]["net"]["w"] == 2).all()
    np.testing.assert_allclose(teacher_after(0.999, 50)["teacher"]["net"]["w"] - 2, 5 * 0.999**50, rtol=1e-5)
    assert (teacher_after(0.5)["teacher"]["batch_stats"]["m"] == 1).all() and "other" in teacher_after(0.5)


@pytest.mark.full
@pytest.mark.parametrize("name", ["byol.py:smoke", "moco.py:smoke", "moco.py:smoke_v3"])
def test_teacher_has_no_gradient_and_own_statistics(name):
    method, state = begin(name)

    def of_teacher(net):
        mutable = {**state.mutable, "teacher": {**state.mutable["teacher"], "net": net}}
        return loss_of(method, state._replace(mutable=mutable))[0]

    assert not any(np.any(x) for x in jax.tree.leaves(jax.jit(jax.grad(of_teacher))(state.mutable["teacher"]["net"])))
    _, (update, _) = jax.jit(lambda state: loss_of(method, state))(state)
    same = {
        part: all(map(np.array_equal, jax.tree.leaves(state.mutable["teacher"][part]), jax.tree.leaves(update["teacher"][part])))
        for part in ("net", "batch_stats")
    }
    assert same == {"net": True, "batch_stats": False}


@pytest.mark.full
def test_byol_is_between_0_and_8_and_blind_to_the_length_of_predictions():
    method, state = begin("byol.py:smoke")
    value = jax.jit(lambda state: loss_of(method, state)[0])
    assert 0 <= value(state) <= 8
    last = state.params["predictor"]["linear2"]
    longer = {**state.params, "predictor": {**state.params["predictor"], "linear2": {"kernel": 3 * last["kernel"]}}}
    np.testing.assert_allclose(value(state._replace(params=longer)), value(state), rtol=1e-5)


@pytest.mark.full
def test_targets_of_simsiam_have_no_gradient_unless_asked_for():
    """With the predictor frozen at the identity only the stop of the gradient makes a difference."""
    found = {}
    for stop in (True, False):
        method, state = begin("simsiam.py:smoke", f"--config.model.stop_gradient={stop}")
        grads = jax.jit(jax.grad(lambda params, m=method, s=state: loss_of(m, s._replace(params=params))[0]))(state.params)
        found[stop] = grads["net"]["projector"]["linear3"]["kernel"]
    assert np.abs(found[True] - found[False]).max() > 1e-6


# ---- MoCo


def test_queue_holds_the_last_keys_in_order():
    queue = {"rows": jnp.zeros((6, 1)), "next": jnp.int32(0)}
    for step in range(5):
        queue = enqueue(queue, jnp.array([[2.0 * step], [2.0 * step + 1]]))
    assert queue["rows"].ravel().tolist() == [6, 7, 8, 9, 4, 5] and queue["next"] == 4


@pytest.mark.full
def test_queue_has_no_gradient_and_gets_the_keys_behind_the_loss():
    method, state = begin("moco.py:smoke")

    def value(queue):
        return loss_of(method, state._replace(mutable={**state.mutable, "queue": {**state.mutable["queue"], "rows": queue}}))

    keys = state.mutable["queue"]["rows"]
    grads, (update, _) = jax.jit(jax.grad(value, has_aux=True))(keys)
    assert not np.any(grads)
    assert np.array_equal(update["queue"]["rows"][32:], keys[32:]) and not np.any(update["queue"]["rows"][:32] == keys[:32])
    np.testing.assert_allclose(np.linalg.norm(update["queue"]["rows"], axis=1), 1, rtol=1e-5)
    assert update["queue"]["next"] == 32


def test_groups_are_normalized_separately():
    def embed(net, stats, views, train):
        mean = views.mean((0, 1))
        return views - mean, 2 * views, {"mean": mean}

    x = jnp.arange(8.0).reshape(8, 1, 1)
    z, h, stats = moco.in_groups(embed, 2)(None, None, x)
    assert h.ravel().tolist() == (2 * np.arange(8)).tolist()
    assert z.ravel().tolist() == [-1.5, -0.5, 0.5, 1.5] * 2 and stats["mean"] == 3.5
    z, _, _ = moco.in_groups(embed, 1)(None, None, x)
    assert z.ravel().tolist() == (np.arange(8) - 3.5).tolist()


@pytest.mark.full
def test_shuffled_keys_return_to_their_images():
    """Without BatchNorm groups do nothing, so the loss is that of one group."""
    values = []
    for groups in (1, 4):
        overrides = (f"--config.model.groups={groups}", "--config.model.projector.batch_norm=False")
        config = load("moco.py:smoke", *overrides)
        with config.unlocked():
            config.model.encoder = dict(name="resnet_v2", depth=10, width=0.125, stem="stride2", norm="layer")
        method = build_method(config)
        params, mutable = jax.jit(method.init)(jax.random.key(0), {"image": IMAGES}, {})
        values.append(jax.jit(lambda s, m=method: loss_of(m, s)[0])(State(jnp.int32(0), params, {}, mutable, {})))
    np.testing.assert_allclose(*values, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("moco.py:smoke", ["--config.model.queue=40"], "queue=40 is no multiple of the 32 keys of a step"),
        ("moco.py:smoke", ["--config.model.groups=3"], "groups=3 do not divide config.batch_size=32"),
        ("moco.py:smoke", ["--config.model.groups=32"], "groups=32 do not divide"),
        ("byol.py:smoke", ["--config.batch_size=1"], "byol compares the images of a batch; give 2 or more"),
        ("vicreg.py:smoke", ["--config.views=((),)"], "config.method='vicreg' compares two views of an image, and config.views has 1"),
        ("byol.py:smoke", ["--config.model.momentum_schedule=sine"], "momentum_schedule='sine' is unknown; choose cosine, linear"),
    ],
)
def test_bad_configs_are_one_line(name, overrides, message):
    with pytest.raises(UserError, match=message):
        build_method(load(name, *overrides))


def test_loss_of_collapsed_keys_of_version_3():
    """2 x 2 tau ln N, as the official code has it."""
    from ssl_jax.objectives.contrastive import info_nce

    same = jnp.ones((16, 4))
    assert 2 * 1.0 * 2 * info_nce(same, same, 1.0)[0] == pytest.approx(4 * math.log(16))

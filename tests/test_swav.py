"""Facts of SwAV: prototypes, their frozen start, the queue of embeddings, crops of several sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_siamese import IMAGES, begin, load, loss_of

from ssl_jax.errors import UserError
from ssl_jax.methods import build_method


@pytest.mark.full
def test_parameters_of_the_published_head_and_prototypes():
    config = load("swav.py:imagenet", "--config.batch_size=16", size=256)
    method = build_method(config)
    params, _ = jax.eval_shape(method.init, jax.random.key(0), {"image": jax.ShapeDtypeStruct((16, 256, 256, 3), np.uint8)}, {})
    assert sum(x.size for x in jax.tree.leaves(params["net"]["projector"])) == 4_462_720
    assert params["net"]["prototypes"].shape == (3000, 128)


def at(state, step):
    return state._replace(step=jnp.int32(step))


@pytest.mark.full
def test_prototypes_start_frozen_and_the_queue_takes_part_when_it_is_full():
    """They are frozen for two steps. The queue holds two batches and begins after two more steps."""
    method, state = begin("swav.py:smoke")
    run = jax.jit(jax.value_and_grad(lambda params, state: loss_of(method, state._replace(params=params))[0]))
    grads = {step: run(state.params, at(state, step)) for step in (1, 2, 4)}
    assert not np.any(grads[1][1]["net"]["prototypes"]) and np.any(grads[2][1]["net"]["prototypes"])
    assert grads[1][0] == grads[2][0]
    rows = state.mutable["queue"]["rows"]
    filled = {**state.mutable["queue"], "rows": jax.random.normal(jax.random.key(3), rows.shape)}
    state = state._replace(mutable={**state.mutable, "queue": filled})
    values = [float(run(state.params, at(state, step))[0]) for step in (3, 4)]
    assert values[0] == grads[2][0] and abs(values[1] - values[0]) > 1e-6


@pytest.mark.full
def test_embeddings_of_the_large_crops_enter_the_queue():
    method, state = begin("swav.py:smoke_crops")
    _, (update, logs) = jax.jit(lambda state: loss_of(method, state))(state)
    assert update["queue"]["rows"].shape == (64, 2, 32) and update["queue"]["next"] == 32
    np.testing.assert_allclose(np.linalg.norm(update["queue"]["rows"][:32], axis=-1), 1, rtol=1e-4)
    assert 0 < logs["code_entropy"] <= np.log(16)


def test_views_of_two_sizes_are_embedded_in_order():
    method = build_method(load("swav.py:smoke_crops"))
    views = jax.eval_shape(method.views, jax.ShapeDtypeStruct(IMAGES.shape, np.uint8), jax.random.key(0))
    assert {name: x.shape for name, x in views.items()} == {"large": (32, 2, 32, 32, 3), "small": (32, 2, 16, 16, 3)}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--config.model.queue=40"], "queue=40 is no multiple of config.batch_size=32"),
        (["--config.views=((),)"], "config.method='swav' compares views, and the first group of config.views has 1; give two or more"),
    ],
)
def test_bad_configs_are_one_line(overrides, message):
    with pytest.raises(UserError, match=message):
        build_method(load("swav.py:smoke", *overrides))

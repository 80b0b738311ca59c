"""Optimizers against their papers and PyTorch, and schedules."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ssl_jax.engine import optim
from ssl_jax.errors import UserError

W = np.sin(1 + np.arange(12.0)).reshape(3, 4)
G1, G2 = np.cos(0.5 * np.arange(12.0)).reshape(3, 4), np.sin(0.3 * np.arange(12.0)).reshape(3, 4)
LARS = dict(name="lars", lr=1.0, schedule="step", milestones=(0.5,), factor=0.5, weight_decay=1e-4)


def test_lars_golden():
    """SimCLR's LARS, two steps with rates 1 and 0.5 (golden values of the TF implementation)."""
    params = {"kernel": jnp.asarray(W, jnp.float32)}
    optimizer, rate = optim.make_optimizer("net", LARS, params, total=2, batch_size=1, examples=2)
    assert [float(rate(s)) for s in (0, 1)] == [1.0, 0.5]
    state = optimizer.init(params)
    for step, g in enumerate((G1, G2)):
        updates, state = optimizer.update({"kernel": jnp.asarray(g, jnp.float32)}, state, params, step=step)
        params = optax.apply_updates(params, updates)
    expected = [0.8394911322205066, 0.9073983348440133, 0.13974167101224097, -0.7573706523932895]
    np.testing.assert_allclose(params["kernel"][0], expected, rtol=2e-6)


def test_lars_first_step_moves_weights_by_lr_times_trust_and_leaves_biases_plain():
    params = {"kernel": jnp.asarray(W, jnp.float32), "bias": jnp.ones(3)}
    optimizer, _ = optim.make_optimizer("net", {**LARS, "lr": 0.5}, params, 2, 1, 2)
    grads = {"kernel": 100 * jnp.asarray(G1, jnp.float32), "bias": jnp.full(3, 2.0)}
    updates, _ = optimizer.update(grads, optimizer.init(params), params, step=0)
    ratio = jnp.linalg.norm(updates["kernel"]) / jnp.linalg.norm(params["kernel"])
    assert float(ratio) == pytest.approx(0.5 * 0.001, rel=1e-4)
    np.testing.assert_allclose(updates["bias"], -0.5 * 2.0)  # no decay, no trust ratio


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_optimizers_equal_torch(name):
    from torch_reference import require_torch

    torch = require_torch()
    ours = {"kernel": jnp.asarray(W, jnp.float32)}
    spec = dict(name=name, lr=0.1, schedule="constant", weight_decay=0.01, weight_decay_mask=((".*", 1.0),))
    theirs = torch.nn.Parameter(torch.tensor(W, dtype=torch.float32))
    make = {
        "sgd": lambda: torch.optim.SGD([theirs], 0.1, 0.9, nesterov=True, weight_decay=0.01),
        "adam": lambda: torch.optim.Adam([theirs], 0.1, weight_decay=0.01),
        "adamw": lambda: torch.optim.AdamW([theirs], 0.1, weight_decay=0.01),
    }[name]()
    if name == "sgd":
        spec["nesterov"] = True
    optimizer, _ = optim.make_optimizer("net", spec, ours, 10, 1, 10)
    state = optimizer.init(ours)
    for i in range(5):
        g = G1 if i % 2 else G2
        updates, state = optimizer.update({"kernel": jnp.asarray(g, jnp.float32)}, state, ours, step=i)
        ours = optax.apply_updates(ours, updates)
        theirs.grad = torch.tensor(g, dtype=torch.float32)
        make.step()
    np.testing.assert_allclose(ours["kernel"], theirs.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_simclr_imagenet_schedule():
    """100 epochs of ImageNet at batch 4096 (official README): 4.8 after 3127 steps of warm-up, 2.4 in the middle, 0 at the end."""
    rate = optim.schedule("cosine", 4.8, 31279, 3127)
    for step, value in ((0, 0.0), (1000, 1.53502), (3127, 4.8), (17203, 2.4), (31279, 0.0)):
        assert float(rate(step)) == pytest.approx(value, abs=2e-4)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("linear", {0: 0.0, 10: 2.0, 50: 2.0, 75: 1.1, 100: 0.2, 120: 0.2}),
        ("exponential", {0: 0.0, 5: 1.0, 50: 2.0, 75: 2 * 0.1**0.5, 100: 0.2, 120: 0.2}),
        ("cosine", {0: 0.0, 50: 2.0, 75: 1.1, 100: 0.2}),
    ],
)
def test_schedules_warm_up_hold_and_decay(kind, values):
    rate = optim.schedule(kind, 2.0, 100, 10, end=0.1, hold=0.5)
    for step, value in values.items():
        assert float(rate(step)) == pytest.approx(value, abs=1e-6)


def test_milestones_that_fall_on_one_step_all_count():
    """Two milestones inside the warm-up, and two that round to one step of a short run."""
    rate = optim.schedule("step", 1.0, 100, 30, milestones=(0.1, 0.2, 0.5, 0.501), factor=0.5)
    for step, value in {15: 0.5, 30: 0.25, 49: 0.25, 50: 0.0625, 99: 0.0625}.items():
        assert float(rate(step)) == pytest.approx(value, rel=1e-6)
    with pytest.raises(UserError, match="milestone 30 is no fraction of the run; give numbers from 0 to 1"):
        optim.schedule("step", 1.0, 100, milestones=(30, 60))


def test_learning_rate_follows_the_step_not_the_number_of_updates():
    """With a count of updates, the rate of a discriminator with five updates per step would run ahead."""
    optimizer, _ = optim.make_optimizer("d", dict(name="adam", lr=1.0, schedule="linear"), {"w": jnp.ones(2)}, 10, 1, 10)
    state, seen = optimizer.init({"w": jnp.ones(2)}), []
    for _ in range(5):
        updates, state = optimizer.update({"w": jnp.ones(2)}, state, {"w": jnp.ones(2)}, step=jnp.int32(4))
        seen.append(float(updates["w"][0]))
    np.testing.assert_allclose(seen, -0.6, rtol=1e-5)


def test_lr_multipliers_freeze_and_scale():
    params = {"encoder": {"kernel": jnp.ones(2)}, "head": {"kernel": jnp.ones(2)}}
    spec = dict(name="sgd", lr=1.0, momentum=0.0, schedule="constant", lr_multipliers=(("encoder", 0.0), (".*", 0.5)))
    optimizer, _ = optim.make_optimizer("net", spec, params, 1, 1, 1)
    updates, _ = optimizer.update(params, optimizer.init(params), params, step=0)
    np.testing.assert_array_equal(updates["encoder"]["kernel"], 0)
    np.testing.assert_array_equal(updates["head"]["kernel"], -0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(name="sdg"), "config.optim.net.name='sdg' is unknown"),
        (dict(lr=-0.1), "must be positive"),
        (dict(learning_rate=0.1), "learning_rate is not an option of sgd"),
        (dict(weight_decay_mask=(("kernel$", 1.0),)), "no rule matches parameter 'net/bias'"),
        (dict(weight_decay_mask=(("conv", 1.0), (".*", 1.0))), "rule 'conv' matches no parameter"),
        (dict(weight_decay_mask=(("(", 1.0),)), "not a regular expression"),
        (dict(warmup="99 steps"), "longer than the run"),
        (dict(schedule="cosin"), "unknown schedule"),
        (dict(schedule="exponential"), "give end > 0"),
        (dict(lr_scale="sqr"), "unknown lr_scale"),
        (dict(warmup=1), "config.optim.net.warmup=1 has no unit"),
        (dict(warmup_steps=1), "warmup_steps is not an option of sgd"),
    ],
)
def test_invalid_optimizer_config_is_a_one_line_error(change, message):
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    with pytest.raises(UserError, match=message.replace("(", r"\(")) as caught:
        optim.make_optimizer("net", {**dict(name="sgd", lr=0.1), **change}, params, 10, 1, 10)
    assert "\n" not in str(caught.value)

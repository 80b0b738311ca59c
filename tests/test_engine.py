"""The step, optimizers, shardings and checkpoints on toy methods; real methods are in test_conformance.py."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ssl_jax.engine import loop, optim, sharding
from ssl_jax.engine.checkpoint import Checkpoints, Corrupt, checksums, verify
from ssl_jax.engine.method import Method, Phase, State, every
from ssl_jax.engine.metrics import MetricsWriter, read_metrics
from ssl_jax.engine.step import make_step, split
from ssl_jax.errors import UserError


def game(repeat=1, every=None, couples=False) -> Method:
    """Two groups that pull on each other, a counter that moves, and a phase that may be lazy."""

    def d(train, state, batch, key):
        value = jnp.mean((batch["x"] @ train["d"]["w"] - jax.lax.stop_gradient(state.params["g"]["w"].sum())) ** 2)
        return value, ({"count": state.mutable["count"] + 1}, {"batch": batch["x"].shape[0] * 1.0})

    def g(train, state, batch, key):
        return jnp.mean((batch["x"] * train["g"]["w"] + jax.random.normal(key)) ** 2), ({}, {})

    return Method(
        inputs={"x": (4,)},
        init=lambda key, batch, frozen: (
            {"d": {"w": jnp.ones((4, 1))}, "g": {"w": jnp.ones((4,))}},
            {"count": jnp.zeros(()), "ema": jnp.zeros((4,))},
        ),
        phases=(
            Phase("d", ("d",), d, repeat=repeat),
            Phase("g", ("g",), g, when=None if every is None else lambda step: step % every == 0),
        ),
        encode=lambda params, mutable, images: {"pooled": images},
        after=lambda state: {**state.mutable, "ema": 0.5 * state.mutable["ema"] + 0.5 * state.params["g"]["w"]},
        couples_batch=couples,
    )


SGD = {"d": optax.sgd(0.1), "g": optax.sgd(0.1)}


def start(method, optimizers=SGD) -> State:
    params, mutable = method.init(jax.random.key(0), None, {})
    return State(jnp.int32(0), params, {k: optimizers[k].init(params[k]) for k in params}, mutable, {"fixed": jnp.ones(3)})


BATCH = {"x": jnp.arange(32.0).reshape(8, 4) / 32}


def test_phases_move_only_their_groups_and_lazy_phases_rest():
    method = game(every=2)
    step = jax.jit(make_step(method, SGD))
    zero = start(method)
    one, logs = step(zero, BATCH, jax.random.key(1))
    two, lazy = step(one, BATCH, jax.random.key(1))
    assert not np.allclose(one.params["g"]["w"], zero.params["g"]["w"])  # step 0 is even
    np.testing.assert_array_equal(two.params["g"]["w"], one.params["g"]["w"])  # step 1 is not
    assert np.isnan(lazy["g/loss"])
    assert not np.isnan(logs["g/loss"])
    assert not np.allclose(two.params["d"]["w"], one.params["d"]["w"])
    assert int(two.step) == 2
    assert int(two.mutable["count"]) == 2
    np.testing.assert_allclose(one.mutable["ema"], 0.5 * one.params["g"]["w"])  # after the optimizer, once per step
    np.testing.assert_array_equal(two.frozen["fixed"], zero.frozen["fixed"])


@pytest.mark.parametrize("unroll", [False, True])
def test_repeat_gives_each_sub_step_its_part_of_the_batch(unroll):
    method = game(repeat=4)
    state, logs = jax.jit(make_step(method, SGD, unroll=unroll))(start(method), BATCH, jax.random.key(1))
    assert float(logs["d/batch"]) == 2
    assert int(state.mutable["count"]) == 4
    parts = split(BATCH, 4)["x"]
    assert parts.shape == (4, 2, 4)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts), 0), BATCH["x"])  # every example once


@pytest.mark.parametrize("unroll", [False, True])
def test_accumulation_equals_the_whole_batch_and_is_refused_for_coupled_losses(unroll):
    method = game()
    whole, _ = jax.jit(make_step(method, SGD))(start(method), BATCH, jax.random.key(1))
    parts, _logs = jax.jit(make_step(method, SGD, accumulate=4, unroll=unroll))(start(method), BATCH, jax.random.key(1))
    np.testing.assert_allclose(whole.params["d"]["w"], parts.params["d"]["w"], rtol=1e-5)
    with pytest.raises(UserError, match="accumulate"):
        make_step(game(couples=True), SGD, accumulate=2)


def test_unknown_mutable_is_caught_at_trace_time():
    bad = game()._replace(phases=(Phase("d", ("d", "g"), lambda t, s, b, k: (t["d"]["w"].sum(), ({"coutn": 0.0}, {}))),))
    with pytest.raises(AssertionError, match="coutn"):
        jax.eval_shape(make_step(bad, SGD), start(bad), BATCH, jax.random.key(0))


def test_skip_leaves_everything_as_it_was():
    method = game()
    step = jax.jit(make_step(method, SGD, skip_nonfinite=True))
    zero = start(method)
    one, logs = step(zero, {"x": BATCH["x"].at[0, 0].set(jnp.nan)}, jax.random.key(1))
    assert float(logs["d/skipped"]) == 1
    np.testing.assert_array_equal(one.params["d"]["w"], zero.params["d"]["w"])
    assert int(one.mutable["count"]) == 0
    assert float(step(one, BATCH, jax.random.key(1))[1]["d/skipped"]) == 0


@pytest.mark.parametrize("unroll", [False, True])
def test_a_sub_step_that_is_not_the_last_is_counted_when_it_is_skipped(unroll):
    step = jax.jit(make_step(game(repeat=4), SGD, skip_nonfinite=True, unroll=unroll))
    first = {"x": BATCH["x"].at[0, 0].set(jnp.nan)}
    assert not np.isfinite(split(first, 4)["x"][0]).all()  # the row is of the first part
    state, logs = step(start(game(repeat=4)), first, jax.random.key(1))
    assert (float(logs["d/skipped"]), int(state.mutable["count"])) == (1, 3)


def test_an_interval_is_at_least_one():
    assert [bool(every(3)(step)) for step in range(6)] == [False, False, True] * 2
    with pytest.raises(UserError, match="interval=0; it must be at least 1"):
        every(0)


def test_stop_names_step_phase_and_group():
    method = game()
    with pytest.raises(UserError, match=r"step 7: the loss in phase 'd' \(groups d\) is nan"):
        loop.check_finite(method, 7, {"d/loss": float("nan"), "g/loss": 0.0})
    with pytest.raises(UserError, match="gradient of group 'g' in phase 'g'"):
        loop.check_finite(method, 7, {"d/loss": 0.0, "g/grad_norm/g": float("inf")})


# ---------------------------------------------------------------- optimizers

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
    spec = dict(name=name, lr=0.1, schedule="constant", weight_decay=0.01, decay=((".*", 1.0),))
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


def test_simclr_schedule_checkpoints():
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


def test_the_rate_is_that_of_the_step_however_often_a_group_is_updated():
    """A count of updates would run ahead where a discriminator is updated five times in a step."""
    optimizer, _ = optim.make_optimizer("d", dict(name="adam", lr=1.0, schedule="linear"), {"w": jnp.ones(2)}, 10, 1, 10)
    state, seen = optimizer.init({"w": jnp.ones(2)}), []
    for _ in range(5):
        updates, state = optimizer.update({"w": jnp.ones(2)}, state, {"w": jnp.ones(2)}, step=jnp.int32(4))
        seen.append(float(updates["w"][0]))
    np.testing.assert_allclose(seen, -0.6, rtol=1e-5)


def test_rates_freeze_and_scale():
    params = {"encoder": {"kernel": jnp.ones(2)}, "head": {"kernel": jnp.ones(2)}}
    spec = dict(name="sgd", lr=1.0, momentum=0.0, schedule="constant", rates=(("encoder", 0.0), (".*", 0.5)))
    optimizer, _ = optim.make_optimizer("net", spec, params, 1, 1, 1)
    updates, _ = optimizer.update(params, optimizer.init(params), params, step=0)
    np.testing.assert_array_equal(updates["encoder"]["kernel"], 0)
    np.testing.assert_array_equal(updates["head"]["kernel"], -0.5)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (dict(name="sdg"), "config.optim.net.name='sdg' is unknown"),
        (dict(lr=-0.1), "must be positive"),
        (dict(learning_rate=0.1), "learning_rate is no option of sgd"),
        (dict(decay=(("kernel$", 1.0),)), "no rule matches parameter 'net/bias'"),
        (dict(decay=(("conv", 1.0), (".*", 1.0))), "rule 'conv' matches no parameter"),
        (dict(decay=(("(", 1.0),)), "not a regular expression"),
        (dict(warmup_steps=99), "longer than the run"),
        (dict(schedule="cosin"), "unknown schedule"),
        (dict(schedule="exponential"), "give end > 0"),
        (dict(lr_scale="sqr"), "unknown lr_scale"),
        (dict(warmup_steps=1, warmup_epochs=1), "exactly one of"),
    ],
)
def test_optimizer_mistakes_are_one_line(change, told):
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    with pytest.raises(UserError, match=told.replace("(", r"\(")) as caught:
        optim.make_optimizer("net", {**dict(name="sgd", lr=0.1), **change}, params, 10, 1, 10)
    assert "\n" not in str(caught.value)


def test_intervals_that_divide_a_run_end_with_it():
    """45 epochs of 28.125 steps: three intervals, and none that ends two steps before the run."""
    config = dict(total_epochs=45.0, every_epochs=15.0, tiny_epochs=0.001, third_epochs=1 / 3)
    total, every, tiny = (optim.duration(config, n, 256, 7200, up=n != "total") for n in ("total", "every", "tiny"))
    assert (total, every, tiny) == (1265, 422, 1)
    assert 2 * every < total < 3 * every
    assert optim.duration(config, "third", 1, 9, up=True) == 3  # not 4 for its last binary digit


# ---------------------------------------------------------------- shardings


def test_mesh_and_rules():
    mesh = sharding.make_mesh(dict(data=-1, fsdp=2))
    assert dict(mesh.shape) == {"data": 4, "fsdp": 2, "tensor": 1}
    for spec, told in ((dict(data=3), "make the product"), (dict(data=-1, fsdp=-1), "at most one"), (dict(dta=1), "unknown axis")):
        with pytest.raises(UserError, match=told):
            sharding.make_mesh(spec)
    assert sharding.spec_of("fsdp", (3, 3, 64, 128), mesh, "w") == sharding.P(None, None, None, "fsdp")
    assert sharding.spec_of("fsdp", (7,), mesh, "w") == sharding.P()
    assert sharding.spec_of((None, "data"), (3, 4, 8), mesh, "w") == sharding.P(None, None, "data")
    with pytest.raises(UserError, match="does not divide"):
        sharding.spec_of(("data",), (6,), mesh, "w")
    with pytest.raises(UserError, match="the nearest that does is 64"):
        sharding.check_batch(60, mesh)


def test_optimizer_moments_lie_as_their_parameters():
    mesh = sharding.make_mesh(dict(data=4, fsdp=2))
    params = {"net": {"a": {"kernel": jnp.zeros((64, 64)), "bias": jnp.zeros(64)}}}
    adam = optax.adam(1e-3)
    state = State(jnp.int32(0), params, {"net": adam.init(params["net"])}, {"s": jnp.zeros(4)}, {})
    placed = sharding.shard_state(((".*", "fsdp"),), state, mesh)
    assert placed.params["net"]["a"]["kernel"].spec == sharding.P("fsdp", None)
    assert placed.opt["net"][0].mu["a"]["kernel"].spec == sharding.P("fsdp", None)
    assert placed.opt["net"][0].count.spec == sharding.P()
    with pytest.raises(UserError, match="no rule matches parameter"):
        sharding.shard_state((("kernel", "fsdp"),), state, mesh)


# ---------------------------------------------------------------- checkpoints


def toy(step=0, scale=1.0, mesh=None) -> State:
    tree = {"w": jnp.arange(64.0).reshape(8, 8) * scale, "h": jnp.ones(8, jnp.bfloat16), "n": jnp.arange(3)}
    state = State(jnp.int32(step), {"net": tree}, {"net": optax.adam(1e-3).init(tree)}, {"flag": jnp.array([True, False])}, {})
    if mesh is None:
        return state
    return jax.device_put(state, sharding.shard_state(((".*", "fsdp"),), jax.eval_shape(lambda: state), mesh))


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_checksum_sees_any_bit_and_no_layout():
    mesh = sharding.make_mesh(dict(data=1, fsdp=8))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1024, 4)), jnp.float32)
    spread = jax.device_put(x, sharding.NamedSharding(mesh, sharding.P("fsdp")))
    assert checksums({"x": x}) == checksums({"x": spread})
    raw = np.asarray(x).copy()
    for bit in (0, 1, 9999, raw.nbytes * 8 - 1):
        broken = raw.copy()
        broken.view(np.uint8).reshape(-1)[bit // 8] ^= 1 << (bit % 8)
        with pytest.raises(Corrupt, match="'x'"):
            verify({"x": jnp.asarray(broken)}, checksums({"x": x}))


def test_save_restore_keeps_last_and_best(tmp_path):
    saved = Checkpoints(tmp_path / "c", keep=2, best_metric="knn/top1")
    scores = ({"knn/top1": 10.0}, {"knn/top1": 50.0}, {"knn/top1": 20.0}, {"fewshot/top1": 99.0}, None)
    for step, score in enumerate(scores, 1):
        saved.save(toy(step, scale=step), {"name": "x"}, score)
    saved.wait()
    assert saved.steps() == [2, 4, 5]
    state = saved.restore_latest(toy())
    assert same(state, toy(5, 5))
    assert saved.config(5) == {"name": "x"}
    saved.close()


def test_the_best_one_is_known_to_another_start_and_may_be_measured_then(tmp_path):
    for first, scores in ((1, (50.0, 1.0)), (3, (60.0, 1.0, 2.0)), (6, (None, None)), (8, (1.0, 2.0))):
        saved = Checkpoints(tmp_path / "c", keep=2, best_metric="knn/top1")
        if first == 8:  # SIGTERM came before 7 was measured
            saved.rate(7, {"knn/top1": 99.0})
            assert same(saved.restore_latest(toy()), toy(7))
        for step, score in enumerate(scores, first):
            saved.save(toy(step), {}, score and {"knn/top1": score})
        saved.wait()
        kept = saved.steps()
        saved.close()
        assert kept == {1: [1, 2], 3: [3, 4, 5], 6: [3, 6, 7], 8: [7, 8, 9]}[first]


def test_restore_onto_another_mesh_is_bit_equal(tmp_path):
    many, one = sharding.make_mesh(dict(data=2, fsdp=4)), sharding.make_mesh(dict(data=1), jax.devices()[:1])
    saved = Checkpoints(tmp_path / "c")
    saved.save(toy(1, 3.0, many), {})
    saved.wait()
    back = saved.restore_latest(toy(0, 0.0, one))
    assert same(back, toy(1, 3.0))
    assert back.params["net"]["w"].sharding.mesh.shape["fsdp"] == 1
    saved.close()


def damage(directory, how):
    """Truncate, or flip one bit in, every data file of a checkpoint (which one is read is Orbax's affair)."""
    for path in (p for p in directory.rglob("d/*") if p.is_file()):
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw[: len(raw) // 2] if how == "truncate" else raw)


@pytest.mark.parametrize("how", ["truncate", "flip", "metadata"])
def test_corrupt_newest_falls_back_loudly(tmp_path, caplog, how):
    saved = Checkpoints(tmp_path / "c", keep=3)
    for step in (1, 2):
        saved.save(toy(step, step), {})
    saved.wait()
    if how == "metadata":
        (tmp_path / "c" / "2" / "state" / "_METADATA").write_text("{")
    else:
        damage(tmp_path / "c" / "2" / "state", how)
    saved.close()
    saved = Checkpoints(tmp_path / "c", keep=3)
    state = saved.restore_latest(toy())
    assert same(state, toy(1, 1))
    assert "checkpoint 2 is corrupt" in caplog.text
    assert saved.steps() == [1]
    assert (tmp_path / "c_corrupt").exists()
    damage(tmp_path / "c" / "1" / "state", "truncate")
    with pytest.raises(UserError, match="every checkpoint"):
        saved.restore_latest(toy())
    saved.close()


def test_a_directory_that_is_deleted_is_made_again(tmp_path, caplog):
    """Between two saves, and while one is being written."""
    saved = Checkpoints(tmp_path / "c")
    for step in range(1, 9):
        if step == 3:
            saved.wait()
            shutil.rmtree(tmp_path / "c")
        saved.save(toy(step, step), {})
        if step == 6:
            shutil.rmtree(tmp_path / "c", ignore_errors=True)
    saved.wait()
    assert saved.steps() == [7, 8]
    assert same(saved.restore_latest(toy()), toy(8, 8))
    assert "deleted under this run; it is made again, and step 3 is saved into it" in caplog.text
    saved.close()


def test_checkpoint_of_another_config_is_left_alone(tmp_path):
    saved = Checkpoints(tmp_path / "c")
    saved.save(toy(1), {})
    saved.wait()
    other = toy()
    other.params["net"]["w"] = jnp.zeros((4, 4))
    with pytest.raises(UserError, match=r"of another config: params/net/w has shape \(8, 8\) there and \(4, 4\) here"):
        saved.restore_latest(other)
    other.params["net"]["w"] = jnp.zeros((8, 8), jnp.bfloat16)
    with pytest.raises(UserError, match="params/net/w has dtype float32 there and bfloat16 here"):
        saved.restore_latest(other)
    assert saved.steps() == [1]
    saved.close()


def test_metrics_that_were_measured_later_are_in_the_line_of_their_step(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=False)
    for step in (1, 2):
        writer.write(step, {"loss": 1.0})
    writer.close()
    writer = MetricsWriter(tmp_path, start_step=2, tensorboard=False)
    writer.amend(2, {"knn/top1": 50.0, "bad": float("nan")})
    writer.write(3, {"loss": 2.0})
    writer.amend(4, {"knn/top1": 60.0})
    writer.close()
    later = [{"step": 2, "loss": 1.0, "knn/top1": 50.0}, {"step": 3, "loss": 2.0}, {"step": 4, "knn/top1": 60.0}]
    assert read_metrics(tmp_path)[1:] == later


def test_metrics_are_cut_at_the_resumed_step(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=False)
    for step in range(1, 6):
        writer.write(step, {"loss": step / 3, "bad": float("nan")})
    writer.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    writer = MetricsWriter(tmp_path, start_step=3, tensorboard=False)
    writer.write(4, {"loss": 9.0})
    writer.close()
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[0] == {"step": 1, "loss": 1 / 3}
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["loss"] == 9.0

"""The train step, shardings and checkpoints with toy methods; test_conformance.py has the real ones."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ssl_jax.engine import loop, sharding
from ssl_jax.engine.checkpoint import Checkpoints, Corrupt, checksums, verify
from ssl_jax.engine.method import Method, Phase, Spec, State, every
from ssl_jax.engine.metrics import MetricsWriter
from ssl_jax.engine.records import read_metrics
from ssl_jax.engine.step import make_step, split
from ssl_jax.errors import UserError


def two_phase_method(repeat=1, every=None, couples=False) -> Method:
    """Two parameter groups whose losses depend on each other, a counter in `mutable`, and a second phase that may be lazy."""

    def d(train, state, batch, key):
        value = jnp.mean((batch["x"] @ train["d"]["w"] - jax.lax.stop_gradient(state.params["g"]["w"].sum())) ** 2)
        return value, ({"count": state.mutable["count"] + 1}, {"batch": batch["x"].shape[0] * 1.0})

    def g(train, state, batch, key):
        return jnp.mean((batch["x"] * train["g"]["w"] + jax.random.normal(key)) ** 2), ({}, {})

    return Method(
        inputs={"x": Spec((4,), "float32")},
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


def test_phases_update_only_their_groups_and_lazy_phases_skip():
    method = two_phase_method(every=2)
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
    method = two_phase_method(repeat=4)
    state, logs = jax.jit(make_step(method, SGD, unroll=unroll))(start(method), BATCH, jax.random.key(1))
    assert float(logs["d/batch"]) == 2
    assert int(state.mutable["count"]) == 4
    parts = split(BATCH, 4)["x"]
    assert parts.shape == (4, 2, 4)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts), 0), BATCH["x"])  # every example once


@pytest.mark.parametrize("unroll", [False, True])
def test_accumulation_equals_the_whole_batch_and_is_refused_for_coupled_losses(unroll):
    method = two_phase_method()
    whole, _ = jax.jit(make_step(method, SGD))(start(method), BATCH, jax.random.key(1))
    parts, _logs = jax.jit(make_step(method, SGD, accumulate=4, unroll=unroll))(start(method), BATCH, jax.random.key(1))
    np.testing.assert_allclose(whole.params["d"]["w"], parts.params["d"]["w"], rtol=1e-5)
    with pytest.raises(UserError, match="accumulate"):
        make_step(two_phase_method(couples=True), SGD, accumulate=2)


def test_unknown_mutable_raises_at_trace_time():
    bad = two_phase_method()._replace(phases=(Phase("d", ("d", "g"), lambda t, s, b, k: (t["d"]["w"].sum(), ({"coutn": 0.0}, {}))),))
    with pytest.raises(AssertionError, match="coutn"):
        jax.eval_shape(make_step(bad, SGD), start(bad), BATCH, jax.random.key(0))


def test_skip_nonfinite_keeps_the_state():
    method = two_phase_method()
    step = jax.jit(make_step(method, SGD, skip_nonfinite=True))
    zero = start(method)
    one, logs = step(zero, {"x": BATCH["x"].at[0, 0].set(jnp.nan)}, jax.random.key(1))
    assert float(logs["d/skipped"]) == 1
    np.testing.assert_array_equal(one.params["d"]["w"], zero.params["d"]["w"])
    assert int(one.mutable["count"]) == 0
    assert float(step(one, BATCH, jax.random.key(1))[1]["d/skipped"]) == 0


@pytest.mark.parametrize("unroll", [False, True])
def test_skipped_counts_all_sub_steps(unroll):
    step = jax.jit(make_step(two_phase_method(repeat=4), SGD, skip_nonfinite=True, unroll=unroll))
    first = {"x": BATCH["x"].at[0, 0].set(jnp.nan)}
    assert not np.isfinite(split(first, 4)["x"][0]).all()  # the row is in the first part
    state, logs = step(start(two_phase_method(repeat=4)), first, jax.random.key(1))
    assert (float(logs["d/skipped"]), int(state.mutable["count"])) == (1, 3)


def test_every_runs_in_the_last_step_of_an_interval():
    assert [bool(every(3)(step)) for step in range(6)] == [False, False, True] * 2
    with pytest.raises(UserError, match="interval=0; it must be at least 1"):
        every(0)


def test_nonfinite_error_names_step_phase_and_group():
    method = two_phase_method()
    with pytest.raises(UserError, match=r"step 7: the loss in phase 'd' \(groups d\) is nan"):
        loop.check_finite(method, 7, {"d/loss": float("nan"), "g/loss": 0.0})
    with pytest.raises(UserError, match=r"gradient of group 'g' in phase 'g'.*--config.optim.g.lr=0.002, or with --config.on_non"):
        loop.check_finite(method, 7, {"d/loss": 0.0, "g/grad_norm/g": float("inf")}, {"g": {"lr": 0.02}})


# ---------------------------------------------------------------- shardings


def test_mesh_sizes_and_sharding_rules():
    mesh = sharding.make_mesh(dict(data=-1, fsdp=2))
    assert dict(mesh.shape) == {"data": 4, "fsdp": 2, "tensor": 1}
    for spec, message in ((dict(data=3), "make the product"), (dict(data=-1, fsdp=-1), "at most one"), (dict(dta=1), "unknown axis")):
        with pytest.raises(UserError, match=message):
            sharding.make_mesh(spec)
    assert sharding.spec_of("fsdp", (3, 3, 64, 128), mesh, "w") == sharding.P(None, None, None, "fsdp")
    assert sharding.spec_of("fsdp", (7,), mesh, "w") == sharding.P()
    assert sharding.spec_of((None, "data"), (3, 4, 8), mesh, "w") == sharding.P(None, None, "data")
    with pytest.raises(UserError, match="does not divide"):
        sharding.spec_of(("data",), (6,), mesh, "w")
    with pytest.raises(UserError, match="the nearest that does is 64"):
        sharding.check_batch(60, mesh)


def test_optimizer_moments_are_sharded_like_their_parameters():
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


def test_checksum_changes_with_any_bit_and_not_with_the_sharding():
    mesh = sharding.make_mesh(dict(data=1, fsdp=8))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1024, 4)), jnp.float32)
    sharded = jax.device_put(x, sharding.NamedSharding(mesh, sharding.P("fsdp")))
    assert checksums({"x": x}) == checksums({"x": sharded})
    raw = np.asarray(x).copy()
    for bit in (0, 1, 9999, raw.nbytes * 8 - 1):
        broken = raw.copy()
        broken.view(np.uint8).reshape(-1)[bit // 8] ^= 1 << (bit % 8)
        with pytest.raises(Corrupt, match="'x'"):
            verify({"x": jnp.asarray(broken)}, checksums({"x": x}))


@pytest.mark.full
def test_checkpoints_keep_the_last_and_the_best(tmp_path):
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


@pytest.mark.full
def test_best_checkpoint_is_kept_across_restarts_and_late_metrics(tmp_path):
    for first, scores in ((1, (50.0, 1.0)), (3, (60.0, 1.0, 2.0)), (6, (None, None)), (8, (1.0, 2.0))):
        saved = Checkpoints(tmp_path / "c", keep=2, best_metric="knn/top1")
        if first == 8:  # SIGTERM had arrived before step 7 was evaluated
            saved.rate(7, {"knn/top1": 99.0})
            assert same(saved.restore_latest(toy()), toy(7))
        for step, score in enumerate(scores, first):
            saved.save(toy(step), {}, score and {"knn/top1": score})
        saved.wait()
        kept = saved.steps()
        saved.close()
        assert kept == {1: [1, 2], 3: [3, 4, 5], 6: [3, 6, 7], 8: [7, 8, 9]}[first]


@pytest.mark.full
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
    """Truncate, or flip one bit in, every data file of a checkpoint, since Orbax decides which of them it reads."""
    for path in (p for p in directory.rglob("d/*") if p.is_file()):
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw[: len(raw) // 2] if how == "truncate" else raw)


@pytest.mark.parametrize("how", ["truncate", "flip", "metadata"])
def test_corrupt_checkpoint_is_set_aside_and_the_one_before_is_restored(tmp_path, caplog, how):
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


def test_deleted_checkpoint_directory_is_created_again(tmp_path, caplog):
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
    assert "deleted during this run; creating it again and saving step 3 into it" in caplog.text
    saved.close()


def test_checkpoint_of_another_config_is_an_error_and_stays(tmp_path):
    saved = Checkpoints(tmp_path / "c")
    saved.save(toy(1), {})
    saved.wait()
    other = toy()
    other.params["net"]["w"] = jnp.zeros((4, 4))
    with pytest.raises(UserError, match=r"belongs to another config: params/net/w has shape \(8, 8\) there and \(4, 4\) here"):
        saved.restore_latest(other)
    other.params["net"]["w"] = jnp.zeros((8, 8), jnp.bfloat16)
    with pytest.raises(UserError, match="params/net/w has dtype float32 there and bfloat16 here"):
        saved.restore_latest(other)
    assert saved.steps() == [1]
    saved.close()


def test_amend_adds_late_metrics_to_the_line_of_their_step(tmp_path):
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


def test_metrics_after_the_resumed_step_are_removed(tmp_path):
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

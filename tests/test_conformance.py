"""The contract of every method, tested with the `:smoke` variant of each config file, without a list of names.

The quick tests trace every method, its phases, its step and its encoder with shapes. The others, marked `full`, compile and run.
`make test` also runs those for methods whose file or config differs from the main branch (see conftest).
"""

import functools
import gc
import importlib
import json
import os
import pathlib
import re
import tempfile

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from configs.common import SCENES_SIZE
from ssl_jax.data.reader import element_spec
from ssl_jax.engine import loop
from ssl_jax.engine.checkpoint import Checkpoints, write_json
from ssl_jax.engine.method import encoder_statistics, encoder_weights, groups, inference_state, loss_groups, trained
from ssl_jax.engine.online_probe import optimizers
from ssl_jax.engine.optim import make_optimizers
from ssl_jax.engine.step import make_step
from ssl_jax.errors import UserError
from ssl_jax.evals import run as evals
from ssl_jax.experiment import config as configs
from ssl_jax.experiment.build import build_experiment
from ssl_jax.methods import build_method

ROOT = pathlib.Path(__file__).parent.parent
NAMES = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem not in ("__init__", "common"))
SMALL = ("--config.batch_size=32",)
every_config = pytest.mark.parametrize("name", NAMES)


def load(name, variant="smoke", *overrides):
    config = configs.load(f"{ROOT}/configs/{name}.py:{variant}", (*SMALL, *overrides) if variant == "smoke" else overrides)
    if variant == "smoke":
        for stage in config.stages.values():
            stage.workdir = stage_run(stage.recipe)
    return config


@functools.cache
def stage_run(recipe):
    """The workdir of a run of `recipe` with a checkpoint of its initial state."""
    exp, workdir = build_experiment(configs.load(f"{ROOT}/{recipe}")), pathlib.Path(tempfile.mkdtemp())
    saved = Checkpoints(workdir / "checkpoints")
    saved.save(exp.run.init(), configs.plain(exp.config))
    saved.close()
    write_json(workdir / "config.json", configs.plain(exp.config))
    return str(workdir)


def fill_in(config, size):
    """Set up `config` and its stages for images of `size` [H, W, 3] and 10 classes."""
    with config.unlocked():
        config.data.image_shape, config.data.num_classes, config.data.examples, config.dtype = size, 10, 512, "float32"
        for name in config.data.get("classes", {}):
            config.data.classes[name] = 10
        config.data.vocabulary = dict.fromkeys(config.data.vocabulary, 10)
        for stage in config.stages.values():
            stage.config = abstract_stage(stage.recipe, size)[0]


@functools.cache
def abstract_stage(recipe, size):
    """(config, {'params', 'mutable'} as shapes) of a run of `recipe`."""
    config = configs.load(f"{ROOT}/{recipe}").copy_and_resolve_references()
    fill_in(config, size)
    params, mutable = abstract_init(config, size)
    return config, {"params": params, "mutable": mutable}


def abstract_init(config, size):
    """Shapes of (params, mutable) of a config after `fill_in`."""
    method = build_method(config)
    frozen = {name: abstract_stage(stage.recipe, size)[1] for name, stage in config.stages.items()}
    batch = {name: spec.batch(8) for name, spec in method.inputs.items()}
    return jax.eval_shape(method.init, jax.random.key(0), batch, frozen)


@functools.cache
def shared_experiment(name, devices, fsdp):
    """An experiment on `devices` fake devices. The tests of a config share it, so that it compiles once."""
    config = load(name, "smoke", f"--config.mesh.fsdp={fsdp}")
    return build_experiment(config, jax.devices()[:devices])


@functools.cache
def initial(name):
    """The initial state of a config, on the host."""
    return jax.device_get(shared_experiment(name, 1, 1).run.init())


@pytest.fixture(autouse=True)
def free_programs_of_other_configs(request):
    """Free the compiled programs of a config after its last test.

    A pytest-xdist worker runs all tests of a config in a row (see conftest). A single process does not, and keeps the programs.
    """
    name = request.node.callspec.params.get("name") if hasattr(request.node, "callspec") else None
    if "PYTEST_XDIST_WORKER" in os.environ and SEEN and name not in SEEN:
        SEEN.clear()
        shared_experiment.cache_clear()
        jax.clear_caches()
        gc.collect()
    SEEN.add(name)


SEEN = set()


def put_state(exp, state):
    """A host state as arrays with the shardings of `exp`."""
    return jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), state, exp.run.abstract)


def begin(name, exp):
    """The initial state on the mesh of `exp`, with the optimizer states of its config."""
    state, config = initial(name), exp.config
    optimizers, _ = make_optimizers(config.optim, state.params, exp.durations["total"], config.batch_size, config.data.examples)
    return put_state(exp, state._replace(opt={group: optimizers[group].init(state.params[group]) for group in optimizers}))


def steps(exp, n, state, start=0):
    """(state after `n` steps from step `start`, [metrics of each])."""
    history = []
    batches = ({k: v for k, v in exp.batches[s].items() if k != "_skipped"} for s in range(start, start + n))
    for batch in loop.to_device(batches, exp.run.mesh, ahead=1):
        state, metrics = exp.run.step(state, batch, exp.run.root)
        history.append({k: float(v) for k, v in jax.device_get(metrics).items()})
    return state, history


def statistics(state, kind):
    """The leaves of `state.mutable` in collection `kind`, 'spectral' or 'batch_stats'."""
    return [x for path, x in jax.tree.leaves_with_path(state.mutable) if kind in jax.tree_util.keystr(path)]


def losses(history, kind="/loss"):
    """[steps, losses]; NaN where a lazy phase did not run."""
    return np.array([[v for k, v in sorted(metrics.items()) if kind in k] for metrics in history])


def variants(name):
    return [variant.name for variant in importlib.import_module(f"configs.{name}").VARIANTS]


@pytest.mark.full
@every_config
def test_every_variant_locks_and_builds_abstractly(name):
    """With shapes only, without data and arrays."""
    found = variants(name)
    assert {"", "smoke"} <= set(found)
    with pytest.raises(UserError, match="variant 'nonsense' does not exist; there are"):
        load(name, "nonsense")
    for variant in found:
        config = load(name, variant)
        assert config.is_locked
        evals.check(config.evals)
        json.dumps(configs.plain(config))
        views = config.get("views", ((),))
        first = next(iter(views.values())) if hasattr(views, "keys") else views
        options = [dict(kwargs) for _, kwargs in (*config.data.ops, *first[0])]
        own = SCENES_SIZE if config.data.name == "scenes" else 32
        size = next((kwargs[key] for kwargs in options for key in ("size", "crop") if key in kwargs), own)
        crops = next((dict(kwargs).get("crops", 2) for op, kwargs in config.data.ops if op == "random_resized_crops"), None)
        shape = (size, size, 3) if crops is None else (crops, size, size, 3)
        fill_in(config, shape)
        params, _ = abstract_init(config, shape)
        assert set(params) == groups(build_method(config)) == set(optimizers(config))


@every_config
def test_inputs_of_a_method_equal_the_data(name):
    exp = shared_experiment(name, 1, 1)
    spec = element_spec(exp.batches.source, exp.config.data.ops, exp.method.inputs, exp.vocabulary)
    assert spec == {name: (tuple(shape), np.dtype(dtype)) for name, (shape, dtype) in exp.method.inputs.items()}


@pytest.mark.slow
@pytest.mark.parametrize("smooth", [False, True], ids=["as it is, small rate", "smooth, own optimizer"])
@every_config
def test_eight_devices_equal_one_over_20_steps(name, smooth, monkeypatch):
    """Losses of two independent runs, on 1 device and on data 4 x fsdp 2; with the small learning rate the parameters, too.

    Devices sum in different orders, so parameters differ by 1e-8. If that moves one ReLU across its kink, the gradient jumps (by
    the share of one unit in the batch, 0.5 % in a head), and the runs diverge although both are correct. So the network stays as it
    is with a small learning rate, and its activations are smooth with the config's own optimizer.
    """
    config = load(name, "smoke")
    if smooth:
        for module in (nn, jax.nn):
            monkeypatch.setattr(module, "relu", nn.silu)
            monkeypatch.setattr(module, "leaky_relu", lambda x, slope=0.01: slope * x + (1 - slope) * nn.silu(x))
    else:
        with config.unlocked():
            rate = 1e-5 if name == "biggan" else 1e-4  # large gradients: at 1e-4 a change of one ulp diverges, too
            config.optim = {group: dict(name="sgd", lr=rate, schedule="constant") for group in config.optim}
    curves, ends = [], []
    for devices, fsdp in ((1, 1), (8, 2)):
        with config.unlocked():
            config.mesh.fsdp = fsdp
        exp = build_experiment(config, jax.devices()[:devices])
        state, history = steps(exp, 20, begin(name, exp))
        curves.append(losses(history))
        ends.append(jax.device_get(state.params))
    assert not np.isinf(curves).any() and np.nanmax(curves[0]) - np.nanmin(curves[0]) > 1e-3  # 100 x the tolerance
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-5, atol=1e-5)
    if not smooth:
        jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5), *ends)


@pytest.mark.full
@pytest.mark.parametrize("count", [4, pytest.param(20, marks=pytest.mark.slow)])
@every_config
def test_from_the_same_state_eight_devices_take_the_same_step(name, count):
    """Each state of a run on one device is also the start of a step on data 4 x fsdp 2 (SimCLR: data 8, too).

    Losses, gradient norms, the vectors of spectral normalization and batch statistics agree. The step is traced once, and the state
    keeps its tree, shapes, types and shardings. Every lazy phase of a smoke config runs within four steps.
    """
    one, history = shared_experiment(name, 1, 1), []
    state = begin(name, one)
    states = [initial(name)]
    for step in range(count):
        state, metrics = steps(one, 1, state, start=step)
        states.append(jax.device_get(state))
        history += metrics
    for fsdp in (1, 2) if name == "simclr" else (2,):
        exp, on_eight = shared_experiment(name, 8, fsdp), []
        for step, start in enumerate(states[:-1]):
            before = put_state(exp, start)
            described = jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), before)
            after, metrics = steps(exp, 1, before, start=step)
            on_eight += metrics
            # In one of BigGAN's 20 states kernels differ by 6.5e-6 (3e-8 in the others), as if a ReLU had crossed its kink. The
            # spectral vectors follow, and so does the loss of the next phase, by 1.7e-5.
            kernels = zip(jax.tree.leaves(after.params), jax.tree.leaves(states[step + 1].params), strict=True)
            apart = min(1e-5, max(np.abs(np.asarray(ours) - theirs).max() for ours, theirs in kernels))
            for ours, theirs in zip(statistics(after, "spectral"), statistics(states[step + 1], "spectral"), strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6 + apart)
            for ours, theirs in zip(statistics(after, "batch_stats"), statistics(states[step + 1], "batch_stats"), strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
            assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), after) == described
        np.testing.assert_allclose(losses(on_eight), losses(history), rtol=1e-5 if count == 4 else 2e-5, atol=1e-5)
        # Such a kink also moves the gradient of one of SimCLR's four states by 0.2 % (oneDNN against XLA, with AVX-512).
        ours, theirs = (losses(lines, "/grad_norm/") for lines in (on_eight, history))  # NaN where a lazy phase did not run
        np.testing.assert_array_equal(np.isnan(ours), np.isnan(theirs))
        apart = (np.abs(ours - theirs) / np.maximum(theirs, 1e-12))[~np.isnan(ours)]
        assert np.sort(apart)[-2] < 1e-4 and apart.max() < 1e-2, apart
        assert exp.run.traces() == 1
        if fsdp == 2:
            split = [x for x in jax.tree.leaves(after.params) if x.sharding.spec != jax.sharding.PartitionSpec()]
            assert split, "no parameter is sharded over fsdp"
            assert all("fsdp" in x.sharding.spec for x in split)


@pytest.mark.full
@every_config
def test_each_phase_updates_only_its_groups_and_the_step_increments(name):
    exp, first = shared_experiment(name, 8, 2), initial(name)
    state, _ = steps(exp, 2, begin(name, exp))  # warm-up: the learning rate of the first may be zero
    assert int(state.step) == 2
    assert jax.tree.all(jax.tree.map(np.array_equal, jax.device_get(state.frozen), first.frozen))
    assert changed(first.params, state.params) == groups(exp.method)
    if len(exp.method.phases) == 1:
        return
    optimizers, _ = make_optimizers(exp.config.optim, first.params, exp.durations["total"], exp.config.batch_size, 1000)
    batch = {k: v for k, v in exp.batches[0].items() if k != "_skipped"}
    for phase in exp.method.phases:
        step = jax.jit(make_step(exp.method._replace(phases=(phase,)), optimizers))
        state = first._replace(step=np.int32(1 if phase.when is None else next(i for i in range(1, 1000) if phase.when(i))))
        after = step(state, batch, exp.run.root)[0]
        assert changed(first.params, after.params) == changed(first.opt, after.opt) == set(trained(phase)), phase.name


@every_config
def test_a_traced_step_keeps_shapes_and_types_and_has_metrics_of_every_phase(name):
    """With loops over sub-steps and parts of a batch, as on accelerators; on CPUs they are unrolled.

    The carry of a loop must keep its type.
    """
    exp = shared_experiment(name, 1, 1)
    first = exp.run.abstract
    optimizers, _ = make_optimizers(exp.config.optim, first.params, exp.durations["total"], exp.config.batch_size, 1000)
    step = make_step(exp.method, optimizers, accumulate=1 if exp.method.couples_batch else 2)
    batch = {k: v for k, v in exp.batches[0].items() if k != "_skipped"}
    after, metrics = jax.eval_shape(step, first, batch, exp.run.root)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), first)
    for phase in exp.method.phases:
        assert {f"{phase.name}/loss", *(f"{phase.name}/grad_norm/{group}" for group in trained(phase))} <= set(metrics)
    assert set().union(*map(trained, exp.method.phases)) == groups(exp.method) == set(first.params)


def changed(before, after):
    """The groups whose arrays differ."""
    return {group for group, tree in jax.device_get(after).items()
            if not jax.tree.all(jax.tree.map(np.array_equal, before[group], tree))}  # fmt: skip


@pytest.mark.full
@every_config
def test_restored_run_equals_uninterrupted_also_on_another_mesh(name, tmp_path):
    exp = shared_experiment(name, 8, 2)
    state, _ = steps(exp, 2, begin(name, exp))
    saved = Checkpoints(tmp_path / "c")
    saved.save(state, configs.plain(exp.config))
    saved.wait()
    _, uninterrupted = steps(exp, 2, state, start=2)
    restored = saved.restore_latest(exp.run.abstract)
    _, resumed = steps(exp, 2, restored, start=2)
    np.testing.assert_equal(resumed, uninterrupted)  # bit-equal; NaN where a lazy phase did not run
    other = shared_experiment(name, 1, 1)
    elsewhere = saved.restore_latest(other.run.abstract)
    np.testing.assert_allclose(losses(steps(other, 2, elsewhere, start=2)[1]), losses(uninterrupted), rtol=1e-5, atol=1e-5)
    saved.close()


@pytest.mark.full
@every_config
def test_encode_gives_finite_features(name):
    exp, state = shared_experiment(name, 8, 2), initial(name)
    images = np.random.default_rng(0).integers(0, 256, (4, *exp.config.data.image_shape[-3:]), np.uint8)
    features = jax.jit(exp.method.encode)(state.params, inference_state(state), images)
    assert features["pooled"].ndim == 2
    assert features["pooled"].dtype == jnp.float32
    assert all(np.isfinite(x).all() and len(x) == 4 for x in features.values())
    one = jax.jit(exp.method.encode)(state.params, inference_state(state), images[:1])
    np.testing.assert_allclose(one["pooled"], features["pooled"][:1], rtol=2e-4, atol=2e-5)  # inference mode: no batch statistics


@pytest.mark.full
@every_config
def test_model_fns_have_their_documented_shapes_and_types(name):
    """Traced with shapes, for images of uint8 and of float32."""
    exp, n = shared_experiment(name, 8, 2), 4
    fns, shape = exp.method.fns, exp.config.data.image_shape[-3:]
    weights = exp.run.abstract.params, inference_state(exp.run.abstract)

    def given(images):
        """{name: (arguments after the weights, documented shape and type)}; None is any size."""
        row, pictures = ((n,), "float32"), ((n, None, None, 3), "float32")
        labels, values = (jax.ShapeDtypeStruct((size,), kind) for size, kind in ((n, "int32"), (3, "float32")))
        tokens = jax.eval_shape(fns.tokens, *weights, images) if fns.tokens else None
        batch = {name: images if name.startswith("image") else spec.batch(n) for name, spec in exp.method.inputs.items()}
        return {
            "reconstruct": ((images,), pictures),
            "traverse": ((images, values), ((n, None, 3, None, None, 3), "float32")),
            "log_prob": ((images, jax.random.key(0), 2), {"elbo": row, "iwae": row, "dimensions": ((), "float32")}),
            "token_nll": ((images, labels), {"nll": row, "tokens": ((n, None), "int32")}),
            "discriminate": ((images,), row),
            "tokens": ((images,), ((n, None, None), "int32")),
            "decode": ((tokens,), pictures),
            "codebook": ((), ((None, None), "float32")),
            "pretext": ((batch, jax.random.key(0)), {"logits": ((n, None, None), "float32"), "answers": ((n, None), "int32")}),
            "draw_pretext": (
                (batch, jax.random.key(0)), {"pictures": ((n, 2, None, None, 3), "float32"), "right": ((n,), "bool")},
            ),
            "affinity": ((images,), {
                "pmi": ((n, None, None), "float32"), "corners": ((None, 2), "int32"), "size": ((), "int32"),
            }),
            "motion": ((batch, jax.random.key(0)), {"predicted": row, "true": row}),
            "segment": ((images,), ((n, *shape[:2], None), "float32")),
            "detect": ((images,), {
                "boxes": ((n, None, 4), "float32"), "scores": ((n, None), "float32"), "labels": ((n, None), "int32"),
            }),
            "answer": ((batch,), {"logits": ((n, None), "float32"), "attention": ((n, None, None), "float32")}),
            "inpaint": ((images,), {"pictures": pictures, "removed": ((None, None, None), "bool")}),
        }

    assert len({fns.tokens is None, fns.decode is None, fns.codebook is None}) == 1, "a tokenizer has all three"
    for kind in ("uint8", "float32"):
        described = given(jax.ShapeDtypeStruct((n, *shape), kind))
        assert set(described) == set(fns._fields)
        for field, (args, documented) in described.items():
            if getattr(fns, field):
                found = abstract(getattr(exp.fns, field), *weights, *args)
                for name, each in found.items() if field in ("pretext", "motion") else [("", found)]:
                    check_shapes(f"{field} {name}", each, documented)


@every_config
def test_samplers_and_views_have_their_documented_shapes_and_types(name):
    exp, n, key = shared_experiment(name, 8, 2), 4, jax.random.key(0)
    images = jax.ShapeDtypeStruct((n, *exp.config.data.image_shape), "uint8")
    if exp.method.views:
        for group in jax.tree.leaves(jax.eval_shape(exp.method.views, images, key)):
            check_shapes("views", group, ((n, None, None, None, 3), "float32"))
    sampler = exp.sampler
    if sampler is None:
        return
    pictures, truncation = ((n, None, None, 3), "float32"), jnp.float32(0.7)
    latents = abstract(sampler.latents, key, n)
    assert all(len(x) == n for x in latents.values())
    check_shapes("latents", {k: x for k, x in latents.items() if k in ("z", "label")},
                 {"z": ((n, None), "float32"), "label": ((n,), "int32")}, some=True)  # fmt: skip
    weights = exp.run.abstract.params, inference_state(exp.run.abstract)
    prepared = abstract(sampler.prepare, *weights, key)
    check_shapes("sample", abstract(sampler.sample, prepared, latents), pictures)
    try:
        truncated = abstract(sampler.sample, prepared, latents, truncation)
    except UserError:  # these latents cannot be truncated
        truncated = None
    if truncated:
        check_shapes("truncated sample", truncated, pictures)
        assert abstract(sampler.prepare, *weights, key, truncation) == prepared
    if sampler.mix:
        for more in ((), (truncation,)):
            check_shapes("mix", abstract(sampler.mix, prepared, latents, latents, jnp.int32(2), *more), pictures)
    if sampler.complete:
        test_images = jax.ShapeDtypeStruct((n, *exp.config.data.image_shape[-3:]), "uint8")
        check_shapes("complete", abstract(sampler.complete, prepared, latents, test_images), pictures)
    for space, between in sampler.between.items():
        check_shapes(f"between {space}", abstract(between, prepared, latents, latents, jnp.zeros(n)), pictures)


def abstract(function, *args):
    """Shapes and types of the result of a jitted function. `jax.eval_shape` would turn its static arguments into arrays."""
    return function.eval_shape(*args)


def check_shapes(what, found, documented, some=False):
    """Check that a tree of arrays has the `documented` shapes (None: any size) and types; with `some`, entries may be missing."""
    if isinstance(documented, dict):
        assert set(found) <= set(documented) if some else set(found) == set(documented), what
        for name in found:
            check_shapes(f"{what} {name}", found[name], documented[name])
        return
    shape, kind = documented
    assert found.dtype == kind and len(found.shape) == len(shape), (what, found)
    assert all(size is None or size == there for size, there in zip(shape, found.shape, strict=True)), (what, found)


@every_config
def test_declared_encoder_exists_in_the_state(name):
    exp = shared_experiment(name, 8, 2)
    method, state = exp.method, exp.run.abstract
    if method.encoder is None:
        assert "name" not in exp.config.model.get("encoder", {}), "Method.encoder has to name the network of config.model.encoder"
        return
    assert method.encoder[0] in (*state.params, *state.mutable)
    assert jax.tree.leaves(encoder_weights(method, state.params, state.mutable))
    if "batch_stats" in (*state.mutable, *state.mutable.get(method.encoder[0], ())):
        assert encoder_statistics(method, state.mutable) is not None  # it raises KeyError; without BatchNorm it is empty


def test_evaluations_shard_their_batches_like_the_step():
    """Without the mesh every device would compute the whole batch, given sharded parameters."""
    exp, images = shared_experiment("simclr", 8, 2), jax.ShapeDtypeStruct((16, 32, 32, 3), np.uint8)
    state = exp.run.abstract
    for function in (exp.encode, lambda *args: exp.encode_views(*args, jax.random.key(0))):
        assert "sharding_constraint" in str(jax.make_jaxpr(function)(state.params, inference_state(state), images))
    assert "sharding_constraint" not in str(jax.make_jaxpr(exp.method.encode)(state.params, inference_state(state), images))


@every_config
def test_encode_takes_a_batch_of_any_size(name):
    """Exports trace it once with a symbolic batch size."""
    exp = shared_experiment(name, 1, 1)
    state = exp.run.abstract
    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *exp.config.data.image_shape[-3:]), np.uint8)
    features = jax.eval_shape(exp.method.encode, state.params, inference_state(state), images)
    assert all(x.shape[0] == batch for x in features.values())
    assert (features["pooled"].ndim, features["pooled"].dtype) == (2, jnp.float32)


@pytest.mark.full
@every_config
def test_loss_falls_on_one_batch(name):
    exp = shared_experiment(name, 8, 2)
    if len(exp.method.phases) > 1 or len(loss_groups(exp.method.phases[0])) > 1:
        pytest.skip("adversarial losses need not fall")
    if {"queue", "teacher"} & set(exp.run.abstract.mutable):
        pytest.skip("a queue fills with keys of this batch, and a teacher moves the targets, so the loss need not fall")
    batch = {k: v for k, v in exp.batches[0].items() if k != "_skipped"}
    batch = next(loop.to_device([batch], exp.run.mesh))
    state, history = begin(name, exp), []
    for _ in range(30):
        state, metrics = exp.run.step(state, batch, exp.run.root)
        history.append(jax.device_get(metrics))
    first, last = losses(history[:3]).mean(), losses(history[-3:]).mean()
    assert last < first - 0.05, (first, last)


@pytest.mark.full
@every_config
def test_accumulation_is_refused_iff_the_loss_couples_the_batch(name):
    if shared_experiment(name, 8, 2).method.couples_batch:
        with pytest.raises(UserError, match="accumulate"):
            build_experiment(load(name, "smoke", "--config.accumulate=2"))
    else:
        exp = build_experiment(load(name, "smoke", "--config.accumulate=2"))
        assert np.isfinite(losses(steps(exp, 1, begin(name, exp))[1])).all()


@pytest.mark.full
@pytest.mark.parametrize("name", ["simclr", "gan"])
def test_the_initial_state_does_not_depend_on_the_devices(name):
    ours = jax.device_get(shared_experiment(name, 8, 2).run.init())
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), ours, initial(name))


COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


def collectives(text):
    """{kind: count} in compiled HLO; an asynchronous pair counts once."""
    counts = {kind: len(re.findall(rf" = .* {kind}(?:-start)?\(", text)) for kind in COLLECTIVES}
    return {kind: count for kind, count in counts.items() if count}


@pytest.mark.full
def test_simclr_step_has_only_the_necessary_collectives():
    """Data parallelism needs all-reduces (statistics, gradients, gradient of the gathered embeddings) and one all-gather of the
    embeddings. FSDP adds all-gathers of parameters.
    """
    counted = {}
    for fsdp in (1, 2):
        exp = shared_experiment("simclr", 8, fsdp)
        batch = next(loop.to_device([{k: v for k, v in exp.batches[0].items() if k != "_skipped"}], exp.run.mesh))
        state = exp.run.abstract
        counted[fsdp] = collectives(exp.run.trace(state, batch, exp.run.root).lower().compile().as_text())
    assert counted == {1: {"all-reduce": 24, "all-gather": 1}, 2: {"all-reduce": 30, "all-gather": 23}}

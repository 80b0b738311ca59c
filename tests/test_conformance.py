"""What every method promises, tested for each config merely because it exists (its `:smoke` variant, the same code small).

The quick tests trace: they build every method, its phases, its step and its encoder from shapes. The others, marked `full`, compile and
run; `make test` runs them, too, for a method whose file or config is not that of the main branch (see conftest).
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

from ssl_jax.data.reader import element_spec
from ssl_jax.engine import loop
from ssl_jax.engine.checkpoint import Checkpoints, write_json
from ssl_jax.engine.method import encoder_statistics, encoder_weights, groups, inference_state, loss_groups, trained
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
    """The directory of a run of `recipe` that was stopped before its first step."""
    this, workdir = build_experiment(configs.load(f"{ROOT}/{recipe}")), pathlib.Path(tempfile.mkdtemp())
    saved = Checkpoints(workdir / "checkpoints")
    saved.save(this.run.init(), configs.plain(this.config))
    saved.close()
    write_json(workdir / "config.json", configs.plain(this.config))
    return str(workdir)


def fill_in(config, size):
    """`config`, and the stages that it stands on, as if their data were images of `size` [H, W, 3] and 10 classes."""
    with config.unlocked():
        config.data.image_shape, config.data.num_classes, config.dtype = size, 10, "float32"
        for stage in config.stages.values():
            stage.config = abstract_stage(stage.recipe, size)[0]


@functools.cache
def abstract_stage(recipe, size):
    """(config, shapes of the weights) of a run of `recipe`."""
    config = configs.load(f"{ROOT}/{recipe}").copy_and_resolve_references()
    fill_in(config, size)
    params, mutable = abstract_init(config, size)
    return config, {"params": params, "mutable": mutable}


def abstract_init(config, size):
    """Shapes of (params, mutable) of a config that is filled in."""
    method = build_method(config)
    frozen = {name: abstract_stage(stage.recipe, size)[1] for name, stage in config.stages.items()}
    batch = {name: spec.batch(8) for name, spec in method.inputs.items()}
    return jax.eval_shape(method.init, jax.random.key(0), batch, frozen)


@functools.cache
def made(name, devices, fsdp):
    """An assembly on `devices` fake devices, shared by the tests of a config: it is compiled once."""
    config = load(name, "smoke", f"--config.mesh.fsdp={fsdp}")
    return build_experiment(config, jax.devices()[:devices])


@functools.cache
def initial(name):
    """The initial state, on the host."""
    return jax.device_get(made(name, 1, 1).run.init())


@pytest.fixture(autouse=True)
def forget_other_configs(request):
    """A worker is given all tests of a config one after the other; then its programs go (see conftest). One process without workers
    comes back to each config and keeps them.
    """
    name = request.node.callspec.params.get("name") if hasattr(request.node, "callspec") else None
    if "PYTEST_XDIST_WORKER" in os.environ and SEEN and name not in SEEN:
        SEEN.clear()
        made.cache_clear()
        jax.clear_caches()
        gc.collect()
    SEEN.add(name)


SEEN = set()


def placed(this, state):
    """A state of the host, on the mesh of `this`."""
    return jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), state, this.run.abstract)


def begin(name, this):
    """The initial state on the mesh of `this`, with its optimizers; compiled once for a config."""
    state, config = initial(name), this.config
    optimizers, _ = make_optimizers(config.optim, state.params, this.durations["total"], config.batch_size, config.data.examples)
    return placed(this, state._replace(opt={group: optimizers[group].init(state.params[group]) for group in optimizers}))


def steps(this, n, state, start=0):
    told = []
    batches = ({k: v for k, v in this.batches[s].items() if k != "_skipped"} for s in range(start, start + n))
    for batch in loop.to_device(batches, this.run.mesh, ahead=1):
        state, metrics = this.run.step(state, batch, this.run.root)
        told.append({k: float(v) for k, v in jax.device_get(metrics).items()})
    return state, told


def statistics(state, kind):
    """The leaves of `kind`: 'spectral' or 'batch_stats'."""
    return [x for path, x in jax.tree.leaves_with_path(state.mutable) if kind in jax.tree_util.keystr(path)]


def losses(told, kind="/loss"):
    """[steps, losses]; NaN where a lazy phase did not run."""
    return np.array([[v for k, v in sorted(t.items()) if kind in k] for t in told])


def variants(name):
    return [variant.name for variant in importlib.import_module(f"configs.{name}").VARIANTS]


@pytest.mark.parametrize("published", [False, pytest.param(True, marks=pytest.mark.full)])
@every_config
def test_every_variant_locks_and_builds_abstractly(name, published):
    """Published recipes build too: shapes only, no data, no arrays."""
    found = variants(name)
    assert {"", "smoke"} <= set(found)
    with pytest.raises(UserError, match="variant 'nonsense' does not exist; there are"):
        load(name, "nonsense")
    for variant in found if published else ("", "smoke"):
        config = load(name, variant)
        assert config.is_locked
        evals.check(config.evals)
        json.dumps(configs.plain(config))
        told = [dict(kwargs) for _, kwargs in (*config.data.ops, *(config.views[0] if "views" in config else ()))]
        size = next((kwargs[key] for kwargs in told for key in ("size", "crop") if key in kwargs), 32)
        crops = next((dict(kwargs).get("crops", 2) for op, kwargs in config.data.ops if op == "random_resized_crops"), None)
        shape = (size, size, 3) if crops is None else (crops, size, size, 3)
        fill_in(config, shape)
        params, _ = abstract_init(config, shape)
        assert set(params) == groups(build_method(config)) == set(config.optim)


@every_config
def test_data_fits_the_method(name):
    this = made(name, 1, 1)
    spec = element_spec(this.batches.source, this.config.data.ops, this.method.inputs)
    assert spec == {name: (tuple(shape), np.dtype(dtype)) for name, (shape, dtype) in this.method.inputs.items()}


@pytest.mark.slow
@pytest.mark.parametrize("smooth", [False, True], ids=["as it is, small rate", "smooth, own optimizer"])
@every_config
def test_eight_devices_equal_one_over_20_steps(name, smooth, monkeypatch):
    """Losses on 1 device and on data 4 x fsdp 2, each going its own way for 20 steps; with the small rate the parameters, too.

    Devices add in another order, so parameters differ by 1e-8; where that carries one ReLU over its kink the gradient jumps (by the
    share of one unit in the batch, 0.5 % in a head) and the runs part, each as right as the other. So the network is left as it is
    where the rate is small, and made smooth where the config's own optimizer runs.
    """
    config = load(name, "smoke")
    if smooth:
        for module in (nn, jax.nn):
            monkeypatch.setattr(module, "relu", nn.silu)
            monkeypatch.setattr(module, "leaky_relu", lambda x, slope=0.01: slope * x + (1 - slope) * nn.silu(x))
    else:
        with config.unlocked():
            rate = 1e-5 if name == "biggan" else 1e-4  # whose gradients are the largest: at 1e-4 one device parts from itself by an ulp
            config.optim = {group: dict(name="sgd", lr=rate, schedule="constant") for group in config.optim}
    curves, ends = [], []
    for devices, fsdp in ((1, 1), (8, 2)):
        with config.unlocked():
            config.mesh.fsdp = fsdp
        this = build_experiment(config, jax.devices()[:devices])
        state, told = steps(this, 20, begin(name, this))
        curves.append(losses(told))
        ends.append(jax.device_get(state.params))
    assert not np.isinf(curves).any() and np.nanmax(curves[0]) - np.nanmin(curves[0]) > 1e-3  # a hundred times what is tolerated
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-5, atol=1e-5)
    if not smooth:
        jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5), *ends)


@pytest.mark.full
@pytest.mark.parametrize("count", [4, pytest.param(20, marks=pytest.mark.slow)])
@every_config
def test_from_the_same_state_eight_devices_take_the_same_step(name, count):
    """The network as it is: states of one device, each also given to data 4 x fsdp 2 (SimCLR: data 8 too); loss, gradient norm, the
    vectors of spectral normalization and batch statistics agree, the step is traced once, and the state keeps its tree, shapes, types
    and shardings.

    Every lazy phase of a smoke config runs within four steps.
    """
    one, told = made(name, 1, 1), []
    state = begin(name, one)
    states = [initial(name)]
    for step in range(count):
        state, metrics = steps(one, 1, state, start=step)
        states.append(jax.device_get(state))
        told += metrics
    for fsdp in (1, 2) if name == "simclr" else (2,):
        this, spread = made(name, 8, fsdp), []
        for step, start in enumerate(states[:-1]):
            before = placed(this, start)
            described = jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), before)
            after, metrics = steps(this, 1, before, start=step)
            spread += metrics
            # In one of BigGAN's 20 states kernels part by 6.5e-6 (3e-8 in the others), as a unit at its kink would make them; the
            # vectors follow them, and so does the loss of the next phase, by 1.7e-5.
            kernels = zip(jax.tree.leaves(after.params), jax.tree.leaves(states[step + 1].params), strict=True)
            apart = min(1e-5, max(np.abs(np.asarray(ours) - theirs).max() for ours, theirs in kernels))
            for ours, theirs in zip(statistics(after, "spectral"), statistics(states[step + 1], "spectral"), strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6 + apart)
            for ours, theirs in zip(statistics(after, "batch_stats"), statistics(states[step + 1], "batch_stats"), strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
            assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), after) == described
        np.testing.assert_allclose(losses(spread), losses(told), rtol=1e-5 if count == 4 else 2e-5, atol=1e-5)
        np.testing.assert_allclose(losses(spread, "/grad_norm/"), losses(told, "/grad_norm/"), rtol=1e-4)
        assert this.run.traces() == 1
        if fsdp == 2:
            split = [x for x in jax.tree.leaves(after.params) if x.sharding.spec != jax.sharding.PartitionSpec()]
            assert split, "no parameter lies on the fsdp axis"
            assert all("fsdp" in x.sharding.spec for x in split)


@pytest.mark.full
@every_config
def test_each_phase_moves_its_groups_only_and_the_step_is_counted(name):
    this, first = made(name, 8, 2), initial(name)
    state, _ = steps(this, 2, begin(name, this))  # the first may have a learning rate of zero
    assert int(state.step) == 2
    assert jax.tree.all(jax.tree.map(np.array_equal, jax.device_get(state.frozen), first.frozen))
    assert moved(first.params, state.params) == groups(this.method)
    if len(this.method.phases) == 1:
        return
    optimizers, _ = make_optimizers(this.config.optim, first.params, this.durations["total"], this.config.batch_size, 1000)
    batch = {k: v for k, v in this.batches[0].items() if k != "_skipped"}
    for phase in this.method.phases:
        step = jax.jit(make_step(this.method._replace(phases=(phase,)), optimizers))
        state = first._replace(step=np.int32(1 if phase.when is None else next(i for i in range(1, 1000) if phase.when(i))))
        after = step(state, batch, this.run.root)[0]
        assert moved(first.params, after.params) == moved(first.opt, after.opt) == set(trained(phase)), phase.name


@every_config
def test_a_traced_step_keeps_shapes_and_types_and_has_metrics_of_every_phase(name):
    """Sub-steps and parts of a batch in loops, as accelerators run them; CPUs write them out. A loop carries what it was given."""
    this = made(name, 1, 1)
    first = this.run.abstract
    optimizers, _ = make_optimizers(this.config.optim, first.params, this.durations["total"], this.config.batch_size, 1000)
    step = make_step(this.method, optimizers, accumulate=1 if this.method.couples_batch else 2)
    batch = {k: v for k, v in this.batches[0].items() if k != "_skipped"}
    after, metrics = jax.eval_shape(step, first, batch, this.run.root)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), first)
    for phase in this.method.phases:
        assert {f"{phase.name}/loss", *(f"{phase.name}/grad_norm/{group}" for group in trained(phase))} <= set(metrics)
    assert set().union(*map(trained, this.method.phases)) == groups(this.method) == set(first.params)


def moved(before, after):
    """The groups whose arrays differ."""
    return {group for group, tree in jax.device_get(after).items()
            if not jax.tree.all(jax.tree.map(np.array_equal, before[group], tree))}  # fmt: skip


@pytest.mark.full
@every_config
def test_save_restore_step_equals_uninterrupted_also_on_another_mesh(name, tmp_path):
    this = made(name, 8, 2)
    state, _ = steps(this, 2, begin(name, this))
    saved = Checkpoints(tmp_path / "c")
    saved.save(state, configs.plain(this.config))
    saved.wait()
    _, on = steps(this, 2, state, start=2)
    back = saved.restore_latest(this.run.abstract)
    _again, told = steps(this, 2, back, start=2)
    np.testing.assert_equal(told, on)  # bit-equal; NaN where a lazy phase did not run
    other = made(name, 1, 1)
    elsewhere = saved.restore_latest(other.run.abstract)
    np.testing.assert_allclose(losses(steps(other, 2, elsewhere, start=2)[1]), losses(on), rtol=1e-5, atol=1e-5)
    saved.close()


@pytest.mark.full
@every_config
def test_encode_gives_finite_features(name):
    this, state = made(name, 8, 2), initial(name)
    images = np.random.default_rng(0).integers(0, 256, (4, *this.config.data.image_shape[-3:]), np.uint8)
    features = jax.jit(this.method.encode)(state.params, inference_state(state), images)
    assert features["pooled"].ndim == 2
    assert features["pooled"].dtype == jnp.float32
    assert all(np.isfinite(x).all() and len(x) == 4 for x in features.values())
    one = jax.jit(this.method.encode)(state.params, inference_state(state), images[:1])
    np.testing.assert_allclose(one["pooled"], features["pooled"][:1], rtol=2e-4, atol=2e-5)  # inference mode: no batch statistics


@every_config
def test_functions_that_a_method_offers_have_their_documented_shapes_and_types(name):
    """Each function of `ModelFns`, traced with shapes; images may be uint8 or float32."""
    this, n = made(name, 8, 2), 4
    fns, shape = this.method.fns, this.config.data.image_shape[-3:]
    weights = this.run.abstract.params, inference_state(this.run.abstract)

    def given(images):
        """{name: (arguments after the weights, what is documented)}; None is any size."""
        row, pictures = ((n,), "float32"), ((n, None, None, 3), "float32")
        labels, values = (jax.ShapeDtypeStruct((size,), kind) for size, kind in ((n, "int32"), (3, "float32")))
        tokens = jax.eval_shape(fns.tokens, *weights, images) if fns.tokens else None
        return {
            "reconstruct": ((images,), pictures),
            "traverse": ((images, values), ((n, None, 3, None, None, 3), "float32")),
            "log_prob": ((images, jax.random.key(0), 2), {"elbo": row, "iwae": row, "dimensions": ((), "float32")}),
            "token_nll": ((images, labels), {"nll": row, "tokens": ((n, None), "int32")}),
            "discriminate": ((images,), row),
            "tokens": ((images,), ((n, None, None), "int32")),
            "decode": ((tokens,), pictures),
            "codebook": ((), ((None, None), "float32")),
        }

    assert len({fns.tokens is None, fns.decode is None, fns.codebook is None}) == 1, "a tokenizer has all three"
    for kind in ("uint8", "float32"):
        described = given(jax.ShapeDtypeStruct((n, *shape), kind))
        assert set(described) == set(fns._fields)
        for field, (args, documented) in described.items():
            if getattr(fns, field):
                check_shapes(field, abstract(getattr(this.fns, field), *weights, *args), documented)


@every_config
def test_samplers_and_views_have_their_documented_shapes_and_types(name):
    this, n, key = made(name, 8, 2), 4, jax.random.key(0)
    images = jax.ShapeDtypeStruct((n, *this.config.data.image_shape), "uint8")
    if this.method.views:
        for group in jax.tree.leaves(jax.eval_shape(this.method.views, images, key)):
            check_shapes("views", group, ((n, None, None, None, 3), "float32"))
    sampler = this.sampler
    if sampler is None:
        return
    pictures, truncation = ((n, None, None, 3), "float32"), jnp.float32(0.7)
    latents = abstract(sampler.latents, key, n)
    assert all(len(x) == n for x in latents.values())
    check_shapes("latents", {k: x for k, x in latents.items() if k in ("z", "label")},
                 {"z": ((n, None), "float32"), "label": ((n,), "int32")}, some=True)  # fmt: skip
    weights = this.run.abstract.params, inference_state(this.run.abstract)
    prepared = abstract(sampler.prepare, *weights, key)
    check_shapes("sample", abstract(sampler.sample, prepared, latents), pictures)
    try:
        truncated = abstract(sampler.sample, prepared, latents, truncation)
    except UserError:  # latents that have no middle
        truncated = None
    if truncated:
        check_shapes("truncated sample", truncated, pictures)
        assert abstract(sampler.prepare, *weights, key, truncation) == prepared
    if sampler.mix:
        for more in ((), (truncation,)):
            check_shapes("mix", abstract(sampler.mix, prepared, latents, latents, jnp.int32(2), *more), pictures)
    if sampler.complete:
        test_images = jax.ShapeDtypeStruct((n, *this.config.data.image_shape[-3:]), "uint8")
        check_shapes("complete", abstract(sampler.complete, prepared, latents, test_images), pictures)
    for space, between in sampler.between.items():
        check_shapes(f"between {space}", abstract(between, prepared, latents, latents, jnp.zeros(n)), pictures)


def abstract(function, *args):
    """Shapes and types of what a jitted function gives; `jax.eval_shape` alone would make its static arguments arrays."""
    return function.eval_shape(*args)


def check_shapes(what, found, documented, some=False):
    """`found`, a tree of arrays, has the shapes (None: any size) and types of `documented`; `some`: of those that are there."""
    if isinstance(documented, dict):
        assert set(found) <= set(documented) if some else set(found) == set(documented), what
        for name in found:
            check_shapes(f"{what} {name}", found[name], documented[name])
        return
    shape, kind = documented
    assert found.dtype == kind and len(found.shape) == len(shape), (what, found)
    assert all(size is None or size == there for size, there in zip(shape, found.shape, strict=True)), (what, found)


@every_config
def test_the_declared_encoder_is_among_the_parameters(name):
    this = made(name, 8, 2)
    method, state = this.method, this.run.abstract
    if method.encoder is None:
        assert "name" not in this.config.model.get("encoder", {}), "a network of config.model.encoder has a place"
        return
    assert method.encoder[0] in (*state.params, *state.mutable)
    assert jax.tree.leaves(encoder_weights(method, state.params, state.mutable))
    if "batch_stats" in (*state.mutable, *state.mutable.get(method.encoder[0], ())):
        assert jax.tree.leaves(encoder_statistics(method, state.mutable))


def test_evaluations_are_laid_out_as_steps_are():
    """Outside of the mesh every device would compute the whole batch of parameters that are spread."""
    this, images = made("simclr", 8, 2), jax.ShapeDtypeStruct((16, 32, 32, 3), np.uint8)
    state = this.run.abstract
    for function in (this.encode, lambda *args: this.encode_views(*args, jax.random.key(0))):
        assert "sharding_constraint" in str(jax.make_jaxpr(function)(state.params, inference_state(state), images))
    assert "sharding_constraint" not in str(jax.make_jaxpr(this.method.encode)(state.params, inference_state(state), images))


@every_config
def test_encode_takes_a_batch_of_any_size(name):
    """As exports need it: traced once, with an unknown number of images."""
    this = made(name, 1, 1)
    state = this.run.abstract
    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *this.config.data.image_shape[-3:]), np.uint8)
    features = jax.eval_shape(this.method.encode, state.params, inference_state(state), images)
    assert all(x.shape[0] == batch for x in features.values())
    assert (features["pooled"].ndim, features["pooled"].dtype) == (2, jnp.float32)


@pytest.mark.full
@every_config
def test_loss_falls_on_one_batch(name):
    this = made(name, 8, 2)
    if len(this.method.phases) > 1 or len(loss_groups(this.method.phases[0])) > 1:
        pytest.skip("a game between several players: no loss has to fall")
    batch = {k: v for k, v in this.batches[0].items() if k != "_skipped"}
    batch = next(loop.to_device([batch], this.run.mesh))
    state, told = begin(name, this), []
    for _ in range(30):
        state, metrics = this.run.step(state, batch, this.run.root)
        told.append(jax.device_get(metrics))
    first, last = losses(told[:3]).mean(), losses(told[-3:]).mean()
    assert last < first - 0.05, (first, last)


@pytest.mark.full
@every_config
def test_accumulation_is_refused_iff_the_loss_couples_the_batch(name):
    if made(name, 8, 2).method.couples_batch:
        with pytest.raises(UserError, match="accumulate"):
            build_experiment(load(name, "smoke", "--config.accumulate=2"))
    else:
        this = build_experiment(load(name, "smoke", "--config.accumulate=2"))
        assert np.isfinite(losses(steps(this, 1, begin(name, this))[1])).all()


@pytest.mark.full
@pytest.mark.parametrize("name", ["simclr", "gan"])
def test_the_initial_state_does_not_depend_on_the_devices(name):
    ours = jax.device_get(made(name, 8, 2).run.init())
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), ours, initial(name))


COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


def collectives(text):
    """{kind: count} in compiled HLO; an asynchronous pair counts once."""
    counts = {kind: len(re.findall(rf" = .* {kind}(?:-start)?\(", text)) for kind in COLLECTIVES}
    return {kind: count for kind, count in counts.items() if count}


@pytest.mark.full
def test_collectives_of_simclr_are_those_that_the_method_needs():
    """Data parallel: only sums (statistics, gradients, that of the gathered embeddings) and one gathering of the embeddings; FSDP adds
    gathers of parameters.
    """
    counted = {}
    for fsdp in (1, 2):
        this = made("simclr", 8, fsdp)
        batch = next(loop.to_device([{k: v for k, v in this.batches[0].items() if k != "_skipped"}], this.run.mesh))
        state = this.run.abstract
        counted[fsdp] = collectives(this.run.trace(state, batch, this.run.root).lower().compile().as_text())
    assert counted == {1: {"all-reduce": 24, "all-gather": 1}, 2: {"all-reduce": 30, "all-gather": 23}}

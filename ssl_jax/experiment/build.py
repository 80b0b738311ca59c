"""From a config to an `Experiment`: data, method, mesh and compiled step. Shared by all verbs."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from ssl_jax.augment.views import output_size
from ssl_jax.data.catalog import DatasetFacts, open_data, read_facts
from ssl_jax.data.features import mismatch
from ssl_jax.data.geometry import check_host_ops, is_random, output_shape
from ssl_jax.data.pipeline import TrainBatches
from ssl_jax.engine import loop, optim, sharding
from ssl_jax.engine.method import Method
from ssl_jax.engine.online_probe import optimizers
from ssl_jax.engine.xla_options import xla_options
from ssl_jax.errors import UserError
from ssl_jax.experiment.config import resolve
from ssl_jax.experiment.contexts import encode_views_of
from ssl_jax.experiment.record import Experiment
from ssl_jax.experiment.sizes import check_arrays, check_memory
from ssl_jax.experiment.stages import open_stages
from ssl_jax.experiment.vocabulary import check_lengths, keep_vocabulary, open_vocabulary
from ssl_jax.methods import build_method
from ssl_jax.models.conv import use_convolutions


def fill_in(config, facts: DatasetFacts, platform: str | None = None) -> Any:
    """A copy of `config` with the fields that come from the data and the machine.

    Args:
        platform: 'cpu', 'gpu' or 'tpu', which decides what dtype='auto' is; None: that of the default backend.

    Raises:
        UserError: an unknown dtype or on_nonfinite, or keep_checkpoints below 1.
    """
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.data.image_shape = tuple(int(n) for n in facts.features["image"].shape)
        config.data.num_classes = facts.num_classes
        config.data.examples = facts.examples
        if facts.vocabulary:
            config.data.vocabulary = facts.vocabulary
        for name, count in config.data.get("classes", {}).items():
            config.data.classes[name] = count or facts.class_counts.get(name)
        config.dtype = compute_type(config.dtype, platform)
        if config.get("online_probe"):
            config.optim = optimizers(config)
    if config.on_nonfinite not in ("stop", "skip"):
        raise UserError(f"config.on_nonfinite={config.on_nonfinite!r} is unknown; choose stop or skip")
    if config.keep_checkpoints < 1:
        raise UserError(f"config.keep_checkpoints={config.keep_checkpoints} would keep none; give 1 or more")
    return config


def compute_type(dtype: str, platform: str | None = None) -> str:
    """'float32' or 'bfloat16'; 'auto' is bfloat16 but on CPUs. Raises UserError for another one."""
    if dtype == "auto":
        dtype = "float32" if (platform or jax.default_backend()) == "cpu" else "bfloat16"
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"config.dtype={dtype!r} is unknown; choose auto, float32 or bfloat16")
    return dtype


def check_eval_ops(config) -> None:
    """Raises UserError for `config.data.eval_ops` that do not exist or are random."""
    check_host_ops(config.data.eval_ops)
    if is_random(config.data.eval_ops):
        size = (output_shape(config.data.eval_ops) or (64,))[-2]
        raise UserError(
            f"config.data.eval_ops: {config.data.eval_ops[0][0]} is random, and evaluations need the same pictures every time; give "
            f"--config.data.eval_ops=\"[('resize_crop', dict(resize={size}, crop={size}))]\""
        )


def check_inputs(config, method: Method, facts: DatasetFacts, mesh) -> None:
    """Raises UserError unless the data have the inputs of `method` and the batches divide over the devices and parts of a step."""
    if "views" in config:
        crops, groups = config.data.image_shape[:-3], hasattr(config.views, "keys")
        if crops and (groups or len(config.views) != crops[0]):
            wanted = "groups of views, which need one image" if groups else f"{len(config.views)} views; give crops={len(config.views)}"
            raise UserError(f"config.data.ops: {config.data.ops[0][0]} makes {crops[0]} crops for config.views of {wanted}")
        output_size(config.views, config.data.image_shape[-3:-1])
    if reason := mismatch(method.inputs, facts.features, config.data.ops):
        given = f" with config.data.ops {config.data.ops[0][0]}" if config.data.ops else ""
        remedies = (f"; {remedy}" for name, remedy in method.absent.items() if name not in facts.features)
        raise UserError(f"method {config.method!r} on {config.data.name!r}{given}: {reason}{next(remedies, '')}")
    check_eval_ops(config)
    if not method.phases:
        raise UserError(
            f"config.method={config.method!r} has nothing to train; evaluate its file with launch.py evaluate --weights=FILE, or train "
            "a task on top of it with config.stages"
        )
    if config.accumulate < 1:
        raise UserError(f"config.accumulate={config.accumulate} must be at least 1")
    for phase in method.phases:
        if phase.repeat < 1:
            raise UserError(f"phase {phase.name!r} of {config.method!r} runs {phase.repeat} times in a step; give at least 1")
    repeats = max(phase.repeat for phase in method.phases)
    sharding.check_batch(config.batch_size, mesh, config.accumulate * repeats)
    if config.evals:
        sharding.check_batch(config.eval_batch_size, mesh, name="eval_batch_size")


def make_run(
    config, method: Method, mesh, total: int, frozen: Mapping, abstract: bool = False
) -> tuple[loop.CompiledRun, Mapping, Mapping]:
    """(run, {group: schedule}, shapes of a global batch) of a filled-in config. Compiles nothing.

    Args:
        total: steps of the whole run.
        frozen: trees of the stages and of `method.frozen`.
        abstract: `frozen` holds shapes, and the run is for tracing only.
    """
    example = {name: spec.batch(config.batch_size) for name, spec in method.inputs.items()}
    run, schedules = loop.compile_run(
        method,
        functools.partial(
            optim.make_optimizers, config.optim, total=total, batch_size=config.batch_size, examples=config.data.examples
        ),
        mesh,
        config.sharding,
        config.seed,
        example,
        frozen,
        accumulate=config.accumulate,
        skip_nonfinite=config.on_nonfinite == "skip",
        xla=xla_options(config.xla, mesh.devices.flat[0].platform),
        abstract=abstract,
    )
    check_arrays(run.abstract, example)
    return run, schedules, example


def jitted_in(mesh, function: Callable) -> Callable:
    """`function` compiled under the mesh, as the step is.

    Without it every device would compute the whole batch of sharded parameters.
    """

    @functools.wraps(function)
    def in_mesh(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    counts = [name for name in inspect.signature(function).parameters if name == "count"]
    return jax.jit(in_mesh, static_argnames=counts)


def build_experiment(config, devices=None, workdir: Path | None = None) -> Experiment:
    """Check the config, the data and the devices, then describe the run. Compiles nothing.

    Args:
        devices: of the mesh; None: all.
        workdir: where the vocabulary of texts is kept; None builds it from the train split.

    Raises:
        UserError: one line for each mistake.
    """
    use_convolutions(config.get("convolutions", "auto"))  # earlier runs have no such key
    mesh = sharding.make_mesh(config.mesh, devices)
    sharding.warm_up_connections(mesh)
    train = open_data(config.data, config.data.train_split)
    vocabulary = open_vocabulary(config, train, workdir)
    facts = read_facts(config.data, train, vocabulary)
    config = fill_in(config, facts)
    durations = resolve(config, len(train))
    config, frozen = open_stages(config)
    method = build_method(config)
    frozen |= {name: read() for name, read in method.frozen.items()}
    check_inputs(config, method, facts, mesh)
    check_lengths(method, vocabulary)
    batches = TrainBatches(
        train,
        config.data.ops,
        config.batch_size,
        config.seed,
        *sharding.local_parts(mesh),
        inputs=method.inputs,
        vocabulary=vocabulary,
    )
    run, schedules, example = make_run(config, method, mesh, durations["total"], frozen)
    check_memory(run.abstract, example, mesh)
    keep_vocabulary(vocabulary, workdir)

    jitted = functools.partial(jitted_in, mesh)
    encode_views = jitted(encode_views_of(method)) if method.views else None
    fns, sampler = jax.tree.map(jitted, (method.fns, method.sampler))
    return Experiment(
        config,
        method,
        batches,
        run,
        schedules,
        durations,
        encode=jitted(method.encode),
        encode_views=encode_views,
        fns=fns,
        sampler=sampler,
        cache={},
        vocabulary=vocabulary,
    )

"""From a config to everything that runs: data, method, mesh, compiled step, evaluations. Shared by all verbs."""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
import json
import logging
import os
import platform
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ssl_jax.augment.views import output_size
from ssl_jax.data.catalog import DatasetFacts, open_data, read_facts
from ssl_jax.data.features import mismatch
from ssl_jax.data.pipeline import TrainBatches, eval_batches
from ssl_jax.data.reader import DEFAULT
from ssl_jax.data.vocabulary import Vocabulary, build_vocabulary, from_json, to_json
from ssl_jax.engine import loop, optim, sharding
from ssl_jax.engine.checkpoint import write_json
from ssl_jax.engine.method import Method, ModelFns, Sampler, State, inference_state
from ssl_jax.engine.xla_options import xla_options
from ssl_jax.errors import UserError
from ssl_jax.evals import run as evals
from ssl_jax.evals.context import Context, EvaluatedModel, pixel_context
from ssl_jax.experiment import distributed
from ssl_jax.experiment.config import resolve
from ssl_jax.experiment.extractors import open_extractor
from ssl_jax.experiment.stages import open_stages
from ssl_jax.methods import build_method

log = logging.getLogger(__name__)
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "numpy")


class Experiment(NamedTuple):
    """A config with its data, its method and its compiled step."""

    config: Any  # resolved: image_shape, num_classes, examples and dtype are filled in
    method: Method
    batches: TrainBatches
    run: loop.CompiledRun
    schedules: Mapping
    durations: Mapping[str, int]  # steps: 'total', 'evaluate', 'checkpoint'
    encode: Callable  # jitted method.encode
    encode_views: Callable | None  # jitted, for alignment
    fns: ModelFns  # method.fns, jitted
    sampler: Sampler | None  # method.sampler, jitted
    known: dict  # what evaluations found out about the real images, which do not change within the run
    vocabulary: Mapping[str, Vocabulary]  # of the texts that become token ids


def start_jax() -> None:
    """Of every process: the persistent compilation cache, and the other processes of the run."""
    distributed.initialize()
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ssl_jax" / "xla"
    if not jax.config.jax_compilation_cache_dir:  # JAX_COMPILATION_CACHE_DIR of the environment comes first
        jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 2.0)


def fill_in(config, facts: DatasetFacts, platform: str | None = None) -> Any:
    """A copy of `config` with what only the data and the machine know. `platform`: 'cpu', 'tpu', ...; None is the one at hand."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.data.image_shape = tuple(int(n) for n in facts.features["image"].shape)
        config.data.num_classes = facts.num_classes
        config.data.examples = facts.examples
        if facts.vocabulary:
            config.data.vocabulary = facts.vocabulary
        if config.dtype == "auto":
            config.dtype = "float32" if (platform or jax.default_backend()) == "cpu" else "bfloat16"
    if config.dtype not in ("float32", "bfloat16"):
        raise UserError(f"config.dtype={config.dtype!r} is unknown; choose auto, float32 or bfloat16")
    if config.on_nonfinite not in ("stop", "skip"):
        raise UserError(f"config.on_nonfinite={config.on_nonfinite!r} is unknown; choose stop or skip")
    if config.keep_checkpoints < 1:
        raise UserError(f"config.keep_checkpoints={config.keep_checkpoints} would keep none of them; give 1 or more")
    return config


def check_inputs(config, method: Method, facts: DatasetFacts, mesh) -> None:
    """Raises UserError unless the data have what `method` needs and the batches divide over `mesh` and the parts of a step."""
    if "views" in config:
        output_size(config.views, config.data.image_shape[-3:-1])
    if reason := mismatch(method.inputs, facts.features, config.data.ops):
        given = f" with config.data.ops {config.data.ops[0][0]}" if config.data.ops else ""
        raise UserError(f"method {config.method!r} on {config.data.name!r}{given}: {reason}")
    if config.accumulate < 1:
        raise UserError(f"config.accumulate={config.accumulate} must be at least 1")
    for phase in method.phases:
        if phase.repeat < 1:
            raise UserError(f"phase {phase.name!r} of {config.method!r} runs {phase.repeat} times in a step; give at least 1")
    repeats = max(phase.repeat for phase in method.phases)
    sharding.check_batch(config.batch_size, mesh, config.accumulate * repeats)
    if config.evals:
        sharding.check_batch(config.eval_batch_size, mesh, name="eval_batch_size")


def make_run(config, method: Method, mesh, total: int, frozen: Mapping, abstract: bool = False) -> tuple[loop.CompiledRun, Mapping, Mapping]:
    """(the run of a config that is filled in, {group: schedule}, the shapes of a global batch); nothing is compiled yet."""
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
    return run, schedules, example


def build_experiment(config, devices=None, workdir: Path | None = None) -> Experiment:
    """Check everything that can be checked before compiling, then describe the run (nothing is compiled yet).

    Args:
        workdir: of the run, where the vocabulary of its texts is kept; None builds it from the train split.

    Raises:
        UserError: with one line for each kind of mistake.
    """
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
        train, config.data.ops, config.batch_size, config.seed, *sharding.local_parts(mesh), inputs=method.inputs, vocabulary=vocabulary
    )
    run, schedules, _ = make_run(config, method, mesh, durations["total"], frozen)

    def jitted(function):
        """Compiled for the mesh, as the step is: without one every device computes the whole batch of sharded parameters."""

        @functools.wraps(function)
        def in_mesh(*args):
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                return function(*args)

        counts = [name for name in inspect.signature(function).parameters if name == "count"]
        return jax.jit(in_mesh, static_argnames=counts)

    encode_views = jitted(_encode_views(method)) if method.views else None
    fns, sampler = jax.tree.map(jitted, (method.fns, method.sampler))
    return Experiment(config, method, batches, run, schedules, durations, jitted(method.encode), encode_views, fns, sampler, {}, vocabulary)


def open_vocabulary(config, train, workdir: Path | None) -> dict[str, Vocabulary]:
    """The vocabulary of each text in `config.data.vocabulary`: that of the run, or that of the train split, written into `workdir`.

    Raises:
        UserError: it has another number of words than the run was started with.
    """
    sizes, path = dict(config.data.get("vocabulary", {})), workdir and workdir / "vocabulary.json"
    if not sizes:
        return {}
    if path and path.is_file():
        found = from_json(json.loads(path.read_text()))
    else:
        found = build_vocabulary(train, list(sizes))
        if path:
            write_json(path, to_json(found))
    for name, size in sizes.items():
        if name not in found or size not in (None, len(found[name].tokens)):
            there = f"{len(found[name].tokens)} words" if name in found else "no words"
            raise UserError(f"config.data.vocabulary.{name}={size}, but {path or 'the train split'} has {there}; leave the number out")
    return found


def check_lengths(method: Method, vocabulary: Mapping[str, Vocabulary]) -> None:
    """Raises UserError where a text of the train split does not fit the length that `method` declares."""
    for name, (shape, _) in method.inputs.items():
        if name in vocabulary and shape[-1] < vocabulary[name].longest:
            raise UserError(f"input {name!r} has {shape[-1]} tokens; the longest text has {vocabulary[name].longest}")


def open_eval(config, split: str, mesh=None, inputs=DEFAULT, vocabulary: Mapping[str, Vocabulary] = {}):
    """Unaugmented batches of 'train' (the bank) or 'test' (the queries): this process's parts of them, or whole without a mesh.

    `inputs`: names of features, or {name: Spec}, which says how long lists are.
    """
    source = open_data(config.data, {"train": config.data.train_split, "test": config.data.test_split}[split])
    share = (0, 1) if mesh is None else sharding.local_parts(mesh)
    return eval_batches(source, config.data.eval_ops, config.eval_batch_size, *share, inputs=inputs, vocabulary=vocabulary)


def eval_opener(this: Experiment) -> Callable:
    """(split, names of features) -> batches of this process; lists are as long as the method declares them."""

    def open_batches(split, names=DEFAULT):
        inputs = {name: this.method.inputs.get(name) if name not in DEFAULT else None for name in names}
        return open_eval(this.config, split, this.run.mesh, inputs, this.vocabulary)

    return open_batches


def context(this: Experiment, state: State) -> Context:
    """What evaluations may see of a state.

    Raises:
        UserError: the config asks for an evaluation that the method offers nothing for.
    """
    opened = any_context(this, state)
    evals.check_needs(this.config.evals, opened)
    return opened


def any_context(this: Experiment, state: State) -> Context:
    """The same for other evaluations than those of the config."""
    from ssl_jax.experiment.sampler import open_between, open_labels, open_samples  # which are about an Assembly

    config, bind = this.config, lambda function: functools.partial(function, state.params, inference_state(state))
    fns = jax.tree.map(bind, this.fns)
    return Context(
        bind(this.encode),
        eval_opener(this),
        split_names(config),
        this.run.mesh,
        bind(this.encode_views) if this.encode_views else None,
        model=EvaluatedModel(
            functools.partial(open_extractor, mesh=this.run.mesh),
            this.known,
            fns,
            codes=jax.eval_shape(fns.codebook).shape[0] if fns.codebook else None,
            samples=open_samples(this, state),
            sampled_labels=open_labels(this),
            between=open_between(this, state),
        ),
        notes=this.method.notes,
    )


def _encode_views(method: Method):
    """(params, mutable, images uint8 [B, H, W, 3], key) -> pooled features of the views, [B, V, D]."""

    def encode_views(params, mutable, images, key):
        views = method.views(images, key)
        pooled = []
        for group in views.values() if isinstance(views, Mapping) else (views,):  # one size each
            features = method.encode(params, mutable, group.reshape(-1, *group.shape[2:]))["pooled"]
            pooled.append(features.reshape(*group.shape[:2], -1))
        return jnp.concatenate(pooled, 1)

    return encode_views


def raw_pixels(config, mesh) -> Context:
    """The floor: the same evaluations on pixels."""
    return pixel_context(functools.partial(open_eval, config, mesh=mesh), split_names(config), mesh)


def split_names(config) -> dict[str, str]:
    """{'train': 'scenes:train+resize_crop-32-32', 'test': ...}: what a protocol has to say of the data and how they are prepared."""
    ops = [f"+{name}-{'-'.join(map(str, arguments.values()))}".replace(" ", "") for name, arguments in config.data.eval_ops]
    ops += [f"+{name}={feature}" for name, feature in sorted(config.data.get("features", {}).items())]
    splits = {"train": config.data.train_split, "test": config.data.test_split}
    return {split: f"{config.data.name}:{name}{''.join(ops)}" for split, name in splits.items()}


def provenance() -> dict:
    """Versions, commit and machine, for the workdir and the model card."""
    root = Path(__file__).resolve().parents[2]
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # no git here
        commit = ""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "packages": versions,
        "python": platform.python_version(),
        "commit": commit or "unknown",
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }



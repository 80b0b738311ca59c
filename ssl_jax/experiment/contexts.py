"""What evaluations see of an experiment: batches, features and functions of the model, bound to one state."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from ssl_jax.data.catalog import open_data
from ssl_jax.data.labels import label_form
from ssl_jax.data.pipeline import eval_batches
from ssl_jax.data.reader import DEFAULT
from ssl_jax.data.sources import is_path
from ssl_jax.data.vocabulary import Vocabulary
from ssl_jax.engine import sharding
from ssl_jax.engine.method import Method, State, inference_state
from ssl_jax.evals.context import Context, EvaluatedModel, pixel_context
from ssl_jax.experiment.extractors import open_extractor
from ssl_jax.experiment.record import Experiment
from ssl_jax.experiment.sampler import open_between, open_labels, open_samples


def model_context(experiment: Experiment, state: State) -> Context:
    """The context of the model with the weights of `state`; `evals.check_needs` checks it against the evaluations."""

    def bind(function):
        return functools.partial(function, state.params, inference_state(state))

    fns = jax.tree.map(bind, experiment.fns)
    return Context(
        bind(experiment.encode),
        eval_opener(experiment),
        split_names(experiment.config),
        experiment.run.mesh,
        bind(experiment.encode_views) if experiment.encode_views else None,
        model=EvaluatedModel(
            functools.partial(open_extractor, mesh=experiment.run.mesh),
            experiment.cache,
            fns,
            ("image", *(name for name in experiment.method.inputs if name != "image")),
            class_names=experiment.batches.source.class_names if experiment.batches else {},  # a file of weights has no train split
            codes=jax.eval_shape(fns.codebook).shape[0] if fns.codebook else None,
            samples=open_samples(experiment, state),
            sampled_labels=open_labels(experiment),
            between=open_between(experiment, state),
            vocabulary=experiment.vocabulary,
        ),
        notes=experiment.method.notes,
    )


def raw_pixel_context(config, mesh) -> Context:
    """The context of the baseline 'raw pixels': the same evaluations on pixels as features."""
    return pixel_context(functools.partial(open_eval, config, mesh=mesh), split_names(config), mesh)


def eval_opener(experiment: Experiment) -> Callable:
    """(split, names of features) -> unaugmented batches of this process. Lists have the lengths that the method declares."""

    def open_batches(split, names=DEFAULT):
        inputs = {name: experiment.method.inputs.get(name) if name not in DEFAULT else None for name in names}
        return open_eval(experiment.config, split, experiment.run.mesh, inputs, experiment.vocabulary)

    return open_batches


def open_eval(config, split: str, mesh=None, inputs=DEFAULT, vocabulary: Mapping[str, Vocabulary] = {}):
    """Unaugmented batches of 'train', 'bank' or 'test'. Without `inputs` they have the label only if it is a class, or several.

    Args:
        mesh: batches hold this process's rows; None: all rows.
        inputs: names of features, or {name: Spec}, which gives the lengths of lists.
    """
    source = open_data(config.data, split_of(config, split))
    if inputs == DEFAULT and label_form(source)[0] == "":
        inputs = ("image",)
    share = (0, 1) if mesh is None else sharding.local_parts(mesh)
    return eval_batches(source, config.data.eval_ops, config.eval_batch_size, *share, inputs=inputs, vocabulary=vocabulary)


def split_names(config) -> dict[str, str]:
    """{'train': 'scenes:train+resize_crop-32-32', 'test': ...}: data and preprocessing, as protocols name them."""
    # Pictures of many sizes may have an EXIF orientation, which earlier versions did not apply.
    ops = ["+upright"] * bool(config.data.eval_ops or is_path(config.data.name))
    ops += [f"+{name}-{'-'.join(map(str, arguments.values()))}".replace(" ", "") for name, arguments in config.data.eval_ops]
    ops += [f"+{name}={feature}" for name, feature in sorted(config.data.get("features", {}).items())]
    splits = ("train", "test", *(("bank",) if config.data.get("bank_split") else ()))
    return {split: f"{config.data.name}:{split_of(config, split)}{''.join(ops)}" for split in splits}


def split_of(config, split: str) -> str:
    """The name in the data of 'train', 'test' or 'bank', which is the train split unless `config.data.bank_split` is set."""
    own = {"train": config.data.train_split, "test": config.data.test_split, "bank": config.data.get("bank_split")}
    return own[split] or config.data.train_split


def encode_views_of(method: Method) -> Callable:
    """(params, mutable, images uint8 [B, H, W, 3], key) -> pooled features of the augmented views, [B, V, D]."""

    def encode_views(params, mutable, images, key):
        views = method.views(images, key)
        pooled = []
        for group in views.values() if isinstance(views, Mapping) else (views,):  # the views of a group have one size
            features = method.encode(params, mutable, group.reshape(-1, *group.shape[2:]))["pooled"]
            pooled.append(features.reshape(*group.shape[:2], -1))
        return jnp.concatenate(pooled, 1)

    return encode_views

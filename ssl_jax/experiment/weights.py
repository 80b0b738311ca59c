"""An encoder that others have trained, in place of a run: what evaluations and features need of an experiment."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

from ssl_jax.engine import sharding
from ssl_jax.engine.loop import CompiledRun
from ssl_jax.engine.method import Method, ModelFns, State
from ssl_jax.experiment.build import check_eval_ops, compute_type, jitted_in
from ssl_jax.experiment.record import Experiment
from ssl_jax.experiment.stages import fingerprint_of, foreign_config, foreign_weights, initial_weights
from ssl_jax.methods import build_method
from ssl_jax.models.conv import use_convolutions
from ssl_jax.models.pretrained.foreign import read_encoder


class OpenedWeights(NamedTuple):
    """A file of weights beside a config that gives its data."""

    config: Any  # of the data and evaluations, with `method` and `model` of the encoder
    method: Method
    weights: dict  # {'params', 'mutable'}, NumPy
    fingerprint: str


def open_weights(path: str, config) -> OpenedWeights:
    """The encoder in the file `path`, for the data of `config`.

    Raises:
        UserError: the file holds no encoder that is known, or the config cannot be evaluated.
    """
    check_eval_ops(config)
    use_convolutions(config.get("convolutions", "auto"))
    config, encoder = config.copy_and_resolve_references(), read_encoder(path)
    with config.unlocked():
        config.dtype = compute_type(config.dtype)
        own = foreign_config(encoder, config)
        config.method, config.stages, config.references = own.method, {}, {}
        config.warm_start.workdir = ""
        del config.model
        config.model = own.model
    weights = foreign_weights(encoder)
    return OpenedWeights(config, build_method(own), weights, fingerprint_of(weights))


def weights_experiment(opened: OpenedWeights, devices=None) -> tuple[Experiment, State]:
    """(an experiment that only evaluates, its state with the weights of the file at step 0)."""
    config, method = opened.config, opened.method
    mesh = sharding.make_mesh(config.mesh, devices)
    sharding.warm_up_connections(mesh)
    sharding.check_batch(config.eval_batch_size, mesh, name="eval_batch_size")
    whole = jax.sharding.NamedSharding(mesh, sharding.P())

    def state_of(weights) -> State:
        placed = jax.tree.map(lambda x: sharding.put_global(np.asarray(x), whole), weights)
        return State(np.zeros((), np.int32), placed["params"], {}, placed["mutable"], {})

    def init() -> State:
        return state_of(initial_weights(method, config.seed, {}))

    run = CompiledRun(mesh, abstract=None, init=init, step=None, trace=None, traces=None, root=None)
    encode = jitted_in(mesh, method.encode)
    experiment = Experiment(config, method, None, run, {}, {}, encode, None, ModelFns(), None, cache={}, vocabulary={})
    return experiment, state_of(opened.weights)

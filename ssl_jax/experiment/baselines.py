"""The baselines of a run: the same evaluations of its initial state and of raw pixels."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ssl_jax.engine.method import State
from ssl_jax.errors import UserError
from ssl_jax.evals import run as evals
from ssl_jax.evals.context import Context
from ssl_jax.experiment.contexts import model_context, raw_pixel_context
from ssl_jax.experiment.evaluations import Evaluations
from ssl_jax.experiment.record import Experiment
from ssl_jax.experiment.warm_start import warm_start

log = logging.getLogger(__name__)
BASELINES = ("raw pixels", "untrained")


def initial_state(experiment: Experiment) -> State:
    """The state at step 0: initialized from the seed, then with the weights of `config.warm_start`.

    Raises:
        UserError: the run of `config.warm_start` is gone.
    """
    state, start = experiment.run.init(), experiment.config.warm_start
    return warm_start(state, start.workdir, start.rules) if start.workdir else state


def baseline_context(experiment: Experiment, name: str) -> Context:
    """The context of 'raw pixels' or 'untrained'."""
    if name == "raw pixels":
        return raw_pixel_context(experiment.config, experiment.run.mesh)
    return model_context(experiment, initial_state(experiment)._replace(opt={}))  # beside the state that is trained


def add_missing(experiment: Experiment, evaluations: Evaluations, names: Sequence[str]) -> None:
    """Measure the baselines `names` where they lack an evaluation that 'trained' has, under the same protocol."""
    for name in names:
        labels = evaluations.not_beside_trained(name)
        if name == "raw pixels":
            labels = [label for label in labels if label in evals.pixel_evals(evaluations.spec)]
        if not labels:
            continue
        try:
            context = baseline_context(experiment, name)
        except UserError as error:  # the run of `config.warm_start` may be gone; training needs it no longer
            log.warning("%r is not measured: %s", name, error)
            continue
        evaluations.add(name, 0, context, labels)

"""What a trained model has to beat: the same evaluations of its own initial state, and of raw pixels."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ssl_jax.data.sources import FolderSource, open_source
from ssl_jax.engine.method import State
from ssl_jax.errors import UserError
from ssl_jax.evals import run as evals
from ssl_jax.evals.context import Context
from ssl_jax.experiment.build import Experiment, any_context, raw_pixels
from ssl_jax.experiment.evaluations import Evaluations
from ssl_jax.experiment.warm_start import warm_start

log = logging.getLogger(__name__)
BASELINES = ("raw pixels", "untrained")


def initial_state(this: Experiment) -> State:
    """The state at step 0, from the seed of the run; where the run began with weights of another one, it has those.

    Raises:
        UserError: those weights are not there any more.
    """
    state, start = this.run.init(), this.config.warm_start
    return warm_start(state, start.workdir, start.rules) if start.workdir else state


def baseline_context(this: Experiment, name: str) -> Context:
    """Of 'raw pixels' or 'untrained'."""
    return raw_pixels(this.config, this.run.mesh) if name == "raw pixels" else any_context(this, initial_state(this))


def add_missing(this: Experiment, evaluations: Evaluations, names: Sequence[str]) -> None:
    """Measure those evaluations of the baselines `names` that are not there yet under the protocol of the newest ones of 'trained'."""
    for name in names:
        labels = evaluations.not_beside_trained(name)
        if name == "raw pixels":
            labels = [label for label in labels if label in evals.pixel_evals(evaluations.spec)]
        if not labels:
            continue
        try:
            context = baseline_context(this, name)
        except UserError as error:  # what a run began with may be gone by now, and the run goes on without it
            log.warning("%r is not measured: %s", name, error)
            continue
        evaluations.add(name, 0, context, labels)


def unmeasurable(config, spec: evals.Evals) -> dict[str, str]:
    """{label: what is missing}: evaluations that read a feature, such as the label, which the data do not have."""
    if not spec:
        return {}
    source = open_source(config.data.name, config.data.train_split, config.data.data_dir)
    without_classes = isinstance(source, FolderSource) and source.label_names is None
    features = [name for name in source.features if not (without_classes and name == "label")]
    return {
        label: f"kind={spec[label]['kind']!r} needs {name!r}, and {config.data.name!r} has only {', '.join(features)}"
        for label, name in evals.missing_features(spec, features).items()
    }

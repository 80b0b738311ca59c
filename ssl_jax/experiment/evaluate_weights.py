"""Evaluates an encoder that others have trained, with the data and evaluations of a config."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from ssl_jax.engine.checkpoint import write_json
from ssl_jax.engine.records import read_evaluations, read_json
from ssl_jax.errors import MachineFault, UserError, workdir_not_made
from ssl_jax.evals import run as evals
from ssl_jax.evals.context import Context
from ssl_jax.experiment import config as configs
from ssl_jax.experiment.baselines import add_missing, baseline_context
from ssl_jax.experiment.contexts import model_context
from ssl_jax.experiment.distributed import start_jax
from ssl_jax.experiment.evaluate import measurable, parse_evals, parse_subjects
from ssl_jax.experiment.evaluations import Evaluations
from ssl_jax.experiment.overrides import refuse_derived
from ssl_jax.experiment.weights import OpenedWeights, open_weights, weights_experiment

log = logging.getLogger(__name__)
RECORD = "weights.json"


def evaluate_weights(
    path: str,
    path_and_variant: str,
    overrides: Sequence[str],
    output: Path,
    wanted: Sequence[str] = (),
    subject_names: str | None = None,
) -> None:
    """Evaluate the encoder in the file `path`; prints the table, and writes evaluations.json and weights.json in `output`.

    Args:
        path_and_variant: a config, for its data and evaluations.
        wanted, subject_names: as in `evaluate.evaluate`; 'trained' is the encoder of the file, at step 0.

    Raises:
        UserError: the file holds no known encoder, there is no such evaluation, or `output` has the numbers of another file.
        MachineFault: the numbers were printed, and cannot be saved.
    """
    refuse_derived(overrides)
    config = configs.load(path_and_variant, overrides)
    asked, subjects = parse_evals(wanted, config.evals), parse_subjects(subject_names)
    with config.unlocked():
        config.references = {}
        if asked:
            config.evals = ConfigDict(asked)
    evals.check(config.evals)
    read_evaluations(output)  # damaged ones are refused before anything is built
    start_jax()
    opened = open_weights(path, config)
    spec = measurable(config, bool(asked), subjects)
    _record(output, path, opened)
    experiment, state = weights_experiment(opened)
    context = model_context(experiment, state)
    if not asked:
        spec = _offered(spec, context)
    evaluations = Evaluations(output, spec, must_save=False)
    evals.check_needs(spec, context)
    for name in subjects or ["trained"]:
        evaluations.add(name, 0, context if name == "trained" else baseline_context(experiment, name))
    if subjects is None:
        add_missing(experiment, evaluations, config.baselines)
    evaluations.show(experiment.config)
    if evaluations.unsaved:
        raise MachineFault(f"the numbers above are not saved: {evaluations.unsaved}")


def _offered(spec: Mapping[str, Mapping], context: Context) -> dict[str, Mapping]:
    """The evaluations of a config that need nothing but features; others are of its own method."""
    kept = {}
    for label, entry in spec.items():
        missing = [name for name in evals.find(entry["kind"]).needs if name != "model" and context.model.offered(name) is None]
        if missing:
            log.info("evals.%s is left out: an encoder alone gives no %s", label, missing[0])
        else:
            kept[label] = entry
    return kept


def _record(output: Path, path: str, opened: OpenedWeights) -> None:
    """Note in `output` whose numbers it has. Raises UserError if it has those of another encoder or of a run."""
    if (output / "config.json").exists():
        raise UserError(f"--output={output} is the directory of a run; choose another")
    model = configs.plain(opened.config)["model"]
    record, there = {"fingerprint": opened.fingerprint, **model, "dtype": opened.config.dtype}, output / RECORD
    if there.exists():
        before = read_json(there, dict, remedy="choose another --output")
        for key, value in record.items():
            if before.get(key) != value:
                raise UserError(
                    f"--output={output} has evaluations of other weights ({key} {before.get(key)}, here {value}); choose another"
                )
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise workdir_not_made(output, error, "--output") from None
    write_json(there, {"weights": path, **record, "data": configs.plain(opened.config)["data"]})

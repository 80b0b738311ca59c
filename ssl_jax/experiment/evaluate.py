"""Evaluates a checkpoint by the names of evaluations, with the baselines of the run."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from ssl_jax.engine.checkpoint import Checkpoints, Corrupt
from ssl_jax.engine.method import State
from ssl_jax.engine.records import read_evaluations
from ssl_jax.errors import MachineFault, UserError
from ssl_jax.evals import run as evals
from ssl_jax.experiment.baselines import BASELINES, add_missing, baseline_context
from ssl_jax.experiment.build import build_experiment
from ssl_jax.experiment.contexts import model_context
from ssl_jax.experiment.distributed import start_jax
from ssl_jax.experiment.evaluations import Evaluations
from ssl_jax.experiment.overrides import apply_overrides, literal, refuse_derived
from ssl_jax.experiment.possible import impossible, possible
from ssl_jax.experiment.record import Experiment
from ssl_jax.experiment.workdir import read_config

log = logging.getLogger(__name__)
SUBJECTS = {"trained": "trained", **{name: name for name in BASELINES}, "pixels": "raw pixels"}


def evaluate(
    workdir: Path,
    overrides: Sequence[str] = (),
    step: int | None = None,
    wanted: Sequence[str] = (),
    subject_names: str | None = None,
) -> None:
    """Evaluate checkpoint `step` (None: the newest) of a run; prints the table and writes evaluations.json.

    Args:
        overrides: --config.KEY=VALUE arguments, which may change evaluations and data.
        wanted: evaluations in the notation of --eval; empty: those of the config.
        subject_names: in the notation of --subjects; None: the checkpoint, and baselines of the config that were not measured yet.

    Raises:
        UserError: there is no such run, checkpoint or evaluation, or an override is wrong.
        MachineFault: the numbers were printed, and cannot be saved in the workdir.
    """
    trained = read_config(workdir)
    refuse_derived(overrides)
    read_evaluations(workdir)  # damaged ones are refused before anything is built
    config = apply_overrides(trained.copy_and_resolve_references(), overrides)
    asked, subjects = parse_evals(wanted, config.evals), parse_subjects(subject_names)
    with config.unlocked():
        config.references = references(trained, config, asked or config.evals)
        if asked:
            config.evals = ConfigDict(asked)
    evals.check(config.evals)
    spec = measurable(config, bool(asked), subjects)
    start_jax()
    experiment = build_experiment(config, workdir=workdir)
    state = restore(workdir, experiment, step)
    evaluations, context = Evaluations(workdir, spec, must_save=False), model_context(experiment, state)
    evals.check_needs(spec, context)
    for name in subjects or ["trained"]:
        measured_at = int(state.step) if name == "trained" else 0
        evaluations.add(name, measured_at, context if name == "trained" else baseline_context(experiment, name))
    if subjects is None:
        add_missing(experiment, evaluations, experiment.config.baselines)
    evaluations.show(experiment.config)
    if evaluations.unsaved:
        raise MachineFault(f"the numbers above are not saved: {evaluations.unsaved}")


def parse_evals(texts: Sequence[str], own: Mapping) -> dict[str, dict]:
    """Parse every 'KIND[,option=value...]' into {label: {'kind': ..., option: value, ...}}.

    Values are Python literals, in brackets or quotes where they contain a comma, or else words. The label is the kind, such as
    'knn'. Where that is taken, here or in `own`, it is the kind with its options, such as 'knn_k200'.

    Raises:
        UserError: text that cannot be parsed, an unknown kind or option, a wrong value, or two of the same label.
    """
    found: dict[str, dict] = {}
    for text in texts:
        kind, *parts = split(text)
        entry = {"kind": kind}
        for part in parts:
            name, equals, value = (piece.strip() for piece in part.partition("="))
            if not equals or not name.isidentifier():
                raise UserError(f"--eval={text}: {part!r} is not understood; give KIND,option=value, with brackets around (1,2)")
            if name in entry:
                raise UserError(f"--eval={text}: {name} is given twice")
            entry[name] = literal(value)
        label = entry.pop("label", None)
        evals.check_entry(entry, f"--eval={text}", ": ")
        label = str(label) if label is not None else default_label(entry, {**own, **found})
        if not re.fullmatch(r"\w[\w.-]*", label):
            raise UserError(f"--eval={text}: label={label} names a file; use letters, digits and '_'")
        if label in found:
            raise UserError(f"--eval={text}: there are two evaluations {label!r}; give one of them another label=NAME")
        found[label] = entry
    return found


def default_label(entry: Mapping, others: Mapping[str, Mapping]) -> str:
    """The kind of `entry`; with its options where another evaluation has that label."""
    kind = entry["kind"]
    if kind not in others or evals.same(others[kind], entry):
        return kind
    options = [f"{name}{value}" for name, value in entry.items() if name != "kind"]
    return re.sub(r"[^\w.]+", "-", "_".join([kind, *options])).strip("-")


def split(text: str) -> list[str]:
    """Split `text` at the commas outside of brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for c in text:
        if c == "," and depth == 0 and not quote:
            parts.append("")
            continue
        parts[-1] += c
        if quote:
            quote = "" if c == quote else quote
        elif c in "'\"":
            quote = c
        else:
            depth += (c in "([{") - (c in ")]}")
    if depth or quote:
        raise UserError(f"--eval={text}: {'a quote' if quote else 'a bracket'} is open; close it")
    return [part.strip() for part in parts]


def parse_subjects(text: str | None) -> list[str] | None:
    """The subjects of evaluations.json that --subjects names; None where it was not given. Raises UserError for an unknown name."""
    if text is None:
        return None
    names = [part.strip().strip("'\"") for part in text.split(",")]
    for name in names:
        if name not in SUBJECTS:
            near = difflib.get_close_matches(name, SUBJECTS, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"choose of {', '.join(SUBJECTS)}"
            raise UserError(f"--subjects={text}: {name!r} is unknown; {hint}")
    return list(dict.fromkeys(SUBJECTS[name] for name in names))


def measurable(config, asked: bool, subjects: Sequence[str] | None) -> dict[str, Mapping]:
    """The evaluations of the config that its data and at least one of the `subjects` allow.

    Args:
        asked: the evaluations were given by --eval.

    Raises:
        UserError: an evaluation given by --eval cannot be measured, or the only subject is raw pixels and all need a model.
    """
    if asked:
        for label, reason in impossible(config, config.evals).items():
            raise UserError(f"--eval: {label} cannot be measured: it needs {reason}")
        spec = dict(config.evals.items())
    else:
        spec = possible(config).evals
    if subjects == ["raw pixels"] and spec and not evals.pixel_evals(spec):
        raise UserError(f"--subjects=pixels: {', '.join(spec)} need a model; give other evaluations with --eval, or other subjects")
    return spec


def references(trained, config, spec: Mapping) -> dict:
    """`config.references` of the run, for the evaluations that are the same on the same data as in its own config."""
    if config.data != trained.data:
        return {}
    same = {label for label in spec if label in trained.evals and evals.same(trained.evals[label], spec[label])}
    found = {}
    for name, metrics in trained.references.items():
        found[name] = {metric: value for metric, value in metrics.items() if metric.partition("/")[0] in same}
    return {name: metrics for name, metrics in found.items() if metrics}


def restore(workdir: Path, experiment: Experiment, step: int | None = None) -> State:
    """The state of checkpoint `step`, or of the newest; the run may still go on.

    Raises:
        UserError: there is no such checkpoint, or it is corrupt.
        MachineFault: the processes do not see the same checkpoints.
    """
    saved = Checkpoints(workdir / "checkpoints", read_only=True)
    steps = saved.agreed_steps()
    if not steps or (step is not None and step not in steps):
        raise UserError(f"{workdir} has no checkpoint {'' if step is None else step}; there are {steps or 'none'}")
    step = steps[-1] if step is None else step
    try:
        return saved.restore(step, experiment.run.abstract)
    except Corrupt as error:
        raise UserError(f"checkpoint {step} in {workdir} is corrupt: {error}; choose another --step of {steps}") from error
    finally:
        saved.close()

"""Evaluations of a checkpoint by name, with the baselines that it has to beat."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from ssl_jax.engine.checkpoint import Checkpoints, Corrupt
from ssl_jax.errors import UserError
from ssl_jax.evals import run as evals
from ssl_jax.experiment import config as configs
from ssl_jax.experiment.baselines import BASELINES, add_missing, baseline_context, unmeasurable
from ssl_jax.experiment.build import any_context, build_experiment, start_jax
from ssl_jax.experiment.evaluations import Evaluations
from ssl_jax.experiment.workdir import read_config

log = logging.getLogger(__name__)
SUBJECTS = {"trained": "trained", **{name: name for name in BASELINES}, "pixels": "raw pixels"}


def evaluate(
    workdir: Path, overrides: Sequence[str] = (), step: int | None = None, wanted: Sequence[str] = (), subject_names: str | None = None
) -> None:
    """Evaluate checkpoint `step` (None: the newest) of a run; prints the table and writes evaluations.json.

    Args:
        overrides: --config.KEY=VALUE arguments, of evaluations or data.
        wanted: evaluations as --eval names them; none: those of the config.
        subject_names: as --subjects names them; None: the checkpoint, and baselines of the config that were not measured yet.

    Raises:
        UserError: there is no such run, checkpoint or evaluation, or an override is wrong.
    """
    trained = read_config(workdir)
    config = configs.apply_overrides(trained.copy_and_resolve_references(), overrides)
    asked, subjects = parse_evals(wanted, config.evals), parse_subjects(subject_names)
    with config.unlocked():
        config.references = references(trained, config, asked or config.evals)
        if asked:
            config.evals = ConfigDict(asked)
    evals.check(config.evals)
    spec = measurable(config, bool(asked), subjects)
    start_jax()
    this = build_experiment(config, workdir=workdir)
    state = restore(workdir, this, step)
    evaluations, context = Evaluations(workdir, spec), any_context(this, state)
    evals.check_needs(spec, context)
    for name in subjects or ["trained"]:
        measured_at = int(state.step) if name == "trained" else 0
        evaluations.add(name, measured_at, context if name == "trained" else baseline_context(this, name))
    if subjects is None:
        add_missing(this, evaluations, this.config.baselines)
    evaluations.show(this.config)


def parse_evals(texts: Sequence[str], own: Mapping) -> dict[str, dict]:
    """{label: {'kind': ..., option: value, ...}} of every 'KIND[,option=value...]'.

    Values are Python literals, in brackets or quotes where they contain a comma, or else words. An evaluation is called as its kind, or
    where another one is called so, here or in `own`, as its kind and options: 'knn', 'knn_k200'.

    Raises:
        UserError: text that is not understood, an unknown kind or option, a wrong value, two of the same name.
    """
    found: dict[str, dict] = {}
    for text in texts:
        kind, *parts = split(text)
        entry = {"kind": kind}
        for part in parts:
            name, equals, value = (each.strip() for each in part.partition("="))
            if not equals or not name.isidentifier():
                raise UserError(f"--eval={text}: {part!r} is not understood; say KIND,option=value, with brackets around (1,2)")
            if name in entry:
                raise UserError(f"--eval={text}: {name} is given twice")
            entry[name] = configs.literal(value)
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
    """The kind, unless another evaluation is called so; with the options then."""
    kind = entry["kind"]
    if kind not in others or evals.same(others[kind], entry):
        return kind
    options = [f"{name}{value}" for name, value in entry.items() if name != "kind"]
    return re.sub(r"[^\w.]+", "-", "_".join([kind, *options])).strip("-")


def split(text: str) -> list[str]:
    """The parts of `text` between commas that are in no brackets and no quotes."""
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
    """Their names in evaluations.json; None where none are given. Raises UserError for another name."""
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
    """The evaluations of the config that its data, and one of the `subjects`, can have.

    Raises:
        UserError: none can be run, or one that was `asked` for by name cannot.
    """
    left_out = unmeasurable(config, config.evals)
    for label, reason in left_out.items():
        if asked:
            raise UserError(f"--eval: {label} cannot be measured: {reason}")
        log.warning("evals.%s is left out: %s", label, reason)
    spec = {label: entry for label, entry in config.evals.items() if label not in left_out}
    if subjects == ["raw pixels"] and spec and not evals.pixel_evals(spec):
        raise UserError(f"--subjects=pixels: {', '.join(spec)} need a model; give other evaluations with --eval, or other subjects")
    return spec


def references(trained, config, spec: Mapping) -> dict:
    """What was recorded beside the run, as far as the data and the evaluation are those that it was trained with."""
    if config.data != trained.data:
        return {}
    same = {label for label in spec if label in trained.evals and evals.same(trained.evals[label], spec[label])}
    found = {}
    for name, metrics in trained.references.items():
        found[name] = {metric: value for metric, value in metrics.items() if metric.partition("/")[0] in same}
    return {name: metrics for name, metrics in found.items() if metrics}


def restore(workdir, this, step: int | None = None):
    """The state of a finished or running run: checkpoint `step`, or the newest.

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
        return saved.restore(step, this.run.abstract)
    except Corrupt as error:
        raise UserError(f"checkpoint {step} in {workdir} is corrupt: {error}; choose another with --step, there are {steps}") from error
    finally:
        saved.close()

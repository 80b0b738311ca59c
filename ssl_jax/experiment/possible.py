"""Which evaluations of a config its data allow, decided from the data before anything is compiled."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from ssl_jax.data import labels
from ssl_jax.data.catalog import open_data
from ssl_jax.data.decode import CorruptImage
from ssl_jax.data.sources import Source
from ssl_jax.errors import UserError
from ssl_jax.evals import evaluator
from ssl_jax.evals import run as evals
from ssl_jax.experiment.contexts import split_of
from ssl_jax.experiment.record import Experiment

log = logging.getLogger(__name__)

LOOKED_AT = 64  # examples that the checks of a method see before a run


class Possible(NamedTuple):
    """What a run measures."""

    evals: dict[str, Mapping]  # the evaluations of the config that the data allow
    best_metric: str  # of the config; '' if its evaluation is left out


class _Splits:
    """The splits of `config.data`, opened once, with their labels."""

    def __init__(self, config):
        self.config = config
        self.source = functools.cache(lambda split: open_data(config.data, split_of(config, split)))
        self.labels = functools.cache(lambda split: labels.read_labels(self.source(split)))

    def name(self, split: str) -> str:
        return f"{self.config.data.name}:{split_of(self.config, split)}"


def impossible(config, spec: evals.Evals) -> dict[str, str]:
    """{label: what is missing} of the evaluations in `spec` that the data do not allow: "'label', and 'photos' has only image".

    They read a feature that the data lack, or labels that are no classes; or the data have too few examples or classes.

    Raises:
        UserError: there is no such split, or an option is larger than the data allow.
    """
    splits, found = _Splits(config), {}
    if spec:
        splits.source("test")  # every evaluation reads it, and a wrong name should not end the run after training
    for label, entry in spec.items():
        reason = _reason(splits, entry)
        if reason:
            found[label] = reason
        else:
            _check_counts(splits, label, entry)
    _tell_of_unknown_classes(splits, [label for label in spec if label not in found], spec)
    return found


def possible(config) -> Possible:
    """The evaluations of `config` that its data allow; one warning names the others and why.

    Raises:
        UserError: as `impossible`.
    """
    left_out = impossible(config, config.evals)
    best = config.best_metric
    if left_out:
        reasons: dict[str, list[str]] = {}
        for label, reason in left_out.items():
            reasons.setdefault(reason, []).append(f"evals.{label}")
        verbs = {1: "is left out: it needs"}
        parts = [f"{', '.join(names)} {verbs.get(len(names), 'are left out: they need')} {why}" for why, names in reasons.items()]
        if best.removeprefix("-").partition("/")[0] in left_out:
            parts.append(f"config.best_metric={best!r} is of these, so only the newest checkpoints are kept")
            best = ""
        log.warning("%s", "; ".join(parts))
    return Possible({label: entry for label, entry in config.evals.items() if label not in left_out}, best)


def check_training_labels(experiment: Experiment) -> None:
    """Raises UserError for labels that a method is to be trained on and that are no classes; not all may have been read."""
    config = experiment.config
    if _learns_classes(experiment):
        why = labels.fault(_Splits(config).labels("train"), config.data.num_classes)
        if why:
            raise UserError(
                f"method {config.method!r} learns from labels, and '{config.data.name}:{config.data.train_split}' {why}; give a "
                "labeled split with --config.data.train_split=NAME"
            )


def check_examples(experiment: Experiment) -> None:
    """Raises UserError for the first of `LOOKED_AT` examples of the train split that `Method.checks` refuse; the message names it."""
    data, reader = experiment.config.data, experiment.batches.reader
    count = len(experiment.batches.source)
    for index in range(0, count, -(-count // LOOKED_AT)) if experiment.method.checks else ():
        try:
            values = reader.decode(index)
        except CorruptImage:  # left out with a warning when its turn comes
            continue
        for name, check in experiment.method.checks.items():
            if why := check(values[name]):
                raise UserError(f"data '{data.name}:{data.train_split}': {name!r} of {reader.source.called(index)} {why}")


def labels_in_range(batches: Iterable[Mapping], experiment: Experiment) -> Iterator[Mapping]:
    """`batches`. Raises UserError for the first label or answer that is no class, since its loss would be NaN, or that of another."""
    data, learns = experiment.config.data, _learns_classes(experiment)
    inputs = experiment.method.inputs
    classes = {name: size for name, size in getattr(data, "vocabulary", {}).items() if name in inputs and inputs[name].shape == ()}
    for batch in batches:
        for name, size in classes.items():
            if why := labels.fault(labels.Labels(batch[name], False), size):
                raise UserError(f"a training batch of '{data.name}:{data.train_split}' {why} in {name!r}; correct these data")
        if learns and (why := labels.fault(labels.Labels(batch["label"], False), data.num_classes)):
            raise UserError(f"a training batch of '{data.name}:{data.train_split}' {why}; correct the labels of the data")
        yield batch


def checked(batches: Iterable[Mapping], experiment: Experiment) -> Iterator[Mapping]:
    """`batches`. Raises UserError for the first one that `Method.checks` refuse."""
    data = experiment.config.data
    for batch in batches:
        for name, check in experiment.method.checks.items():
            if why := check(batch[name]):
                raise UserError(f"{name!r} in a training batch of '{data.name}:{data.train_split}' {why}")
        yield batch


def _learns_classes(experiment: Experiment) -> bool:
    label = experiment.method.inputs.get("label")
    return label is not None and label.shape == () and bool(experiment.config.data.num_classes)


def _reason(splits: _Splits, entry: Mapping) -> str:
    """What an evaluation needs and the data lack, '' if nothing: "'label', and 'photos' has only image"."""
    kind, train = evals.find(entry["kind"]), splits.source("train")
    where, as_numbers = repr(splits.config.data.name), splits.config.data.get("vocabulary", {})  # of texts
    for name in evaluator.data_features(kind, entry):
        if name in kind.data and name == "label":
            if reason := _labels_reason(splits, kind, evaluator.with_defaults(kind, entry)):
                return f"'label', and {reason}"
        elif name not in train.features:
            return f"{name!r}, and {where} has only {', '.join(train.features)}"
        elif (None in train.features[name].shape or train.features[name].dtype == "object") and name not in as_numbers:
            return f"{name!r} as numbers, and {where} has {train.features[name]}"
    for split, least in kind.smallest.items():
        if len(splits.source(split)) < least:
            return f"{least} examples of {splits.name(split)!r}, which has {len(splits.source(split))}"
    return ""


def _labels_reason(splits: _Splits, kind: evaluator.Evaluator, options: Mapping) -> str:
    """Why a kind cannot use the labels, '' if it can."""
    for split in ("bank", "test"):
        source = splits.source(split)
        form, why = labels.label_form(source)
        if not form:
            return f"{splits.config.data.name!r} {why}"
        if form == "several" and not (kind.several and kind.several(**options)):
            remedy = "; kind='linear' with solver='lbfgs' measures them"
            return f"{splits.config.data.name!r} has several labels per example ({source.features['label']}){remedy}"
        own = splits.labels(split)
        why = labels.fault(own, source.num_classes) or (split == "bank" and labels.few(own))
        if why:
            return f"{splits.name(split)!r} {why}{_other_bank(splits) if split == 'bank' else ''}"
    return ""


def _other_bank(splits: _Splits) -> str:
    """'; give --config.data.bank_split=train ...' if the split 'train' of the data has labels, and is not the bank."""
    data = splits.config.data
    if "train" in (data.train_split, data.get("bank_split")):
        return ""
    try:
        source: Source = open_data(data, "train")
    except UserError:  # it has no such split
        return ""
    found = labels.read_labels(source)
    if labels.fault(found, source.num_classes) or labels.few(found):
        return ""
    return "; --config.data.bank_split=train evaluates with the labels of that split"


def _check_counts(splits: _Splits, label: str, entry: Mapping) -> None:
    """Raises UserError for an option that is larger than the number of examples allows."""
    kind = evals.find(entry["kind"])
    options = evaluator.with_defaults(kind, entry)
    for name, (split, beside) in kind.at_most.items():
        split = options.get(split, split)  # an option may say which split
        count = len(splits.source(split))
        if options[name] > count - beside:
            raise UserError(
                f"evals.{label}.{name}={options[name]} is too large for {splits.name(split)!r}, which has {count} examples; give "
                f"--config.evals.{label}.{name}={count - beside} or less"
            )


def _tell_of_unknown_classes(splits: _Splits, measured: list[str], spec: evals.Evals) -> None:
    """Warn if the test split has classes that the bank lacks, where all labels are known."""
    using = [label for label in measured if "label" in evals.find(spec[label]["kind"]).data]
    if not using or labels.label_form(splits.source("test"))[0] != "class":
        return
    bank, test = splits.labels("bank"), splits.labels("test")
    unknown = np.setdiff1d(test.values, bank.values) if bank.whole and test.whole else ()
    if len(unknown):
        names = splits.source("test").label_names
        shown = ", ".join(names[i] if names else str(i) for i in unknown[:5].tolist()) + (", ..." if len(unknown) > 5 else "")
        log.warning(
            "%r has %d of %d examples of classes that %r lacks (%s): no evaluation can get them right",
            splits.name("test"), np.isin(test.values, unknown).sum(), len(test.values), splits.name("bank"), shown,
        )  # fmt: skip

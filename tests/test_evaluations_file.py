"""Numbers that cannot be saved: `evaluate` keeps them to print them, and `train` ends."""

import pathlib

import numpy as np
import pytest
from eval_contexts import make_context

from ssl_jax.engine.checkpoint import write_json
from ssl_jax.errors import MachineFault
from ssl_jax.experiment.evaluations import Evaluations

SPEC = {"shape": {"kind": "representation", "examples": 8}}


@pytest.fixture
def unwritable(tmp_path):
    (tmp_path / ".evaluations.lock").mkdir()  # open() fails, also for root
    return tmp_path


def test_numbers_that_cannot_be_saved_are_kept_to_be_printed(unwritable):
    context = make_context(np.random.default_rng(0).integers(0, 256, (16, 4, 4, 3), np.uint8))
    kept = Evaluations(unwritable, SPEC, must_save=False)
    for subject, step in (("raw pixels", 0), ("trained", 3)):
        assert kept.add(subject, step, context)["shape/l2_std"] > 0
    assert [entry["subject"] for entry in kept.entries] == ["raw pixels", "trained"]
    assert isinstance(kept.unsaved, MachineFault)
    assert not pathlib.Path(unwritable, "evaluations.json").exists()


def test_training_ends_where_numbers_cannot_be_saved(unwritable):
    context = make_context(np.random.default_rng(0).integers(0, 256, (16, 4, 4, 3), np.uint8))
    with pytest.raises(MachineFault, match="cannot be written"):
        Evaluations(unwritable, SPEC).add("trained", 3, context)


def test_options_that_an_earlier_version_lacks_are_taken_to_be_the_defaults(tmp_path):
    """`kind="linear"` without `labels` used all labels, so nothing is measured again."""
    options = {"kind": "linear", "solver": "ridge", "l2": [1e-2]}
    entry = {"subject": "trained", "step": 3, "metrics": {"linear/top1": 50.0}, "protocols": {"linear": "p"}}
    entry["evals"] = {"linear": options}
    write_json(tmp_path / "evaluations.json", [entry])
    for spec, missing in (({}, []), ({"labels": 1.0}, []), ({"labels": 0.01}, ["linear"])):
        found = Evaluations(tmp_path, {"linear": {**options, "l2": (1e-2,), **spec}})
        assert found.unmeasured("trained", 3) == missing

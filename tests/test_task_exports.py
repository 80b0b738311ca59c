"""Exports of whole tasks: image in, boxes or answers out, with the words of the run in the card."""

import jax
import numpy as np
import pytest
from test_evaluate_by_name import load_tiny, save_run

import ssl_jax
from launch import main
from ssl_jax.errors import UserError
from ssl_jax.experiment.build import build_experiment
from ssl_jax.experiment.vocabulary import keep_vocabulary

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 48, 48, 3), np.uint8)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """{method: (workdir, its exports)}"""
    found = {}
    for name in ("detection", "vqa"):
        folder = tmp_path_factory.mktemp(name)
        config = load_tiny(name)
        workdir = save_run(config, folder)
        keep_vocabulary(build_experiment(config).vocabulary, folder)
        assert main(["export", f"--workdir={workdir}", "--step=2", "--format=all", f"--output={folder}/out"]) == 0
        found[name] = {form: ssl_jax.load(folder / "out" / form) for form in ("stablehlo", "orbax")}
    return found


@pytest.mark.full
def test_exported_detector_gives_boxes_with_falling_scores(exported):
    program, weights = (exported["detection"][form].detect(IMAGES) for form in ("stablehlo", "orbax"))
    assert program["boxes"].shape == (*program["scores"].shape, 4) and program["labels"].dtype == np.int32
    assert np.all(np.diff(program["scores"], axis=1) <= 0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), program, weights)
    with pytest.raises(UserError, match="has no function 'answer'"):
        exported["detection"]["orbax"].answer(IMAGES, ["what?"] * 3)


@pytest.mark.full
def test_exported_question_answerer_reads_words_as_the_run_did(exported):
    questions = ["what color is the object?", "How many pebbles?", "is the zebra an object?"]
    for form, model in exported["vqa"].items():
        found = model.answer(IMAGES, questions)
        assert found["logits"].shape == (3, len(model.card["vocabulary"]["answer"]["tokens"])), form
        np.testing.assert_allclose(np.sum(found["attention"], (1, 2)), 1, rtol=1e-5)
        shouted = model.answer(IMAGES, [text.upper() for text in questions])
        np.testing.assert_array_equal(found["logits"], shouted["logits"])
        with pytest.raises(UserError, match=r"question 'is is .*' has 99 words, more than the declared 8"):
            model.answer(IMAGES[:1], ["is " * 99])

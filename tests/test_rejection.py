"""Rejection sampling: which are kept, how many of each class, from the same latents; and nothing at all with acceptance=1."""

import pathlib
import types

import jax
import numpy as np
import pytest
from eval_contexts import made, means
from feature_clouds import mesh_of

from ssl_jax.errors import UserError
from ssl_jax.evals import run as evals
from ssl_jax.evals.kinds import generation, sample_class_accuracy
from ssl_jax.evals.lib import linear_probe, real_features, rejection
from ssl_jax.experiment import config as configs
from ssl_jax.experiment.build import build_experiment
from ssl_jax.experiment.contexts import model_context

ROOT = pathlib.Path(__file__).parent.parent
COLORS = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200]])


def painted(labels, strength):
    """uint8 [N, 4, 4, 3]: from gray to the color of the class; the surer that class, the stronger."""
    colors = 93 + strength[:, None] * (COLORS[labels] - 93)
    return np.broadcast_to(np.round(colors).astype(np.uint8)[:, None, None], (len(labels), 4, 4, 3))


def strengths(count, seed):
    return np.random.default_rng(seed).permutation(np.linspace(0.1, 1, count))


def drawn(count, seed):
    return np.random.default_rng(seed + 100).choice(3, count, p=(0.5, 0.3, 0.2)).astype(np.int32)


def pictured(mesh=None, calls=None, **others):
    """A context of colored squares in batches of 16; the strength of a picture is its latent."""
    real = {split: np.random.default_rng(seed).integers(0, 3, 90) for seed, split in enumerate(("train", "test"))}
    images = [painted(labels, np.random.default_rng(seed + 2).uniform(0.3, 0.9, 90)) for seed, labels in enumerate(real.values())]

    def samples(count, seed, truncation, *labels):
        if calls is not None:
            calls.append((count, seed, truncation, *map(tuple, labels)))
        pictures = painted(*labels or [drawn(count, seed)], strengths(count, seed))
        yield from (pictures[start : start + 16] for start in range(0, count, 16))

    offered = dict(samples=samples, sampled_labels=drawn, extractor=means) | others
    return made(*images, None, real, mesh=mesh, **offered)


def test_processes_share_a_batch_in_its_order(monkeypatch):
    """What is gathered from all of them is what one alone would have: rows go with their labels."""
    images = painted(drawn(12, 0), strengths(12, 0))

    def batches(*own):
        monkeypatch.setattr(real_features, "parts", lambda mesh: (own, 4))
        return list(real_features.sampled(images[:8], iter([images[8:11]]), types.SimpleNamespace(mesh="a mesh"), np.arange(11)))

    whole, some, others = batches(0, 1, 2, 3), batches(0, 3), batches(1, 2)
    for number, batch in enumerate(whole):
        for name, rows in batch.items():
            first, last = np.split(some[number][name], 2)
            np.testing.assert_array_equal(np.concatenate([first, others[number][name], last]), rows)


def best(labels, seed, acceptance):
    """(classes asked for, bool: kept) by a loop over classes."""
    asked = rejection.candidates(labels, acceptance)
    strength, kept = strengths(len(asked), seed), np.zeros(len(asked), bool)
    for label in range(3):
        own = np.flatnonzero(asked == label)
        assert len(own) == int(np.ceil(round(np.sum(labels == label) / acceptance, 6)))
        kept[own[np.argsort(-strength[own])[: np.sum(labels == label)]]] = True
    return asked, kept


@pytest.mark.parametrize(("count", "acceptance", "devices"), [(50, 0.5, None), (41, 0.3, 8), (23, 0.75, None), (5, 0.1, None)])
def test_exactly_the_best_of_each_class_are_kept(count, acceptance, devices):
    labels, calls = drawn(count, 3), []
    given = pictured(devices and mesh_of(devices), calls)
    with jax.transfer_guard("disallow"):
        batches, classes, told = rejection.preferred(given, means(), labels, 3, 0.7, acceptance)
    batches, (asked, kept) = list(batches), best(labels, 3, acceptance)
    np.testing.assert_array_equal(np.concatenate(batches), painted(asked, strengths(len(asked), 3))[kept])
    np.testing.assert_array_equal(classes, asked[kept])
    np.testing.assert_array_equal(np.bincount(classes, minlength=3), np.bincount(labels, minlength=3))
    assert {len(batch) for batch in batches[:-1]} <= {16} and len(batches[-1]) <= 16
    assert calls == 2 * [(len(asked), 3, 0.7, tuple(asked))]
    assert told == f" acceptance={acceptance} of each class by a linear probe lbfgs on extractor=means of train(90)"


def test_candidates_are_asked_for_in_the_order_of_what_is_wanted():
    np.testing.assert_array_equal(rejection.candidates(np.array([2, 0, 0, 2, 1]), 0.5), [2, 2, 0, 0, 0, 0, 2, 2, 1, 1])
    np.testing.assert_array_equal(rejection.candidates(np.array([1, 1, 1, 5, 1]), 0.75), [1, 1, 1, 1, 5, 5, 1, 1])
    for acceptance in (0.1, 0.3, 0.7, 1.0):
        tenfold = rejection.candidates(np.repeat([4, 1], round(acceptance * 700)), acceptance)
        np.testing.assert_array_equal(tenfold, np.repeat([4, 1], 700))  # not one more for the sake of rounding


def test_of_equal_scores_the_earlier_is_kept():
    np.testing.assert_array_equal(rejection.places(np.array([1, 0, 1, 1, 0]), np.array([2.0, 5, 1, 2, 5])), [1, 0, 0, 2, 1])


def test_evaluations_see_the_pictures_that_are_kept():
    asked, kept = best(drawn(40, 1), 1, 0.5)
    pictures = painted(asked, strengths(len(asked), 1))[kept]
    alone = pictured(samples=lambda *_: iter([pictures]), sampled_labels=lambda *_: asked[kept])
    for label, entry, judged in (
        ("g", dict(kind="generation", extractor="means", examples=40, subsets=2, subset_size=30, seed=1), "truncation=none"),
        ("c", dict(kind="sample_class_accuracy", extractor="means", examples=40, seed=1), "seed=1"),
    ):
        (half,) = evals.run({label: {**entry, "acceptance": 0.5}}, pictured()).values()
        (whole,) = evals.run({label: entry}, alone).values()
        assert half.metrics == pytest.approx(whole.metrics, rel=1e-5)
        selected = " acceptance=0.5 of each class by a linear probe lbfgs on extractor=means of train(90)"
        assert half.protocol == whole.protocol.replace(judged, judged + selected, 1) != whole.protocol


def test_without_rejection_samples_are_asked_for_as_ever_and_no_classifier_is_fitted(monkeypatch):
    monkeypatch.setattr(linear_probe, "fit", lambda *_, **__: pytest.fail("a classifier"))
    entry = dict(kind="generation", extractor="means", examples=40, subsets=2, subset_size=30)
    calls = []
    results = [evals.run({"one": entry | more}, pictured(calls=calls)) for more in ({}, {"acceptance": 1.0}, {"acceptance": 1})]
    assert results[0] == results[1] == results[2] and "acceptance" not in results[0]["one"].protocol
    assert calls == 3 * [(40, 0, None)]


@pytest.mark.parametrize("kind", ["generation", "classified"])
@pytest.mark.parametrize("acceptance", [0.0, -0.5, 1.5, float("nan")])
def test_shares_out_of_range_are_named_before_anything_runs(kind, acceptance):
    with pytest.raises(UserError, match=rf"^evals\.one\.acceptance={acceptance} must be above 0 and at most 1$") as error:
        evals.check({"one": dict(kind=kind, acceptance=acceptance)})
    assert "\n" not in str(error.value)


def test_samples_without_classes_are_told_before_training_and_classes_without_images_in_one_line():
    without = pictured(sampled_labels=None)
    evals.check_needs({"one": dict(kind="generation", extractor="means")}, without)
    with pytest.raises(UserError, match=r"^generation acceptance=0\.5 needs samples of classes, and this model knows none; leave"):
        evals.check_needs({"one": dict(kind="generation", extractor="means", acceptance=0.5)}, without)
    red = painted(np.zeros(8, int), np.ones(8))
    unknown = pictured(sampled_labels=lambda count, seed: np.full(count, 7), samples=lambda *_: iter([red]))
    for module in (generation, sample_class_accuracy):
        with pytest.raises(UserError, match="no image of some classes"):
            module.evaluate(unknown, extractor="means", examples=8, acceptance=0.5)


@pytest.mark.full
def test_a_run_makes_its_candidates_twice_of_the_latents_that_its_sampler_has():
    small = ("--config.data.train_split=train[:96]", "--config.data.test_split=test[:64]", "--config.eval_batch_size=32")
    this = build_experiment(configs.load(f"{ROOT}/configs/biggan.py:smoke", small))

    @jax.jit
    def sample(generator, latents, truncation):
        shade = jax.nn.sigmoid(latents["z"][:, :12]) + latents["label"][:, None] / 9
        return shade.reshape(-1, 2, 2, 3) / 2

    this = this._replace(sampler=this.sampler._replace(prepare=lambda *_: None, sample=sample))  # a generator that takes no time
    opened = model_context(this, this.run.abstract)
    labels = opened.pictures.sampled_labels(30, 4)
    batches, classes, _ = rejection.preferred(opened, means(), labels, 4, None, 0.4)
    got = np.concatenate(list(batches))
    asked, pictures = rejection.candidates(labels, 0.4), []
    for i, start in enumerate(range(0, len(asked), 32)):
        part = asked[start : start + 32]
        latents = {**this.sampler.latents(jax.random.key(4 + (i << 20)), 32), "label": np.resize(part, 32)}
        pictures.append(np.round(np.asarray(sample(None, latents, None)) * 255)[: len(part)].astype(np.uint8))
    pictures = np.concatenate(pictures)
    x = pictures.astype(np.float64).mean((1, 2))
    probe = next(value for value in opened.pictures.known.values() if isinstance(value, linear_probe.Probe))
    logits = ((x - probe.mean) / probe.std) @ probe.kernel[:, 0] + probe.bias[0]
    own = logits[np.arange(len(asked)), asked]
    logits[np.arange(len(asked)), asked] = -np.inf
    odds, kept = own - np.log(np.exp(logits).sum(1)), np.zeros(len(asked), bool)
    for label in np.unique(labels):
        mine = np.flatnonzero(asked == label)
        kept[mine[np.argsort(-odds[mine], kind="stable")[: np.sum(labels == label)]]] = True
    np.testing.assert_array_equal(classes, asked[kept])
    np.testing.assert_array_equal(got, pictures[kept])

"""Rejection sampling: which samples are kept, how many per class, and from which latents; no change for acceptance=1."""

import pathlib
import re
import types

import jax
import numpy as np
import pytest
from eval_contexts import make_context, means
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


def converged(protocol):
    """A protocol without what it says of fits that did not converge: separable data and small penalties have no near optimum."""
    return re.sub(r" \(\d+ of \d+ fits not converged\)", "", protocol)


def painted(labels, strength):
    """uint8 [N, 4, 4, 3], from gray to the color of the class by `strength`."""
    colors = 93 + strength[:, None] * (COLORS[labels] - 93)
    return np.broadcast_to(np.round(colors).astype(np.uint8)[:, None, None], (len(labels), 4, 4, 3))


def strengths(count, seed):
    return np.random.default_rng(seed).permutation(np.linspace(0.1, 1, count))


def random_labels(count, seed):
    return np.random.default_rng(seed + 100).choice(3, count, p=(0.5, 0.3, 0.2)).astype(np.int32)


def sample_context(mesh=None, calls=None, **others):
    """A context of colored squares in batches of 16; the latent of a sample is its strength."""
    real = {split: np.random.default_rng(seed).integers(0, 3, 90) for seed, split in enumerate(("train", "test"))}
    images = [painted(labels, np.random.default_rng(seed + 2).uniform(0.3, 0.9, 90)) for seed, labels in enumerate(real.values())]

    def samples(count, seed, truncation, *labels):
        if calls is not None:
            calls.append((count, seed, truncation, *map(tuple, labels)))
        images = painted(*labels or [random_labels(count, seed)], strengths(count, seed))
        yield from (images[start : start + 16] for start in range(0, count, 16))

    functions = dict(samples=samples, sampled_labels=random_labels, extractor=means) | others
    return make_context(*images, None, real, mesh=mesh, **functions)


def test_sample_batches_of_processes_join_to_the_whole_batch(monkeypatch):
    """The rows and labels of all processes together equal those of a single process."""
    images = painted(random_labels(12, 0), strengths(12, 0))

    def batches(*own):
        monkeypatch.setattr(real_features, "local_parts", lambda mesh: (own, 4))
        return list(real_features.sample_batches(images[:8], iter([images[8:11]]), types.SimpleNamespace(mesh="a mesh"), np.arange(11)))

    whole, some, others = batches(0, 1, 2, 3), batches(0, 3), batches(1, 2)
    for number, batch in enumerate(whole):
        for name, rows in batch.items():
            first, last = np.split(some[number][name], 2)
            np.testing.assert_array_equal(np.concatenate([first, others[number][name], last]), rows)


def best(labels, seed, acceptance):
    """(classes of the candidates, bool: kept) by a loop over classes."""
    candidates = rejection.candidate_labels(labels, acceptance)
    strength, kept = strengths(len(candidates), seed), np.zeros(len(candidates), bool)
    for label in range(3):
        own = np.flatnonzero(candidates == label)
        assert len(own) == int(np.ceil(round(np.sum(labels == label) / acceptance, 6)))
        kept[own[np.argsort(-strength[own])[: np.sum(labels == label)]]] = True
    return candidates, kept


@pytest.mark.parametrize(("count", "acceptance", "devices"), [(50, 0.5, None), (41, 0.3, 8), (23, 0.75, None), (5, 0.1, None)])
@pytest.mark.full
def test_rejection_keeps_the_best_samples_of_each_class(count, acceptance, devices):
    labels, calls = random_labels(count, 3), []
    given = sample_context(devices and mesh_of(devices), calls)
    with jax.transfer_guard("disallow"):
        batches, classes, protocol = rejection.select_samples(given, means(), labels, 3, 0.7, acceptance)
    batches, (candidates, kept) = list(batches), best(labels, 3, acceptance)
    np.testing.assert_array_equal(np.concatenate(batches), painted(candidates, strengths(len(candidates), 3))[kept])
    np.testing.assert_array_equal(classes, candidates[kept])
    np.testing.assert_array_equal(np.bincount(classes, minlength=3), np.bincount(labels, minlength=3))
    assert {len(batch) for batch in batches[:-1]} <= {16} and len(batches[-1]) <= 16
    assert calls == 2 * [(len(candidates), 3, 0.7, tuple(candidates))]
    assert converged(protocol) == f" acceptance={acceptance} of each class by a linear probe lbfgs on extractor=means of train(90)"


def test_candidate_labels_keep_the_order_of_the_labels():
    np.testing.assert_array_equal(rejection.candidate_labels(np.array([2, 0, 0, 2, 1]), 0.5), [2, 2, 0, 0, 0, 0, 2, 2, 1, 1])
    np.testing.assert_array_equal(rejection.candidate_labels(np.array([1, 1, 1, 5, 1]), 0.75), [1, 1, 1, 1, 5, 5, 1, 1])
    for acceptance in (0.1, 0.3, 0.7, 1.0):
        tenfold = rejection.candidate_labels(np.repeat([4, 1], round(acceptance * 700)), acceptance)
        np.testing.assert_array_equal(tenfold, np.repeat([4, 1], 700))  # rounding adds no candidate


def test_rank_in_class_breaks_ties_by_index():
    np.testing.assert_array_equal(rejection.rank_in_class(np.array([1, 0, 1, 1, 0]), np.array([2.0, 5, 1, 2, 5])), [1, 0, 0, 2, 1])


@pytest.mark.full
def test_evaluations_with_acceptance_use_the_selected_samples():
    candidates, kept = best(random_labels(40, 1), 1, 0.5)
    images = painted(candidates, strengths(len(candidates), 1))[kept]
    alone = sample_context(samples=lambda *_: iter([images]), sampled_labels=lambda *_: candidates[kept])
    for label, entry, before in (
        ("g", dict(kind="generation", extractor="means", examples=40, subsets=2, subset_size=30, seed=1), "truncation=none"),
        ("c", dict(kind="sample_class_accuracy", extractor="means", examples=40, seed=1), "seed=1"),
    ):
        (half,) = evals.run({label: {**entry, "acceptance": 0.5}}, sample_context()).values()
        (whole,) = evals.run({label: entry}, alone).values()
        assert half.metrics == pytest.approx(whole.metrics, rel=1e-5)
        selected = " acceptance=0.5 of each class by a linear probe lbfgs on extractor=means of train(90)"
        half, whole = converged(half.protocol), converged(whole.protocol)
        assert half == whole.replace(before, before + selected, 1) != whole


def test_acceptance_one_fits_no_classifier_and_changes_nothing(monkeypatch):
    monkeypatch.setattr(linear_probe, "fit", lambda *_, **__: pytest.fail("a classifier"))
    entry = dict(kind="generation", extractor="means", examples=40, subsets=2, subset_size=30)
    calls = []
    results = [evals.run({"one": entry | more}, sample_context(calls=calls)) for more in ({}, {"acceptance": 1.0}, {"acceptance": 1})]
    assert results[0] == results[1] == results[2] and "acceptance" not in results[0]["one"].protocol
    assert calls == 3 * [(40, 0, None)]


@pytest.mark.parametrize("kind", ["generation", "sample_class_accuracy"])
@pytest.mark.parametrize("acceptance", [0.0, -0.5, 1.5, float("nan")])
def test_acceptance_out_of_range_raises_before_anything_runs(kind, acceptance):
    with pytest.raises(UserError, match=rf"^evals\.one\.acceptance={acceptance} must be (above 0 and at most 1|finite)$") as error:
        evals.check({"one": dict(kind=kind, acceptance=acceptance)})
    assert "\n" not in str(error.value)


@pytest.mark.full
def test_acceptance_needs_classes_and_real_images_of_each_class():
    without = sample_context(sampled_labels=None)
    evals.check_needs({"one": dict(kind="generation", extractor="means")}, without)
    with pytest.raises(UserError, match=r"^generation acceptance=0\.5 needs samples of classes, and this model knows none; leave"):
        evals.check_needs({"one": dict(kind="generation", extractor="means", acceptance=0.5)}, without)
    red = painted(np.zeros(8, int), np.ones(8))
    unknown = sample_context(sampled_labels=lambda count, seed: np.full(count, 7), samples=lambda *_: iter([red]))
    for module in (generation, sample_class_accuracy):
        with pytest.raises(UserError, match="no image of some classes"):
            module.evaluate(unknown, extractor="means", examples=8, acceptance=0.5)


@pytest.mark.full
def test_selected_samples_of_a_run_are_those_of_its_sampler_latents():
    small = ("--config.data.train_split=train[:96]", "--config.data.test_split=test[:64]", "--config.eval_batch_size=32")
    experiment = build_experiment(configs.load(f"{ROOT}/configs/biggan.py:smoke", small))

    @jax.jit
    def sample(generator, latents, truncation):
        shade = jax.nn.sigmoid(latents["z"][:, :12]) + latents["label"][:, None] / 9
        return shade.reshape(-1, 2, 2, 3) / 2

    experiment = experiment._replace(sampler=experiment.sampler._replace(prepare=lambda *_: None, sample=sample))  # fast
    opened = model_context(experiment, experiment.run.abstract)
    labels = opened.model.sampled_labels(30, 4)
    batches, classes, _ = rejection.select_samples(opened, means(), labels, 4, None, 0.4)
    got = np.concatenate(list(batches))
    candidates, images = rejection.candidate_labels(labels, 0.4), []
    for i, start in enumerate(range(0, len(candidates), 32)):
        part = candidates[start : start + 32]
        latents = {**experiment.sampler.latents(jax.random.key(4 + (i << 20)), 32), "label": np.resize(part, 32)}
        images.append(np.round(np.asarray(sample(None, latents, None)) * 255)[: len(part)].astype(np.uint8))
    images = np.concatenate(images)
    x = images.astype(np.float64).mean((1, 2))
    probe = next(value for value in opened.model.cache.values() if isinstance(value, linear_probe.Fit)).probe
    logits = ((x - probe.mean) / probe.std) @ probe.kernel[:, 0] + probe.bias[0]
    own = logits[np.arange(len(candidates)), candidates]
    logits[np.arange(len(candidates)), candidates] = -np.inf
    odds, kept = own - np.log(np.exp(logits).sum(1)), np.zeros(len(candidates), bool)
    for label in np.unique(labels):
        mine = np.flatnonzero(candidates == label)
        kept[mine[np.argsort(-odds[mine], kind="stable")[: np.sum(labels == label)]]] = True
    np.testing.assert_array_equal(classes, candidates[kept])
    np.testing.assert_array_equal(got, images[kept])

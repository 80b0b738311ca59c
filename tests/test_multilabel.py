"""The linear probe of images with several classes, against scikit-learn."""

import jax
import numpy as np
import pytest
from eval_contexts import make_context
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score

from ssl_jax.evals import run as evals
from ssl_jax.evals.lib import multilabel_probe
from ssl_jax.evals.lib.features import Features
from ssl_jax.evals.lib.linear_probe import predict


def clouds(count, seed, classes=4, dim=6):
    generator = np.random.default_rng(seed)
    weights = np.random.default_rng(9).standard_normal((dim, classes))
    x = generator.standard_normal((count, dim)) * 3 + 5
    y = ((x - 5) @ weights + 4 * generator.standard_normal((count, classes)) > 1).astype(np.int32)
    return Features(x.astype(np.float32), y)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.full
def test_probe_of_each_class_is_that_of_scikit_learn(devices):
    bank, query, l2 = clouds(101, 0), clouds(80, 1), 0.03
    mesh = jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices])
    chosen = multilabel_probe.fit(bank, (l2,), 500, True, 0.1, 0, mesh)
    logits = predict(chosen.probe, query.x, mesh)[:, 0]
    mean, std = bank.x.mean(0), bank.x.std(0)
    expected = []
    for c in range(4):
        model = LogisticRegression(C=1 / (l2 * len(bank.x)), tol=1e-8, max_iter=1000).fit((bank.x - mean) / std, bank.y[:, c])
        expected.append(model.decision_function((query.x - mean) / std))
    np.testing.assert_allclose(logits, np.stack(expected, 1), atol=2e-3)
    score = np.mean([average_precision_score(query.y[:, c], expected[c]) for c in range(4)])
    assert multilabel_probe.mean_average_precision(logits, query.y) == pytest.approx(100 * score, abs=0.05)
    assert chosen.unconverged == 0


def test_l2_is_chosen_on_held_out_images_and_few_iterations_are_told():
    bank = clouds(200, 0)
    chosen = multilabel_probe.fit(bank, (1e3, 1e-2), 500, True, 0.3, 0, None)
    assert chosen.l2 == (1e3, 1e-2)[int(chosen.validation.argmax())]
    assert multilabel_probe.fit(bank, (1e-2,), 2, True, 0.3, 0, None).unconverged == 2


def test_class_without_an_example_is_left_out_of_the_mean():
    scores, labels = np.random.default_rng(0).random((9, 3)), np.zeros((9, 3), int)
    labels[:4, 0] = 1
    assert multilabel_probe.mean_average_precision(scores, labels) == 100 * average_precision_score(labels[:, 0], scores[:, 0])
    assert np.isnan(multilabel_probe.mean_average_precision(scores, 0 * labels))


@pytest.mark.full
def test_linear_evaluation_of_label_vectors_gives_the_mean_average_precision(monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (40, 4, 4, 3), np.uint8)
    labels = (images.reshape(40, -1)[:, :3] > 127).astype(np.int32)
    context = make_context(images)
    batches = context._open_batches

    def open_batches(split, names=()):
        for i, batch in enumerate(batches(split, names)):
            own = labels[16 * i : 16 * i + 16]
            yield {**batch, "label": np.concatenate([own, np.zeros((16 - len(own), 3), np.int32)])}

    context._open_batches = open_batches
    result = evals.run({"linear": {"kind": "linear", "solver": "lbfgs", "l2": (1e-3,), "iterations": 200}}, context)["linear"]
    assert set(result.metrics) == {"linear/map", "linear/validation_map"}
    assert result.metrics["linear/map"] == 100  # the labels are pixels of the images that the probe was fitted to
    assert "mean over 3 classes of scikit-learn's average precision" in result.protocol

"""Linear probes against scikit-learn, closed forms and steps by hand."""

import jax
import numpy as np
import pytest
from feature_clouds import blobs, fake_context, mesh_of

from ssl_jax.engine.sharding import put_global
from ssl_jax.evals.kinds import linear
from ssl_jax.evals.lib import linear_probe, logistic, second_moments
from ssl_jax.evals.lib.features import Features, flat_mesh, hits, moments, share_of_each_class
from ssl_jax.experiment.evaluations import comparable


def standardized(bank, *others):
    return [(f.x.astype(np.float64) - bank.x.mean(0)) / bank.x.std(0) for f in (bank, *others)]


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.full
def test_lbfgs_equals_scikit_learn(devices):
    sklearn_linear = pytest.importorskip("sklearn.linear_model", reason="parity test")
    bank, query = blobs(403), blobs(101, seed=1)
    l2 = 1e-2
    fitted = linear_probe.fit(bank, "lbfgs", mesh=mesh_of(devices), l2=(l2,))
    x, q = standardized(bank, query)
    reference = sklearn_linear.LogisticRegression(C=1 / (l2 * len(x)), tol=1e-8, max_iter=5000)
    reference.fit(x, bank.y)
    logits = linear_probe.predict(fitted.probe, query.x, mesh_of(devices))[:, 0]
    log_probability = np.log(reference.predict_proba(q))
    np.testing.assert_allclose(jax.nn.log_softmax(logits), log_probability, atol=2e-3)
    np.testing.assert_allclose(fitted.probe.kernel[:, 0], reference.coef_.T, atol=1e-3)


def test_lbfgs_without_eigenbasis_has_the_same_optimum(monkeypatch):
    bank = blobs(403)
    rotated = linear_probe.fit(bank, "lbfgs", standardize=False, l2=(1e-2,)).probe
    monkeypatch.setattr(logistic, "LARGEST_BASIS", 15)
    along_axes = linear_probe.fit(bank, "lbfgs", standardize=False, l2=(1e-2,)).probe
    np.testing.assert_allclose(along_axes.kernel, rotated.kernel, atol=2e-3)
    logits = [jax.nn.log_softmax(linear_probe.predict(probe, bank.x)) for probe in (rotated, along_axes)]
    np.testing.assert_allclose(*logits, rtol=2e-3, atol=5e-3)


@pytest.mark.full
def test_lbfgs_equals_scikit_learn_on_badly_scaled_features():
    """Badly scaled, off-center, rank-deficient features: the optimum is that of scikit-learn on the same features."""
    sklearn_linear = pytest.importorskip("sklearn.linear_model", reason="parity test")
    bank = blobs(300)
    bank = Features(np.concatenate([bank.x * 3 + 10, bank.x[:, :4], np.ones((300, 1), np.float32)], 1), bank.y)
    fitted = linear_probe.fit(bank, "lbfgs", standardize=False, l2=(1e-2,))
    reference = sklearn_linear.LogisticRegression(C=1 / (1e-2 * 300), tol=1e-8, solver="newton-cholesky")
    log_probability = np.log(reference.fit(bank.x.astype(np.float64), bank.y).predict_proba(bank.x))
    logits = linear_probe.predict(fitted.probe, bank.x)[:, 0]
    np.testing.assert_allclose(jax.nn.log_softmax(logits), log_probability, rtol=2e-3, atol=2e-3)


def test_lbfgs_ends_by_the_gradient_also_at_small_penalties(monkeypatch):
    """Their optima are flat: the loss hardly decreases long before them. Without the eigenbasis, as for raw pixels."""
    sklearn_linear = pytest.importorskip("sklearn.linear_model", reason="parity test")
    monkeypatch.setattr(logistic, "LARGEST_BASIS", 1)
    bank, query, l2 = blobs(403), blobs(101, seed=1), 1e-5
    fitted = linear_probe.fit(bank, "lbfgs", l2=(l2,))
    assert (fitted.fits, fitted.unconverged) == (2, 0)
    x, q = standardized(bank, query)
    reference = sklearn_linear.LogisticRegression(C=1 / (l2 * len(x)), tol=1e-8, solver="newton-cholesky").fit(x, bank.y)
    logits = linear_probe.predict(fitted.probe, query.x)[:, 0]
    np.testing.assert_allclose(jax.nn.softmax(logits), reference.predict_proba(q), atol=1e-2)


def test_the_protocol_says_where_lbfgs_did_not_converge(caplog):
    context = fake_context({"train": blobs(403), "test": blobs(101, seed=1)})
    few, enough = (linear.evaluate(context, solver="lbfgs", l2=(1e-5,), iterations=n).protocol for n in (5, 1000))
    assert few == enough + " (2 of 2 fits not converged)"
    assert "2 of 2 fits (l2=1e-05, l2=1e-05) did not converge in 5 iterations" in caplog.text
    assert len(caplog.records) == 1
    assert comparable({"protocols": {"p": few}}, {"protocols": {"p": enough}}, "p/top1")  # or a start would measure baselines for ever


@pytest.mark.parametrize("devices", [1, 8])
def test_ridge_equals_scikit_learn(devices, monkeypatch):
    sklearn_linear = pytest.importorskip("sklearn.linear_model", reason="parity test")
    monkeypatch.setattr(second_moments, "CHUNK_BYTES", 4 * 16 * 100)  # five chunks
    bank, query = blobs(403), blobs(101, seed=1)
    fitted = linear_probe.fit(bank, "ridge", mesh=mesh_of(devices), l2=(0.1,))
    x, q = standardized(bank, query)
    reference = sklearn_linear.RidgeClassifier(alpha=0.1 * len(x)).fit(x, bank.y)
    logits = linear_probe.predict(fitted.probe, query.x, mesh_of(devices))[:, 0]
    np.testing.assert_allclose(logits, reference.decision_function(q), atol=1e-5)


@pytest.mark.full
def test_sgd_reaches_the_optimum_and_its_heads_are_independent(monkeypatch):
    bank = blobs(512)
    scale = moments(bank.x)
    options = {"epochs": 60, "batch_size": 64, "seed": 0}
    rows, mesh = np.arange(512), flat_mesh(mesh_of(8))
    grid = ((0.02, 0.0), (0.4, 1e-2))
    kernel, bias = linear_probe._train_sgd(bank, rows, scale, grid, mesh, **options)
    monkeypatch.setattr(linear_probe, "CHUNK_BYTES", 4 * 64 * 16 * 3)  # three steps at a time
    for head, setting in enumerate(grid):
        alone = linear_probe._train_sgd(bank, rows, scale, (setting,), flat_mesh(None), **options)
        np.testing.assert_allclose(kernel[:, head], alone[0][:, 0], atol=2e-5)
        np.testing.assert_allclose(bias[head], alone[1][0], atol=2e-5)
    exact = linear_probe.fit(bank, "lbfgs", l2=(1e-2,)).probe
    np.testing.assert_allclose(kernel[:, 1], exact.kernel[:, 0] - exact.kernel.mean(2), atol=0.03)
    x = (bank.x - scale[0]) / scale[1]
    accuracy = [hits(x @ w[:, -1] + b[-1], bank.y, 1).mean() for w, b in ((kernel, bias), (exact.kernel, exact.bias))]
    assert accuracy[0] == pytest.approx(accuracy[1], abs=0.02)


def test_one_sgd_step_is_nesterov_by_hand():
    bank = Features(np.array([[1.0, 2.0], [-1.0, 0.5]], np.float32), np.array([0, 1], np.int32))
    scale = linear_probe._no_scale(2)
    kernel, bias = linear_probe._train_sgd(
        bank, np.arange(2), scale, ((0.5, 0.1),), flat_mesh(None), epochs=2, batch_size=256, seed=0
    )
    w, b, v, u = np.zeros((2, 2)), np.zeros(2), np.zeros((2, 2)), np.zeros(2)
    for step in range(2):
        logits = bank.x @ w + b
        error = (np.exp(logits) / np.exp(logits).sum(1, keepdims=True) - np.eye(2)) / 2
        rate = 0.5 * 2 / 256 * 0.5 * (1 + np.cos(np.pi * step / 2))
        g, h = bank.x.T @ error + 0.1 * w, error.sum(0)
        v, u = 0.9 * v + g, 0.9 * u + h
        w, b = w - rate * (g + 0.9 * v), b - rate * (h + 0.9 * u)
    np.testing.assert_allclose(kernel[:, 0], w, rtol=1e-5)
    np.testing.assert_allclose(bias[0], b, rtol=1e-5)


def test_sgd_shuffles_and_sees_every_row_in_every_epoch(monkeypatch):
    epochs = []

    def spy(array, sharding):
        if array.dtype == np.int32:
            epochs.append(array.ravel())
        return put_global(array, sharding)

    monkeypatch.setattr(linear_probe, "put_global", spy)
    bank = Features(blobs(20).x, np.arange(20, dtype=np.int32))  # the label is the row
    mesh, rows = flat_mesh(None), np.arange(3, 20)
    linear_probe._train_sgd(bank, rows, moments(bank.x), ((0.1, 0.0),), mesh, epochs=2, batch_size=8, seed=0)
    assert [len(order) for order in epochs] == [24, 24]  # three batches of 8 for 17 rows
    for order in epochs:
        np.testing.assert_array_equal(np.unique(order), rows)
        np.testing.assert_array_equal(np.sort(order[:17]), rows)
    assert not np.array_equal(epochs[0], epochs[1])


def test_selection_never_sees_the_test_split():
    bank, query = blobs(300), blobs(100, seed=1)
    permuted = Features(query.x, np.random.default_rng(0).permutation(query.y))
    results = []
    for test in (query, permuted):
        context = fake_context({"train": bank, "test": test})
        results.append(linear.evaluate(context, solver="sgd", epochs=3, batch_size=64))
    assert results[0].protocol == results[1].protocol  # names the chosen learning rate
    assert results[0].metrics["validation_top1"] == results[1].metrics["validation_top1"]
    assert results[0].metrics["top1"] > results[1].metrics["top1"] + 20


def test_setting_is_chosen_on_held_out_rows_and_refitted_on_all():
    bank = blobs(300)
    fitted = linear_probe.fit(bank, "ridge", validation=0.2, seed=3, l2=(1e4, 1e-3, 1e3))
    held_out = np.sort(np.random.default_rng(3).permutation(300)[:60])
    rest = np.setdiff1d(np.arange(300), held_out)
    accuracy = []
    scale = moments(bank.x)
    mesh = flat_mesh(None)
    for l2 in (1e4, 1e-3, 1e3):
        kernel, bias = second_moments.ridge(bank, rest, scale, ((l2,),), mesh)
        scores = (bank.x[held_out] - scale[0]) / scale[1] @ kernel[:, 0] + bias[0]
        accuracy.append(100 * hits(scores, bank.y[held_out], 1).mean())
    np.testing.assert_allclose(fitted.validation, accuracy)
    assert fitted.setting == ((1e4, 1e-3, 1e3)[int(np.argmax(accuracy))],)
    whole = second_moments.ridge(bank, np.arange(300), scale, (fitted.setting,), mesh)
    np.testing.assert_allclose(fitted.probe.kernel, whole[0])


def wide(count, seed=0):
    """Rows of 16 blobs in 700 dimensions: more dimensions than rows; off-center and badly scaled."""
    few = blobs(count, seed=seed)
    mix = np.random.default_rng(5).standard_normal((16, 700))
    noise = np.random.default_rng(seed).standard_normal((count, 700))
    return Features(((few.x @ mix + noise) * np.geomspace(0.1, 10, 700) + 3).astype(np.float32), few.y)


@pytest.mark.parametrize(("solver", "standardize"), [
    pytest.param("lbfgs", True, marks=pytest.mark.full), ("ridge", True), ("ridge", False),
])  # fmt: skip
def test_fewer_rows_than_dimensions_give_the_optimum_of_scikit_learn(solver, standardize, monkeypatch):
    """Solved among the rows; scikit-learn solves for all 700 dimensions."""
    sklearn_linear = pytest.importorskip("sklearn.linear_model", reason="parity test")
    monkeypatch.setattr(logistic, "LARGEST_BASIS", 250)
    monkeypatch.setattr(second_moments, "CHUNK_BYTES", 8 * 200 * 300)  # three parts of the dimensions
    bank, query, l2 = wide(200), wide(50, seed=1), 0.05
    rows_solved = []
    gram_of_rows = second_moments.gram_of_rows
    for module in (second_moments, logistic):
        monkeypatch.setattr(module, "gram_of_rows", lambda *args: rows_solved.append(1) or gram_of_rows(*args))
    fitted = linear_probe.fit(bank, solver, standardize=standardize, l2=(l2,))
    assert rows_solved
    assert fitted.unconverged == 0
    mean, std = (bank.x.mean(0), bank.x.std(0)) if standardize else (0, 1)
    x, q = ((f.x.astype(np.float64) - mean) / std for f in (bank, query))
    if solver == "ridge":
        reference = sklearn_linear.RidgeClassifier(alpha=l2 * len(x)).fit(x, bank.y)
        logits, expected = linear_probe.predict(fitted.probe, query.x)[:, 0], reference.decision_function(q)
        np.testing.assert_allclose(fitted.probe.kernel[:, 0], reference.coef_.T, atol=1e-6)
    else:
        reference = sklearn_linear.LogisticRegression(C=1 / (l2 * len(x)), tol=1e-8, solver="newton-cholesky").fit(x, bank.y)
        logits, expected = jax.nn.log_softmax(linear_probe.predict(fitted.probe, query.x)[:, 0]), np.log(reference.predict_proba(q))
        np.testing.assert_allclose(fitted.probe.kernel[:, 0], reference.coef_.T, atol=1e-3)
    np.testing.assert_allclose(logits, expected, rtol=2e-3, atol=2e-3)


def test_repeated_rows_of_many_dimensions_are_left_out_of_the_rotation(monkeypatch):
    monkeypatch.setattr(logistic, "LARGEST_BASIS", 250)
    bank = wide(100)
    bank = Features(np.concatenate([bank.x, bank.x]), np.concatenate([bank.y, bank.y]))
    within = logistic.directions(bank, moments(bank.x), flat_mesh(None))
    assert within.rotation.shape == (700, 99)  # 100 rows less their mean
    np.testing.assert_allclose(within.rotation.T @ within.rotation, np.eye(99), atol=1e-6)


def test_a_share_of_the_labels_has_the_same_share_of_each_class():
    """At least one of each; smaller shares of a seed are parts of larger ones."""
    y = np.repeat([0, 1, 4], [100, 20, 3]).astype(np.int32)
    bank = Features(np.arange(123, dtype=np.float32)[:, None], y)
    small, large = (share_of_each_class(bank, share, 0) for share in (0.1, 0.5))
    assert np.bincount(small.y).tolist() == [10, 2, 0, 0, 1]
    assert np.bincount(large.y).tolist() == [50, 10, 0, 0, 2]
    assert set(small.x[:, 0]) < set(large.x[:, 0]) and (np.diff(large.x[:, 0]) > 0).all()
    np.testing.assert_array_equal(small.y, y[small.x[:, 0].astype(int)])
    assert set(share_of_each_class(bank, 0.1, 1).x[:, 0]) != set(small.x[:, 0])
    assert len(share_of_each_class(Features(bank.x, np.zeros((123, 5), np.int32)), 0.1, 0).y) == 12  # several labels


def test_linear_probe_of_a_share_of_the_labels_is_that_of_these_examples():
    train, test = blobs(403), blobs(101, seed=1)
    options = dict(solver="ridge", l2=(1e-3,), seed=3)
    few = linear.evaluate(fake_context({"train": train, "test": test}), labels=0.1, **options)
    alone = linear.evaluate(fake_context({"train": share_of_each_class(train, 0.1, 3), "test": test}), **options)
    every = linear.evaluate(fake_context({"train": train, "test": test}), **options)
    assert few.metrics == alone.metrics and few.metrics["top1"] < every.metrics["top1"]
    assert f"train=0.1 of the labels of each class of train(403): {len(share_of_each_class(train, 0.1, 3).y)} test=" in few.protocol
    assert "train=train(403) test=" in every.protocol

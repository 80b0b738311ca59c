"""Evaluators against slow loops, closed forms, scikit-learn and lightly."""

import functools
import importlib.util
import json
import runpy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from feature_clouds import blobs, fake_context, mesh_of
from scipy import stats
from torch_reference import require_lightly, require_torch

from ssl_jax.engine.sharding import put_global
from ssl_jax.errors import UserError
from ssl_jax.evals import run as evals
from ssl_jax.evals.context import Context, pixel_context
from ssl_jax.evals.kinds import fewshot, knn, linear, representation
from ssl_jax.evals.lib.features import Features, extract, hits, moments, pixels
from ssl_jax.experiment.evaluations import Evaluations, comparable

# --- evaluations.json


def test_concurrent_writers_of_evaluations_json_lose_no_entry(tmp_path):
    """`evaluate` may write while `train` runs."""
    context = fake_context({})
    (tmp_path / "evaluations.json").write_text('[{"subject": "trained", "step": 99, "metrics": {}, "protocols": {}}]')
    # entry 99 is later than the last checkpoint and is dropped
    train, others = Evaluations(tmp_path, {}, 0), [Evaluations(tmp_path, {}) for _ in range(7)]
    with ThreadPoolExecutor(8) as pool:
        for i, writer in enumerate((train, *others)):
            for step in range(4):
                pool.submit(writer.add, "trained", 4 * i + step, context)
    written = json.loads((tmp_path / "evaluations.json").read_text())
    assert sorted(entry["step"] for entry in written) == list(range(32))
    assert not list(tmp_path.glob(".*tmp"))


# --- kNN


def knn_loop(bank, query, k, temperature, metric):
    """One query at a time, float64."""
    unit = (lambda a: a / np.linalg.norm(a)) if metric == "cosine" else (lambda a: a)
    rows = [unit(row) for row in bank.x.astype(np.float64)]
    index, top1, top5 = [], 0, 0
    for image, label in zip(query.x.astype(np.float64), query.y, strict=True):
        q = unit(image)
        s = np.array([r @ q if metric == "cosine" else -np.sqrt(((r - q) ** 2).sum()) for r in rows])
        nearest = sorted(range(len(s)), key=lambda i: (-s[i], i))[:k]
        votes = {}
        for i in nearest:
            votes[bank.y[i]] = votes.get(bank.y[i], 0.0) + (np.exp(s[i] / temperature) if temperature else 1.0)
        ranking = sorted(votes, key=lambda c: (-votes[c], c))
        index.append(nearest)
        top1 += ranking[0] == label
        top5 += label in ranking[:5]
    return np.array(index), 100 * top1 / len(query.y), 100 * top5 / len(query.y)


@pytest.mark.parametrize(
    ("metric", "k", "temperature"),
    [("cosine", 7, 0.07), ("euclidean", 7, 0.5), ("cosine", 40, 0.1), ("cosine", 7, 0.0)],
)
def test_knn_equals_a_loop(metric, k, temperature):
    bank, query = blobs(203, classes=12), blobs(57, classes=12, seed=1)
    expected, top1, top5 = knn_loop(bank, query, k, temperature, metric)
    index, similarity = knn.neighbors(bank.x, query.x, k, metric, mesh=mesh_of(8), bank_chunk=64, query_chunk=32)
    assert (index == expected).mean() == 1
    assert (np.diff(similarity, axis=1) <= 0).all()
    assert knn.vote(index, similarity, bank, query.y, temperature) == pytest.approx({"top1": top1, "top5": top5})
    assert top1 < top5 < 100


@pytest.mark.full
def test_knn_equals_lightly():
    torch = require_torch()
    require_lightly()
    # Load the file by itself: its package imports Lightning, which the function does not need.
    folder = Path(importlib.util.find_spec("lightly").origin).parent
    knn_predict = runpy.run_path(str(folder / "utils/benchmarking/knn.py"))["knn_predict"]
    bank, query = blobs(300, classes=10), blobs(200, classes=10, seed=1)
    normalized = [torch.nn.functional.normalize(torch.tensor(f.x), dim=1) for f in (query, bank)]
    predicted = knn_predict(
        normalized[0], normalized[1].T, torch.tensor(bank.y).long(), 10, knn_k=20, knn_t=0.1
    ).numpy()
    expected = 100 * (predicted[:, 0] == query.y).mean()
    index, similarity = knn.neighbors(bank.x, query.x, 20)
    assert knn.vote(index, similarity, bank, query.y, 0.1)["top1"] == pytest.approx(expected)


@pytest.mark.parametrize(("k", "count"), [(3, 8000), (50, 1000)])
@pytest.mark.full
def test_knn_does_not_depend_on_chunks_or_devices_and_breaks_ties_by_index(k, count):
    """Integer features have exact products and many duplicates, which must be in order of index."""
    generator = np.random.default_rng(0)
    bank = generator.integers(0, 3, (count, 4)).astype(np.float32)
    query = generator.integers(0, 3, (30, 4)).astype(np.float32)
    distance = ((query[:, None] - bank[None]) ** 2).sum(-1)
    expected = np.argsort(distance, axis=1, kind="stable")[:, :k]
    for devices, bank_chunk, query_chunk in ((1, count, 30), (1, 333, 7), (8, count, 30), (8, 999, 16)):
        index, similarity = knn.neighbors(
            bank, query, k, "euclidean", "none", mesh_of(devices), bank_chunk, query_chunk
        )
        np.testing.assert_array_equal(index, expected)
        np.testing.assert_allclose(similarity, -np.sqrt(np.take_along_axis(distance, expected, 1)), rtol=1e-6)


def test_knn_grouped_top_k_is_used_for_small_k():
    """The previous test covers the grouped path for k = 3."""
    assert knn._chunk_shape(8000, 1, 3)[1] > 1
    assert knn._chunk_shape(1000, 8, 50)[1] == 1


def test_knn_holds_one_bank_chunk_at_a_time(monkeypatch):
    sizes = []

    def spy(array, sharding):
        placed = put_global(array, sharding)
        sizes.append((array.shape, placed.addressable_shards[0].data.shape))
        return placed

    monkeypatch.setattr(knn, "put_global", spy)
    bank, query = blobs(1000), blobs(50, seed=1)
    knn.neighbors(bank.x, query.x, 5, mesh=mesh_of(8), bank_chunk=256, query_chunk=25)
    chunk_rows = [whole[0] for whole, _ in sizes if whole[0] > 25]
    assert chunk_rows == [256] * 4
    assert all(part == (32, 16) for whole, part in sizes if whole[0] == 256)
    assert len(sizes) == 2 + 4 * (2 + 2)  # statistics; per chunk the bank, its range and two query chunks


@pytest.mark.parametrize("normalization", ["center", "standardize"])
def test_knn_normalizes_by_bank_statistics(normalization):
    bank, query = blobs(100), blobs(20, seed=1)
    std = bank.x.std(0) if normalization == "standardize" else 1
    shifted = [(f.x - bank.x.mean(0)) / std for f in (bank, query)]
    index, _ = knn.neighbors(bank.x, query.x, 5, "cosine", normalization)
    np.testing.assert_array_equal(index, knn.neighbors(*shifted, 5)[0])
    assert (index != knn.neighbors(bank.x, query.x, 5)[0]).any()


def test_knn_votes_do_not_overflow():
    similarity, index = np.array([[1.0, 0.9, 0.9]], np.float32), np.array([[0, 1, 2]])
    bank = Features(np.zeros((3, 1), np.float32), np.array([1, 0, 0]))
    assert knn.vote(index, similarity, bank, np.array([1]), 1e-4) == {"top1": 100, "top5": 100}
    assert knn.vote(index, similarity, bank, np.array([0]), 10.0) == {"top1": 100, "top5": 100}
    assert knn.vote(index, similarity, bank, np.array([2]), 0.07) == {"top1": 0, "top5": 0}


# --- few-shot


def test_fewshot_primal_dual_and_scikit_learn_agree():
    sklearn_linear = pytest.importorskip("sklearn.linear_model", reason="parity test")
    bank = blobs(60)
    x = bank.x.astype(np.float64)
    augmented = fewshot.whiten(x, x.mean(0), x.std(0))
    assert augmented.shape == (60, 17)
    assert (augmented[:, -1] == 100).all()
    np.testing.assert_allclose(augmented[:, :-1], (x - x.mean(0)) / (np.sqrt(x.var(0)) + 1e-5), rtol=1e-12)
    targets = 2.0 * np.eye(5)[bank.y] - 1
    reference = sklearn_linear.Ridge(alpha=1024, fit_intercept=False).fit(augmented, targets).coef_.T
    for dual in (True, False, None):
        np.testing.assert_allclose(fewshot.ridge(augmented, targets, 1024, dual), reference, rtol=0, atol=1e-12)


def test_fewshot_support_follows_the_seeded_permutation():
    labels = np.array([1, 0, 1, 1, 0, 3, 1])
    generator = np.random.default_rng(2)
    zero, one, three = (generator.permutation(np.flatnonzero(labels == c)) for c in (0, 1, 3))
    np.testing.assert_array_equal(fewshot.support(labels, 1, 2), [zero[0], one[0], three[0]])
    np.testing.assert_array_equal(fewshot.support(labels, 3, 2), [*zero, *one[:3], *three])


def test_fewshot_accuracy_is_the_mean_over_seeds():
    sklearn_linear = pytest.importorskip("sklearn.linear_model", reason="parity test")
    bank, query = blobs(300), blobs(200, seed=1)
    result = fewshot.evaluate(fake_context({"train": bank, "test": query}), shots=(1, 10))
    for shots in (1, 10):
        accuracy = []
        for seed in (0, 1, 2, 3, 4):
            rows = fewshot.support(bank.y, shots, seed)
            x = bank.x[rows].astype(np.float64)
            a, q = (fewshot.whiten(f, x.mean(0), x.std(0)) for f in (x, query.x))
            model = sklearn_linear.Ridge(alpha=1024, fit_intercept=False).fit(a, 2.0 * np.eye(5)[bank.y[rows]] - 1)
            accuracy.append(100 * (model.predict(q).argmax(1) == query.y).mean())
        assert result.metrics[f"{shots}shot_top1"] == pytest.approx(np.mean(accuracy))
        assert result.metrics[f"{shots}shot_top1_std"] == pytest.approx(np.std(accuracy))
        interval = stats.t.interval(0.95, 4, np.mean(accuracy), stats.sem(accuracy))
        assert result.metrics[f"{shots}shot_top1_ci"] == pytest.approx((interval[1] - interval[0]) / 2)
    assert result.metrics["10shot_top1"] > result.metrics["1shot_top1"] + 5


def test_fewshot_interval_of_one_draw_does_not_exist():
    """For three values with standard deviation 1 it is 2.484 (t of two degrees of freedom over the root of three)."""
    assert fewshot.half_interval([0.0, 1.0, 2.0]) == pytest.approx(2.4841377)
    bank = blobs(60)
    metrics = fewshot.evaluate(fake_context({"train": bank, "test": bank}), shots=(1,), seeds=(3,)).metrics
    assert set(metrics) == {"1shot_top1", "1shot_top1_std"}


def test_fewshot_draws_are_the_same_for_all_subjects(monkeypatch):
    """Images are drawn by seed and labels alone, so methods can be compared draw by draw."""
    draws, real = [], fewshot.support
    monkeypatch.setattr(fewshot, "support", lambda *given: draws.append(real(*given)) or draws[-1])
    bank, query = blobs(60), blobs(30, seed=1)
    for x in (bank.x, -3 * bank.x[:, ::-1], np.ones((60, 7), np.float32)):
        other = {"train": bank._replace(x=x), "test": query._replace(x=query.x[:, : x.shape[1]])}
        fewshot.evaluate(fake_context(other), shots=(1, 5))
    assert len(draws) == 30
    for first, second, third in zip(draws[:10], draws[10:20], draws[20:], strict=True):
        np.testing.assert_array_equal(first, second)
        np.testing.assert_array_equal(first, third)
    assert not np.array_equal(draws[0], draws[1])


# --- representation


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_alpha_finds_the_exponent_of_a_power_law(exponent):
    x = np.random.default_rng(0).standard_normal((200, 40))
    directions = np.linalg.qr(x - x.mean(0))[0]  # orthonormal, and centered
    rotation = np.linalg.qr(np.random.default_rng(1).standard_normal((40, 40)))[0]
    x = directions * np.arange(1, 41) ** (-exponent / 2) @ rotation + 3.0
    assert representation.alpha(x) == pytest.approx(exponent, abs=1e-6)
    assert representation.alpha(7 * x[:, ::-1]) == pytest.approx(exponent, abs=1e-6)
    assert representation.alpha(np.ones((10, 3))) == 0


def singular(x):
    return np.linalg.svd(x, compute_uv=False)


def test_ranks_equal_golden_values():
    s = singular(np.random.default_rng(0).standard_normal((1000, 64)))
    assert representation.rankme(s) == pytest.approx(63.4425, abs=5e-5)
    assert representation.rankme(10 * s) == pytest.approx(63.4425, abs=5e-5)
    assert representation.effective_rank(s) == pytest.approx(63.4412, abs=5e-5)
    assert representation.covariance_rank(s) == pytest.approx(61.8426, abs=5e-5)
    assert representation.participation_ratio(s) == pytest.approx(59.8858, abs=5e-5)
    assert representation.rankme(singular(np.eye(64))) == pytest.approx(64.0013, abs=5e-5)
    assert representation.participation_ratio(singular(np.eye(64))) == pytest.approx(64, abs=1e-9)
    rank_one = singular(np.outer(np.arange(1.0, 100), np.ones(64)))
    assert representation.rankme(rank_one) == pytest.approx(1.0001, abs=5e-5)
    s = singular(np.sin(1 + np.arange(120.0).reshape(20, 6) ** 1.1))
    assert representation.rankme(s) == pytest.approx(3.441185216093022, abs=1e-10)
    assert representation.covariance_rank(s) == pytest.approx(2.3564510075744576, abs=1e-10)


def test_alignment_and_uniformity_equal_golden_values():
    i, j = np.arange(4)[:, None], np.arange(8)[None]
    a, b = np.sin(1 + 8 * i + j), np.cos(2 + 0.5 * (8 * i + j))
    assert representation.uniformity(a) == pytest.approx(-3.804104906013733, abs=1e-12)
    assert representation.alignment(np.stack([a, b], 1)) == pytest.approx(1.9652411272212293, abs=1e-12)
    u = representation.unit(a)
    pairs = [np.exp(-2 * np.sum((u[p] - u[q]) ** 2)) for p in range(4) for q in range(p)]
    assert representation.uniformity(a) == pytest.approx(np.log(np.mean(pairs)), abs=1e-12)
    sphere = np.random.default_rng(0).standard_normal((3000, 128))  # three chunks of pairs
    assert representation.uniformity(sphere) == pytest.approx(-3.9375, abs=1e-3)
    assert representation.uniformity(np.ones((5, 3))) == pytest.approx(0, abs=1e-12)


def test_l2_std_is_one_for_spread_and_zero_for_collapsed_features():
    x = np.random.default_rng(0).standard_normal((2000, 64))
    assert representation.l2_std(x) == pytest.approx(1, abs=0.01)
    assert representation.l2_std(np.ones((10, 64))) == pytest.approx(0, abs=1e-12)
    rows = [row / np.sqrt(sum(row**2)) for row in x[:50]]
    assert representation.l2_std(x[:50]) == pytest.approx(np.mean([np.std(d) for d in zip(*rows, strict=True)]) * 8)


# --- features and context


def image_batches(count=37, size=16, seed=0):
    """Images whose first pixel is their index; the padding of the last batch has extreme values."""
    images = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), np.uint8)
    images[:, 0, 0, 0] = np.arange(count)
    for start in range(0, count, size):
        part = images[start : start + size]
        fill = size - len(part)
        yield {
            "image": np.concatenate([part, np.full((fill, 4, 4, 3), 255, np.uint8)]),
            "label": np.concatenate([part[:, 0, 0, 0] % 3, np.full(fill, 77)]).astype(np.int32),
            "_valid": np.concatenate([np.ones(len(part)), np.zeros(fill)]).astype(np.float32),
        }


@jax.jit
def toy_encode(images):
    x = images.astype(jnp.float32)
    return {"pooled": x[:, 0, 0], "map": x, "tokens": x.reshape(len(x), -1, 3), "half": x[:, 0, 0].astype(jnp.bfloat16)}


@pytest.mark.parametrize("devices", [None, 8])
def test_extract_drops_padding_and_keeps_the_order(devices):
    mesh = devices and mesh_of(devices)
    result = extract(toy_encode, image_batches(), "pooled", mesh)
    assert result.x.shape == (37, 3)
    assert (result.x.dtype, result.y.dtype) == (np.float32, np.int32)
    np.testing.assert_array_equal(result.x[:, 0], np.arange(37))
    np.testing.assert_array_equal(result.y, np.arange(37) % 3)
    images = np.concatenate([b["image"] for b in image_batches()])[:37].astype(np.float64)
    for layer in ("map", "tokens"):
        np.testing.assert_allclose(extract(toy_encode, image_batches(), layer, mesh).x, images.mean((1, 2)), rtol=1e-6)
    assert extract(toy_encode, image_batches(), "half", mesh).x.dtype == np.float32
    limited = extract(toy_encode, image_batches(), "pooled", mesh, limit=20)
    np.testing.assert_array_equal(limited.x, result.x[:20])
    np.testing.assert_allclose(pixels(image_batches(), mesh).x, images.reshape(37, -1) / 255, rtol=1e-6)


def test_extract_rejects_unknown_layers_empty_splits_and_nan_features():
    with pytest.raises(UserError, match="'layer9' does not exist; the encoder has half, map, pooled, tokens"):
        extract(toy_encode, image_batches(), "layer9")
    with pytest.raises(UserError, match="no examples"):
        extract(toy_encode, [])
    with pytest.raises(UserError, match="not finite"):
        extract(lambda x: {"pooled": x * jnp.nan}, image_batches(), "pooled")


def test_moments_of_constant_dimensions_have_std_one():
    x = np.stack([np.full(1000, 0.1), np.zeros(1000), np.arange(1000)], 1).astype(np.float32)
    mean, std = moments(x, 300)
    np.testing.assert_allclose(mean, x.mean(0, dtype=np.float64), rtol=1e-6)
    np.testing.assert_allclose(std, [1, 1, np.arange(1000).std()], rtol=1e-6)


def test_hits_rank_like_argmax_and_unknown_labels_miss():
    scores = np.array([[1.0, 1.0, 0.0], [np.nan] * 3, [0.0, -np.inf, 2.0], [0.0, 1.0, 2.0], [0.0, 1.0, 2.0]])
    labels = np.array([1, 0, 1, 7, -1])
    np.testing.assert_array_equal(hits(scores, labels, 1), [False] * 5)
    np.testing.assert_array_equal(hits(scores, labels, 3), [True, False, False, False, False])
    assert hits(scores[:1], np.array([0]), 1)[0]


def test_context_caches_features_names_limits_and_separates_views():
    opened = []

    def open_batches(split):
        opened.append(split)
        return image_batches(seed=split == "test")

    def encode_views(images, key):
        x = images.astype(jnp.float32)[:, 0, 0]
        return jnp.stack([x, x + jax.random.uniform(key)], 1)

    context = Context(
        toy_encode, open_batches, {"train": "train[:90%]", "test": "test"}, mesh_of(8), encode_views, {"test": 20}
    )
    assert context.features("test") is context.features("test")
    context.features("train", "map")
    assert opened == ["test", "train"]
    assert context.name("test") == "test[:20](20)"
    assert context.name("train") == "train[:90%](37)"
    views = context.views(18)
    assert views.shape == (18, 2, 3)
    np.testing.assert_array_equal(views[:, 0], context.features("test").x[:18])
    shift = (views[:, 1] - views[:, 0]).mean(1)
    assert shift[0] == pytest.approx(shift[15], abs=1e-4)  # one key per batch of 16
    assert abs(shift[0] - shift[16]) > 1e-3
    assert context.views(18) is views
    assert Context(toy_encode, open_batches).views() is None


# --- evaluations of a config

SPEC = {
    "near": {"kind": "knn", "k": 3, "layer": "map"},
    "linear": {"kind": "linear", "solver": "ridge"},
    "few": {"kind": "fewshot", "shots": (1, 2)},
    "shape": {"kind": "representation", "examples": 20},
}


@pytest.mark.full
def test_run_evaluates_a_config_under_the_transfer_guard():
    assert evals.kinds() == sorted({*evals.kinds(), "fewshot", "knn", "linear", "representation"})
    context = Context(toy_encode, lambda split: image_batches(seed=split == "test"), None, mesh_of(8), two_views)
    spec = {
        **SPEC,
        "sgd": {"kind": "linear", "solver": "sgd", "epochs": 1},
        "lbfgs": {"kind": "linear", "solver": "lbfgs"},
    }
    with jax.transfer_guard("disallow"):
        results = evals.run(spec, context)
    assert set(results) == set(spec)
    assert set(results["near"].metrics) == {"near/top1", "near/top5"}
    assert results["near"].protocol == (
        "kNN k=3 T=0.07 cosine l2-normalized normalization=none layer=map bank=train(37) query=test(37)"
    )
    assert "alignment" in str(results["shape"].metrics)
    for result in results.values():
        assert "\n" not in result.protocol
        assert "test(37)" in result.protocol
        assert all(type(value) is float and np.isfinite(value) for value in result.metrics.values())


@functools.partial(jax.jit)
def two_views(images, key):
    x = images.astype(jnp.float32)[:, 0]
    return x[:, :2] + jax.random.uniform(key, (len(x), 2, 3))


def test_pixel_baseline_runs_the_same_evaluations():
    def open_batches(split):
        return image_batches(seed=split == "test")

    context = pixel_context(open_batches)
    model = Context(toy_encode, open_batches, notes={"tokenizer": "trained with perceptual=none"})
    protocols = [evals.run({"near": {"kind": "knn", "k": 3}}, c)["near"].protocol for c in (model, context)]
    assert protocols[0].endswith("[tokenizer: trained with perceptual=none]")
    of_model, of_pixels = ({"protocols": {"near": protocol}} for protocol in protocols)
    assert comparable(of_model, of_pixels, "near/top1")  # the pixel baseline is comparable with the model
    results = evals.run({"near": SPEC["near"], "normalized": {"kind": "knn", "k": 3, "layer": "normalized"}}, context)
    assert "layer=pooled" in results["near"].protocol  # pixels have no 'map'
    assert "layer=normalized" in results["normalized"].protocol
    raw, normalized = context.features("test"), context.features("test", "normalized")
    mean, std = np.tile([0.485, 0.456, 0.406], 16), np.tile([0.229, 0.224, 0.225], 16)
    np.testing.assert_allclose(normalized.x, (raw.x - mean) / std, atol=1e-5)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"kind": "kn"}, r"evals\.near\.kind='kn' is unknown \(did you mean 'knn'\?\); kinds: .*fewshot, .*knn"),
        ({"kind": "features"}, "kind='features' is unknown"),
        ({"k": 3}, "kind=None is unknown"),
        ({"kind": "knn", "temprature": 1}, r"evals\.near\.temprature: unknown option \(did you mean 'temperature'\?\)"),
        ({"kind": "knn", "metric": "cosin"}, r"evals\.near\.metric='cosin' \(did you mean 'cosine'\?\)"),
        ({"kind": "knn", "k": 0}, r"evals\.near\.k=0 must be at least 1"),
        ({"kind": "knn", "temperature": -1.0}, "temperature=-1.0"),
        ({"kind": "linear", "solver": "ridge", "epochs": 3}, "'ridge' has no option 'epochs'; it has l2"),
        ({"kind": "linear", "learning_rates": ()}, "learning_rates"),
        ({"kind": "linear", "epochs": 0}, "epochs=0 must be positive"),
        ({"kind": "linear", "validation": 1.0}, "validation=1.0"),
        ({"kind": "fewshot", "shots": (0,)}, r"shots=\(0,\): each must be at least 1"),
        ({"kind": "representation", "examples": 1}, "examples=1"),
    ],
)
def test_invalid_options_in_the_config_raise_user_errors_before_anything_runs(entry, message):
    with pytest.raises(UserError, match=message) as error:
        evals.check({"near": entry})
    assert "\n" not in str(error.value)


def test_banks_with_one_class_or_without_labels_are_rejected():
    bank, query = blobs(20), blobs(10, seed=1)
    with pytest.raises(UserError, match="k=21 needs a bank of at least 21 examples, it has 20"):
        knn.evaluate(fake_context({"train": bank, "test": query}), k=21)
    for labels, message in ((np.zeros(20), "two classes"), (-np.ones(20), "has none")):
        context = fake_context({"train": Features(bank.x, labels.astype(np.int32)), "test": query})
        for evaluator in (knn, linear, fewshot):
            with pytest.raises(UserError, match=message):
                evaluator.evaluate(context)

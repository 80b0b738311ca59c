"""Distances between sets of features against golden values, closed forms, SciPy and loops."""

import numpy as np
import pytest
import scipy.linalg
from scipy.spatial.distance import cdist
from torch_reference import require_torch, require_torch_fidelity

from ssl_jax.evals.lib import distances as subject


def rows(seed, n, d, scale=1.0, shift=0.0):
    return scale * np.random.default_rng(seed).standard_normal((n, d)) + shift


def frechet(x, y):
    return subject.frechet(subject.moments(x), subject.moments(y))


def test_frechet_equals_golden_value_of_compare_gan():
    """compare_gan's unit test; dividing by n instead of n - 1 would give 89.0."""
    real, fake = np.array([[2, 1]] * 50 + [[1, 1]] * 50), np.array([[9, 9]] * 50 + [[2, 9]] * 50)
    assert frechet(real, fake) == pytest.approx(89.0909090909, abs=1e-9)


def test_frechet_equals_scipys_matrix_root_and_is_a_distance():
    mix = rows(9, 12, 12)
    x, y = rows(0, 400, 12) @ mix, 1.5 * rows(1, 300, 12) @ mix + 0.3
    a, b = subject.moments(x), subject.moments(y)
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance).real
    expected = np.sum((a.mean - b.mean) ** 2) + np.trace(a.covariance + b.covariance - 2 * root)
    assert frechet(x, y) == pytest.approx(expected, rel=1e-10)
    assert frechet(x, y) == pytest.approx(frechet(y, x), rel=1e-10)
    assert abs(frechet(x, x)) < 1e-8
    turn = np.linalg.qr(rows(2, 12, 12))[0]
    assert frechet(x @ turn, y @ turn) == pytest.approx(frechet(x, y), rel=1e-9)
    few = rows(3, 6, 12)  # fewer rows than dimensions: a singular covariance
    assert np.isfinite(frechet(few, x)) and frechet(few, few) == pytest.approx(0, abs=1e-6)


def test_frechet_of_diagonal_gaussians_and_its_bias():
    values = [frechet(rows(i, n, 16), rows(i + 50, n, 16)) for i, n in enumerate((100, 1000, 10_000))]
    assert 5 < values[0] / values[1] < 20 and 5 < values[1] / values[2] < 20  # about D^2 / N
    got = frechet(rows(0, 200_000, 3) * [1, 2, 3], rows(1, 200_000, 3) * [2, 2, 1] + [1, 0, 0])
    assert got == pytest.approx(1 + 1 + 0 + 4, rel=0.02)  # (1 - 2)^2 + (3 - 1)^2 for the deviations, 1 for the means


def test_merged_moments_equal_moments_of_all_rows():
    x = rows(0, 1000, 5, scale=0.01, shift=100).astype(np.float32)
    whole, parts = subject.moments(x), [subject.moments(x[a:b]) for a, b in ((0, 1), (1, 400), (400, 1000))]
    merged = subject.merge(subject.merge(parts[0], parts[1]), parts[2])
    assert merged.count == 1000
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-13)
    np.testing.assert_allclose(merged.covariance, np.cov(x.astype(np.float64).T), rtol=1e-9)


def test_kernel_distance_equals_the_pairwise_loop():
    real, fake = rows(0, 20, 6), rows(1, 30, 6, shift=0.5)
    kernel = lambda a, b: (a @ b / 6 + 1) ** 3  # noqa: E731
    xx = np.mean([kernel(a, b) for i, a in enumerate(real) for j, b in enumerate(real) if i != j])
    yy = np.mean([kernel(a, b) for i, a in enumerate(fake) for j, b in enumerate(fake) if i != j])
    xy = np.mean([kernel(a, b) for a in real for b in fake])
    value, error = subject.kernel_distance(real, fake, subsets=3)
    assert value == pytest.approx(xx + yy - 2 * xy, rel=1e-12)
    assert error == pytest.approx(0, abs=1e-12)  # every subset is everything
    assert subject.kernel_distance(fake, real, subsets=1)[0] == pytest.approx(value, rel=1e-12)
    same = [subject.kernel_distance(rows(i, 200, 6), rows(i + 100, 200, 6), 1)[0] for i in range(40)]
    assert min(same) < 0 < max(same)  # unbiased


def test_inception_score_is_between_one_and_the_number_of_classes():
    sure = 1000.0 * np.eye(7)[np.arange(700) % 7]
    assert subject.inception_score(sure) == pytest.approx((7, 0), abs=1e-6)
    assert subject.inception_score(np.tile(rows(0, 1, 7), (70, 1))) == pytest.approx((1, 0))
    logits = rows(1, 40, 5)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    by_hand = [np.exp(np.mean([np.sum(q * np.log(q / part.mean(0))) for q in part])) for part in (p[:20], p[20:])]
    assert subject.inception_score(logits, 2) == pytest.approx((np.mean(by_hand), np.std(by_hand)))


@pytest.mark.parametrize("k", [3, 5])
def test_neighborhoods_equal_a_loop(k):
    real, fake = rows(0, 60, 3), rows(1, 50, 3, shift=0.7)
    reach = lambda x: np.sort(cdist(x, x), 1)[:, k]  # noqa: E731
    across, of_real, of_fake = cdist(real, fake), reach(real), reach(fake)
    got = subject.neighborhoods(real, fake, k)
    assert got["precision"] == np.mean([(across[:, j] <= of_real).any() for j in range(50)])
    assert got["recall"] == np.mean([(across[i] <= of_fake).any() for i in range(60)])
    assert got["density"] == pytest.approx(sum((across[:, j] <= of_real).sum() for j in range(50)) / (k * 50))
    assert got["coverage"] == np.mean([across[i].min() <= of_real[i] for i in range(60)])


def test_recall_sees_dropped_modes_and_precision_does_not():
    centers = 20 * np.random.default_rng(0).standard_normal((10, 8))
    sample = lambda seed, n, modes: rows(seed, n, 8) + centers[np.arange(n) % modes]  # noqa: E731
    real = sample(1, 1500, 10)
    both, few = (subject.neighborhoods(real, sample(2, 1500, modes)) for modes in (10, 3))
    assert subject.neighborhoods(real, real) == pytest.approx({"precision": 1, "recall": 1, "density": 4 / 3, "coverage": 1}, rel=0.01)
    assert min(both["precision"], both["recall"], few["precision"]) > 0.7
    assert few["recall"] < 0.3 and few["coverage"] < 0.35


@pytest.mark.full
def test_neighborhoods_equal_reference_values_of_prdc():
    """README of prdc: N(0, I) in 1000 dimensions, 10,000 rows each, k=5. Here 3,000 rows: equal within noise."""
    got = subject.neighborhoods(rows(0, 3000, 1000), rows(1, 3000, 1000), 5)
    for name, value in dict(precision=0.4772, recall=0.4705, density=1.0555, coverage=0.9735).items():
        assert got[name] == pytest.approx(value, abs=0.08), name


@pytest.mark.full
def test_all_distances_equal_torch_fidelity():
    """Frechet distance, kernel distance of all rows, inception score, precision and recall of equal features."""
    torch = require_torch()
    fid, kid, isc, prc = (require_torch_fidelity(f"metric_{name}") for name in ("fid", "kid", "isc", "prc"))
    mix = rows(9, 64, 64)
    real, fake = np.maximum(rows(0, 700, 64) @ mix, 0) / 8, np.maximum(rows(1, 600, 64, 0.9, 0.1) @ mix, 0) / 8
    theirs = fid.fid_statistics_to_metric(*(fid.fid_features_to_statistics(torch.tensor(x)) for x in (real, fake)), False)
    assert frechet(real, fake) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-8)
    options = dict(kid_subsets=1, kid_subset_size=600, kid_kernel="poly", kid_degree=3, rng_seed=0, verbose=False)
    theirs = kid.kid_features_to_metric(torch.tensor(real[:600]), torch.tensor(fake), **options)
    assert subject.kernel_distance(real[:600], fake, 1)[0] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)
    logits = rows(2, 1000, 10, 3.0)
    theirs = isc.isc_features_to_metric(torch.tensor(logits), 10, shuffle=False)
    expected = (theirs["inception_score_mean"], theirs["inception_score_std"])
    assert subject.inception_score(logits) == pytest.approx(expected, rel=1e-10)
    theirs = prc.prc_features_to_metric(torch.tensor(fake), torch.tensor(real), prc_neighborhood=3, prc_batch_size=10000, verbose=False)
    ours = subject.neighborhoods(real, fake, 3)
    assert 0.05 < ours["recall"] < 0.95 and 0.05 < ours["precision"] < 0.95
    assert (ours["precision"], ours["recall"]) == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-6)


def test_frechet_by_its_symmetric_root_equals_the_eigenvalues_of_the_product():
    """Also for fewer rows than dimensions, with a tolerance of 1e-5 because of zero eigenvalues."""
    for n, tolerance in ((400, 1e-10), (30, 1e-5)):
        a, b = subject.moments(rows(0, n, 48)), subject.moments(rows(1, n, 48, 1.5, 0.2))
        values = np.linalg.eigvals(a.covariance @ b.covariance)
        apart = np.sum((a.mean - b.mean) ** 2) + np.trace(a.covariance + b.covariance)
        assert subject.frechet(a, b) == pytest.approx(apart - 2 * np.sqrt(np.maximum(values.real, 0)).sum(), rel=tolerance)


def test_kernel_distance_is_symmetric_and_deterministic():
    """Symmetric for subsets of all rows; deterministic for a seed."""
    real, fake = rows(0, 40, 6), rows(1, 40, 6, shift=0.3)
    assert subject.kernel_distance(real, fake, 1)[0] == pytest.approx(subject.kernel_distance(fake, real, 1)[0], rel=1e-12)
    assert subject.kernel_distance(real, fake, 20, 10, 1) == subject.kernel_distance(real, fake, 20, 10, 1)

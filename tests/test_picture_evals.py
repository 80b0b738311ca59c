"""Evaluations of reconstructions, codes, filters and likelihoods against closed forms, scikit-learn and loops."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats
from eval_contexts import levels, make_context, means, smooth, to_floats
from feature_clouds import mesh_of
from sklearn.decomposition import PCA
from sklearn.manifold import trustworthiness

from ssl_jax.evals import run as evals
from ssl_jax.evals.kinds import denoising, likelihood, pca_baseline, reconstruction
from ssl_jax.evals.lib import distances, linear_maps, quality  # fmt: skip

# --- image quality


def test_psnr_in_closed_form():
    x = np.random.default_rng(0).random((3, 4, 5, 3))
    offset = np.array([0.1, 0.01, 0.0])[:, None, None, None]
    np.testing.assert_allclose(quality.psnr(x, x + offset), [20, 40, 100], rtol=1e-12)
    np.testing.assert_allclose(quality.squared_error(x, x + offset), [60 * 0.01, 60 * 0.0001, 0], rtol=1e-9)


def test_ssim_equals_a_loop_over_windows_and_the_closed_form_for_constant_images():
    x, y = (np.random.default_rng(i).random((2, 13, 14, 2)) for i in range(2))
    y = 0.5 * x + 0.5 * y
    edge = np.arange(-5, 6)
    window = np.exp(-(edge[:, None] ** 2 + edge**2) / (2 * 1.5**2))
    window /= window.sum()
    expected = []
    for a, b in zip(x, y, strict=True):
        values = []
        for i in range(3):
            for j in range(4):
                for c in range(2):
                    p, q = a[i : i + 11, j : j + 11, c], b[i : i + 11, j : j + 11, c]
                    m, n = (window * p).sum(), (window * q).sum()
                    vp, vq, cov = (window * (p - m) ** 2).sum(), (window * (q - n) ** 2).sum(), (window * (p - m) * (q - n)).sum()
                    values.append((2 * m * n + 1e-4) * (2 * cov + 9e-4) / ((m * m + n * n + 1e-4) * (vp + vq + 9e-4)))
        expected.append(np.mean(values))
    np.testing.assert_allclose(quality.ssim(x, y), expected, rtol=1e-12)
    np.testing.assert_allclose(quality.ssim(x, x), 1, rtol=1e-12)
    flat = quality.ssim(np.full((1, 11, 11, 1), 0.2), np.full((1, 11, 11, 1), 0.6))
    np.testing.assert_allclose(flat, (2 * 0.12 + 1e-4) / (0.04 + 0.36 + 1e-4), rtol=1e-12)


def test_reconstruction_psnr_ssim_and_frechet_distance_of_the_whole_split():
    images = smooth(0, 40)
    darker = jax.jit(lambda x: 0.8713 * x / 255.0)
    given = make_context(smooth(1, 24), images, reconstruct=darker, extractor=means)
    plain = reconstruction.evaluate(given, examples=20)
    reconstructed = 0.8713 * levels(images)
    assert plain.metrics["psnr"] == pytest.approx(quality.psnr(levels(images), reconstructed)[:20].mean(), rel=1e-5)
    assert plain.metrics["ssim"] == pytest.approx(quality.ssim(levels(images), reconstructed)[:20].mean(), rel=1e-5)
    assert "frechet" not in plain.metrics and "extractor" not in plain.protocol
    measured = reconstruction.evaluate(given, examples=20, extractor="means")
    assert measured.metrics.items() >= plain.metrics.items()
    x, y = images.mean((1, 2)), np.round(255 * reconstructed).mean((1, 2))
    expected = 100 * distances.frechet(distances.moments(x), distances.moments(y)) / np.cov(x.T).trace()
    assert measured.metrics["frechet"] == pytest.approx(expected, rel=1e-3)
    assert "fid" not in measured.metrics
    assert measured.protocol.endswith(
        "frechet extractor=means weights=ffffffff dimensions=3 resize=legacy pixels=12x12 all of test(40), in percent of the variance"
        " of the images"
    )
    assert "ssim" not in reconstruction.evaluate(make_context(images[:, :8], reconstruct=to_floats)).metrics  # no window fits


# --- linear maps of pixels


def test_principal_components_equal_scikit_learn():
    x = levels(smooth(0, 90, 4)).reshape(90, -1).astype(np.float32)
    for k in (3, 20, 48):  # some of many, most, all
        ours, theirs = linear_maps.pca(distances.chunked_moments(x, 32), k), PCA(k, svd_solver="full").fit(x.astype(np.float64))
        np.testing.assert_allclose(ours(x), theirs.inverse_transform(theirs.transform(x)), atol=1e-6)
        np.testing.assert_allclose(np.abs(ours.code(x)), np.abs(theirs.transform(x.astype(np.float64))), atol=1e-6)


@pytest.mark.full
def test_best_filter_is_the_wiener_filter_and_least_squares_with_clipping():
    x = levels(smooth(0, 60, 3)).reshape(60, -1)
    wiener, sigma = linear_maps.best_filter(x, 0.3, False), 0.3
    covariance = np.cov(x.T, ddof=0)
    np.testing.assert_allclose(wiener.inward.T, covariance @ np.linalg.inv(covariance + sigma**2 * np.eye(27)), atol=1e-10)
    np.testing.assert_allclose(wiener.before, x.mean(0), rtol=1e-12)

    for value, s in ((0.0, 0.5), (0.3, 0.2), (1.0, 0.7), (0.5, 0.01)):
        def moment(power, value=value, s=s):
            inside = lambda e: np.clip(value + s * e, 0, 1) ** power * scipy.stats.norm.pdf(e)  # noqa: E731
            edges = sorted({-9.0, 9.0, *np.clip([-value / s, (1 - value) / s], -9, 9)})
            return sum(scipy.integrate.quad(inside, a, b)[0] for a, b in itertools.pairwise(edges))

        mean, variance = linear_maps.clipped(np.array([value]), s)
        assert (mean[0], variance[0]) == pytest.approx((moment(1), moment(2) - moment(1) ** 2), abs=1e-8)

    best = linear_maps.best_filter(x, 0.5, True)
    generator = np.random.default_rng(1)
    clean = np.tile(x, (4000, 1))
    noisy = np.clip(clean + 0.5 * generator.standard_normal(clean.shape), 0, 1)
    weights, *_ = np.linalg.lstsq(np.concatenate([noisy, np.ones((len(noisy), 1))], 1), clean, rcond=None)
    np.testing.assert_allclose(best.inward, weights[:-1], atol=5e-3)
    np.testing.assert_allclose(best.after - best.before @ best.inward, weights[-1], atol=5e-3)


@pytest.mark.parametrize("gray", [False, True])
def test_pca_baseline_of_a_linear_code_equals_scikit_learn_pca(gray):
    train, test = smooth(0, 80, 6, gray), smooth(1, 37, 6, gray)
    x, y = (levels(images).reshape(len(images), -1)[:, :: 3 if gray else 1] for images in (train, test))
    oracle = PCA(5, svd_solver="full").fit(x)
    mean, components = (jnp.asarray(a, jnp.float32) for a in (oracle.mean_, oracle.components_))
    channels = 1 if gray else 3

    def code(images):
        return (images.reshape(len(images), 36, 3)[..., :channels].reshape(len(images), -1) / 255.0 - mean) @ components.T

    @jax.jit
    def reconstruct(images):
        reconstructed = (code(images) @ components + mean).reshape(-1, 6, 6, channels)
        return jnp.broadcast_to(reconstructed, (len(images), 6, 6, 3))

    encode = jax.jit(lambda images: {"code": code(images), "pooled": code(images)})
    given = make_context(train, test, encode, reconstruct=reconstruct)
    evals.check_needs({"one": dict(kind="pca_baseline")}, given)
    metrics, protocol, _ = pca_baseline.evaluate(given, examples=33)
    error = np.sum((oracle.inverse_transform(oracle.transform(y)) - y) ** 2, 1)[:33].mean()
    assert metrics["squared_error_pca"] == pytest.approx(error, rel=1e-5)
    assert metrics["squared_error"] == pytest.approx(error, rel=1e-4)  # the linear code spans the principal subspace
    assert metrics["ratio"] == pytest.approx(1, rel=1e-4)
    expected = trustworthiness(y[:33], oracle.transform(y[:33]), n_neighbors=5)
    assert metrics["trustworthiness"] == pytest.approx(expected, abs=2e-3)
    assert metrics["trustworthiness_pca"] == pytest.approx(expected, abs=2e-3)
    assert protocol == (
        f"reduction layer=code D=5 first of test(33) pixels=6x6x{channels} in [0, 1], principal components of train(80);"
        " trustworthiness of 5 neighbors among 33"
    )
    given.opened.clear()
    assert pca_baseline.evaluate(given, examples=33).metrics == metrics
    assert "train" not in given.opened  # cached for the run


@pytest.mark.full
def test_denoising_gain_over_noisy_images_pca_and_linear_filter():
    train, test = smooth(0, 200, 6, gray=True), smooth(1, 50, 6, gray=True)
    seen = []

    @jax.jit
    def keep(images):
        jax.debug.callback(lambda x: seen.append(np.array(x)), images)
        return images

    given = make_context(train, test, reconstruct=keep)
    evals.check_needs({"one": dict(kind="denoising")}, given)
    same = denoising.evaluate(given, sigma=0.4, components=4, examples=50, seed=3)
    jax.effects_barrier()
    noisy = np.concatenate([x for x in seen if x.dtype == np.float32])[:50]
    assert (noisy == noisy[..., :1]).all() and noisy.min() == 0 and noisy.max() == 1  # gray noise, clipped
    assert same.metrics["gain"] == pytest.approx(0, abs=1e-6)
    plain, clean = (x[..., 0].reshape(50, -1).astype(np.float64) for x in (noisy, levels(test)))
    assert np.std(noisy[(plain.reshape(50, 6, 6) > 0)]) > 0.2
    assert same.metrics["psnr_noisy"] == pytest.approx(quality.psnr(clean, plain).mean(), rel=1e-5)
    x = levels(train)[..., 0].reshape(200, -1)
    best = linear_maps.best_filter(x, 0.4, True)
    assert same.metrics["psnr_linear"] == pytest.approx(quality.psnr(clean, best(plain).clip(0, 1)).mean(), rel=1e-5)
    basis = PCA(4, svd_solver="full").fit(x)
    projected = (plain - best.before) @ basis.components_.T @ basis.components_ + basis.mean_
    assert same.metrics["psnr_pca"] == pytest.approx(quality.psnr(clean, projected.clip(0, 1)).mean(), rel=1e-5)
    assert same.metrics["psnr_noisy"] < same.metrics["psnr_pca"] < same.metrics["psnr_linear"]
    weights, offset = jnp.asarray(best.inward, jnp.float32), jnp.asarray(best.after - best.before @ best.inward, jnp.float32)

    @jax.jit
    def filtered(images):
        reconstructed = images[..., 0].reshape(len(images), -1) @ weights + offset
        return jnp.broadcast_to(reconstructed.clip(0, 1).reshape(-1, 6, 6, 1), (len(images), 6, 6, 3))

    best_one = denoising.evaluate(make_context(train, test, reconstruct=filtered), sigma=0.4, components=4, examples=50, seed=3)
    assert best_one.metrics["gain_linear"] == pytest.approx(0, abs=1e-3)
    assert best_one.metrics["gain"] == pytest.approx(best_one.metrics["psnr_linear"] - same.metrics["psnr_noisy"], abs=1e-3)
    assert "sigma=0.4 cut off at 0 and 1 seed=3 first of test(50) pixels=6x6x1" in same.protocol
    free = denoising.evaluate(given, sigma=0.4, clip=False, components=4, examples=50)
    assert free.metrics["psnr_noisy"] == pytest.approx(-20 * np.log10(0.4), abs=0.15)


# --- likelihood


@pytest.mark.full
def test_iwae_bound_of_a_linear_gaussian_model_rises_with_k_to_the_evidence():
    """Five pixels x = W z + noise: the evidence has a closed form; q is shifted and wider."""
    generator = np.random.default_rng(0)
    weights, images = generator.standard_normal((5, 2)), generator.integers(0, 256, (900, 5, 1, 1), np.uint8)
    covariance = weights @ weights.T + 0.25 * np.eye(5)
    x = levels(images).reshape(900, 5)
    exact = scipy.stats.multivariate_normal(np.zeros(5), covariance).logpdf(x).mean()
    posterior = np.linalg.inv(np.eye(2) + weights.T @ weights / 0.25)
    normal = jax.scipy.stats.norm.logpdf

    def log_prob(images, key, k, shift=0.15, scale=1.3):
        x = images.reshape(len(images), 5) / 255.0
        mean, std = x @ (posterior @ weights.T / 0.25).T + shift, scale * np.sqrt(np.diag(posterior))
        z = mean + std * jax.random.normal(key, (k, len(x), 2))
        joint = normal(z).sum(-1) + normal(x, z @ weights.T, 0.5).sum(-1)
        w = joint - normal(z, mean, std).sum(-1)
        return {"elbo": w.mean(0), "iwae": jax.scipy.special.logsumexp(w, axis=0) - jnp.log(k)}

    jitted = jax.jit(log_prob, static_argnums=2)
    context = make_context(images, log_prob=jitted, mesh=mesh_of(8), size=320)
    results = [likelihood.evaluate(context, k=k).metrics for k in (1, 5, 50, 1000)]
    bounds = [metrics[f"iwae_{k}"] for metrics, k in zip(results, (1, 5, 50, 1000), strict=True)]
    assert results[0]["elbo"] == pytest.approx(bounds[0], rel=1e-6)
    assert (np.diff(bounds) > 0).all() and bounds[-1] == pytest.approx(exact, abs=0.01)
    assert results[-1]["elbo"] < bounds[1]
    assert results[-1]["bits_per_dimension"] == pytest.approx(-bounds[-1] / (5 * np.log(2)), rel=1e-6)


def test_bits_per_dimension_of_uniform_pixels_is_eight_for_any_channels_and_batches():
    images = smooth(0, 20, 4)
    uniform = jax.jit(lambda x, key, k: dict.fromkeys(("elbo", "iwae"), jnp.full(len(x), -48 * jnp.log(256.0))), static_argnums=2)
    metrics, protocol, _ = likelihood.evaluate(make_context(images, log_prob=uniform), k=3, examples=18)
    assert metrics["bits_per_dimension"] == pytest.approx(8, rel=1e-6) == metrics["elbo_bits_per_dimension"]
    assert protocol == "likelihood k=3 seed=0 of test(18) dimensions=48"
    one = jax.jit(lambda x, key, k: uniform(x, key, k) | {"dimensions": jnp.float32(16)}, static_argnums=2)
    assert likelihood.evaluate(make_context(images, log_prob=one)).metrics["bits_per_dimension"] == pytest.approx(24, rel=1e-6)
    keys = jax.jit(lambda x, key, k: dict.fromkeys(("elbo", "iwae"), jnp.full(len(x), jax.random.uniform(key))), static_argnums=2)
    context = make_context(images, log_prob=keys)
    first, repeated, other = (likelihood.evaluate(context, seed=seed).metrics["elbo"] for seed in (0, 0, 1))
    assert first == repeated != other
    values = [jax.random.uniform(jax.random.fold_in(jax.random.key(0), batch)) for batch in range(2)]
    assert first == pytest.approx(float(16 * values[0] + 4 * values[1]) / 20, rel=1e-5)

"""Perceptual path length of images that change linearly, and its trimmed mean."""

import hashlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax.errors import UserError
from ssl_jax.evals import run as evals
from ssl_jax.evals.kinds import perceptual_path as subject
from ssl_jax.models.pretrained import vgg
from ssl_jax.objectives.perceptual import _unit, feature_distance, random_features, random_kernels

BASE = np.random.default_rng(1).random((40, 8, 8, 3), np.float32)


def lines(slope):
    """A context whose generator gives BASE + t * slope * direction, and the directions."""
    directions = np.random.default_rng(0).standard_normal(BASE.shape).astype(np.float32)

    def between(space, seed, t):
        assert space == "w"
        for part in (slice(0, 16), slice(16, 40)):
            yield (BASE[part] + slope * t[part, None, None, None] * directions[part]).astype(np.float32)

    return types.SimpleNamespace(model=types.SimpleNamespace(between=between)), directions


@pytest.mark.full
def test_perceptual_path_length_is_the_squared_speed_of_unit_features():
    kernels, (context, directions) = random_kernels(), lines(0.5)

    def features(x):
        return [_unit(h) for h in random_features(kernels, x)]

    _, speed = jax.jvp(features, (jnp.asarray(BASE),), (0.5 * directions,))
    expected = sum(np.mean(np.sum(np.asarray(v, np.float64) ** 2, -1), (1, 2)) for v in speed)
    measured = subject.evaluate(context, examples=40, epsilon=2e-3)
    assert measured.metrics["length"] == pytest.approx(subject.trimmed_mean(expected), rel=0.02)
    assert "distance=random_conv" in measured.protocol
    twice = subject.evaluate(lines(1.0)[0], examples=40, epsilon=1e-3)
    assert twice.metrics["length"] == pytest.approx(4 * measured.metrics["length"], rel=0.02)


def test_full_paths_are_measured_at_random_positions():
    positions = []

    def between(space, seed, t):
        positions.append(t)
        yield np.zeros((len(t), 4, 4, 3), np.float32)

    context = types.SimpleNamespace(model=types.SimpleNamespace(between=between))
    assert subject.evaluate(context, examples=50, where="full", space="z", epsilon=0.01).metrics["length"] < 1e-6
    assert 0.3 < positions[0].mean() < 0.7
    np.testing.assert_allclose(positions[1] - positions[0], 0.01)
    with pytest.raises(UserError, match="examples=1 must be at least 2"):
        evals.check({"path": dict(kind="perceptual_path", examples=1)})


@pytest.mark.full
def test_perceptual_path_with_lpips_uses_the_weight_file(tmp_path):
    rng = np.random.default_rng(2)
    arrays = {name: (rng.standard_normal(shape) * 0.05).astype(np.float32) for name, shape in vgg.shapes().items()}
    arrays |= {name: np.abs(x) for name, x in arrays.items() if name.startswith("lin")}
    path = tmp_path / "lpips.npz"
    np.savez(path, **arrays)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    a, b = (rng.random((3, 16, 16, 3), np.float32) for _ in range(2))
    context = types.SimpleNamespace(
        model=types.SimpleNamespace(between=lambda space, seed, t: iter([a if t[0] == 0 else b]))
    )
    measured = subject.evaluate(context, examples=3, epsilon=0.5, distance="lpips", path=str(path), sha256=digest)
    expected = feature_distance(vgg.features(arrays, a), vgg.features(arrays, b), vgg.lins(arrays)) / 0.25
    assert measured.metrics["length"] == pytest.approx(subject.trimmed_mean(np.asarray(expected)), rel=1e-4)
    assert f"distance=lpips weights={digest[:8]}" in measured.protocol
    with pytest.raises(UserError, match="is no file"):
        subject.prepare(context, distance="lpips", path=str(tmp_path / "none.npz"), sha256=digest)
    with pytest.raises(UserError, match="distance='vgg'; choose one of"):
        evals.check({"path": dict(kind="perceptual_path", distance="vgg")})


def test_large_images_are_cropped_to_faces_and_downsampled():
    x = np.random.default_rng(0).random((2, 1024, 1024, 1), np.float32)
    expected = x.reshape(2, 256, 4, 256, 4, 1).mean((2, 4))
    np.testing.assert_allclose(subject.crop_and_downsample(x, False), expected, rtol=1e-5)
    expected = x[:, 384:896, 256:768].reshape(2, 256, 2, 256, 2, 1).mean((2, 4))
    np.testing.assert_allclose(subject.crop_and_downsample(x, True), expected, rtol=1e-5)
    assert subject.crop_and_downsample(x[:, :64, :64], False).shape == (2, 64, 64, 1)


def test_trimmed_mean_drops_outliers():
    lengths = np.concatenate([np.arange(1.0, 101), [1e9]])
    assert subject.trimmed_mean(lengths) == pytest.approx(np.mean(np.arange(2, 101)))

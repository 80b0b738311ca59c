"""Perceptual path length of pictures that change along lines, and its trimmed mean."""

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
    """A generator whose pictures are BASE + place * slope * direction, and the directions."""
    directions = np.random.default_rng(0).standard_normal(BASE.shape).astype(np.float32)

    def between(space, seed, place):
        assert space == "w"
        for part in (slice(0, 16), slice(16, 40)):
            yield (BASE[part] + slope * place[part, None, None, None] * directions[part]).astype(np.float32)

    return types.SimpleNamespace(pictures=types.SimpleNamespace(between=between)), directions


def test_the_length_is_the_squared_speed_of_the_unit_features():
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


def test_full_ways_are_measured_anywhere_on_them():
    places = []

    def between(space, seed, place):
        places.append(place)
        yield np.zeros((len(place), 4, 4, 3), np.float32)

    context = types.SimpleNamespace(pictures=types.SimpleNamespace(between=between))
    assert subject.evaluate(context, examples=50, where="full", space="z", epsilon=0.01).metrics["length"] < 1e-6
    assert 0.3 < places[0].mean() < 0.7
    np.testing.assert_allclose(places[1] - places[0], 0.01)
    with pytest.raises(UserError, match="examples=1 must be at least 2"):
        evals.check({"path": dict(kind="perceptual_path", examples=1)})


@pytest.mark.full
def test_lpips_needs_its_file_and_is_measured_with_its_weights(tmp_path):
    rng = np.random.default_rng(2)
    arrays = {name: (rng.standard_normal(shape) * 0.05).astype(np.float32) for name, shape in vgg.shapes().items()}
    arrays |= {name: np.abs(x) for name, x in arrays.items() if name.startswith("lin")}
    path = tmp_path / "lpips.npz"
    np.savez(path, **arrays)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    a, b = (rng.random((3, 16, 16, 3), np.float32) for _ in range(2))
    context = types.SimpleNamespace(
        pictures=types.SimpleNamespace(between=lambda space, seed, place: iter([a if place[0] == 0 else b]))
    )
    found = subject.evaluate(context, examples=3, epsilon=0.5, distance="lpips", path=str(path), sha256=digest)
    expected = feature_distance(vgg.features(arrays, a), vgg.features(arrays, b), vgg.lins(arrays)) / 0.25
    assert found.metrics["length"] == pytest.approx(subject.trimmed_mean(np.asarray(expected)), rel=1e-4)
    assert f"distance=lpips weights={digest[:8]}" in found.protocol
    with pytest.raises(UserError, match="is no file"):
        subject.prepare(context, distance="lpips", path=str(tmp_path / "none.npz"), sha256=digest)
    with pytest.raises(UserError, match="distance='vgg'; choose one of"):
        evals.check({"path": dict(kind="perceptual_path", distance="vgg")})


def test_large_pictures_are_reduced_by_means_of_squares_and_faces_cut_out():
    x = np.random.default_rng(0).random((2, 1024, 1024, 1), np.float32)
    expected = x.reshape(2, 256, 4, 256, 4, 1).mean((2, 4))
    np.testing.assert_allclose(subject.reduced(x, False), expected, rtol=1e-5)
    np.testing.assert_allclose(subject.reduced(x, True), x[:, 384:896, 256:768].reshape(2, 256, 2, 256, 2, 1).mean((2, 4)), rtol=1e-5)
    assert subject.reduced(x[:, :64, :64], False).shape == (2, 64, 64, 1)


def test_outliers_are_left_out():
    lengths = np.concatenate([np.arange(1.0, 101), [1e9]])
    assert subject.trimmed_mean(lengths) == pytest.approx(np.mean(np.arange(2, 101)))

"""Perceptual path length of a linear generator, of a turning one, and its trimmed mean."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax.evals import perceptual_path as subject


def squared(a, b):
    return jnp.sum((a - b) ** 2, axis=-1)


def latents(n, size=6):
    return (jax.random.normal(jax.random.key(i), (n, size)) for i in (1, 2))


def test_a_linear_generator_has_twice_its_squared_norm_anywhere_on_the_way():
    a = jnp.asarray(np.random.default_rng(0).standard_normal((6, 20)), jnp.float32)
    start, end = latents(40_000)
    for place in (jnp.zeros(40_000), jax.random.uniform(jax.random.key(3), (40_000,))):
        lengths = subject.path_lengths(lambda w: w @ a, squared, start, end, place, epsilon=1e-2)
        np.testing.assert_allclose(lengths.mean(), 2 * jnp.sum(a**2), rtol=0.02)
        np.testing.assert_allclose(lengths[:50], jnp.sum(((end - start) @ a)[:50] ** 2, -1), rtol=1e-3)


def test_great_circles_have_unit_length_and_the_speed_of_their_angle():
    start, end = latents(100)
    t = jax.random.uniform(jax.random.key(3), (100,))
    on = subject.slerp(start, 3 * end, t)
    np.testing.assert_allclose(jnp.linalg.norm(on, axis=-1), 1, rtol=1e-5)
    unit = [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in map(np.asarray, (start, end))]
    np.testing.assert_allclose(subject.slerp(start, end, jnp.zeros(100)), unit[0], atol=1e-6)
    np.testing.assert_allclose(subject.slerp(start, end, jnp.ones(100)), unit[1], atol=1e-5)
    angle = np.arccos(np.sum(unit[0] * unit[1], -1))
    speed = subject.path_lengths(lambda z: z, squared, start, end, t, subject.slerp, epsilon=1e-2)
    np.testing.assert_allclose(speed, angle**2, rtol=1e-3)


def test_outliers_are_left_out():
    lengths = np.concatenate([np.arange(1.0, 101), [1e9]])
    assert subject.trimmed_mean(lengths) == pytest.approx(np.mean(np.arange(2, 101)))

"""Differentiable augmentations: ranges and effects of each operation, probabilities, gradients, the adaptive probability."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax.augment import diffaugment
from ssl_jax.errors import UserError

KEY = jax.random.key(0)


def apply(operation, x, numbers=1):
    return operation(x, jax.random.uniform(KEY, (numbers, len(x), 1, 1, 1)))


def pictures(n=64, height=8, width=16, seed=0):
    return jnp.asarray(np.random.default_rng(seed).uniform(-1, 1, (n, height, width, 3)), jnp.float32)


def test_color_operations_stay_in_range_and_keep_means():
    x = pictures(400)
    added = apply(diffaugment.brightness, x) - x
    assert np.ptp(added, axis=(1, 2, 3)).max() < 1e-6
    np.testing.assert_allclose((added.min(), added.max()), (-0.5, 0.5), atol=0.01)
    gray, saturated = x.mean(3, keepdims=True), apply(diffaugment.saturation, x)
    np.testing.assert_allclose(saturated.mean(3, keepdims=True), gray, atol=1e-6)
    factors = np.sum((saturated - gray) * (x - gray), (1, 2, 3)) / np.sum((x - gray) ** 2, (1, 2, 3))
    np.testing.assert_allclose((factors.min(), factors.max()), (0, 2), atol=0.02)
    mean, contrasted = x.mean((1, 2, 3), keepdims=True), apply(diffaugment.contrast, x)
    np.testing.assert_allclose(contrasted.mean((1, 2, 3), keepdims=True), mean, atol=1e-6)
    factors = np.sum((contrasted - mean) * (x - mean), (1, 2, 3)) / np.sum((x - mean) ** 2, (1, 2, 3))
    np.testing.assert_allclose((factors.min(), factors.max()), (0.5, 1.5), atol=0.01)


def test_translation_shifts_by_whole_pixels_and_fills_with_zeros():
    x = pictures(400)
    shifted, found = np.asarray(apply(diffaugment.translation, x, 2)), set()
    for before, after in zip(np.asarray(x), shifted, strict=True):
        for dy in (-1, 0, 1):  # an eighth of 8
            for dx in (-2, -1, 0, 1, 2):  # an eighth of 16
                big = np.pad(before, ((1, 1), (2, 2), (0, 0)))
                if np.array_equal(after, big[1 - dy : 9 - dy, 2 - dx : 18 - dx]):
                    found.add((dy, dx))
                    break
            else:
                continue
            break
        else:
            pytest.fail("not a shift by whole pixels")
    assert len(found) == 15


def test_cutout_zeros_a_square_of_half_the_size():
    zeros = np.asarray(apply(diffaugment.cutout, jnp.ones((2000, 8, 16, 3)), 2) == 0)
    assert (zeros[..., 0] == zeros[..., 1]).all()
    rows, columns = zeros[..., 0].any(2), zeros[..., 0].any(1)
    np.testing.assert_array_equal(zeros[..., 0], rows[:, :, None] & columns[:, None])
    assert set(rows.sum(1)) == {2, 3, 4}  # a side of 4 around 0 .. 8
    assert set(columns.sum(1)) == {4, 5, 6, 7, 8}
    assert len(np.unique(rows, axis=0)) == 9


@pytest.mark.full
def test_probability_is_per_image_and_may_be_traced():
    x = pictures(1000)
    policy = tuple(diffaugment.OPERATIONS)
    np.testing.assert_array_equal(diffaugment.augment(x, KEY, policy, 0.0), x)
    np.testing.assert_array_equal(diffaugment.augment(x, KEY, ()), x)
    traced = jax.jit(lambda p: diffaugment.augment(x, KEY, ("cutout",), p))
    changed = np.any(traced(0.3) != x, axis=(1, 2, 3))
    assert 0.25 < changed.mean() < 0.35
    assert np.any(traced(1.0) != x, axis=(1, 2, 3)).all()
    always = diffaugment.augment(x, KEY, policy)
    assert not np.array_equal(always, diffaugment.augment(x, jax.random.key(1), policy))
    np.testing.assert_allclose(always[:10], jax.jit(diffaugment.augment, static_argnums=2)(x, KEY, policy)[:10], atol=1e-6)


@pytest.mark.full
def test_gradients_reach_the_images():
    x = pictures(4)
    direction = pictures(4, seed=1)

    def f(x):
        return jnp.sum(jnp.sin(diffaugment.augment(x, KEY, tuple(diffaugment.OPERATIONS))))

    slope = jnp.sum(jax.grad(f)(x) * direction)
    numeric = (f(x + 1e-2 * direction) - f(x - 1e-2 * direction)) / 2e-2
    assert abs(slope) > 1
    np.testing.assert_allclose(slope, numeric, rtol=1e-2)


def test_unknown_operation_is_a_user_error():
    with pytest.raises(UserError, match="no 'colors'; choose from color, translation, cutout"):
        diffaugment.check_policy(("translation", "colors"))


def test_adaptive_probability_steps_toward_the_target():
    half = jnp.float32(0.5)
    np.testing.assert_allclose(diffaugment.adapt(half, 0.9, 256) - 0.5, 5.12e-4, rtol=1e-3)  # batch 64, every 4 steps
    np.testing.assert_allclose(diffaugment.adapt(half, 0.3, 256) - 0.5, -5.12e-4, rtol=1e-3)
    assert diffaugment.adapt(jnp.float32(0), -1.0, 256) == 0
    assert diffaugment.adapt(jnp.float32(1), 1.0, 256) == 1

"""Known motions: groups, bins, poses in the world, warps without borders, and the convention of the embedded scenes."""

import math

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax.augment import motions
from ssl_jax.data import render
from ssl_jax.errors import UserError

KEY = jax.random.key(0)
LIMITS = (3.0, 2.0, 0.5, 0.2)


def some(count=20, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (count, 4)) * LIMITS


def matrix(motion, size=1):
    """float64 [3, 3]: takes (x, y, 1) of the first view to the second, for views of `size` pixels."""
    dx, dy, turn, log_zoom = motion
    scale, center = math.exp(log_zoom), (size - 1) / 2
    out = np.array([[math.cos(turn), -math.sin(turn), 0], [math.sin(turn), math.cos(turn), 0], [0, 0, 1]])
    out[:2] *= scale
    out[:2, 2] = center - out[:2, :2] @ [center, center] + [dx, dy]
    return out


def test_the_convention_is_that_of_the_embedded_scenes():
    for motion in some():
        np.testing.assert_allclose(render.motion_matrix(motion), matrix(motion, render.SIZE)[:2], atol=1e-12)


def test_motions_form_a_group():
    first, second = some(seed=1), some(seed=2)
    together, back, between = motions.compose(first, second), motions.invert(first), motions.relative(first, second)
    for i in range(20):
        np.testing.assert_allclose(matrix(together[i]), matrix(second[i]) @ matrix(first[i]), atol=1e-5)
        np.testing.assert_allclose(matrix(back[i]), np.linalg.inv(matrix(first[i])), atol=1e-5)
        np.testing.assert_allclose(matrix(between[i]) @ matrix(first[i]), matrix(second[i]), atol=1e-5)
    np.testing.assert_allclose(motions.relative(first, first), 0, atol=1e-6)
    np.testing.assert_allclose(motions.relative(second, first), motions.invert(between), atol=1e-5)  # the swapped pair


def random_rotations(count, seed):
    q, r = np.linalg.qr(np.random.default_rng(seed).normal(size=(count, 3, 3)))
    q = q * np.sign(np.diagonal(r, axis1=1, axis2=2))[:, None]
    return q * np.sign(np.linalg.det(q))[:, None, None]


def test_relative_poses_do_not_depend_on_the_world_frame():
    """R1'R2 and R1'(t2 - t1), in float64; the difference t2 - t1 does depend on it."""
    rng = np.random.default_rng(0)
    r1, r2, world = random_rotations(9, 1), random_rotations(9, 2), random_rotations(1, 3)[0]
    t1, t2, shift = rng.normal(size=(9, 3)), rng.normal(size=(9, 3)), rng.normal(size=3)
    rotation, translation = motions.relative_pose(r1, t1, r2, t2)
    moved = motions.relative_pose(world @ r1, t1 @ world.T + shift, world @ r2, t2 @ world.T + shift)
    np.testing.assert_allclose(moved[0], rotation, atol=1e-14)
    np.testing.assert_allclose(moved[1], translation, atol=1e-14)
    assert np.abs((t2 - t1) @ world.T - (t2 - t1)).max() > 1
    back, back_translation = motions.relative_pose(r2, t2, r1, t1)  # the swapped pair is the inverse
    np.testing.assert_allclose(back @ rotation, np.broadcast_to(np.eye(3), (9, 3, 3)), atol=1e-14)
    np.testing.assert_allclose(back_translation, -(np.swapaxes(rotation, 1, 2) @ translation[..., None])[..., 0], atol=1e-14)
    identity = motions.relative_pose(r1, t1, r1, t1)
    np.testing.assert_allclose(identity[0], np.broadcast_to(np.eye(3), (9, 3, 3)), atol=1e-14)
    assert (identity[1] == 0).all()
    single = motions.relative_pose(r1[0], t1[0], r2[0], t2[0])
    np.testing.assert_allclose(single[1], translation[0])


def test_drawn_motions_are_uniform_and_depend_on_the_example_only():
    drawn = np.asarray(motions.draw_motions(KEY, 4000, LIMITS))
    assert drawn.dtype == np.float32 and (np.abs(drawn) <= LIMITS).all()
    np.testing.assert_allclose(drawn.std(0) / LIMITS, 1 / np.sqrt(3), atol=0.02)
    np.testing.assert_allclose(drawn.mean(0) / LIMITS, 0, atol=0.04)
    assert np.abs(np.corrcoef(drawn.T) - np.eye(4)).max() < 0.06
    np.testing.assert_array_equal(motions.draw_motions(KEY, 10, LIMITS), drawn[:10])


def test_whole_pixels_from_minus_to_plus_the_limit_are_equally_likely():
    drawn = np.asarray(motions.draw_motions(KEY, 4000, (3, 1, 0.5, 0), whole_pixels=True))
    counts = [np.unique(drawn[:, axis], return_counts=True) for axis in (0, 1)]
    np.testing.assert_array_equal(counts[0][0], np.arange(-3, 4))
    np.testing.assert_array_equal(counts[1][0], [-1, 0, 1])
    for _, count in counts:
        np.testing.assert_allclose(count * len(count) / 4000, 1, atol=0.12)
    assert (drawn[:, 3] == 0).all() and len(np.unique(drawn[:, 2])) > 3000
    bins = motions.bin_motions(drawn[:, :2], (3.5, 1.5), (7, 3))
    np.testing.assert_array_equal(bins, drawn[:, :2] + [3, 1])


def test_bins_of_motions_center_mirror_and_ends():
    values, limits, bins = some(200).astype(np.float32), np.array(LIMITS), (7, 5, 21, 3)
    found = np.asarray(motions.bin_motions(values, LIMITS, bins))
    for axis in range(4):
        edges = np.linspace(-limits[axis], limits[axis], bins[axis] + 1)
        np.testing.assert_array_equal(found[:, axis], np.digitize(values[:, axis], edges[1:-1]))
    np.testing.assert_array_equal(motions.bin_motions(np.zeros(4, np.float32), LIMITS, bins), [3, 2, 10, 1])  # the identity
    np.testing.assert_array_equal(motions.bin_motions(-values, LIMITS, bins), np.array(bins) - 1 - found)
    far = motions.bin_motions(np.array([[99, -99, 9, -9]], np.float32), LIMITS, bins)
    np.testing.assert_array_equal(far, [[6, 0, 20, 0]])
    assert found.dtype == np.int32


# Warps
def smooth_pictures(count, height, width, seed=0):
    noise = np.random.default_rng(seed).random((count, height, width, 3), dtype=np.float32)
    return np.stack([cv2.GaussianBlur(image, (0, 0), 2.5) for image in noise])


warp = jax.jit(motions.warp, static_argnums=2)


def test_warp_equals_opencv():
    images, moves, size = smooth_pictures(6, 41, 44), some(6).astype(np.float32), 21
    out = warp(images, moves, size)
    assert out.shape == (6, 21, 21, 3) and out.dtype == jnp.float32
    corner = np.array([(44 - size) / 2, (41 - size) / 2])  # of the window in the image
    to_window = np.array([[1, 0, -corner[0]], [0, 1, -corner[1]], [0, 0, 1]])
    for image, motion, found in zip(images, moves, out, strict=True):
        m = matrix(motion, size) @ to_window
        want = cv2.warpAffine(image, m[:2], (size, size), flags=cv2.INTER_LINEAR)
        np.testing.assert_allclose(found, want, atol=6e-3)  # OpenCV rounds places to 1/32 pixel


def test_warp_by_whole_pixels_and_quarter_turns_is_exact():
    images = np.random.default_rng(0).integers(0, 256, (4, 15, 15, 3)).astype(np.uint8)
    moves = np.array([[0, 0, 0, 0], [2, 0, 0, 0], [0, -3, 0, 0], [0, 0, math.pi / 2, 0]], np.float32)
    out = np.asarray(warp(images, moves, 7)) * 255
    middle = images[:, 4:11, 4:11]
    np.testing.assert_allclose(out[0], middle[0], atol=1e-3)
    np.testing.assert_allclose(out[1], images[1, 4:11, 2:9], atol=1e-3)  # the picture moved to the right
    np.testing.assert_allclose(out[2], images[2, 7:14, 4:11], atol=1e-3)  # and up
    np.testing.assert_allclose(out[3], np.rot90(middle[3], -1), atol=0.01)  # clockwise
    np.testing.assert_allclose(warp(images / np.float32(255), moves, 7) * 255, out, atol=1e-3)
    even = warp(images[:1, :14, :14], moves[:1], 6) * 255  # even sizes
    np.testing.assert_allclose(even, images[:1, 4:10, 4:10], atol=1e-3)


def test_warp_by_a_motion_and_back_gives_the_image():
    images, moves = smooth_pictures(5, 61, 61), some(5).astype(np.float32)
    there = warp(images, moves, 51)
    back = warp(there, motions.invert(jnp.asarray(moves)), 21)
    np.testing.assert_allclose(back, images[:, 20:41, 20:41], atol=0.02)
    assert np.abs(np.asarray(warp(there, moves, 21)) - images[:, 20:41, 20:41]).max() > 0.1


def test_warp_of_a_linear_picture_is_linear_and_differentiable():
    y, x = np.mgrid[:25, :25].astype(np.float32)
    image = jnp.asarray(np.stack([x, y, 3 * x - 2 * y], -1)[None])
    motion = jnp.asarray(some(1), jnp.float32)
    out = np.asarray(warp(image, motion, 11))[0]
    inverse = np.linalg.inv(matrix(motion[0], 11))
    points = inverse @ np.stack([*np.mgrid[:11, :11][::-1].reshape(2, -1), np.ones(121)])
    np.testing.assert_allclose(out[..., :2].reshape(-1, 2).T, points[:2] + 7, atol=1e-4)
    gradient = jax.grad(lambda m: warp(image, m, 11)[0, 5, 5, 0])(motion)
    step = 1e-2
    difference = (warp(image, motion.at[0, 0].add(step), 11) - warp(image, motion.at[0, 0].add(-step), 11))[0, 5, 5, 0] / (2 * step)
    np.testing.assert_allclose(gradient[0, 0], difference, rtol=1e-2)


def test_motions_within_the_limits_never_read_outside_of_the_image():
    """The farthest point that is read, against a search over motions."""
    for size, limits in ((24, (3, 3, 0.5, 0)), (9, (0, 0, 2.0, 0)), (5, (1, 4, 0.1, 0.3)), (7, (0, 0, 0, 0)), (10, (2, 0, 3.2, 0.1))):
        corners = (size - 1) / 2 * np.array([[-1, -1], [-1, 1], [1, -1], [1, 1]])
        farthest = 0
        for sign in np.stack(np.meshgrid([-1, 1], [-1, 1], [-1, 1]), -1).reshape(-1, 3):
            for turn in np.linspace(-limits[2], limits[2], 201):
                m = matrix((sign[0] * limits[0], sign[1] * limits[1], turn, sign[2] * limits[3]))
                back = np.linalg.inv(m) @ np.concatenate([corners.T, np.ones((1, 4))])
                farthest = max(farthest, np.abs(back[:2]).max())
        reach = motions.most_reach(size, limits)
        assert farthest <= reach + 1e-9 and reach < farthest + 0.01
        needed = math.ceil(2 * reach + 1)
        motions.check_interior((needed, needed + 3), size, limits)
        with pytest.raises(UserError, match=rf"need images of \d+ x \d+ pixels, not {needed} x {needed - 1}, so that no border"):
            motions.check_interior((needed, needed - 1), size, limits)
    with pytest.raises(UserError, match="are not 4 positive numbers"):
        motions.check_interior((9, 9), 3, (1, 1, -1, 0))


def test_limits_of_composed_motions_hold():
    first, then = some(500, 1) * 1.0, some(500, 2) * 0.5
    composed = np.abs(motions.compose(first, then))
    limits = np.array(motions.composed_limits(LIMITS, 0.5 * np.array(LIMITS)))
    assert (composed <= limits + 1e-5).all() and (composed.max(0) > 0.6 * limits).all()


def test_the_second_view_of_the_embedded_scenes_is_the_first_after_its_motion():
    """Warping by the motion explains it much better than the inverse motion or none."""
    scenes = [render.render(1, index) for index in range(24)]
    first, second = (np.stack([cv2.GaussianBlur(v / np.float32(255), (0, 0), 1.2) for v in views]) for views in zip(
        *((s.image, s.image2) for s in scenes), strict=True))  # fmt: skip
    moves = jnp.asarray(np.stack([s.motion for s in scenes]))
    inner = slice(12, 36)

    def error(m):
        return np.abs(np.asarray(warp(first, m, 48)) - second)[:, inner, inner].mean((1, 2, 3))

    right = error(moves)
    assert right.max() < 0.05
    assert (right < error(motions.invert(moves))).sum() >= 22 and (right < error(jnp.zeros_like(moves))).sum() >= 22

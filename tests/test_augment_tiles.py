"""Rotations, tiles, patches, permutations of puzzles, and masks: group laws, places, gaps, and loops in NumPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax.augment import hue, lab, masks, motions, permutations, tiles
from ssl_jax.augment.rotation import rotations
from ssl_jax.augment.views import make_patch_views, make_views
from ssl_jax.engine import sharding
from ssl_jax.errors import UserError

KEY = jax.random.key(0)


def bytes_(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


# Rotations
@pytest.mark.parametrize("turns", [(0, 1, 2, 3), (0, 2), (1, 3)])
@pytest.mark.parametrize("images", [bytes_(3, 5, 5, 3), bytes_(1, 4, 4, 1) / np.float32(255)])
def test_rotations_and_labels_equal_numpy(images, turns):
    rotated, labels = rotations(jnp.asarray(images), turns)
    assert rotated.dtype == images.dtype and labels.dtype == jnp.int32
    for i, v in np.ndindex(len(images), len(turns)):
        np.testing.assert_array_equal(rotated[i, v], np.rot90(images[i], turns[v]))
    np.testing.assert_array_equal(labels, [range(len(turns))] * len(images))
    np.testing.assert_array_equal(np.bincount(np.ravel(labels)), len(images))  # exactly balanced


def test_rotations_are_a_group():
    """A rotation by a, then by b, is that by a + b mod 4; the fourth turn gives the image back."""
    images = jnp.asarray(bytes_(2, 5, 5, 3))
    once = rotations(images)[0]
    for a in range(4):
        twice = rotations(once[:, a])[0]
        for b in range(4):
            np.testing.assert_array_equal(twice[:, b], once[:, (a + b) % 4])


def test_mirroring_after_a_rotation_swaps_90_and_270_degrees():
    """In D4 flip(rot90(x)) = rot270(flip(x)); so mirrored rotations look alike, and images are mirrored before."""
    images = jnp.asarray(bytes_(2, 5, 5, 3))
    rotated, mirrored_before = rotations(images)[0], rotations(images[:, :, ::-1])[0]
    for turns in range(4):
        np.testing.assert_array_equal(rotated[:, turns, :, ::-1], mirrored_before[:, -turns % 4])


def test_rotations_of_other_than_square_images_raise_user_error():
    with pytest.raises(UserError, match=r"square images, not 4 x 6 pixels; let config\.views end in one size"):
        jax.eval_shape(rotations, jnp.zeros((2, 4, 6, 3)))


# Tiles
@pytest.mark.parametrize(
    ("height", "width", "channels", "grid", "size", "jitter", "batch"),
    [(30, 30, 3, 3, 8, 2, 4), (35, 47, 1, 3, 7, 3, 1), (16, 16, 3, 2, 8, 0, 3), (17, 19, 3, 2, 5, 0, 2), (9, 9, 3, 3, 1, 2, 2)],
)
def test_tiles_are_slices_of_the_image_at_their_corners(height, width, channels, grid, size, jitter, batch):
    images = bytes_(batch, height, width, channels)
    cut, corners = jax.jit(lambda x, key: tiles.tiles(x, key, grid, size, jitter))(images, KEY)
    assert cut.shape == (batch, grid**2, size, size, channels) and cut.dtype == jnp.float32
    cell = np.array([height // grid, width // grid])
    border = (np.array([height, width]) - grid * cell) // 2
    for i, tile in np.ndindex(batch, grid**2):
        top, left = corners[i, tile]
        np.testing.assert_allclose(cut[i, tile] * 255, images[i, top : top + size, left : left + size], atol=1e-4)
        start = border + cell * np.array(divmod(tile, grid))
        assert (corners[i, tile] >= start).all() and (corners[i, tile] + size <= start + cell).all()  # inside of its cell


def test_places_of_tiles_are_uniform_and_gaps_have_the_range_of_the_paper():
    """Noroozi: offsets of 0 to 21 inclusive in cells of 85 pixels, gaps of 0 to 42; Doersch: 48 pixels +- 14."""
    image = jnp.zeros((300, 255, 255, 1))
    corners = np.asarray(jax.jit(lambda x: tiles.tiles(x, KEY, 3, 64, 21)[1])(image)).reshape(-1, 3, 3, 2)
    offsets = corners - 85 * np.stack(np.meshgrid(range(3), range(3), indexing="ij"), -1)
    counts = np.bincount(offsets.ravel(), minlength=22)
    assert len(counts) == 22
    assert ((counts - offsets.size / 22) ** 2).sum() / (offsets.size / 22) < 52  # chi squared, 21 degrees: p = 2e-4
    assert abs(np.corrcoef(offsets[..., 0].ravel(), offsets[..., 1].ravel())[0, 1]) < 0.06
    gaps = corners[:, :, 1:, 1] - corners[:, :, :-1, 1] - 64
    assert gaps.min() >= 0 and gaps.max() <= 42 and abs(gaps.mean() - 21) < 0.6
    corners = np.asarray(jax.jit(lambda x: tiles.tiles(x, KEY, 3, 96, 14)[1])(jnp.zeros((50, 432, 432, 1)))).reshape(-1, 3, 3, 2)
    gaps = corners[:, 1:, :, 0] - corners[:, :-1, :, 0] - 96
    assert 34 <= gaps.min() < 40 and 56 < gaps.max() <= 62


def test_places_of_tiles_depend_on_the_example_only():
    images = bytes_(4, 30, 30, 3)
    cut = jax.jit(lambda x: tiles.tiles(x, KEY, 3, 6, 4))
    (whole, corners), (part, corners_of_part) = cut(images), cut(images[:2])
    np.testing.assert_array_equal(corners[:2], corners_of_part)
    np.testing.assert_array_equal(whole[:2], part)
    assert len({np.asarray(c).tobytes() for c in corners}) == 4
    np.testing.assert_allclose(cut(images / np.float32(255))[0], whole, atol=1e-6)


def test_tiles_that_do_not_fit_raise_user_error():
    for grid, size, jitter in ((3, 9, 2), (3, 11, 0), (3, 0, 0), (40, 1, 0)):
        with pytest.raises(UserError, match=rf"tiles of {size} pixels with a jitter of {jitter} do not fit images of 30 x 32"):
            jax.eval_shape(lambda x, g=grid, s=size, j=jitter: tiles.tiles(x, KEY, g, s, j), jnp.zeros((2, 30, 32, 3)))


@pytest.mark.parametrize(
    ("height", "width", "size", "stride", "rows", "columns"),
    [(256, 256, 64, 32, 7, 7), (260, 260, 80, 36, 6, 6), (32, 32, 8, 4, 7, 7), (11, 14, 4, 3, 3, 4), (5, 5, 5, 1, 1, 1)],
)
def test_grid_patches_equal_slices(height, width, size, stride, rows, columns):
    images = bytes_(2, height, width, 1)
    patches = jax.jit(tiles.grid_patches, static_argnums=(1, 2))(images, size, stride)
    assert patches.shape == (2, rows, columns, size, size, 1) and patches.dtype == jnp.uint8
    top, left = (height - size) % stride // 2, (width - size) % stride // 2
    for r, c in np.ndindex(rows, columns):
        y, x = top + r * stride, left + c * stride
        np.testing.assert_array_equal(patches[:, r, c], images[:, y : y + size, x : x + size])


@pytest.mark.parametrize(("size", "stride"), [(33, 4), (8, 0), (0, 4)])
def test_grid_patches_that_do_not_fit_raise_user_error(size, stride):
    with pytest.raises(UserError, match=rf"patches of {size} pixels with stride {stride} do not fit images of 32 x 40"):
        jax.eval_shape(lambda x: tiles.grid_patches(x, size, stride), jnp.zeros((2, 32, 40, 3)))


def test_directions_of_neighbors_are_antisymmetric():
    first, second, direction = tiles.neighbor_pairs(3, 3)
    label = {(int(p), int(q)): int(d) for p, q, d in zip(first, second, direction, strict=True)}
    assert len(label) == 40 and all(label[p, q] + label[q, p] == 7 for p, q in label)
    # Doersch's labels around the center: row by row, without the center itself.
    assert [label[4, q] for q in (0, 1, 2, 3, 5, 6, 7, 8)] == list(range(8))
    assert sum(p == 4 for p, _ in label) == 8
    assert len(tiles.neighbor_pairs(7, 5)[0]) == 2 * (7 * 4 + 6 * 5 + 2 * 6 * 4)
    assert tiles.neighbor_pairs(1, 1)[0].shape == (0,)


@pytest.mark.parametrize("per_channel", [False, True])
def test_standardize_against_numpy_and_on_one_color(per_channel):
    images = (bytes_(2, 4, 8, 8, 3) / np.float32(255)) * np.array([0.1, 0.5, 1], np.float32)
    axes = (2, 3) if per_channel else (2, 3, 4)
    x = images.astype(np.float64)
    want = (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + 1e-6)
    out = tiles.standardize(jnp.asarray(images), per_channel)
    np.testing.assert_allclose(out, want, atol=1e-4)
    np.testing.assert_allclose(np.mean(out, axes), 0, atol=1e-5)
    np.testing.assert_allclose(np.std(out, axes), 1, atol=2e-3)
    flat = jnp.full((1, 1, 8, 8, 3), 0.7)
    np.testing.assert_allclose(tiles.standardize(flat, per_channel), 0, atol=1e-2)
    assert np.isfinite(jax.grad(lambda x: jnp.sum(tiles.standardize(x, per_channel) ** 2))(flat)).all()


@pytest.mark.full
def test_a_recipe_on_patches_draws_for_each_patch_and_equals_the_views_of_the_image():
    patches = jnp.asarray(bytes_(3, 5, 8, 8, 3) / np.float32(255))
    recipe = (("random_crop", {"size": 6, "pad": 1}), ("grayscale", {"p": 0.5}), ("drop_colors", {"p": 0.5}))
    out = jax.jit(make_patch_views(recipe))(patches, KEY)
    assert out.shape == (3, 5, 6, 6, 3)
    views = jax.jit(make_views([recipe] * 5))(jnp.round(patches * 255).astype(jnp.uint8), KEY)  # one crop per view
    np.testing.assert_allclose(out, views, atol=1e-6)
    same = jax.jit(make_patch_views(recipe))(jnp.broadcast_to(patches[:1, :1], patches.shape), KEY)
    assert len({np.asarray(p).tobytes() for p in same.reshape(-1, 6, 6, 3)}) > 10
    with pytest.raises(UserError, match="unknown operation 'greyscale'"):
        make_patch_views((("greyscale", {}),))


# Permutations
@pytest.mark.parametrize(
    ("kind", "count", "size", "least", "mean", "use"),
    [
        ("average", 100, 100, 2, 8.080, (11, 12)),
        ("min", 100, 100, 6, 8.027, (4, 26)),
        ("affine", 0, 72, 8, 576 / 71, (8, 8)),
        ("affine", 72, 72, 8, 576 / 71, (8, 8)),
        ("projective", 0, 504, 7, 504 * 8 / 503, (56, 56)),
    ],
)
def test_permutation_sets_have_the_published_distances_and_balance(kind, count, size, least, mean, use):
    rows = permutations.permutation_set(kind, count)
    assert rows.shape == (size, 9) and rows.dtype == np.int32
    assert (np.sort(rows, axis=1) == np.arange(9)).all() and len(np.unique(rows, axis=0)) == size
    np.testing.assert_array_equal(rows[0], np.arange(9))  # the identity is included
    pairs = [(a != b).sum() for a, b in itertools.combinations(rows, 2)]
    assert min(pairs) == least and abs(np.mean(pairs) - mean) < 1e-3
    np.testing.assert_allclose(permutations.hamming_distances(rows), (min(pairs), np.mean(pairs)))
    uses = np.stack([np.bincount(column, minlength=9) for column in rows.T])
    assert (uses.min(), uses.max()) == use
    np.testing.assert_array_equal(permutations.permutation_set(kind, count), rows)  # deterministic


@pytest.mark.full
@pytest.mark.parametrize(("kind", "least", "mean"), [("average", 2, 8.008), ("min", 5, 7.910)])
def test_a_thousand_permutations_have_the_published_distances(kind, least, mean):
    found = permutations.hamming_distances(permutations.permutation_set(kind, 1000))
    assert found[0] == least and abs(found[1] - mean) < 1e-3


@pytest.mark.parametrize(("kind", "tiles_", "size", "least"), [("affine", 4, 12, 3), ("projective", 4, 24, 2), ("affine", 16, 240, 15)])
def test_groups_of_permutations_are_closed(kind, tiles_, size, least):
    rows = permutations.permutation_set(kind, tiles=tiles_)
    found = {tuple(row) for row in rows}
    assert len(found) == len(rows) == size and permutations.hamming_distances(rows)[0] == least
    assert all(tuple(a[b]) in found for a in rows[:12] for b in rows)


def test_greedy_sets_take_the_farthest_permutation():
    """A float64 loop over all 24 orders of 4 tiles."""
    for kind, reduce in (("average", np.mean), ("min", np.min)):
        rows = permutations.permutation_set(kind, 10, tiles=4)
        for n in range(1, 10):
            rest = [p for p in itertools.permutations(range(4)) if p not in {tuple(r) for r in rows[:n]}]
            best = max(reduce([(np.array(p) != r).sum() for r in rows[:n]]) for p in rest)
            assert np.isclose(reduce([(rows[n] != r).sum() for r in rows[:n]]), best)
    assert len(np.unique(permutations.permutation_set("average", 24, tiles=4), axis=0)) == 24


def test_the_inverse_permutation_solves_the_puzzle():
    rows = permutations.permutation_set("affine")
    pieces = jnp.asarray(bytes_(5, 9, 4, 4, 3))
    labels = jnp.array([0, 1, 7, 71, 30])
    puzzle = permutations.permute(pieces, rows, labels)
    for i, slot in np.ndindex(5, 9):
        np.testing.assert_array_equal(puzzle[i, slot], pieces[i, rows[labels[i], slot]])
    solved = permutations.permute(puzzle, permutations.inverse_permutations(rows), labels)
    np.testing.assert_array_equal(solved, pieces)
    features = jnp.arange(45.0).reshape(5, 9)  # also of features, [B, N]
    np.testing.assert_array_equal(permutations.permute(features, rows, labels)[2], features[2, rows[7]])


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("hamming", 100), "unknown permutation set 'hamming'; choose from average, min, affine, projective"),
        (("average", 0), "give a count from 2 to 362880, not 0"),
        (("min", 25, 4), "give a count from 2 to 24, not 25"),
        (("average", 100, 16), "has 2 to 9 tiles, not 16; 16 tiles have the set 'affine'"),
        (("affine", 100), "has 72 permutations, not 100; give 0 for all"),
        (("projective", 0, 16), r"has no 16 tiles, only 3, 4, 5, 6, 8, 9, 10, 17"),
    ],
)
def test_permutation_sets_that_do_not_exist_raise_user_error(arguments, line):
    with pytest.raises(UserError, match=line):
        permutations.permutation_set(*arguments)


# Masks
@pytest.mark.parametrize(("hw", "size", "top", "left"), [((8, 8), 4, 2, 2), ((9, 12), 4, 2, 4), ((7, 7), 1, 3, 3)])
def test_center_mask_is_a_square_in_the_center(hw, size, top, left):
    mask = masks.center_mask(hw, size)
    assert mask.sum() == size**2 and mask[top : top + size, left : left + size].all()


@pytest.mark.parametrize("size", [8, 9, 0])
def test_a_mask_as_large_as_the_image_raises_user_error(size):
    with pytest.raises(UserError, match=rf"a mask of {size} x {size} pixels does not leave anything of images of 8 x 10 pixels; use"):
        masks.center_mask((8, 10), size)


@pytest.mark.parametrize("hw", [(32, 32), (9, 13)])
def test_random_regions_have_the_area_that_was_drawn(hw):
    drawn = np.asarray(jax.jit(lambda key: masks.random_region_masks(key, 64, hw, (0.2, 0.3), cell=5))(KEY))
    share = drawn.mean((1, 2))
    pixel = 1 / (hw[0] * hw[1])
    assert drawn.shape == (64, *hw) and share.min() >= 0.2 - pixel and share.max() <= 0.3 + pixel
    assert np.unique(share).size > 3 and len({m.tobytes() for m in drawn}) > 60


@pytest.mark.full
def test_random_regions_are_connected_areas_anywhere_in_the_image():
    draw = jax.jit(masks.random_region_masks, static_argnums=(1, 2, 3, 4))
    drawn = np.asarray(draw(KEY, 512, (32, 32), (0.25, 0.25), 8))
    np.testing.assert_array_equal(drawn[:3], draw(KEY, 3, (32, 32), (0.25, 0.25), 8))  # a mask depends on its example only
    assert (drawn.sum((1, 2)) == 256).all()
    often = drawn.mean(0)
    assert often.min() > 0.15 and often.max() < 0.35  # no place is favored
    changes = (drawn[:, 1:] != drawn[:, :-1]).mean() + (drawn[:, :, 1:] != drawn[:, :, :-1]).mean()
    assert changes < 0.25  # single pixels at random would give 0.75


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"area": (0, 0.3)}, r"masks of area=\(0, 0\.3\) are not possible; give"),
        ({"area": (0.4, 0.3)}, "are not possible"),
        ({"area": (0.4, 1.0)}, "are not possible"),
        ({"cell": 0}, "mask cells of 0 pixels do not fit images of 16 x 16 pixels; use 1 to 16"),
        ({"cell": 17}, "mask cells of 17 pixels do not fit"),
    ],
)
def test_impossible_random_regions_raise_user_error(arguments, line):
    with pytest.raises(UserError, match=line):
        masks.random_region_masks(KEY, 2, (16, 16), **arguments)


def test_gradients_with_respect_to_removed_pixels_are_exactly_zero():
    images = jnp.asarray(bytes_(2, 8, 8, 3) / np.float32(255))
    mask = jnp.stack([masks.center_mask((8, 8), 4), ~masks.center_mask((8, 8), 4)])
    kernel = jax.random.normal(KEY, (3, 3, 3, 4))

    def network(x):
        x = masks.remove(x, mask, (0.1, 0.2, 0.3))
        return jnp.sum(jnp.sin(jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))))

    gradient = np.asarray(jax.grad(network)(images))
    assert (gradient[np.asarray(mask)] == 0).all() and (gradient[~np.asarray(mask)] != 0).all()
    removed = np.asarray(masks.remove(images, mask[0], (0.1, 0.2, 0.3)))
    np.testing.assert_allclose(removed[:, 2:6, 2:6], np.broadcast_to([0.1, 0.2, 0.3], (2, 4, 4, 3)), rtol=1e-6)
    np.testing.assert_array_equal(removed[:, :2], images[:, :2])


# All of them on several devices
@pytest.mark.parametrize("name", ["rotations", "tiles", "grid_patches", "puzzle", "masks", "warp", "lab", "hue"])
@pytest.mark.full
def test_each_device_makes_the_same_views_of_its_own_images(name):
    """On 8 devices as on one, without communication, since the batch is the outermost axis everywhere."""
    rows, bins = permutations.permutation_set("affine"), lab.ab_bins(20)
    functions = {
        "rotations": lambda x, key: rotations(x),
        "tiles": lambda x, key: tiles.tiles(x, key, 3, 4, 2),
        "grid_patches": lambda x, key: make_patch_views((("random_crop", {"size": 6}),))(
            tiles.grid_patches(x / np.float32(255), 8, 4).reshape(-1, 16, 8, 8, 3), key
        ),
        "puzzle": lambda x, key: permutations.permute(tiles.grid_patches(x, 6, 6).reshape(-1, 9, 6, 6, 3), rows, x[:, 0, 0, 0] % 72),
        "masks": lambda x, key: masks.remove(x, masks.random_region_masks(key, len(x), (20, 20), cell=5), 7),
        "warp": lambda x, key: motions.warp(x, motions.draw_motions(key, len(x), (1, 1, 0.2, 0.1)), 9),
        "lab": lambda x, key: lab.soft_encode(lab.rgb_to_lab(x)[..., 1:], bins),
        "hue": lambda x, key: hue.local_histograms(hue.hue_chroma(x)[0], 8, 3, 2),
    }
    images = bytes_(8, 20, 20, 3)
    rows_of = jax.NamedSharding(sharding.make_mesh({"data": 8}), sharding.BATCH)
    function = jax.jit(functions[name])
    program = function.lower(jax.device_put(images, rows_of), KEY).compile()
    text = program.as_text()
    assert not any(word in text for word in ("all-gather", "all-reduce", "all-to-all", "collective-permute"))
    many = program(jax.device_put(images, rows_of), jax.device_put(KEY, program.input_shardings[0][1]))
    for a, b in zip(jax.tree.leaves(many), jax.tree.leaves(function(images, KEY)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)

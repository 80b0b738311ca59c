"""The programs of benchmarks/shortcuts.py answer what leaks, and only that."""

import pathlib
import sys

import jax
import numpy as np
import pytest
import scipy.ndimage

pytest.importorskip("sklearn", reason="shortcuts are learned by scikit-learn")
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "benchmarks"))

import shortcuts

from ssl_jax.augment.tiles import tiles
from ssl_jax.experiment.training import load_config

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"


def cut(pictures, size=64, jitter=0):
    return (np.asarray(x) for x in tiles(pictures.astype(np.float32), jax.random.key(0), 3, size, jitter))


@pytest.mark.full
def test_tiles_without_a_gap_continue_each_other_and_unrelated_ones_do_not():
    assert shortcuts.edge(*cut(shortcuts.noise_pictures(24, 192))) > 0.95
    unrelated = np.random.default_rng(0).random((200, 9, 8, 8, 3))
    assert abs(shortcuts.edge(unrelated, None) - shortcuts.CHANCE["edge"]) < 0.04


def test_shifts_of_a_lens_have_the_right_direction_and_size():
    """Red is magnified by 1.004: at a distance d from the center it lies 0.004 d further out, to first order."""
    pictures = shortcuts.noise_pictures(4, 255)
    smooth = scipy.ndimage.gaussian_filter(pictures[..., 1], (0, 3, 3))
    pictures = np.stack([smooth] * 3, -1)
    tile = shortcuts.magnified(pictures, 1.004, 1.0)[0, 0:64, 100:164].astype(np.float64)
    down_red, down_blue, right_red, right_blue = shortcuts.shifts(tile)
    # A color that lies d further out has the value of green d nearer to the center: c(x) = G(x - d).
    np.testing.assert_allclose([down_red, right_red], [-0.004 * (31.5 - 127), -0.004 * (131.5 - 127)], atol=0.02)
    np.testing.assert_allclose([down_blue, right_blue], 0, atol=1e-3)


@pytest.mark.full
def test_places_are_told_by_a_lens_and_not_without_colors():
    lens = shortcuts.magnified(shortcuts.noise_pictures(40, 255), 1.004, 1.004)
    assert shortcuts.aberration(*cut(lens, 64, 21)) > 0.95
    gray = np.repeat(lens.mean(-1, keepdims=True), 3, -1)
    assert shortcuts.aberration(*cut(gray, 64, 21)) < 0.25


@pytest.mark.parametrize("offset", [0, 3, 7])
def test_phase_is_the_first_column_of_a_block(offset):
    pictures = shortcuts.compressed(shortcuts.noise_pictures(4, 80), 75)
    assert (shortcuts.phases(pictures[:, 5:69, offset : offset + 64]) == -offset % 8).all()


@pytest.mark.full
def test_blocks_of_a_jpeg_tell_distances_until_the_picture_is_resized():
    pictures = shortcuts.compressed(shortcuts.noise_pictures(24, 255), 50)
    assert shortcuts.jpeg(*cut(pictures, 64, 21)) > 0.95
    assert shortcuts.jpeg(*cut(shortcuts.resized(pictures, 0.8, 1.2), 64, 21)) < 0.4


@pytest.mark.full
def test_views_of_a_config_are_measured():
    rows = shortcuts.of_config(load_config(f"{CONFIGS}/jigsaw.py:smoke", []), 64)
    assert [probe for probe, *_ in rows] == ["edge", "aberration"]  # tiles of 12 pixels have no whole block
    assert all(0 <= accuracy <= 1 for *_, accuracy in rows)


@pytest.mark.full
def test_pairs_of_cooccurrence_are_told_by_a_cast_and_not_in_gray():
    assert [probe for probe, *_ in shortcuts.of_config(load_config(f"{CONFIGS}/cooccurrence.py:smoke", []), 64)] == ["color", "texture"]
    rng = np.random.default_rng(0)
    tint, gray = rng.random((200, 1, 1, 1, 3)), rng.random((200, 9, 8, 8, 1)).repeat(3, -1)
    assert shortcuts.same_image(0.5 * tint + 0.5 * gray, shortcuts.color) > 0.9
    assert abs(shortcuts.same_image(gray, shortcuts.color) - 0.5) < 0.05


def test_a_config_without_tiles_is_one_line(capsys):
    assert shortcuts.main([f"--config={CONFIGS}/simclr.py:smoke"]) == 2
    error = capsys.readouterr().err
    assert "config.method='simclr' has no tiles in a 3 x 3 grid; choose relative_patch, jigsaw or cooccurrence" in error

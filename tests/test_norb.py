"""Pairs of smallNORB: the same toy in the same light, motions that are those of the labels, and a prepared copy in TFDS's format."""

import numpy as np
import pytest
from PIL import Image
from small_data import picture_feature, png, prepare

from ssl_jax.data import norb
from ssl_jax.data.reader import Reader
from ssl_jax.data.sources import open_source
from ssl_jax.errors import UserError

TOYS = [(category, instance, light) for category in (0, 3) for instance in (4, 7) for light in (0, 5)]
WHOLE = np.array([(*toy, e, a) for toy in TOYS for e in range(9) for a in range(18)])


def shuffled(table):
    return np.random.default_rng(1).permutation(table)


@pytest.mark.parametrize("table", [WHOLE, shuffled(WHOLE), shuffled(WHOLE)[:400]], ids=["ordered", "shuffled", "a part"])
def test_a_pair_never_mixes_toy_category_or_lighting(table):
    chosen, motions = norb.partners(table)
    first, second = table, table[chosen]
    np.testing.assert_array_equal(first[:, :3], second[:, :3])
    np.testing.assert_array_equal(motions[:, 0], 5 * (second[:, 3] - first[:, 3]))
    np.testing.assert_array_equal((motions[:, 1] / 20 - (second[:, 4] - first[:, 4])) % 18, 0)  # only the azimuth is a circle
    assert set(np.unique(motions[:, 0])) == {-10, -5, 0, 5, 10} and set(np.unique(motions[:, 1])) == {-40, -20, 0, 20, 40}


def test_all_motions_are_about_equally_likely_and_the_same_again():
    chosen, motions = norb.partners(WHOLE)
    inner = motions[(WHOLE[:, 3] > 1) & (WHOLE[:, 3] < 7)]  # at the ends of the elevations some motions do not exist
    counts = np.unique(inner, axis=0, return_counts=True)[1]
    assert len(counts) == 25 and counts.min() > 0.5 * counts.mean() and counts.max() < 1.6 * counts.mean()
    np.testing.assert_array_equal(chosen, norb.partners(WHOLE)[0])


def gray(number):
    return png(number, 1)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """TFDS's smallnorb with two toys in two lightings, 4 elevations and 18 azimuths."""
    import tensorflow_datasets as tfds

    root = tmp_path_factory.mktemp("norb")
    label = tfds.features.ClassLabel
    sizes = {"instance": 10, "label_azimuth": 18, "label_category": 5, "label_elevation": 9, "label_lighting": 6}
    features = {"image": picture_feature(1), "image2": picture_feature(1)}
    features |= {name: label(names=[str(20 * i) for i in range(count)]) for name, count in sizes.items()}
    views = [(c, i, light, e, a) for c, i in ((1, 4), (2, 7)) for light in (0, 3) for e in range(4) for a in range(18)]
    keys = ("label_category", "instance", "label_lighting", "label_elevation", "label_azimuth")
    rows = [{"image": gray(n), "image2": gray(-1 % 999), **dict(zip(keys, view, strict=True))} for n, view in enumerate(views)]
    prepare(root, "smallnorb", features, {"train": rows, "test": rows[:72]})
    prepare(root, "other", {"image": picture_feature(), "label": label(num_classes=2)}, {"train": [{"image": png(0), "label": 0}]})
    return str(root), np.array(views)


def test_pairs_are_read_from_a_prepared_dataset(data_dir):
    root, written = data_dir
    source, single = (open_source(name, "train", root) for name in ("smallnorb/pairs", "smallnorb"))
    views = np.array([[single[n][key] for key in (*norb.FIXED, *norb.MOVES)] for n in range(len(single))])  # TFDS shuffles
    numbers = [int(np.flatnonzero((written == view).all(1))[0]) for view in views]
    chosen, motions = norb.partners(views)
    reader = Reader(source, (), ("image", "image2", "motion", "label"))
    batch, _ = reader.batch(range(len(views)), [(0, i) for i in range(len(views))])
    pixels = np.stack([np.asarray(Image.open(gray(n)).convert("RGB")) for n in numbers])
    np.testing.assert_array_equal(batch["image"], pixels)
    np.testing.assert_array_equal(batch["image2"], pixels[chosen])
    np.testing.assert_array_equal(batch["motion"], motions)
    np.testing.assert_array_equal(batch["label"], views[:, 0])
    assert source.num_classes == 5 and source.select(("motion",))[3].keys() == {"motion"}
    assert source.fingerprint != single.fingerprint


def test_other_data_are_refused(data_dir):
    with pytest.raises(UserError, match="needs TFDS's smallnorb; these data have no label_category, instance"):
        norb.NorbPairs(open_source("other", "train", data_dir[0]))
    with pytest.raises(UserError, match="are fixed for 'smallnorb/pairs'"):
        open_source("smallnorb/pairs", "train", data_dir[0], {"x": "image"})
    with pytest.raises(UserError, match="data 'smallnorb' is not prepared"):
        open_source("smallnorb/pairs", "train", f"{data_dir[0]}/nothing")

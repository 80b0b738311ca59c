"""Sources and batches: order independent of workers and processes, exact counts, unreadable files, one-line errors."""

import io
import logging
import multiprocessing
import os
import pickle
import re
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
from pictures import encode, photo
from PIL import Image

from ssl_jax.data import pipeline
from ssl_jax.data.decode import CorruptImage, Picture
from ssl_jax.data.pipeline import EvalBatches, TrainBatches, eval_batches, iterate
from ssl_jax.data.reader import element_spec
from ssl_jax.data.sources import open_source
from ssl_jax.engine.method import Spec
from ssl_jax.errors import MachineFault, UserError
from ssl_jax.experiment.data_record import check_there, record_data

CROPS = [("random_resized_crops", {"size": 16})]


def images_folder(root, count, classes=("a", "b"), shape=(24, 32), kind="PNG"):
    """Write `count` images, classes in turns; all values of image i are i. Returns the root as text."""
    for i in range(count):
        pixels = np.full((*shape, 3), i, np.uint8)
        path = root / classes[i % len(classes)] / f"{i:03d}.{kind.lower()}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(pixels, kind))
    return str(root)


# ------------------------------------------------------------------------------------------------- folders


def test_folder_skips_files_that_are_not_images(tmp_path, caplog):
    root = tmp_path / "images"
    images_folder(root, 6)
    (root / "a" / "deep").mkdir()
    (root / "a" / "deep" / "photo.jpeg").write_bytes(encode(photo(20, 30)))
    (root / "a" / ".hidden.png").write_bytes(encode(photo(9, 9), "PNG"))
    (root / ".cache").mkdir()
    (root / ".cache" / "x.png").write_bytes(encode(photo(9, 9), "PNG"))
    (root / "a" / "zero.jpg").write_bytes(b"")
    (root / "b" / "notes.txt").write_text("PS: not a picture")
    (root / "b" / "text.png").write_text("not a picture either")
    outside = tmp_path / "outside.png"
    outside.write_bytes(encode(photo(9, 9), "PNG"))
    (root / "b" / "away.png").symlink_to(outside)
    (root / "b" / "inside.png").symlink_to(root / "a" / "000.png")
    (root / "loop").symlink_to(root)
    with caplog.at_level("WARNING"):
        source = open_source(str(root), "all")
    assert source.paths == ["a/000.png", "a/002.png", "a/004.png", "a/deep/photo.jpeg", "b/001.png", "b/003.png",
                            "b/005.png", "b/inside.png", "b/text.png"]  # fmt: skip
    with pytest.raises(CorruptImage, match="not an image"):  # files of a usual name are not opened before
        Picture(source[8]["image"])
    assert (source.label_names, source.num_classes) == (("a", "b"), 2)
    assert [int(source[i]["label"]) for i in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert source.rejected == {"a/zero.jpg": "empty file", "b/notes.txt": "not an image",
                               "b/away.png": "link out of the folder", "loop": "link to a folder"}  # fmt: skip
    assert [record.args[1] for record in caplog.records] == [4]  # files left out, in one warning
    reopened = open_source(str(root), "all")
    assert reopened.fingerprint == source.fingerprint
    (tmp_path / "new.png").write_bytes(encode(photo(25, 32), "PNG"))
    (tmp_path / "new.png").replace(root / "a" / "000.png")
    assert open_source(str(root), "all").fingerprint != source.fingerprint


def test_folder_splits(tmp_path):
    root = images_folder(tmp_path / "one", 40)
    parts = {split: set(open_source(root, split).paths) for split in ("all", "train", "test")}
    assert parts["train"] | parts["test"] == parts["all"]
    assert not parts["train"] & parts["test"]
    assert 1 <= len(parts["test"]) <= 12
    images_folder(tmp_path / "one", 60)  # twenty more: the others stay in their split
    assert parts["test"] <= set(open_source(root, "test").paths)
    assert parts["train"] <= set(open_source(root, "train").paths)
    with pytest.raises(UserError, match="no split 'validation'; it has all, train, test"):
        open_source(root, "validation")

    images_folder(tmp_path / "two" / "train", 6)
    images_folder(tmp_path / "two" / "val", 3, classes=("b",))
    (tmp_path / "two" / "logo.png").write_bytes(encode(photo(9, 9), "PNG"))
    root = str(tmp_path / "two")
    assert len(open_source(root, "train")) == 6
    assert len(open_source(root, "all")) == 9
    test = open_source(root, "test")
    assert test.paths == [f"val/b/{i:03d}.png" for i in range(3)]
    assert test.label_names == ("a", "b")
    assert {int(test[i]["label"]) for i in range(3)} == {1}
    assert open_source(root, "validation").paths == test.paths
    with pytest.raises(UserError, match="it has all, train, val"):
        open_source(root, "unlabeled")

    photos = images_folder(tmp_path / "three", 9, classes=("car", "dog", "train"))  # a class named train, as in COCO
    assert open_source(photos, "all").label_names == ("car", "dog", "train")
    assert len(open_source(photos, "all")) == 9

    flat = tmp_path / "flat"
    flat.mkdir()
    for i in range(3):
        (flat / f"{i}.png").write_bytes(encode(photo(8, 8), "PNG"))
    source = open_source(str(flat), "train")
    assert (source.num_classes, tuple(source.features), len(source)) == (None, ("image",), 2)
    assert "label" not in TrainBatches(source, [], 2, seed=0)[0]
    with pytest.raises(UserError, match="has no feature 'pose'; it has image"):
        TrainBatches(source, [], 2, seed=0, inputs=("image", "pose"))


def test_missing_data_is_a_one_line_user_error(tmp_path):
    for folder in ("empty", "text", "tfds/broken/1.0.0", "tfds/half/1.0.0.incompleteABC"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "text" / "a.txt").write_text("hello, this is not an image")
    for name, message in (
        (str(tmp_path / "empty"), "has no image; give one"),
        (str(tmp_path / "text"), r"has no image \(1 files are not images\)"),
        (str(tmp_path / "nowhere"), "no such folder"),
        (str(tmp_path / "text" / "a.txt"), "is a file; unpack it if it is an archive, and give its folder"),
        ("imagenet9", rf"not prepared in data_dir '{tmp_path}/tfds' \(there: broken, half\); prepare .* --data_dir"),
        ("broken", "not prepared to the end .'1.0.0'"),
        ("half", "not prepared to the end"),
        ("half:2.0.0", "no such version"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            open_source(name, "all", str(tmp_path / "tfds"))
        assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------- TFDS


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    """A TFDS data directory from a real builder, in ArrayRecord and without TensorFlow."""
    import tensorflow_datasets as tfds

    class Dots(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.2.0")
        url_infos = {}  # noqa: RUF012

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(12, 10, 3), encoding_format="png"),
                "label": tfds.features.ClassLabel(names=["even", "odd"]),
                "mask": tfds.features.Image(shape=(12, 10, 1), encoding_format="png"),
                "point": tfds.features.Tensor(shape=(2,), dtype=np.float64),
                "name": tfds.features.Text(),
                "boxes": tfds.features.Sequence({"bbox": tfds.features.BBoxFeature()}),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(40), "test": self._generate_examples(9)}

        def _generate_examples(self, count):
            for i in range(count):
                pixels = np.full((12, 10, 3), i, np.uint8)
                mask = io.BytesIO(encode(pixels[:, :, 0], "PNG"))
                box = [{"bbox": tfds.features.BBox(0.0, 0.0, 1.0, 1.0)}] * (i % 3)
                example = {"label": i % 2, "mask": mask, "point": [i, -i], "name": str(i), "boxes": box}
                yield i, {"image": io.BytesIO(encode(pixels, "PNG")), **example}

    root = tmp_path_factory.mktemp("tfds")
    Dots(data_dir=root, file_format="array_record").download_and_prepare()
    return root


def change(tfds_dir, tmp_path, name, change):
    """A copy of the dataset whose file `name` is `change(text)`."""
    root = tmp_path / "copy"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(tfds_dir / "dots" / "1.2.0", root)
    (root / name).write_text(change((root / name).read_text()))
    return str(root)


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
@pytest.mark.parametrize("text", [lambda _: "", lambda text: text[: len(text) // 2], lambda _: "[1]", lambda _: "[" * 100_000,
                                  lambda _: "null", lambda _: "{}", lambda _: '{"featuresDict": 3, "splits": 4}'])  # fmt: skip
def test_cut_tfds_files_are_one_line(tfds_dir, tmp_path, name, text):
    with pytest.raises(UserError, match=r"is not a readable TFDS dataset \(.*\); prepare it again") as caught:
        open_source(change(tfds_dir, tmp_path, name, text), "train")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", ["99999999999", "-7", "1.5", "4000000", "x"])
def test_absurd_shapes_are_one_line(tfds_dir, tmp_path, size):
    root = change(tfds_dir, tmp_path, "features.json", lambda text: text.replace('"12"', f'"{size}"').replace('"10"', f'"{size}"'))
    with pytest.raises(UserError, match=r"features.json: '(image|mask)' has the shape .*; prepare it again"):
        open_source(root, "train")


def test_absurd_numbers_of_classes_are_one_line(tfds_dir, tmp_path):
    for number in ("-5", "1000000000000"):
        text = f'"numClasses": "{number}"'
        root = change(tfds_dir, tmp_path, "features.json", lambda before, text=text: before.replace('"numClasses": "2"', text))
        with pytest.raises(UserError, match=f"features.json: 'label' has numClasses {number}"):
            open_source(root, "train")


def test_data_choose_no_code(tfds_dir, tmp_path, monkeypatch):
    lines = (f"open({str(tmp_path / 'ran')!r}, 'w')", "import tensorflow_datasets as tfds", "class Image(tfds.features.Image): pass")
    (tmp_path / "evil.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(str(tmp_path))
    features = "tensorflow_datasets.core.features."
    for own, other in ((features + "image_feature.Image", "evil.Image"), ("text_feature.Text", "text_feature.Evil")):
        root = change(tfds_dir, tmp_path, "features.json", lambda text, own=own, other=other: text.replace(own, other))
        with pytest.raises(UserError, match=r"names the class '.*[Ee]vil.*', and data must not choose code"):
            open_source(root, "train")
    legacy = '{"type": "evil.Image", "content": {"shape": [8, 8, 3]}}'
    with pytest.raises(UserError, match="data must not choose code"):
        open_source(change(tfds_dir, tmp_path, "features.json", lambda _: legacy), "train")
    name = re.compile('"moduleName": "[^"]*"')
    root = change(tfds_dir, tmp_path, "dataset_info.json", lambda text: name.sub('"moduleName": "evil"', text))
    assert '"moduleName": "evil"' in (tmp_path / "copy" / "dataset_info.json").read_text()
    assert len(open_source(root, "train")) == 40
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("split", ["train[:0]", "train[5:5]", "test[9:]", "train[:0]+test[:0]"])
def test_empty_range_is_not_a_damaged_shard(tfds_dir, split):
    with pytest.raises(UserError, match=r"split '.*' is empty; it has test, train"):
        open_source(str(tfds_dir / "dots"), split)


def test_more_than_a_split_has_is_one_line(tfds_dir):
    with pytest.raises(UserError, match=r"'train\[:512\]' is no part of split 'train'; it has 40 examples"):
        open_source(str(tfds_dir / "dots"), "train[:512]")


@pytest.mark.parametrize("split", ["train[5:3]", "train[4:3]", "train[5:3]+test"])
def test_reversed_range_is_one_line(tfds_dir, split):
    with pytest.raises(UserError, match=r"split '.*' ends before it begins; it has test, train"):
        open_source(str(tfds_dir / "dots"), split)


@pytest.mark.parametrize("name", ["http://example.com/data", "https://example.com/data.zip", "gs://bucket/data", "s3://bucket/data"])
def test_urls_are_one_line(tmp_path, name):
    with pytest.raises(UserError, match=f"config.data.name='{name}' is a URL, and data are read from files; mount the bucket"):
        open_source(name, "train")
    with pytest.raises(UserError, match=f"config.data.data_dir='{name}' is a URL"):
        open_source("cifar10", "train", name)


def test_shards_that_vanish_are_a_fault_of_the_machine(tfds_dir, tmp_path, monkeypatch):
    root = change(tfds_dir, tmp_path, "features.json", lambda text: text)
    source = open_source(root, "train")
    monkeypatch.setattr(source, "_records", [])  # what reading a lost file raises differs between versions of ArrayRecord
    for shard in (tmp_path / "copy").glob("*.array_record*"):
        shard.unlink()
    with pytest.raises(MachineFault, match=r"array_record.* cannot be read"):
        source[3]
    with pytest.raises(UserError, match=r"shard .* is missing; prepare the data again"):
        open_source(root, "train")


def test_splits_classes_and_counts_are_said(tfds_dir, caplog):
    with caplog.at_level("INFO", "ssl_jax.data"):
        open_source(str(tfds_dir / "dots"), "train[:8]")
    assert "splits test 9, train 40; 2 classes" in caplog.text


def test_tfds_source_by_name_path_and_split(tfds_dir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tfds_dir))
    source = open_source("dots", "train")
    assert (len(source), source.num_classes, source.label_names) == (40, 2, ("even", "odd"))
    assert source.image_shape == (12, 10, 3)
    assert source[5]["image"][:4] == b"\x89PNG"
    fingerprints = {source.fingerprint}
    for path in (tfds_dir / "dots" / "1.2.0", tfds_dir / "dots"):
        by_path = open_source(str(path), "train", data_dir="/nonexistent")
        assert by_path[5]["image"] == source[5]["image"]
        fingerprints.add(by_path.fingerprint)
    assert len(fingerprints) == 1
    for split, length in (("train[:25%]", 10), ("train[10:]+test", 39), ("test", 9)):
        part = open_source("dots:1.2.0", split)
        assert len(part) == length
        assert part.fingerprint not in fingerprints
    assert len(pickle.loads(pickle.dumps(source))) == 40
    with pytest.raises(UserError, match="no split 'valid'; it has test, train"):
        open_source("dots", "valid")


def test_tfds_features_by_name_in_a_batch(tfds_dir):
    source = open_source("dots", "test", str(tfds_dir), {"segments": "mask"})
    keys = ("image", "label", "segments", "point", "name")
    spec = element_spec(source, [], keys)
    assert spec == {
        "image": ((12, 10, 3), np.uint8), "label": ((), np.int32), "segments": ((12, 10, 1), np.uint8),
        "point": ((2,), np.float32), "name": ((), np.dtype(object)),
    }  # fmt: skip
    (batch,) = eval_batches(source, [], 9, inputs=keys)
    order = [int(name) for name in batch["name"]]
    assert sorted(order) == list(range(9))
    for key, value in batch.items():
        if key in spec:
            assert (value.shape[1:], value.dtype) == spec[key]
    np.testing.assert_array_equal(batch["image"][:, 3, 4, 1], order)
    np.testing.assert_array_equal(batch["segments"][:, 3, 4, 0], order)
    np.testing.assert_array_equal(batch["point"], np.stack([order, np.negative(order)], -1))
    np.testing.assert_array_equal(batch["label"], np.mod(order, 2))
    with pytest.raises(UserError, match="names that begin with _ are reserved"):
        element_spec(open_source("dots", "test", str(tfds_dir), {"_valid": "mask"}), [], ("image", "_valid"))
    with pytest.raises(UserError, match=r"no feature 'boxes'; it has boxes/bbox float32 \(\?, 4\), image uint8"):
        element_spec(source, [], ("image", "boxes"))
    with pytest.raises(UserError, match=r"'boxes/bbox' of data 'dots' is a list \(float32 \(\?, 4\)\); ask for a length"):
        element_spec(source, [], ("image", "boxes/bbox"))


def test_damaged_tfds_shard_is_a_user_error(tfds_dir, tmp_path):
    shard = "dots-train.array_record-00000-of-00001"
    for case, message in (("missing", "is missing; prepare"), ("short", "is damaged"), ("info", "not a readable TFDS")):
        root = tmp_path / case
        shutil.copytree(tfds_dir / "dots", root / "dots")
        folder = root / "dots" / "1.2.0"
        if case == "missing":
            (folder / shard).unlink()
        elif case == "short":
            (folder / shard).write_bytes((folder / shard).read_bytes()[:1000])
        else:
            (folder / "features.json").unlink()
        with pytest.raises(UserError, match=message):
            open_source("dots", "train", str(root))


def test_reading_imports_no_tensorflow_and_starts_no_opencv_threads(tfds_dir):
    code = (
        "import sys; from ssl_jax.data.sources import open_source;"
        "from ssl_jax.data.pipeline import TrainBatches, iterate;"
        f"source = open_source('dots', 'train', {str(tfds_dir)!r});"
        "assert len(list(iterate(TrainBatches(source, [], 8, seed=0), 0, 3))) == 3;"
        "assert 'tensorflow' not in sys.modules; import cv2; assert cv2.getNumThreads() == 1"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.getcwd()})


# ------------------------------------------------------------------------------------------------- batches


def numbers(batch):
    """The image of each row: `images_folder` writes its number into the pixels."""
    return batch["image"].reshape(len(batch["image"]), -1)[:, 0].tolist()


def equal(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return images_folder(tmp_path_factory.mktemp("folder"), 21)


def test_every_epoch_has_every_example_once_for_any_batch_size_and_process_count(folder):
    source = open_source(folder, "all")
    batches = TrainBatches(source, [], 6, seed=3)
    sequence = [n for batch in iterate(batches, 0, 14) for n in numbers(batch)]  # 84 places = 4 epochs of 21
    epochs = [sequence[i : i + 21] for i in range(0, 84, 21)]
    assert all(sorted(epoch) == list(range(21)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4  # shuffled anew
    assert epochs[0] != list(range(21))
    assert sequence[:6] != numbers(TrainBatches(source, [], 6, seed=4)[0])
    # Processes read consecutive rows of one global batch. Other batch sizes read the same sequence.
    for count in (2, 3, 6):
        parts = [TrainBatches(source, [], 6, 3, index, count)[5] for index in range(count)]
        assert [n for part in parts for n in numbers(part)] == sequence[30:36]
    assert numbers(TrainBatches(source, [], 6, 3, (0, 2), 3)[5]) == sequence[30:32] + sequence[34:36]
    assert [n for batch in iterate(TrainBatches(source, [], 14, 3), 0, 6) for n in numbers(batch)] == sequence
    assert all((np.mod(numbers(batches[s]), 2) == batches[s]["label"]).all() for s in (0, 9, 17))  # labels match images


def test_resumed_iteration_equals_the_rest_of_an_uninterrupted_one(folder):
    batches = TrainBatches(open_source(folder, "all"), CROPS, 6, seed=3)
    whole = list(iterate(batches, 0, 9))
    equal(whole[4:], list(iterate(TrainBatches(open_source(folder, "all"), CROPS, 6, seed=3), 4, 9)))
    assert whole[0]["image"].shape == (6, 2, 16, 16, 3)
    assert next(iterate(batches, 10**12, 10**12 + 1))["label"].shape == (6,)  # any step without iterating


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """JPEGs of many sizes, three of them truncated after an intact header."""
    root = tmp_path_factory.mktemp("photos")
    for i in range(12):
        data = encode(photo(40 + 7 * i, 90 - 5 * i, seed=i), quality=92)
        (root / f"{i:02d}.jpg").write_bytes(data[: len(data) // 2] if i in (3, 4, 8) else data)
    return str(root)


def test_batches_are_identical_for_any_workers_threads_and_processes(photos, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("ssl_jax.data"), "filters", [])  # the command line filters repeated messages

    def make(index=0, count=1):
        return TrainBatches(open_source(photos, "all"), CROPS, 6, 1, index, count)

    plain = list(iterate(make(), 0, 5, threads=0))
    equal(plain, list(iterate(make(), 0, 5, threads=4, prefetch=1)))
    caplog.clear()
    batches = make()
    worked = list(iterate(batches, 0, 5, workers=2))
    equal(plain, worked)
    del worked  # its arrays are the workers' shared memory
    assert sorted(batches.skipped) == [3, 4, 8]  # reported by the main process, each once
    assert all("truncated" in reason.lower() for reason in batches.skipped.values())
    assert sum("is left out" in record.message for record in caplog.records) == 3
    halves = [list(iterate(make(index, 2), 0, 5)) for index in range(2)]
    joined = [{key: np.concatenate([a[key], b[key]]) for key in a} for a, b in zip(*halves, strict=True)]
    equal(plain, joined)


def test_unreadable_record_is_replaced_by_the_next_readable_one(tmp_path):
    root = tmp_path / "images"
    images_folder(root, 10, classes=("a",))
    for bad in (4, 5, 9):
        path = root / "a" / f"{bad:03d}.png"
        path.write_bytes(path.read_bytes()[:50])
    batches = TrainBatches(open_source(str(root), "all"), [], 5, seed=0)
    counts = np.bincount([n for batch in iterate(batches, 0, 2) for n in numbers(batch)], minlength=10)
    assert counts.tolist() == [2, 1, 1, 1, 0, 0, 3, 1, 1, 0]
    assert sorted(batches.skipped) == [4, 5, 9]
    for i in range(10):
        path = root / "a" / f"{i:03d}.png"
        path.write_bytes(path.read_bytes()[:50])
    source = open_source(str(root), "all")
    for ops in ([], CROPS):
        with pytest.raises(UserError, match=r"10 images in a row cannot be read \(first: example \d \(a/00\d\.png\), .*truncated"):
            next(iterate(TrainBatches(source, ops, 5, seed=0), 0, 1))


def test_evaluation_reads_every_example_once(photos, folder):
    source = open_source(folder, "all")
    for count in (1, 2, 4):
        seen, labels = [], []
        for index in range(count):
            batches = eval_batches(source, [], 8, index, count)
            assert len(batches) == 3
            for batch in batches:
                assert batch["image"].shape == (8 // count, 24, 32, 3)
                assert batch["_valid"].shape == batch["_index"].shape == batch["label"].shape == (8 // count,)
                assert (batch["image"][~batch["_valid"]] == 0).all()
                seen += batch["_index"][batch["_valid"]].tolist()
                labels += batch["label"][batch["_valid"]].tolist()
        assert sorted(seen) == list(range(21))
        assert labels == [int(source[i]["label"]) for i in seen]
    batches = EvalBatches(open_source(photos, "all"), [("resize_crop", {"resize": 20, "crop": 16})], 5)
    mask, index = (np.concatenate([batch[key] for batch in batches]) for key in ("_valid", "_index"))
    assert index[mask].tolist() == [0, 1, 2, 5, 6, 7, 9, 10, 11]
    assert sorted(batches.skipped) == [3, 4, 8]
    spaced = eval_batches(source, [], 4, limit=6)
    assert np.concatenate([b["_index"][b["_valid"]] for b in spaced]).tolist() == [0, 3, 7, 10, 14, 17]
    assert len(eval_batches(source, [], 4, limit=100)) == 6


def test_element_spec_and_images_of_mixed_sizes(photos, folder):
    assert element_spec(open_source(folder, "all"), []) == {"image": ((24, 32, 3), np.uint8), "label": ((), np.int32)}
    source = open_source(photos, "all")
    assert element_spec(source, CROPS) == {"image": ((2, 16, 16, 3), np.uint8)}
    with pytest.raises(
        UserError, match=r"example \d+ \(\d+\.jpg\) has shape \(\d+, \d+, 3\), others \(40, 90, 3\); give config.data.ops"
    ):
        list(iterate(TrainBatches(source, [], 4, seed=0), 0, 3))


def test_input_of_a_method_does_not_give_pictures_its_size(photos):
    """A method declares the size of the crops, not that of the pictures on the disk."""
    inputs = {"image": Spec((2, 16, 16, 3), "uint8")}
    batches = TrainBatches(open_source(photos, "all"), CROPS, 6, seed=0, inputs=inputs)
    assert batches[0]["image"].shape == (6, 2, 16, 16, 3)


def test_invalid_batch_size_or_seed_is_a_user_error(folder):
    source = open_source(folder, "all")
    with pytest.raises(UserError, match=r"batch size 22 is larger than .* \(21 examples\)"):
        TrainBatches(source, [], 22, seed=0)
    with pytest.raises(UserError, match="seed -1 is not within"):
        TrainBatches(source, [], 6, seed=-1)
    for build in (lambda: TrainBatches(source, [], 6, 0, 0, 4), lambda: eval_batches(source, [], 6, 0, 4)):
        with pytest.raises(UserError, match="batch size 6 is not divisible by 4, the parts"):
            build()


def test_cache_of_decoded_images_equals_decoding_every_time(folder, monkeypatch):
    source = open_source(folder, "all")
    batches = TrainBatches(source, [], 7, seed=0)
    first = list(iterate(batches, 0, 3))
    assert batches.reader.cache.ready.all()
    first[0]["image"][:] = 77  # a caller may change its batch, not the cache
    monkeypatch.setattr("ssl_jax.data.reader.Picture", None)  # nothing is decoded a second time
    second = list(iterate(batches, 0, 3))
    equal(first[1:], second[1:])
    assert not (second[0]["image"] == 77).all()
    monkeypatch.undo()
    monkeypatch.setattr("ssl_jax.data.reader.CACHE_BYTES", 0)
    uncached = TrainBatches(open_source(folder, "all"), [], 7, seed=0)
    assert uncached.reader.cache is None
    equal(second, list(iterate(uncached, 0, 3)))


def test_cifar10_batches():
    root = os.environ.get("TFDS_DATA_DIR", "")
    if not os.path.isdir(os.path.join(root, "cifar10")):
        pytest.skip("needs cifar10 below $TFDS_DATA_DIR")
    source = open_source("cifar10", "test[:1000]")
    assert source.label_names[3] == "cat"
    batches = TrainBatches(source, [], 250, seed=0)
    assert batches.spec == {"image": ((32, 32, 3), np.uint8), "label": ((), np.int32)}
    labels = np.concatenate([batch["label"] for batch in iterate(batches, 0, 4)])
    np.testing.assert_array_equal(np.bincount(labels), np.bincount([source[i]["label"] for i in range(1000)]))
    pixels = Image.open(io.BytesIO(source[batches.order[2 * 250]]["image"]))
    np.testing.assert_array_equal(batches[2]["image"][0], np.array(pixels))


# ------------------------------------------------------------------------------------------------- worker processes


@pytest.mark.full
def test_killed_worker_is_a_fault_of_the_machine(photos):
    batches = TrainBatches(open_source(photos, "all"), CROPS, 4, seed=0)
    before = {child.pid for child in multiprocessing.active_children()}
    stream = iterate(batches, 0, 10_000, workers=1)
    next(stream)
    for child in multiprocessing.active_children():
        if child.pid not in before:
            child.kill()
    with pytest.raises(MachineFault, match="a data worker was ended by SIGKILL, as when memory runs out; choose fewer") as caught:
        list(stream)
    assert "\n" not in str(caught.value)


def test_room_in_shared_memory(photos, monkeypatch):
    batches, free = TrainBatches(open_source(photos, "all"), CROPS, 4, seed=0), 4 * 2 * 16 * 16 * 3 * (2 * 3 + 2)
    for blocks, lacks in ((free, False), (free - 1, True)):
        monkeypatch.setattr(pipeline.os, "statvfs", lambda _, blocks=blocks: types.SimpleNamespace(f_bavail=blocks, f_frsize=1))
        assert pipeline._lacks_shared_memory(batches, workers=2, prefetch=2) == lacks


@pytest.mark.full
def test_small_shared_memory_is_not_used(photos, monkeypatch, caplog):
    batches = TrainBatches(open_source(photos, "all"), CROPS, 4, seed=0)
    plain = list(iterate(batches, 0, 3))
    monkeypatch.setattr("ssl_jax.data.pipeline.os.statvfs", lambda _: types.SimpleNamespace(f_bavail=1, f_frsize=4096))
    before = set(os.listdir("/dev/shm"))
    stream = iterate(batches, 0, 3, workers=1)
    with caplog.at_level("WARNING"):
        piped = [next(stream)]
    made = {name for name in set(os.listdir("/dev/shm")) - before if name.startswith("psm_")}  # of Python's shared memory
    equal(plain, piped + list(stream))
    assert not made
    assert "/dev/shm has 0 MB free, and batches of 1 workers need 0 MB there, so they go through pipes" in caplog.text
    assert "docker run --shm-size" in caplog.text


def test_changed_data_are_refused_on_resume(tmp_path):
    source = open_source(images_folder(tmp_path / "images", 6), "all")
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "data.json").write_text('{"fingerprint": "of other data", "examples": 6}')
    record_data(workdir, source)  # nothing was saved with the other data
    (workdir / "checkpoints" / "2").mkdir(parents=True)
    record_data(workdir, open_source(str(tmp_path / "images"), "all"))
    (tmp_path / "new.png").write_bytes(encode(photo(24, 33), "PNG"))
    (tmp_path / "new.png").replace(tmp_path / "images" / "a" / "000.png")
    with pytest.raises(UserError, match=r"have changed since .*: 6 examples then, 6 now.*remove .*/data.json to go on") as caught:
        record_data(workdir, open_source(str(tmp_path / "images"), "all"))
    assert "\n" not in str(caught.value)
    check_there(workdir, str(tmp_path / "images"))
    shutil.rmtree(tmp_path / "images")
    for _ in range(2):  # gone, then the empty place where a disk was mounted
        with pytest.raises(MachineFault, match=r"are gone since .*; see that their disk is mounted"):
            check_there(workdir, str(tmp_path / "images"))
        (tmp_path / "images").mkdir(exist_ok=True)
    (workdir / "data.json").unlink()
    check_there(workdir, str(tmp_path / "images"))
    record_data(workdir, source)

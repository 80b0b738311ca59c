"""Folders as people have them: split folders of any name, links, stray pictures, unreadable parts, vanished disks."""

import errno
import logging
import os
import shutil
import time

import numpy as np
import pytest
from pictures import encode, photo

from ssl_jax.data import scan as scan_module
from ssl_jax.data.folders import split_of
from ssl_jax.data.pipeline import TrainBatches, iterate
from ssl_jax.data.sources import open_source
from ssl_jax.errors import MachineFault, UserError

PIXELS = encode(photo(8, 8), "PNG")


def make(root, files):
    """Pictures at these paths; 'Train/cat/*3' is three."""
    for file in files:
        folder, _, count = file.partition("*")
        (root / folder).mkdir(parents=True, exist_ok=True)
        for i in range(int(count)):
            (root / folder / f"{i:03}.png").write_bytes(PIXELS)
    return str(root)


def understood(caplog, root, split):
    """(the source, the line of the log)"""
    caplog.clear()
    with caplog.at_level(logging.INFO, "ssl_jax.data"):
        source = open_source(root, split)
    return source, next(record.getMessage() for record in caplog.records if record.getMessage().startswith("data '"))


# ------------------------------------------------------------------------------------------------- splits


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("Train", "Test"), ("training", "testing"), ("TRAIN", "VAL"), ("train", "dev"), ("training_set", "test_set"),
        ("Training Data", "Testing Data"), ("train2017", "val2017"), ("seg_train", "seg_test"), ("trainset", "testset"),
        ("train_images", "valid"), ("Training", "Validation"), ("train", "evaluation"), ("images_train", "images-test"),
    ],
)  # fmt: skip
def test_split_folders_of_usual_names(tmp_path, caplog, train, test):
    root = make(tmp_path, [f"{train}/cat/*8", f"{train}/dog/*8", f"{test}/cat/*2", f"{test}/dog/*2"])
    source, line = understood(caplog, root, "train")
    assert (len(source), source.label_names) == (16, ("cat", "dog"))
    assert line.count("train 16") == 1
    assert "2 classes: cat, dog" in line
    other = open_source(root, "test")
    assert (len(other), other.label_names) == (4, ("cat", "dog"))
    assert {path.split("/")[0] for path in other.paths} == {test}
    assert len(open_source(root, test)) == 4  # the name of the folder
    assert len(open_source(root, "all")) == 20


def test_classes_are_not_splits(tmp_path, caplog):
    for name in ("cat", "trainer", "invalid", "testament", "detest", "images", "2017", "developer"):
        assert split_of(name) is None
    for classes in (("car", "train", "dog"), ("valid", "invalid"), ("extra", "plain")):
        root = make(tmp_path / classes[0], [f"{name}/*4" for name in classes])
        source, line = understood(caplog, root, "all")
        assert source.label_names == tuple(sorted(classes))
        assert f"{4 * len(classes)} images, {len(classes)} classes" in line
        assert "no split folders" in line


def test_doubled_and_surrounding_folders(tmp_path):
    root = make(tmp_path, ["archive/Train/Train/cat/*3", "archive/Train/Train/dog/*3", "archive/Test/Test/cat/*2"])
    train, test = open_source(root, "train"), open_source(root, "test")
    assert (len(train), train.label_names, len(test), test.label_names) == (6, ("cat", "dog"), 2, ("cat", "dog"))


def test_split_that_is_not_there_has_a_remedy_that_works(tmp_path, caplog):
    root = make(tmp_path / "a", ["labeled/cat/*3", "labeled/dog/*3", "unlabeled/*9"])
    with pytest.raises(UserError, match=r"no split 'train'; it has all, unlabeled, labeled: --config.data.train_split=NAME"):
        open_source(root, "train")
    assert open_source(root, "unlabeled").num_classes is None
    assert open_source(root, "labeled").label_names == ("cat", "dog")
    root = make(tmp_path / "b", ["train2014/*3", "train2017/*4"])
    with pytest.raises(UserError, match="train2014, train2017 are all a split 'train'"):
        open_source(root, "train")
    assert len(open_source(root, "train2017")) == 4
    # Folders that may be splits, of names that nobody can know.
    root = make(tmp_path / "c", ["A/cat/*3", "A/dog/*3", "B/cat/*2", "B/dog/*2"])
    source, line = understood(caplog, root, "train")
    assert source.label_names == ("A", "B")
    assert "A and B have the same folders inside: if they are splits, --config.data.train_split=NAME" in line
    chosen, line = understood(caplog, root, "A")
    assert (len(chosen), chosen.label_names, len(open_source(root, "B"))) == (6, ("cat", "dog"), 4)
    assert "splits A 6, B 4; 2 classes: cat, dog" in line


def test_unlabeled_split_beside_labeled_ones(tmp_path, caplog):
    root = make(tmp_path, ["train/cat/*6", "train/dog/*6", "test/*5", "unlabeled/part0/*7"])
    train, line = understood(caplog, root, "train")
    assert train.label_names == ("cat", "dog")
    assert "train 12, test 5 (no classes), unlabeled 7 (no classes); 2 classes: cat, dog" in line
    for split, count in (("test", 5), ("unlabeled", 7)):
        source = open_source(root, split)
        assert (len(source), source.num_classes, tuple(source.features)) == (count, None, ("image",))


# ------------------------------------------------------------------------------------------------- strays


def test_stray_picture_keeps_the_classes(tmp_path, caplog):
    root = make(tmp_path / "a", ["cat/*4", "dog/*4", "*1"])
    with caplog.at_level("WARNING"):
        source, line = understood(caplog, root, "all")
    assert (len(source), source.label_names) == (8, ("cat", "dog"))
    assert "8 images, 2 classes: cat, dog" in line
    assert "1 images beside the class folders are left out" in caplog.text
    assert len(open_source(root, "train")) + len(open_source(root, "test")) == 8
    root = make(tmp_path / "b", ["train/cat/*4", "train/dog/*4", "train/*1", "test/cat/*2"])
    assert (len(open_source(root, "train")), open_source(root, "test").num_classes) == (8, 2)


def test_many_pictures_beside_folders_are_unlabeled_and_said(tmp_path, caplog):
    root = make(tmp_path, ["more/*3", "*9"])
    with caplog.at_level("WARNING"):
        source = open_source(root, "all")
    assert (len(source), source.num_classes) == (12, None)
    assert "9 images are beside the class folders, so no image has a class" in caplog.text


# ------------------------------------------------------------------------------------------------- links


def test_linked_classes_and_files(tmp_path, caplog):
    make(tmp_path / "full", ["n0/*3", "n1/*3"])
    subset = tmp_path / "subset"
    subset.mkdir()
    for name in ("n0", "n1"):
        (subset / name).symlink_to(tmp_path / "full" / name)
    with pytest.raises(UserError, match=r"no image but links, .* not followed \(2 link to a folder\); --config.data.follow_links"):
        open_source(str(subset), "all")
    source = open_source(str(subset), "all", follow_links=True)
    assert (len(source), source.label_names) == (6, ("n0", "n1"))
    assert source[0]["image"] == PIXELS
    files = tmp_path / "files" / "n0"
    files.mkdir(parents=True)
    (files / "a.png").symlink_to(tmp_path / "full" / "n0" / "000.png")
    (files / "own.png").write_bytes(PIXELS)
    (files / "loop").symlink_to(tmp_path / "files")
    (files / "self").symlink_to(files / "self")
    (files / "gone.png").symlink_to(tmp_path / "gone.png")
    with caplog.at_level("WARNING"):
        assert len(open_source(str(tmp_path / "files"), "all")) == 1
    assert "1 link out of the folder" in caplog.text
    assert "--config.data.follow_links=True follows them" in caplog.text
    source = open_source(str(tmp_path / "files"), "all", follow_links=True)
    assert len(source) == 2
    assert source.rejected == {
        "n0/loop": "link to a folder above it", "n0/self": "broken link", "n0/gone.png": "broken link",
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------- speed


def test_a_folder_is_scanned_once_and_not_opened(tmp_path, monkeypatch):
    root = make(tmp_path, ["cat/*3", "dog/*3"])
    for folder in (tmp_path, tmp_path / "cat", tmp_path / "dog"):
        os.utime(folder, (1e9, 1e9))
    scans, plain = [], scan_module._scan
    monkeypatch.setattr(scan_module, "_scan", lambda *args: scans.append(args) or plain(*args))
    monkeypatch.setattr(scan_module, "sniff", None)  # no file is opened
    for split in ("train", "test", "train", "all"):
        open_source(root, split)
    assert len(scans) == 1
    (tmp_path / "dog" / "new.png").write_bytes(PIXELS)
    assert len(open_source(root, "all")) == 7
    assert len(scans) == 2


def test_opening_twenty_thousand_files_is_fast(tmp_path):
    root = tmp_path / "many"
    for folder in range(20):
        make(root, [f"c{folder}/*1"])
        for i in range(1, 1000):
            os.link(root / f"c{folder}" / "000.png", root / f"c{folder}" / f"{i:03}.png")
    open_source(str(make(tmp_path / "few", ["cat/*1"])), "all")  # imports
    start = time.process_time()
    source = open_source(str(root), "all")
    took = time.process_time() - start
    start = time.process_time()
    assert sum(entry.is_file() for folder in os.scandir(root) for entry in os.scandir(folder)) == 20_000
    listed = time.process_time() - start
    assert (len(source), source.num_classes) == (20_000, 20)
    assert took < 30 * listed, (took, listed)  # 10 to 17 times; it was 60


# ------------------------------------------------------------------------------------------------- faults


def test_unreadable_subfolder_is_said(tmp_path, caplog, monkeypatch):
    root = make(tmp_path, ["cat/*3", "dog/*3", "lost/*3"])
    plain = os.scandir

    def scandir(path):
        if str(path).endswith("lost"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return plain(path)

    monkeypatch.setattr(scan_module.os, "scandir", scandir)
    with caplog.at_level("WARNING"):
        source = open_source(root, "all")
    assert source.label_names == ("cat", "dog")
    assert "1 folder without permission): lost" in caplog.text
    shutil.rmtree(tmp_path / "cat")
    shutil.rmtree(tmp_path / "dog")
    with pytest.raises(UserError, match=r"no image that can be read \(1 folders without permission\); give permission"):
        open_source(root, "all")


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOTCONN])
def test_failing_disk_while_scanning_is_a_fault_of_the_machine(tmp_path, monkeypatch, number):
    root, plain = make(tmp_path, ["cat/*3", "dog/*3"]), os.scandir

    def scandir(path):
        if str(path).endswith("dog"):
            raise OSError(number, os.strerror(number), path)
        return plain(path)

    monkeypatch.setattr(scan_module.os, "scandir", scandir)
    with pytest.raises(MachineFault, match=r"dog' cannot be read .*; see that its disk is there") as caught:
        open_source(root, "all")
    assert "\n" not in str(caught.value)


def test_vanished_folder_while_training_is_a_fault_of_the_machine(tmp_path):
    for layout in (["cat/*3", "dog/*3"], ["*6"]):
        root = make(tmp_path / str(len(layout)), layout)
        batches = TrainBatches(open_source(root, "all"), [("resize_crop", {"resize": 8, "crop": 8})], 4, seed=0)
        shutil.rmtree(root)
        os.mkdir(root)  # the empty place where a disk was mounted
        with pytest.raises(MachineFault, match=r"cannot be read \(No such file or directory\)"):
            list(iterate(batches, 0, 2))


def test_failing_disk_while_training_is_a_fault_of_the_machine(tmp_path, monkeypatch):
    source = open_source(make(tmp_path, ["cat/*3", "dog/*3"]), "all")

    def fail(path, *_args, **_named):
        raise OSError(errno.EIO, os.strerror(errno.EIO), path)

    monkeypatch.setattr("builtins.open", fail)
    with pytest.raises(MachineFault, match="Input/output error"):
        source[0]
    monkeypatch.undo()
    os.remove(tmp_path / "cat" / "000.png")  # a file alone is one bad picture
    batches = TrainBatches(source, [("resize_crop", {"resize": 8, "crop": 8})], 6, seed=0)
    assert len(next(iterate(batches, 0, 1))["image"]) == 6


def test_messages_name_the_file_and_large_files_are_not_read(tmp_path, caplog, monkeypatch):
    root = make(tmp_path, ["cat/*3"])
    (tmp_path / "cat" / "001.png").write_bytes(PIXELS[:40])
    batches = TrainBatches(open_source(root, "all"), [("resize_crop", {"resize": 8, "crop": 8})], 3, seed=0)
    with caplog.at_level("WARNING"):
        next(iterate(batches, 0, 1))
    assert "example 1 (cat/001.png) is left out:" in caplog.text
    monkeypatch.setattr("ssl_jax.data.scan.MAX_FILE_BYTES", len(PIXELS) - 1)
    (tmp_path / "cat" / "new.png").write_bytes(PIXELS)
    assert open_source(root, "all").paths == ["cat/001.png"]


def test_names_with_control_characters_do_not_reach_the_log(tmp_path, caplog):
    root = make(tmp_path, ["a\nclass/*3", "b\x1b[31m/*3"])
    source, line = understood(caplog, root, "all")
    assert "2 classes: a?class, b?[31m" in line
    assert "\n" not in source.called(0)
    assert np.array_equal(source.labels, [0, 0, 0, 1, 1, 1])

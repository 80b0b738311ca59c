"""The embedded dataset: consistent ground truth, deterministic rendering, atomic preparation without TensorFlow."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from ssl_jax.data import render, scenes
from ssl_jax.errors import UserError

SIZE = render.SIZE


@pytest.fixture(scope="module")
def rendered():
    return [render.render(1, index) for index in range(192)]


@pytest.fixture(scope="module")
def builder(tmp_path_factory):
    return scenes.prepare(tmp_path_factory.mktemp("tfds"), "tiny")


def test_render_is_a_function_of_seed_and_index(rendered):
    repeated = render.render(1, 7)
    for first, second in zip(repeated, rendered[7], strict=True):
        np.testing.assert_array_equal(first, second)
    assert (render.render(0, 7).image != repeated.image).mean() > 0.5
    assert len({scene.image.tobytes() for scene in rendered}) == len(rendered)


def test_shapes_types_and_ranges(rendered):
    for scene in rendered:
        assert scene.image.shape == scene.image2.shape == (SIZE, SIZE, 3)
        assert scene.mask.shape == (SIZE, SIZE, 1)
        assert scene.image.dtype == scene.image2.dtype == scene.mask.dtype == np.uint8
        assert scene.pose.dtype == scene.motion.dtype == np.float32
        assert abs(scene.pose[0]) <= render.MAX_ANGLE + 1e-6
        limits = (render.MAX_SHIFT, render.MAX_SHIFT, render.MAX_TURN, render.MAX_LOG_ZOOM)
        assert (np.abs(scene.motion) <= np.float32(limits)).all()


def test_boxes_match_the_mask(rendered):
    for scene in rendered:
        mask = scene.mask[:, :, 0]
        assert scene.box_labels[0] == render.CLASSES[scene.label]
        assert set(scene.box_labels[1:]) <= {render.PEBBLE}
        rows, columns = np.nonzero(mask == render.OBJECT)
        exact = np.array([rows.min(), columns.min(), rows.max() + 1, columns.max() + 1]) / SIZE
        np.testing.assert_allclose(scene.boxes[0], exact, atol=1e-7)
        # Pebbles do not touch, so each one is a component of the mask, and there are no other components.
        count, _, stats, _ = cv2.connectedComponentsWithStats((mask == render.PEBBLES).astype(np.uint8))
        found = [(y / SIZE, x / SIZE, (y + h) / SIZE, (x + w) / SIZE) for x, y, w, h, _ in stats[1:]]
        assert count - 1 == len(scene.boxes) - 1
        np.testing.assert_allclose(sorted(found), sorted(scene.boxes[1:]), atol=1e-7)


def test_pose_matches_the_center_of_the_mask(rendered):
    """A ring stays symmetric when it is stretched, so the box of its mask is centered on (x, y)."""
    checked = 0
    for scene in rendered:
        if render.CLASSES[scene.label] != "ring":
            continue
        _, x, y, radius = scene.pose
        ymin, xmin, ymax, xmax = np.array(scene.boxes[0]) * SIZE
        if min(ymin, xmin) > 0 and max(ymax, xmax) < SIZE:
            np.testing.assert_allclose([(xmin + xmax - 1) / 2, (ymin + ymax - 1) / 2], [x, y], atol=0.8)
            assert 0.75 < max(ymax - ymin, xmax - xmin) / (2 * radius) < 1.5
            checked += 1
    assert checked >= 8


def test_pose_angle_matches_the_axis_of_a_dumbbell(rendered):
    """Its long axis points along (sin, -cos) of the angle, up to the shear."""
    errors = []
    for scene in rendered:
        if render.CLASSES[scene.label] == "dumbbell":
            rows, columns = np.nonzero(scene.mask[:, :, 0] == render.OBJECT)
            points = np.stack([columns - columns.mean(), rows - rows.mean()])
            axis = np.linalg.eigh(points @ points.T)[1][:, 1]
            axis *= -np.sign(axis[1])
            errors.append(np.arctan2(axis[0], -axis[1]) - scene.pose[0])
    assert len(errors) == 16
    assert np.abs(errors).max() < 0.35
    assert abs(np.mean(errors)) < 0.1


def test_motion_maps_the_first_view_to_the_second(rendered):
    """Warping by the motion explains the second view; the identity and the inverse motion do not."""
    worse = 0
    for scene in rendered[:96]:
        a, b = (cv2.GaussianBlur(v.astype(np.float32), (0, 0), 1.2) for v in (scene.image, scene.image2))
        matrix = render.motion_matrix(scene.motion)
        inside = cv2.erode(
            cv2.warpAffine(np.ones((SIZE, SIZE), np.uint8), matrix, (SIZE, SIZE)), np.ones((5, 5), np.uint8)
        )

        def error(m, a=a, b=b, inside=inside):
            return np.abs(cv2.warpAffine(a, m, (SIZE, SIZE)) - b)[inside > 0].mean()

        identity, inverse = np.eye(2, 3), cv2.invertAffineTransform(matrix)
        right = error(matrix)
        assert right < 7
        worse += error(identity) > right and error(inverse) > right
    assert worse >= 94  # with a nearly static camera all three are equally good


def test_motion_matrix_closed_form():
    center = (SIZE - 1) / 2
    point = np.array([center + 10, center, 1])
    found = render.motion_matrix([2, -3, np.pi / 2, np.log(2)]) @ point
    np.testing.assert_allclose(found, [center + 2, center - 3 + 20], atol=1e-9)  # a quarter turn from right to down, twice as far
    np.testing.assert_allclose(render.motion_matrix([0, 0, 0, 0]), np.eye(2, 3), atol=1e-12)


def _hue(picture, mask):
    """Circular mean hue in degrees, weighted by chroma, of the pixels in the mask."""
    hsv = cv2.cvtColor(picture.astype(np.float32) / 255, cv2.COLOR_RGB2HSV)[mask]
    weight = hsv[:, 1] * hsv[:, 2]
    angle = np.deg2rad(hsv[:, 0])
    return np.rad2deg(np.arctan2((weight * np.sin(angle)).sum(), (weight * np.cos(angle)).sum())) % 360


def test_questions_are_answered_by_the_scene(rendered):
    kinds = {"what color": 0, "what is": 0, "how many": 0, "is there": 0}
    color_errors = []
    for scene in rendered:
        name = render.CLASSES[scene.label]
        kind = next(k for k in kinds if scene.question.startswith(k))
        kinds[kind] += 1
        assert scene.answer in render.ANSWERS
        if kind == "what color":
            interior = cv2.erode((scene.mask[:, :, 0] == render.OBJECT).astype(np.uint8), np.ones((2, 2), np.uint8)) > 0
            offset = _hue(scene.image, interior) - 60 * render.COLORS.index(scene.answer)
            color_errors.append(abs((offset + 180) % 360 - 180))
        elif kind == "what is":
            assert scene.answer == name
        elif kind == "how many":
            assert int(scene.answer) == len(scene.boxes) - 1
        else:
            assert (scene.answer == "yes") == (scene.question == f"is there a {name}?")
    assert min(kinds.values()) >= 30
    assert np.mean(np.array(color_errors) < 30) > 0.9


def test_best_guess_from_the_question_alone_is_rarely_right():
    """The most frequent answer to each question, without the image."""
    rng = np.random.default_rng(0)
    counts = {}
    for _ in range(20000):
        label, color = rng.integers(len(render.CLASSES)), rng.integers(len(render.COLORS))
        question, answer = render.question_and_answer(label, color, int(rng.integers(render.MAX_PEBBLES + 1)), rng)
        counts.setdefault(question, {}).setdefault(answer, 0)
        counts[question][answer] += 1
    assert 0.25 < sum(max(answers.values()) for answers in counts.values()) / 20000 < 0.31


def test_classes_and_nuisances_are_balanced(rendered):
    assert np.bincount([scene.label for scene in rendered]).tolist() == [16] * len(render.CLASSES)
    pebbles = np.bincount([len(scene.boxes) - 1 for scene in rendered], minlength=4)
    assert pebbles.min() > 25  # 48 expected


def test_builder_round_trip_is_lossless(builder, rendered):
    assert {name: split.num_examples for name, split in builder.info.splits.items()} == {"train": 192, "test": 96}
    names = builder.info.features["label"].names
    assert names == list(render.CLASSES)
    by_image = {scene.image.tobytes(): scene for scene in rendered[:96]}  # series 1 is the test split
    source = builder.as_data_source("test")
    assert len(source) == 96
    for example in source:
        scene = by_image.pop(example["image"].tobytes())
        for key in ("mask", "image2", "pose", "motion"):
            np.testing.assert_array_equal(example[key], getattr(scene, key))
        assert names[example["label"]] == render.CLASSES[scene.label]
        assert example["question"].decode() == scene.question
        assert builder.info.features["answer"].names[example["answer"]] == scene.answer
        np.testing.assert_allclose(example["objects"]["bbox"], scene.boxes, atol=1e-6)
        object_names = builder.info.features["objects"]["label"].names
        assert [object_names[label] for label in example["objects"]["label"]] == scene.box_labels
    assert not by_image


def test_splits_share_no_scene(builder):
    images = {split: {x["image"].tobytes() for x in builder.as_data_source(split)} for split in ("train", "test")}
    assert not images["train"] & images["test"]


def test_second_preparation_reuses_the_data_and_prints_nothing(builder, capsys):
    root = Path(builder.data_dir).parents[2]
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert scenes.prepare(root, "tiny").data_dir == builder.data_dir
    assert capsys.readouterr() == ("", "")
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_parallel_rendering_equals_serial(monkeypatch):
    serial = list(scenes._encoded_scenes(5, 24))
    monkeypatch.setattr(scenes, "_CHUNK", 5)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    parallel = list(scenes._encoded_scenes(5, 24))
    assert [s.image + s.mask + s.image2 for s in parallel] == [s.image + s.mask + s.image2 for s in serial]


def _start(root, *lines):
    """A new process that runs `lines` without network access."""
    code = """
        import socket, sys
        def no_network(*arguments, **keywords):
            raise RuntimeError("network")
        socket.socket.connect = socket.create_connection = no_network
        from ssl_jax.data import scenes
    """
    code = textwrap.dedent(code) + "\n".join(lines)
    # A separate home directory, to check that nothing is written there.
    home = Path(root).parent / "home"
    home.mkdir(exist_ok=True)
    environment = {**os.environ, "HOME": str(home), "PYTHONPATH": str(Path(scenes.__file__).parents[2])}
    environment.pop("XDG_CACHE_HOME", None)
    return subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.full
def test_interrupted_and_simultaneous_preparation(tmp_path):
    """After kill -9 in the middle two processes start at once: one prepares, both read, and no temporary file stays."""
    root = tmp_path / "data"
    first = _start(
        root,
        "import time",
        "real = scenes._encoded_scenes",
        "def slow(seed, count):",
        "    for index, scene in enumerate(real(seed, count)):",
        "        if index == 20: time.sleep(60)",
        "        yield scene",
        "scenes._encoded_scenes = slow",
        f"scenes.prepare({str(root)!r}, 'tiny')",
    )
    deadline = time.monotonic() + 60
    while not list(root.glob("scenes/tiny/*incomplete*")):
        assert time.monotonic() < deadline
        assert first.poll() is None, first.stdout.read()
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert not (root / "scenes/tiny/1.0.1").exists()
    use = (
        f"builder = scenes.prepare({str(root)!r}, 'tiny')",
        "total = sum(int(x['label']) for x in builder.as_data_source('train'))",
        "assert 'tensorflow' not in sys.modules",
        "print('read', total)",
    )
    outputs = [process.communicate(timeout=120)[0] for process in [_start(root, *use), _start(root, *use)]]
    total = sum(index % len(render.CLASSES) for index in range(192))
    assert all(output.strip().endswith(f"read {total}") for output in outputs), outputs
    assert sorted(output.count("preparing the embedded dataset") for output in outputs) == [0, 1]
    noise = [line for output in outputs for line in output.strip().splitlines() if not line.startswith(("preparing ", "read "))]
    assert len(noise) == 1 and re.fullmatch(r"the embedded dataset is ready after \d+ s", noise[0]), outputs  # lines of their own
    assert [path.name for path in (root / "scenes/tiny").iterdir()] == ["1.0.1"]
    assert not list((tmp_path / "home").iterdir())


def test_default_directory_is_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "never"))
    assert scenes.cache_dir() == tmp_path / "ssl_jax" / "tfds"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert scenes.cache_dir() == Path.home() / ".cache" / "ssl_jax" / "tfds"


def test_invalid_config_or_data_dir_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="no config 'huge'; choose full or tiny"):
        scenes.prepare(tmp_path, "huge")
    with pytest.raises(UserError, match="needs a local data_dir"):
        scenes.prepare("gs://bucket/data")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="name a writable data_dir"):
        scenes.prepare(tmp_path / "file", "tiny")

"""Features in files: right rows, names and order, also after kill -9, with several processes, and with images that cannot be read."""

import functools
import io
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image
from process_runs import environment
from safetensors.numpy import save_file
from test_foreign_weights import SPEC, features, state_of

from launch import main
from ssl_jax import files
from ssl_jax.augment.pixels import to_input
from ssl_jax.data.sources import open_source
from ssl_jax.engine.checkpoint import Checkpoints, write_json
from ssl_jax.errors import UserError
from ssl_jax.experiment import config as configs
from ssl_jax.experiment import feature_files, write_features
from ssl_jax.experiment.build import build_experiment
from ssl_jax.experiment.launch_environment import COORDINATOR, PROCESS, PROCESSES
from ssl_jax.models.pretrained.foreign import read_encoder

ROOT = pathlib.Path(__file__).parent.parent
SIZE, COUNT = 16, 1000
pq = pytest.importorskip("pyarrow.parquet", reason="the rows of Parquet files: pip install pyarrow")


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """1,000 noise images of 16 x 16 pixels in seven folders."""
    top, noise = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for number in range(COUNT):
        folder = top / f"roll{number % 7}"
        folder.mkdir(exist_ok=True)
        Image.fromarray(noise.integers(0, 256, (SIZE, SIZE, 3), np.uint8)).save(folder / f"{number:04d}.png")
    return top


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    save_file(state_of(SPEC, SIZE), path)
    return path


@functools.cache
def expected(weights, photos):
    """{name: features} of the encoder alone, of images that PIL has read."""
    found, names = read_encoder(weights), sorted(str(path.relative_to(photos)) for path in photos.rglob("*.png"))
    images = np.stack([np.asarray(Image.open(photos / name)) for name in names])
    pooled = features(found, to_input(images, found.mean, found.std))["pooled"]
    return dict(zip(names, np.asarray(pooled), strict=True))


def flags(weights, photos, output, *others):
    return [
        "features", f"--weights={weights}", "--config=configs/simclr.py:smoke", f"--config.data.name={photos}",
        "--config.dtype=float32", "--config.eval_batch_size=16", "--shard_rows=24", f"--output={output}", *others,
    ]  # fmt: skip


def check(output, weights, photos, form):
    """Every image once, in order, with its own name, label and features."""
    if form == "parquet":
        table = pq.read_table(output / "features.parquet")
        names, labels, x = table["name"].to_pylist(), table["label"].to_pylist(), np.array(table["features"].to_pylist(), np.float32)
    else:
        names = (output / "names.txt").read_text().splitlines()
        labels, x = np.load(output / "labels.npy").tolist(), np.load(output / "features.npy", mmap_mode="r")
        assert isinstance(x, np.memmap) and x.dtype == np.float32
        assert {path.name for path in output.iterdir()} == {".lock", "features.json", "features.npy", "labels.npy", "names.txt"}
    wanted = expected(weights, photos)
    assert names == list(wanted)
    assert labels == [int(name[4]) for name in names]
    np.testing.assert_allclose(x, np.stack(list(wanted.values())), atol=1e-5)
    card = json.loads((output / "features.json").read_text())
    assert (card["rows"], card["examples"], card["width"], card["split"]) == (COUNT, COUNT, 32, "all")
    assert card["classes"] == [f"roll{i}" for i in range(7)]


@pytest.mark.full
@pytest.mark.parametrize("form", ["npy", "parquet"])
def test_features_of_a_thousand_photos_and_back(form, photos, weights, tmp_path, capsys):
    command = flags(weights, photos, tmp_path / "out", f"--format={form}")
    assert main(command) == 0
    check(tmp_path / "out", weights, photos, form)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file() and path.name != ".lock"}
    assert main(command) == 0  # complete: nothing is written again
    assert before == {path: path.stat().st_mtime_ns for path in before}
    for other in ("--layer=block0", "--split=train", "--config.data.eval_ops=[('resize_crop',dict(resize=16,crop=8))]"):
        assert main([*command, other]) == 2
        assert "has other features" in capsys.readouterr().err


def shards(output, form):
    return sorted(feature_files.folder_of(output, form).glob("part-*"))


@pytest.mark.full
@pytest.mark.parametrize("form", ["npy", "parquet"])
def test_killed_run_goes_on_without_repeating_or_missing_a_row(form, photos, weights, tmp_path):
    output = tmp_path / "out"
    command = [sys.executable, "launch.py", *flags(weights, photos, output, f"--format={form}")]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(1), stderr=subprocess.DEVNULL)
    while len(shards(output, form)) < 3 and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {path: path.stat().st_mtime_ns for path in shards(output, form)}
    assert 3 <= len(done) < 32 and "rows" not in json.loads((output / "features.json").read_text())
    left = feature_files.folder_of(output, form) / ".part-000009-of-000032.x.tmp"  # of a write that was killed
    left.write_bytes(b"half")
    finished = subprocess.run(command, cwd=ROOT, env=environment(1), capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert f"has {len(done)} of 32 shards; going on" in finished.stderr
    assert finished.stderr.count("\nshard ") == 32 - len(done)
    assert not left.exists()
    check(output, weights, photos, form)
    if form == "parquet":
        assert done == {path: path.stat().st_mtime_ns for path in done}


@pytest.mark.full
def test_two_processes_share_the_work(photos, weights, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "launch.py", *flags(weights, photos, tmp_path / "out", "--format=parquet")]
    processes = [
        subprocess.Popen(
            command, cwd=ROOT, stderr=subprocess.PIPE, text=True,
            env=environment(2, **{COORDINATOR: f"localhost:{port}", PROCESSES: 2, PROCESS: number}),
        )
        for number in range(2)
    ]  # fmt: skip
    logs = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], logs
    assert [log.count("\nshard ") for log in logs] == [16, 16]
    check(tmp_path / "out", weights, photos, "parquet")


@pytest.mark.full
def test_images_that_cannot_be_read_are_left_out(photos, weights, tmp_path):
    some = tmp_path / "photos"
    some.mkdir()
    names = [f"{number:04d}.png" for number in range(0, 210, 7)]
    for number, name in enumerate(names):
        content = (photos / "roll0" / name).read_bytes()
        (some / name).write_bytes(content[:60] if number == 3 else content)
    assert main(flags(weights, some, tmp_path / "out")) == 0
    kept = [name for number, name in enumerate(names) if number != 3]
    assert (tmp_path / "out" / "names.txt").read_text().splitlines() == kept
    x = np.load(tmp_path / "out" / "features.npy")
    np.testing.assert_allclose(x, [expected(weights, photos)[f"roll0/{name}"] for name in kept], atol=1e-5)
    assert not (tmp_path / "out" / "labels.npy").exists()  # one folder has no classes
    assert json.loads((tmp_path / "out" / "features.json").read_text())["rows"] == 29


@pytest.mark.full
def test_features_of_a_run_are_those_of_its_encoder(tmp_path, photos):
    config = configs.load("configs/supervised.py:smoke", ["--config.dtype=float32"])
    experiment = build_experiment(config, jax.devices()[:1])
    state = experiment.run.init()
    saved = Checkpoints(tmp_path / "run" / "checkpoints")
    saved.save(state, configs.plain(experiment.config))
    saved.close()
    write_json(tmp_path / "run" / "config.json", configs.plain(experiment.config))
    arguments = ["features", f"--workdir={tmp_path}/run", "--split=test[:40]", "--layer=layer2", "--config.eval_batch_size=16"]
    assert main([*arguments, f"--output={tmp_path}/out"]) == 0
    data = open_source("scenes", "test[:40]")
    images = np.stack([np.asarray(Image.open(io.BytesIO(data[i]["image"]))) for i in range(40)])
    wanted = experiment.encode(state.params, state.mutable, images)["layer2"].mean((1, 2))
    np.testing.assert_allclose(np.load(tmp_path / "out" / "features.npy"), wanted, atol=1e-4)
    assert (tmp_path / "out" / "names.txt").read_text().split() == [str(i) for i in range(40)]
    assert np.load(tmp_path / "out" / "labels.npy").tolist() == [int(data[i]["label"]) for i in range(40)]
    # Of data with other classes and sizes than those of the run.
    assert main([*arguments, f"--config.data.name={photos}", "--split=test", f"--output={tmp_path}/photos"]) == 0
    names = (tmp_path / "photos" / "names.txt").read_text().splitlines()
    assert 50 < len(names) < 200
    images = np.stack([np.asarray(Image.open(photos / name)) for name in names])
    wanted = experiment.encode(state.params, state.mutable, images)["layer2"].mean((1, 2))
    np.testing.assert_allclose(np.load(tmp_path / "photos" / "features.npy"), wanted, atol=1e-4)


def test_a_run_that_joined_its_shards_and_was_killed_is_cleaned(tmp_path):
    (tmp_path / "shards").mkdir()
    for name in (".features.npy.tmp", "shards/part-000000-of-000001.npz"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "features.npy").write_bytes(b"x")
    feature_files.clean(tmp_path, "npy")
    assert os.listdir(tmp_path) == ["features.npy"]


def test_an_output_that_another_process_writes_is_refused(tmp_path):
    with files.lock(tmp_path / write_features.LOCK):
        begun = write_features._begun(tmp_path, {"layer": "pooled"})
        with pytest.raises(UserError, match="is in use by another process"):
            begun.__enter__()
    with write_features._begun(tmp_path, {"layer": "pooled"}) as complete:
        assert not complete


def test_a_line_break_in_the_name_of_a_file_needs_parquet(tmp_path, weights, capsys):
    image = Image.new("RGB", (SIZE, SIZE))
    for name in ("a.png", "b\nc.png"):
        image.save(tmp_path / name)
    assert main(flags(weights, tmp_path, tmp_path / "out")) == 2
    assert "has a line break in its name, and names.txt has a line for each; give --format=parquet" in capsys.readouterr().err


def test_parquet_without_pyarrow_is_one_line(monkeypatch, tmp_path, weights, capsys):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert main(flags(weights, tmp_path, tmp_path / "out", "--format=parquet")) == 2
    assert "error: --format=parquet needs pyarrow, which is not installed" in capsys.readouterr().err

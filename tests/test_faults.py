"""Runs through the command line: killed, stopped, resumed, evaluated, and given bad input."""

import fcntl
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import flax.linen as nn
import numpy as np
import pytest
from PIL import Image
from xla_flags import flags

from launch import main
from ssl_jax.engine.checkpoint import Checkpoints
from ssl_jax.engine.loop import Signals
from ssl_jax.engine.records import read_metrics, read_starts
from ssl_jax.engine.timing import Trace
from ssl_jax.engine.watchdog import Watchdog
from ssl_jax.experiment import training
from ssl_jax.report import write

ROOT = pathlib.Path(__file__).parent.parent
PIXELS = 24
CONFIG = """
import flax.linen as nn
from configs import simclr

nn.relu = nn.silu  # smooth, so that rounding cannot carry a unit over its kink: see test_conformance

def get_config(variant=""):
    config = simclr.get_config("smoke")
    config.baselines, config.best_metric, config.evals = (), "", {}
    config.batch_size, config.total, config.checkpoint_every = 16, "12 steps", "3 steps"
    config.data.train_split = config.data.test_split = "all"
    if variant == "bad_evaluation":
        config.evals.x = dict(kind="knnn")
    if variant == "bad_view":
        config.views = ((("flipp", {}),),) * 2
    if variant == "bad_argument":
        config.views = ((("flip", {"prob": 0.5}),),) * 2
    if variant == "small_image":
        config.views = ((("random_crop", {"size": 99}),),) * 2
    return config
"""


@pytest.fixture(scope="module", autouse=True)
def config_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("settings") / "configs" / "tiny.py"
    path.parent.mkdir()
    path.write_text(CONFIG)
    CONFIGS["tiny"] = path


CONFIGS = {}


def write_images(folder, count=48):
    """A folder of small images, in a sub-folder for each of two classes."""
    rng = np.random.default_rng(0)
    for i in range(count):
        path = folder / ("warm" if i % 2 else "cold") / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 120, (PIXELS, PIXELS, 3), np.uint8)
        pixels[..., 0 if i % 2 else 2] += 100
        Image.fromarray(pixels).save(path)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("write_images"))


def command(workdir, folder, *overrides, variant=""):
    flags = [f"--config={CONFIGS['tiny']}:{variant}", f"--workdir={workdir}", f"--config.data.name={folder}"]
    return [sys.executable, "launch.py", "train", *flags, *overrides]


def environment(devices=1):
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags(devices), "NPROC": "16", "PYTHONUNBUFFERED": "1"}


def run(arguments, devices=1, timeout=240):
    return subprocess.run(arguments, cwd=ROOT, env=environment(devices), capture_output=True, text=True, timeout=timeout)


@pytest.fixture
def here(monkeypatch, capsys):
    """`run` in this process, for commands that are not killed."""
    monkeypatch.setattr(nn, "relu", nn.relu)  # the config replaces it
    monkeypatch.chdir(ROOT)

    def run_here(arguments):
        capsys.readouterr()
        code = main(arguments[2:])
        return subprocess.CompletedProcess(arguments, code, *capsys.readouterr())

    return run_here


def lines(workdir):
    """metrics.jsonl without the times."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


def interrupt_at(arguments, workdir, step, signum, devices=1):
    """Start, send `signum` once `step` is logged; returns (exit code, stderr)."""
    process = subprocess.Popen(arguments, cwd=ROOT, env=environment(devices), stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 600
    path = workdir / "metrics.jsonl"
    while time.time() < deadline and process.poll() is None:
        if path.exists() and path.read_text().count("\n") >= step:
            process.send_signal(signum)
            break
        time.sleep(0.01)
    return process.wait(timeout=120), process.stderr.read()


@pytest.fixture(scope="module")
def straight(tmp_path_factory, folder):
    """An uninterrupted run, with two checkpoints kept."""
    workdir = tmp_path_factory.mktemp("runs") / "straight"
    done = run(command(workdir, folder))
    assert done.returncode == 0, done.stderr
    return workdir


def test_run_writes_all_files_that_the_readme_lists(straight):
    names = {path.name for path in straight.iterdir()}
    expected = {"config.json", "metrics.jsonl", "starts.jsonl", "checkpoints", "pictures", "report.html", "log.txt", "provenance.json"}
    assert expected <= names
    assert [row["step"] for row in lines(straight)] == list(range(1, 13))
    assert (straight / "pictures" / "views.png").stat().st_size > 1000


@pytest.mark.full
def test_watchdog_is_paused_outside_of_steps(here, folder, tmp_path, monkeypatch):
    watchdogs, paused = [], {}
    enter = Watchdog.__enter__
    monkeypatch.setattr(Watchdog, "__enter__", lambda watchdog: watchdogs.append(watchdog) or enter(watchdog))

    def record_pauses(owner, name):
        real = getattr(owner, name)

        def call(*args, **kwargs):
            watchdog = watchdogs[-1]
            paused[name] = watchdog._thread.is_alive() and watchdog._at.pauses, watchdog._at.since
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    record_pauses(Checkpoints, "restore_latest")
    for name in ("save_views", "add_missing", "save_neighbors"):
        record_pauses(training, name)
    record_pauses(write, "write_report")
    record_pauses(Trace, "close")
    record_pauses(Checkpoints, "close")
    record_pauses(Signals, "stop")
    settings = ("--config.total=2 steps", "--config.baselines=('raw pixels',)", "--config.evals={'knn': {'kind': 'knn'}}")
    assert here([*command(tmp_path / "run", folder, *settings), "--saved_code=75"]).returncode == 0
    assert {name for name, (pauses, _) in paused.items() if pauses == 0} == {"stop"}
    assert len(paused) == 7
    assert len({since for _, since in paused.values()}) == 5  # a time limit each for start, step, baselines, closing, end
    assert watchdogs[0].ends and not watchdogs[0]._thread.is_alive()
    monkeypatch.setattr(training, "train", lambda *_: None)
    assert here(command(tmp_path / "run", folder, *settings)).returncode == 0
    assert not watchdogs[1].ends  # nothing would restart it


@pytest.mark.full
def test_run_killed_with_sigkill_resumes_to_the_same_curve(straight, folder, tmp_path):
    workdir = tmp_path / "killed"
    code, _ = interrupt_at(command(workdir, folder), workdir, 5, signal.SIGKILL)
    assert code == -signal.SIGKILL
    done = run(command(workdir, folder))
    assert done.returncode == 0, done.stderr
    assert "going on at step" in done.stderr
    assert lines(workdir) == lines(straight)  # bit for bit
    first, second = (start["time/clock"] for start in read_starts(workdir))
    assert first < second < read_metrics(workdir)[-1]["time/clock"]
    assert 0 < float(re.search(r"goodput (\d+) % of the time from the first start", done.stderr).group(1)) < 100


SINGLE_STAGE = ("gan", "bigan", "biggan", "bigbigan", "stylegan", "ssgan", "autoencoder", "rbm_stack", "vae", "vqvae", "vit_vqgan",
                "colorization", "context_encoder", "split_brain", "cpc")  # fmt: skip
WITH_TOKENIZER = ("vq_prior", "maskgit")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "tokenizer"
    done = run([sys.executable, "launch.py", "train", "--config=configs/vit_vqgan.py:smoke", f"--workdir={workdir}"], timeout=900)
    assert done.returncode == 0, done.stderr
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize("name", SINGLE_STAGE + WITH_TOKENIZER)
def test_every_method_killed_with_sigkill_resumes_to_the_same_curve(name, tmp_path, request):
    """Spectral vectors, averages, statistics and codebooks are in the checkpoint, or in that of the stage."""

    def command_of(workdir):
        overrides = ["--config.total=24 steps", "--config.evaluate_every=12 steps", "--config.checkpoint_every=3 steps"]
        if name in WITH_TOKENIZER:
            overrides.append(f"--config.stages.tokenizer.workdir={request.getfixturevalue('tokenizer')}")
        return [sys.executable, "launch.py", "train", f"--config=configs/{name}.py:smoke", f"--workdir={workdir}", *overrides]

    done = run(command_of(tmp_path / "straight"), timeout=900)
    assert done.returncode == 0, done.stderr
    code, _ = interrupt_at(command_of(tmp_path / "killed"), tmp_path / "killed", 17, signal.SIGKILL)
    assert code == -signal.SIGKILL
    done = run(command_of(tmp_path / "killed"), timeout=900)
    assert "going on at step" in done.stderr, done.stderr
    np.testing.assert_equal(lines(tmp_path / "killed"), lines(tmp_path / "straight"))  # NaN where a lazy phase is skipped


@pytest.mark.full
@pytest.mark.parametrize(("signum", "expected"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_sigterm_saves_and_exits_with_0_and_sigint_with_130(straight, folder, tmp_path, signum, expected):
    workdir = tmp_path / "stopped"
    code, stderr = interrupt_at(command(workdir, folder), workdir, 4, signum)
    assert code == expected, stderr
    assert "saved; run the same command again" in stderr
    saved = max(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())
    assert saved == lines(workdir)[-1]["step"] or saved > 3
    done = run(command(workdir, folder))
    assert done.returncode == 0, done.stderr
    assert lines(workdir) == lines(straight)


@pytest.mark.full
def test_evaluation_missed_because_of_sigterm_runs_on_resume(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(nn, "relu", nn.relu)  # the config replaces it
    monkeypatch.chdir(ROOT)
    arguments = command(tmp_path, folder, "--config.total=4 steps", "--config.evaluate_every=2 steps", REPRESENTATION)[2:]

    def stop(watch, step):
        if step == 2:
            watch.received = signal.SIGTERM
        return watch.received

    with monkeypatch.context() as patch:
        patch.setattr(Signals, "stop", stop)
        assert main(arguments) == 0
    assert lines(tmp_path)[-1]["step"] == 2 and not (tmp_path / "evaluations.json").exists()
    for _ in range(2):  # the second time there is nothing left to do
        assert main(arguments) == 0
        assert [entry["step"] for entry in json.loads((tmp_path / "evaluations.json").read_text())] == [2, 4]
        assert ["representation/rankme" in line and "ssl/loss" in line for line in lines(tmp_path)] == [False, True, False, True]


@pytest.mark.full
def test_curve_is_the_same_with_worker_processes_and_with_eight_devices(straight, folder, tmp_path):
    """Workers: bit-identical, also after a kill. Devices: losses to 1e-5, from 1 to 8 and back."""
    workdir = tmp_path / "mixed"
    code, _ = interrupt_at(command(workdir, folder, "--config.data.workers=2"), workdir, 4, signal.SIGKILL)
    assert code == -signal.SIGKILL
    first = lines(workdir)
    assert first == lines(straight)[: len(first)]
    code, stderr = interrupt_at(command(workdir, folder), workdir, 7, signal.SIGTERM, devices=8)
    assert code == 0, stderr
    back = run(command(workdir, folder))
    assert back.returncode == 0, back.stderr
    for ours, theirs in zip(lines(workdir), lines(straight), strict=True):
        assert ours["ssl/loss"] == pytest.approx(theirs["ssl/loss"], abs=1e-5)


BAD = {
    "unknown key": (["--config.modle.temperature=1"], "did you mean config.model?"),
    "wrong type": (["--config.batch_size=many"], "config.batch_size=many must be a whole number"),
    "missing dataset": (["--config.data.name=cifar11", "--config.data.train_split=train"], "cifar11"),
    "no such split": (["--config.data.train_split=validation"], "validation"),
    "zero steps": (["--config.total=0 steps"], "zero steps"),
    "no checkpoint": (["--config.keep_checkpoints=0"], "config.keep_checkpoints=0 must be a whole number from 1"),
    "negative rate": (["--config.optim.net.lr=-0.1"], "must be positive"),
    "wrong mesh": (["--config.mesh.fsdp=3"], "config.mesh"),
    "batch and devices": (["--config.batch_size=15"], "the nearest that does is 16"),
    "evaluated batch and devices": (
        ["--config.eval_batch_size=36", "--config.evals={'x': {'kind': 'knn'}}"],
        "config.eval_batch_size=36 does not divide by 8 devices; the nearest that does is 32",
    ),
    "no parts of a batch": (["--config.accumulate=0"], "config.accumulate=0 must be a whole number from 1"),
    "batch and data": (["--config.batch_size=512"], "larger than data"),
    "unknown evaluation": ("bad_evaluation", "did you mean 'knn'"),
    "best of no evaluation": (["--config.best_metric=-knn/top1"], "config.best_metric='-knn/top1' is of no evaluation"),
    "unknown view op": ("bad_view", "did you mean 'flip'?"),
    "unknown view argument": ("bad_argument", "unknown argument 'prob'"),
    "image too small for the crop": ("small_image", "random_crop: size=99 does not fit an image of 24 x 24"),
    "unknown method": (["--config.method=simcrl"], "did you mean 'simclr'?"),
    "unknown optimizer": (["--config.optim.net.name=adamm"], "is unknown"),
    "unknown encoder field": (["--config.model.encoder.depth=19"], "19"),
    "rule that misses": (["--config.sharding=(('kernel', 'fsdp'),)"], "no rule matches parameter"),
    "rule that hits nothing": (["--config.sharding=(('transformer', 'fsdp'), ('.*', 'fsdp'))"], "matches no parameter"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name, folder, tmp_path, here):
    change, message = BAD[name]
    variant, overrides = (change, []) if isinstance(change, str) else ("", change)
    one_line(here(command(tmp_path / "w", folder, *overrides, variant=variant)), message)
    assert not (tmp_path / "w" / "metrics.jsonl").exists()


def one_line(done, message, code=2):
    assert done.returncode == code, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert "Traceback" not in done.stderr


def test_unknown_variant_missing_flags_and_unwritable_workdir_are_one_line(folder, tmp_path, here):
    unknown = [sys.executable, "launch.py", "train", "--config=configs/simclr.py:cifar100", f"--workdir={tmp_path / 'w'}"]
    one_line(here(unknown), "variant 'cifar100' does not exist")
    one_line(run([sys.executable, "launch.py", "train"]), "--help")
    one_line(here([sys.executable, "launch.py", "evaluate", f"--workdir={tmp_path / 'nothing'}"]), "holds no run")
    (tmp_path / "file").write_text("")
    one_line(here(command(tmp_path / "file" / "w", folder)), "cannot be written")


def test_workdir_that_is_a_url_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--config=configs/simclr.py:smoke", "--workdir=gs://bucket/run"]) == 2
    assert "--workdir=gs://bucket/run is no directory; mount the bucket on every host" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_workdir_of_another_config_or_in_use_is_refused(straight, folder, here):
    before = (straight / "config.json").read_text()
    one_line(here(command(straight, folder, "--config.model.temperature=0.9")), "model.temperature: 0.2 -> 0.9")
    assert (straight / "config.json").read_text() == before
    with open(straight / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        one_line(here(command(straight, folder)), "in use by another process")


@pytest.fixture
def finished(straight, tmp_path):
    """A copy of the uninterrupted run, to break."""
    return shutil.copytree(straight, tmp_path / "run")


@pytest.mark.full
def test_run_whose_checkpoints_are_gone_is_refused_until_it_starts_over(finished, folder, here):
    before = (finished / "metrics.jsonl").read_bytes()
    (finished / "checkpoints").rename(finished.parent / "elsewhere")
    for _ in range(2):
        one_line(here(command(finished, folder)), "saved step 12, and")
        assert (finished / "metrics.jsonl").read_bytes() == before and not (finished / "checkpoints").exists()
    (finished / "checkpoints").symlink_to(finished.parent / "unmounted")
    one_line(here(command(finished, folder)), "is a link to what is not there")
    done = here([*command(finished, folder), "--start_over"])
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in lines(finished)] == list(range(1, 13))
    assert (finished / "before-1" / "metrics.jsonl").read_bytes() == before


@pytest.fixture
def verb(here):
    return lambda name, workdir, *overrides: here([sys.executable, "launch.py", name, f"--workdir={workdir}", *overrides])


REPRESENTATION = "--config.evals={'representation': {'kind': 'representation'}}"


@pytest.mark.full
def test_evaluate_with_other_options_adds_an_entry_and_the_same_options_replace_it(finished, verb):
    before = len(json.loads((finished / "evaluations.json").read_text()))
    for k, more in ((3, 1), (1, 2), (3, 2)):  # another protocol adds an entry, the same replaces it
        done = verb("evaluate", finished, f"--config.evals={{'knn': {{'kind': 'knn', 'k': {k}, 'temperature': 0.1}}}}")
        assert done.returncode == 0, done.stderr
        assert f"k={k}" in done.stdout
        assert len(json.loads((finished / "evaluations.json").read_text())) == before + more


@pytest.mark.full
def test_evaluate_and_export_refuse_a_checkpoint_with_a_flipped_bit(finished, verb):
    newest = max((path for path in (finished / "checkpoints").iterdir() if path.name.isdigit()), key=lambda path: int(path.name))
    largest = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    one_line(verb("evaluate", finished, REPRESENTATION), "checkpoint 12")
    one_line(verb("export", finished), "checkpoint 12")
    assert newest.exists()  # only `train` moves it aside


@pytest.mark.full
def test_evaluate_on_float_images_without_a_defined_range_is_refused(finished, tmp_path, verb):
    before = (finished / "evaluations.json").read_text()
    for i in range(16):
        path = tmp_path / "floats" / f"{i}.tif"
        path.parent.mkdir(exist_ok=True)
        Image.new("F", (PIXELS, PIXELS), i / 16).save(path)
    one_line(verb("evaluate", finished, REPRESENTATION, f"--config.data.name={tmp_path / 'floats'}"), "no defined range")
    assert (finished / "evaluations.json").read_text() == before


@pytest.mark.full
def test_export_of_an_unfinished_run_is_refused(finished, verb):
    shutil.rmtree(finished / "checkpoints" / "12")
    one_line(verb("export", finished), "is unfinished (step 9 of 12)")


def test_tfds_dataset_whose_preparation_was_interrupted_is_refused(tmp_path, here):
    half = tmp_path / "tfds" / "cifar10" / "3.0.2.incompleteABC"
    half.mkdir(parents=True)
    (half / "cifar10-train.array_record-00000-of-00001").write_bytes(b"")
    flags = [f"--config={CONFIGS['tiny']}", f"--workdir={tmp_path / 'w'}", f"--config.data.data_dir={tmp_path / 'tfds'}"]
    one_line(here([sys.executable, "launch.py", "train", *flags, "--config.data.name=cifar10"]), "was not prepared to the end")


NOT_FINITE = ("--config.optim.net.lr=1e30", "--config.model.temperature=1e-30")


@pytest.mark.full
def test_nan_loss_names_the_phase_and_exits(here, folder, tmp_path):
    done = here(command(tmp_path / "w", folder, *NOT_FINITE, "--config.checkpoint_every=1 steps"))
    one_line(done, "in phase 'ssl'")


@pytest.mark.full
def test_nan_loss_is_skipped_with_on_nonfinite_skip(here, folder, tmp_path):
    skipped = here(command(tmp_path / "s", folder, *NOT_FINITE, "--config.on_nonfinite=skip"))
    assert skipped.returncode == 0, skipped.stderr
    assert any(row.get("ssl/skipped") == 1 for row in lines(tmp_path / "s"))


@pytest.mark.full
@pytest.mark.skipif(os.geteuid() != 0, reason="a full disk is a tmpfs of 3 MB, and mounting needs root")
def test_full_disk_is_one_line_with_exit_code_74(folder, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    try:
        wide = ("--config.model.encoder.width=0.5", "--config.keep_checkpoints=9")
        done = run(command(disk / "w", folder, *wide))
        one_line(done, "no space left on the disk", code=74)
    finally:
        subprocess.run(["umount", str(disk)], check=True)

"""Faults of the machine and signals, through the command line: one line with exit code 74, and nothing is lost."""

import errno
import logging
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from disks import full_disk

from launch import main
from ssl_jax import interrupts
from ssl_jax.engine import loop
from ssl_jax.engine.checkpoint import Checkpoints
from ssl_jax.engine.metrics import MetricsWriter
from ssl_jax.engine.pictures import save_grid
from ssl_jax.errors import MachineFault, UserError, not_written
from ssl_jax.experiment import distributed, training
from ssl_jax.experiment.workdir import lock_workdir

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def signals_of_a_terminal():
    """The tests may run in the background, where SIGINT and SIGHUP are ignored, and programs that they start would inherit that."""
    wanted = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {signum: signal.signal(signum, handler) for signum, handler in wanted.items()}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.fixture
def here(monkeypatch):
    monkeypatch.chdir(ROOT)


def one_line(capsys, message):
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0], lines


# ---------------------------------------------------------------- the workdir while it is used


def test_deleted_lock_does_not_let_another_run_in(tmp_path, caplog):
    with lock_workdir(tmp_path) as lock:
        (tmp_path / ".lock").unlink()
        with pytest.raises(UserError, match="in use by another process"):
            lock_workdir(tmp_path)
        lock.check()
        assert "was deleted during this run; it is made again" in caplog.text
        lock._due = 0.0
        lock.check()
        assert caplog.text.count("made again") == 1


def test_run_ends_where_another_has_taken_its_workdir(tmp_path, monkeypatch):
    monkeypatch.setattr("ssl_jax.experiment.workdir._lock_folder", lambda _: None)  # as on NFS
    with lock_workdir(tmp_path) as lock:
        (tmp_path / ".lock").unlink()
        with lock_workdir(tmp_path), pytest.raises(MachineFault, match=r"\.lock was deleted, and another process now uses"):
            lock.check()


@pytest.mark.parametrize("how", ["moved", "deleted", "replaced"])
def test_run_ends_where_its_workdir_has_gone(tmp_path, how):
    workdir = tmp_path / "w"
    with lock_workdir(workdir) as lock:
        lock.check()
        lock._due = 0.0
        if how == "deleted":
            shutil.rmtree(workdir)
        else:
            workdir.rename(tmp_path / "elsewhere")
        if how == "replaced":
            workdir.mkdir()
        with pytest.raises(MachineFault, match="was moved or deleted during this run"):
            lock.check()


def test_log_on_a_full_disk_is_reported_once(tmp_path, capsys):
    with lock_workdir(tmp_path):
        logger = logging.getLogger("ssl_jax")
        (handler,) = (h for h in logger.handlers if getattr(h, "baseFilename", "") == str(tmp_path / "log.txt"))
        handler.stream.close()
        handler.stream = open("/dev/full", "w")  # noqa: SIM115  closed by the handler
        for _ in range(3):
            logger.warning("x")
        logger.removeHandler(handler)
    assert capsys.readouterr().err.count("log.txt cannot be written") == 1


# ---------------------------------------------------------------- full disks


def test_pictures_metrics_and_tensorboard_on_a_full_disk(tmp_path, caplog):
    with full_disk(tmp_path / "disk", "16k") as disk:
        writer = MetricsWriter(disk)
        (disk / "fill").write_bytes(bytes(4096))
        with pytest.raises(OSError, match="No space"):
            (disk / "more").write_bytes(bytes(65536))
        with pytest.raises(MachineFault, match=r"views.png cannot be written \(No space left on device\)"):
            save_grid(np.random.default_rng(0).random((4, 32, 32, 3)), disk / "pictures" / "views.png")
        with pytest.raises(MachineFault, match=r"metrics.jsonl cannot be written \(No space left on device\)"):
            writer.write(1, {f"loss{i}": 1.0 for i in range(9999)})
        worker = writer._board.file_writer.event_writer._worker
        writer.close()
        assert not worker.is_alive()
        assert "cannot be closed (No space left on device)" in caplog.text


def test_save_in_flight_on_a_full_disk_is_one_line(tmp_path, monkeypatch, caplog):
    from test_saves import toy

    monkeypatch.setattr(Checkpoints, "_check_space", lambda *_: None)  # something else fills the disk after it
    with full_disk(tmp_path / "disk", "400k") as disk:  # room for two, however many files Orbax writes
        saved = Checkpoints(disk / "c")
        saved.save(toy(1), {})
        saved.wait()
        (disk / "fill").write_bytes(bytes(shutil.disk_usage(disk).free - 8192))
        saved.save(toy(2), {})
        with pytest.raises(MachineFault, match=r"could not save a checkpoint .*it resumes from step 1"):
            saved.wait()
        (disk / "fill").unlink()
        assert sorted(path.name for path in (disk / "c").iterdir()) == ["1"]  # the half-written one does not fill the disk
        saved.save(toy(3), {})
        saved.wait()
        assert saved.steps() == [1, 3]
        saved.close()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device; free space or repair the disk"),
        (OSError(errno.EROFS, "Read-only file system", "/x/y"), "/x/y: Read-only file system"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
        (not_written(pathlib.Path("/x"), OSError(errno.ENOSPC, "full")), "/x cannot be written (full)"),
    ],
)
def test_faults_of_the_machine_end_a_verb_with_one_line(here, tmp_path, capsys, monkeypatch, error, message):
    monkeypatch.setattr(training, "run_training", lambda *_: (_ for _ in ()).throw(error))
    assert main(["train", "--config=configs/simclr.py:smoke", f"--workdir={tmp_path}"]) == 74
    one_line(capsys, message)


def test_bug_keeps_its_traceback(here, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "run_training", lambda *_: (_ for _ in ()).throw(FileNotFoundError(2, "No such file")))
    with pytest.raises(FileNotFoundError):
        main(["train", "--config=configs/simclr.py:smoke", f"--workdir={tmp_path}"])


def run(*arguments, **more):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.run([sys.executable, "launch.py", *arguments], cwd=ROOT, env=environment, text=True, timeout=120, **more)


def test_full_disk_behind_stdout_is_one_line():
    with open("/dev/full", "w") as full:
        done = run("configs", stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 74
    assert done.stderr == "error: No space left on device; free space or repair the disk, and run the same command again\n"


CLOSED = """
import os, sys
os.close(1), os.close(2)
sys.stdout = sys.stderr = None  # as Python starts with closed streams
sys.path.insert(0, {root!r})
from launch import main
code = main(["report", "--workdir={workdir}"])
assert [os.readlink(f"/proc/self/fd/{{n}}") for n in (1, 2)] == ["/dev/null"] * 2
os._exit(code)
"""


@pytest.mark.full
def test_closed_streams_are_not_the_files_of_a_run(tmp_path):
    script = CLOSED.format(root=str(ROOT), workdir=tmp_path)
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0
    assert (tmp_path / "report.html").stat().st_size > 1000


def test_no_device_is_one_line(monkeypatch):
    for error in (RuntimeError("Unable to initialize backend 'cuda': no GPU\nmore"), AssertionError()):

        def fails(error=error):
            raise error

        monkeypatch.setattr(jax, "devices", fails)
        with pytest.raises(MachineFault, match=r"JAX finds no device for JAX_PLATFORMS=cpu \("):
            distributed.start_jax()


@pytest.mark.parametrize("errors", [(errno.ENOSPC, 74), (errno.EROFS, 74), (errno.EACCES, 2), (errno.ENOTDIR, 2)])
@pytest.mark.parametrize("verb", ["train", "submit"])
def test_workdir_that_cannot_be_made(here, tmp_path, capsys, monkeypatch, verb, errors):
    number, code = errors
    mkdir = pathlib.Path.mkdir

    def fails(path, *args, **kwargs):
        if path == tmp_path / "w":
            raise OSError(number, os.strerror(number))
        mkdir(path, *args, **kwargs)

    monkeypatch.setattr(pathlib.Path, "mkdir", fails)
    flags = ["--to=local"] if verb == "submit" else []
    assert main([verb, *flags, "--config=configs/simclr.py:smoke", f"--workdir={tmp_path / 'w'}"]) == code
    one_line(capsys, f"cannot be written ({os.strerror(number)})")


# ---------------------------------------------------------------- signals


def test_hangup_ends_the_run_and_usr1_saves_once():
    with loop.Signals() as watch:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert watch.save(1) and not watch.save(2)
        assert watch.stop(2) is None
        os.kill(os.getpid(), signal.SIGHUP)
        assert watch.stop(3) == signal.SIGHUP
    assert str(loop.Interrupted(signal.SIGHUP, 3)) == "SIGHUP at step 3: saved"


def test_hangup_that_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with loop.Signals() as watch:
            os.kill(os.getpid(), signal.SIGHUP)
            assert watch.stop(1) is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_several_processes_agree_on_usr1_and_pass_hangup_on(monkeypatch):
    heard = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(loop, "gather", lambda value: [value, True])  # the other process was asked
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append("SIGTERM"))
    try:
        with loop.Signals(every=2) as watch:
            assert [watch.save(step) for step in (1, 2)] == [False, True]
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == ["SIGTERM"]


INTERRUPTED = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
from ssl_jax import interrupts

with interrupts.heard(0.2):
    class Callback:
        def __del__(self):  # Python prints and drops what is raised here
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)

    Callback()
    while True:
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            pass
"""


def test_interrupt_that_a_library_drops_ends_the_process():
    done = subprocess.run([sys.executable, "-c", INTERRUPTED.format(root=str(ROOT))], capture_output=True, text=True, timeout=60)
    assert done.returncode == 130
    assert done.stderr.strip().splitlines()[-1] == "interrupted"


def test_interrupt_during_imports_ends_launch_without_a_traceback(tmp_path):
    (tmp_path / "argparse.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "launch.py", "configs"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 130 and "Traceback" not in done.stderr


def test_interrupts_restore_what_they_change():
    threads = threading.active_count()
    with interrupts.heard():
        os.kill(os.getpid(), signal.SIGUSR1)  # by default it would end the process
        assert threading.active_count() == threads + 1
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT) or time.sleep(1)
    assert threading.active_count() == threads
    assert signal.set_wakeup_fd(-1) == -1
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL

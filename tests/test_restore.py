"""Which failures mean a corrupt checkpoint, and that all processes restore the same one."""

import re
import sys

import jax
import pytest
from process_runs import ROOT, Runs, start_pair
from test_engine import same, toy

from ssl_jax.engine.checkpoint import Checkpoints, Corrupt
from ssl_jax.errors import MachineFault


@pytest.mark.parametrize(
    "error", [jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED"), MemoryError(), PermissionError(13, "denied"), OSError(5, "I/O error")]
)
def test_device_or_disk_failure_does_not_mark_a_checkpoint_corrupt(tmp_path, monkeypatch, error):
    saved = Checkpoints(tmp_path / "c")
    saved.save(toy(1, 1), {})
    saved.wait()

    def fails(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(saved._handlers["state"], "restore", fails)
        with pytest.raises(MachineFault if isinstance(error, OSError) else type(error)):
            saved.restore_latest(toy())
    assert same(saved.restore_latest(toy()), toy(1, 1))
    saved.close()


def test_checkpoint_with_a_missing_file_is_corrupt(tmp_path):
    saved = Checkpoints(tmp_path / "c")
    saved.save(toy(1, 1), {})
    saved.wait()
    (tmp_path / "c" / "1" / "checksums" / "metadata").unlink()
    with pytest.raises(Corrupt, match=r"it cannot be read \(FileNotFoundError"):
        saved.restore(1, toy())
    saved.close()


def test_checkpoint_with_another_step_than_its_name_is_corrupt(tmp_path):
    saved = Checkpoints(tmp_path / "c")
    saved.save(toy(1, 1), {})
    saved.wait()
    (tmp_path / "c" / "1").rename(tmp_path / "c" / "2")
    with pytest.raises(Corrupt, match="it holds step 1"):
        saved.restore(2, toy())
    saved.close()


# Process 1 lists its own directory. The newest checkpoint appears there a second late; in the second directory it never appears.
LISTINGS = f"""
import logging, pathlib, sys, threading
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from ssl_jax.experiment import distributed
distributed.initialize()
import jax
from jax.experimental import multihost_utils
from test_engine import toy
from ssl_jax.engine import checkpoint
from ssl_jax.engine.sharding import make_mesh
from ssl_jax.errors import MachineFault

logging.basicConfig(format="%(message)s")
checkpoint.STALE = 3
folder, mesh = pathlib.Path(sys.argv[1]), make_mesh(dict(data=4))
saved = checkpoint.Checkpoints(folder / "all")
for step in (5, 10):
    saved.save(toy(step, step, mesh), {{}})
saved.wait()
for name, later in (("late", True), ("never", False)):
    seen = folder / "all"
    if not distributed.is_lead():
        seen = folder / name
        seen.mkdir()
        (seen / "5").symlink_to(folder / "all" / "5")
        if later:
            threading.Timer(1.0, (seen / "10").symlink_to, (folder / "all" / "10",)).start()
    try:
        state = checkpoint.Checkpoints(seen, read_only=True).restore_latest(toy(0, 0, mesh))
        print(f"process {{jax.process_index()}} continues at step {{int(state.step)}}", file=sys.stderr, flush=True)
    except MachineFault as error:
        print(f"fault: {{error}}", file=sys.stderr, flush=True)
"""


@pytest.mark.full
def test_processes_that_list_different_checkpoints_wait_then_fail(tmp_path):
    command = [sys.executable, "-c", LISTINGS, str(tmp_path)]
    for process, running in enumerate(start_pair(command, command)):
        output = running.finish(timeout=120)
        assert re.findall(r"continues at step \d+", output) == ["continues at step 10"], process
        assert "fault: process 1 sees checkpoints [5] in" in output and "process 0 [5, 10]; see that all hosts mount" in output


@pytest.mark.full
def test_checkpoint_that_one_process_cannot_read_is_corrupt_for_all(tmp_path):
    """The parameters are sharded over two processes; the files of process 1 are truncated."""
    runs, flags = Runs(tmp_path, "simclr", 6, 3), ("--config.mesh.data=1", "--config.mesh.fsdp=4")
    runs.start("cut", 2, *flags).finish()
    (own,) = (tmp_path / "cut" / "checkpoints" / "6" / "state").glob("ocdbt.process_1")
    for path in (path for path in own.rglob("d/*") if path.is_file()):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    output = runs.start("cut", 2, *flags).finish(timeout=400)
    assert "checkpoint 6 is corrupt: process 1 cannot read it" in output
    assert re.search("going on at step 3 of 6", output)
    assert (tmp_path / "cut" / "checkpoints" / "6").is_dir() and (tmp_path / "cut" / "checkpoints_corrupt" / "6-0").is_dir()

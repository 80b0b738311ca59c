"""What is called a corrupt checkpoint, and what is not; of several processes all decide alike."""

import re

import jax
import pytest
from process_runs import Runs
from test_engine import same, toy

from ssl_jax.engine.checkpoint import Checkpoints, Corrupt


@pytest.mark.parametrize(
    "error", [jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED"), MemoryError(), PermissionError(13, "denied"), OSError(5, "I/O error")]
)
def test_a_device_or_a_disk_that_fails_is_no_corrupt_checkpoint(tmp_path, monkeypatch, error):
    saved = Checkpoints(tmp_path / "c")
    saved.save(toy(1, 1), {})
    saved.wait()

    def fails(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(saved._handlers["state"], "restore", fails)
        with pytest.raises(type(error)):
            saved.restore_latest(toy())
    assert same(saved.restore_latest(toy()), toy(1, 1))
    saved.close()


def test_a_file_that_is_missing_is(tmp_path):
    saved = Checkpoints(tmp_path / "c")
    saved.save(toy(1, 1), {})
    saved.wait()
    (tmp_path / "c" / "1" / "checksums" / "metadata").unlink()
    with pytest.raises(Corrupt, match=r"it cannot be read \(FileNotFoundError"):
        saved.restore(1, toy())
    saved.close()


@pytest.mark.slow
def test_one_process_cannot_read_its_part(tmp_path):
    """The parameters are spread over both, and the files of the second one are cut off."""
    runs, flags = Runs(tmp_path, "simclr", 6, 3), ("--config.mesh.data=1", "--config.mesh.fsdp=4")
    runs.start("cut", 2, *flags).finish()
    (own,) = (tmp_path / "cut" / "checkpoints" / "6" / "state").glob("ocdbt.process_1")
    for path in (path for path in own.rglob("d/*") if path.is_file()):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    told = runs.start("cut", 2, *flags).finish(timeout=400)
    assert "checkpoint 6 is corrupt: process 1 cannot read it" in told
    assert re.search("going on at step 3 of 6", told)
    assert (tmp_path / "cut" / "checkpoints" / "6").is_dir() and (tmp_path / "cut" / "checkpoints_corrupt" / "6-0").is_dir()

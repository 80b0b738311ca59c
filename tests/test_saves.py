"""What a run has saved is not lost: odd paths, checkpoints that are gone, unreadable disks, damaged files, NaN."""

import builtins
import errno
import functools
import os
import shutil

import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest

from ssl_jax import files
from ssl_jax.engine import checkpoint, reading
from ssl_jax.engine.checkpoint import Checkpoints, Corrupt
from ssl_jax.engine.method import State
from ssl_jax.engine.metrics import MetricsWriter
from ssl_jax.engine.records import read_metrics
from ssl_jax.errors import MachineFault, UserError, machine_fault
from ssl_jax.experiment.workdir import begin_again, last_logged


def toy(step=0, scale=1.0) -> State:
    tree = {"w": jnp.arange(8.0) * scale, "h": jnp.ones(3, jnp.bfloat16)}
    return State(jnp.int32(step), {"net": tree}, {"net": optax.adam(1e-3).init(tree)}, {"flag": jnp.array([True, False])}, {})


def save(directory, *steps, keep=5):
    saved = Checkpoints(directory, keep)
    for step in steps:
        saved.save(toy(step, step), {"name": "x"})
    saved.wait()
    return saved


# ---------------------------------------------------------------- any path


@pytest.mark.parametrize("name", ["real[1]", "a\\b", "[!a]", "logs:", "a*", "ü ?", "plain"])
def test_checkpoints_below_any_path_are_read_again(tmp_path, name):
    directory = tmp_path / name / "w" / "checkpoints"
    save(directory, 1, 2).close()
    saved = Checkpoints(directory)
    assert saved.steps() == [1, 2]
    assert float(saved.restore_latest(toy()).params["net"]["w"][7]) == 14.0
    assert float(saved.read(1)["params"]["net"]["w"][7]) == 7.0
    assert not (tmp_path / "a").exists()  # TensorStore would write a\b there
    saved.close()


def test_path_that_is_no_text_is_refused(tmp_path):
    with pytest.raises(UserError, match="is no UTF-8"):
        Checkpoints(tmp_path / os.fsdecode(b"a\xff") / "checkpoints")


def test_first_save_is_read_back(tmp_path, monkeypatch):
    reads, restore = [], ocp.PyTreeCheckpointHandler.restore
    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "restore", lambda *a, **k: reads.append(1) or restore(*a, **k))
    monkeypatch.setattr(checkpoint, "read_back", functools.partial(reading.read_back, part=40))
    save(tmp_path / "c", 1, 2, 3).close()
    assert len(reads) > 1  # in parts, once
    monkeypatch.setattr(reading, "verify_named", lambda *_: (_ for _ in ()).throw(Corrupt("2 leaves differ")))
    with pytest.raises(MachineFault, match=r"checkpoint 1 was saved in .* and cannot be read back .*2 leaves differ"):
        save(tmp_path / "d", 1)


# ---------------------------------------------------------------- checkpoints that are gone


def test_checkpoints_that_are_gone_are_refused(tmp_path):
    save(tmp_path / "c", 1, 2, 3).close()
    shutil.rmtree(tmp_path / "c" / "3")
    saved = Checkpoints(tmp_path / "c")
    with pytest.raises(UserError, match=r"has saved step 3, and .* has only \[1, 2\]; mount or move back .*c.json to go on at step 2"):
        saved.check_present(logged=3, least=1)
    (tmp_path / "c.json").unlink()
    saved.check_present(logged=3, least=1)
    saved.close()
    shutil.rmtree(tmp_path / "c")
    saved = Checkpoints(tmp_path / "c")
    saved.check_present(logged=3, least=4)  # killed before its first save
    with pytest.raises(UserError, match=r"has logged step 4, and .* has no checkpoint; .*--start_over"):
        saved.check_present(logged=4, least=4)
    assert not (tmp_path / "c").exists()  # so that it can be moved back
    saved.close()


def test_after_all_were_corrupt_the_next_start_is_refused_too(tmp_path):
    save(tmp_path / "c", 1).close()
    (tmp_path / "c" / "1" / "state" / "_METADATA").write_text("{")
    saved = Checkpoints(tmp_path / "c")
    saved.check_present(1, 1)
    with pytest.raises(UserError, match="every checkpoint"):
        saved.restore_latest(toy())
    with pytest.raises(UserError, match=r"has saved step 1, and .* has no checkpoint"):
        saved.check_present(1, 1)
    saved.close()


def test_after_falling_back_the_next_start_goes_on(tmp_path):
    save(tmp_path / "c", 1, 2).close()
    (tmp_path / "c" / "2" / "state" / "_METADATA").write_text("{")
    saved = Checkpoints(tmp_path / "c")
    assert int(saved.restore_latest(toy()).step) == 1
    saved.check_present(logged=2, least=1)
    saved.close()


def test_begin_again_moves_the_files_of_the_run(tmp_path):
    for name in ("metrics.jsonl", "config.json", "job.json", "data.txt"):
        (tmp_path / name).write_text('{"step": 4}\n')
    (tmp_path / "checkpoints").symlink_to(tmp_path / "nowhere")
    assert last_logged(tmp_path) == 4
    begin_again(tmp_path)
    begin_again(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["before-1", "data.txt", "job.json"]
    assert (tmp_path / "before-1" / "metrics.jsonl").is_file() and (tmp_path / "before-1" / "checkpoints").is_symlink()
    assert last_logged(tmp_path) == 0


def test_link_to_nothing_and_file_in_place_of_directories_are_one_line(tmp_path):
    (tmp_path / "c").symlink_to(tmp_path / "unmounted")
    with pytest.raises(UserError, match="is a link to what is not there; mount its disk"):
        Checkpoints(tmp_path / "c")
    (tmp_path / "d").write_text("")
    with pytest.raises(UserError, match="is no directory"):
        Checkpoints(tmp_path / "d")
    save(tmp_path / "e", 1, 2).close()
    (tmp_path / "e_corrupt").write_text("")
    (tmp_path / "e" / "2" / "state" / "_METADATA").write_text("{")
    saved = Checkpoints(tmp_path / "e")
    with pytest.raises(UserError, match=r"cannot be moved to .*e_corrupt, which is no directory"):
        saved.restore_latest(toy())
    assert saved.steps() == [1, 2]
    saved.close()


# ---------------------------------------------------------------- unreadable, not damaged

TENSORSTORE = "UNKNOWN: Error opening \"zarr\" driver: Error reading local file [os_error_code='{}']"


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
@pytest.mark.parametrize("kind", ["OSError", "TensorStore", "read"])
def test_unreadable_checkpoint_is_a_fault_of_the_machine_and_stays(tmp_path, monkeypatch, number, kind):
    saved = save(tmp_path / "c", 1)
    error = OSError(number, os.strerror(number)) if kind == "OSError" else ValueError(TENSORSTORE.format(number))
    if kind == "read":  # an error without a number: the files tell
        real, error = builtins.open, ValueError("something")

        def broken(path, *args, **kwargs):
            if str(path).startswith(str(tmp_path / "c" / "1" / "state")):
                raise OSError(number, os.strerror(number))
            return real(path, *args, **kwargs)

        monkeypatch.setattr(builtins, "open", broken)
    monkeypatch.setattr(saved._handlers["state"], "restore", lambda *_, **__: (_ for _ in ()).throw(error))
    for read in (lambda: saved.restore_latest(toy()), lambda: saved.read(1)):
        with pytest.raises(MachineFault, match=r"cannot be read, and stays where it is: .*" + os.strerror(number)):
            read()
    assert (tmp_path / "c" / "1").is_dir() and not (tmp_path / "c_corrupt").exists()
    monkeypatch.undo()
    saved.close()


def test_tensorstore_names_the_number_of_an_error(tmp_path):
    """The text that `machine_fault` reads is that of the installed TensorStore: a link to itself gives ELOOP."""
    saved = save(tmp_path / "c", 1)
    for path in [path for path in (tmp_path / "c" / "1" / "state").rglob("*") if path.parent.name == "d"]:
        path.unlink()
        path.symlink_to(path)
    with pytest.raises(Corrupt) as caught:
        saved.restore(1, toy())
    text = str(caught.value.__cause__)
    assert f"os_error_code='{errno.ELOOP}'" in text
    assert "Input/output error" in str(machine_fault(ValueError(text.replace(f"='{errno.ELOOP}'", f"='{errno.EIO}'"))))
    saved.close()


# ---------------------------------------------------------------- content


def test_state_that_is_not_finite_is_not_saved(tmp_path):
    saved = save(tmp_path / "c", 1)
    for value in (jnp.nan, jnp.inf):
        bad = toy(2)
        bad.params["net"]["h"] = bad.params["net"]["h"].at[1].set(value)
        with pytest.raises(UserError, match=r"step 2: the state is not finite .*first params/net/h.*set config.on_nonfinite='skip'"):
            saved.save(bad, {})
    assert saved.steps() == [1]
    saved.close()


def test_state_that_is_not_finite_is_not_gone_on_from(tmp_path, monkeypatch):
    """An earlier version may have saved one."""
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "nonfinite", lambda tree: [])
        saved = save(tmp_path / "checkpoints", 1)
        saved.save(toy(2, jnp.nan), {"name": "x"})
        saved.close()
    again = Checkpoints(tmp_path / "checkpoints")
    assert int(again.restore_latest(toy()).step) == 1
    assert (tmp_path / "checkpoints_corrupt" / "2-0").is_dir()
    again.close()


def test_read_checks_that_a_checkpoint_is_of_the_step_of_its_name(tmp_path):
    save(tmp_path / "c", 1).close()
    (tmp_path / "c" / "1").rename(tmp_path / "c" / "2")
    saved = Checkpoints(tmp_path / "c", read_only=True)
    with pytest.raises(UserError, match=r"checkpoint 2 .* cannot be read .*it holds step 1"):
        saved.read(2)
    saved.close()


# ---------------------------------------------------------------- metrics


def test_metrics_damaged_in_the_middle_keep_the_other_lines(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    odd = [b'{"step": 2, "lo', b"\xff\xfe", b"[1]", b'{"loss": 1}', b'{"step": "3"}', b"null"]
    damaged = b"\n".join([b'{"step": 1}', *odd, b'{"step": 4}', b'{"step": 5, "x": 1}', b'{"step": 6, "x'])
    path.write_bytes(damaged)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 4, 5]
    for _ in range(2):
        MetricsWriter(tmp_path, 5, tensorboard=False).close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 4, 5]
    assert path.with_name("metrics.jsonl.damaged-1").read_bytes() == damaged
    assert not path.with_name("metrics.jsonl.damaged-2").exists()
    assert caplog.text.count("6 lines cannot be read (2, 3, 4, 5, 6, ...)") == 1


# ---------------------------------------------------------------- files


def test_files_are_flushed_before_and_after_they_are_renamed(tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: order.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: order.append("rename") or replace(a, b))
    files.write(tmp_path / "a.json", "{}")
    assert len(order) == 3 and ".a.json." in order[0] and order[1:] == ["rename", str(tmp_path)]
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_checkpoint_is_flushed_before_it_is_recorded(tmp_path, monkeypatch):
    flushed, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: flushed.append(os.readlink(f"/proc/self/fd/{fd}")) or fsync(fd))
    save(tmp_path / "c", 1).close()
    recorded = next(i for i, path in enumerate(flushed) if ".c.json." in path)
    below = {str(path) for path in (tmp_path / "c").rglob("*")}
    assert below <= set(flushed[:recorded])


def test_file_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    files.write(tmp_path / "a.json", "old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(MachineFault, match=r"a.json cannot be written"):
        files.write(tmp_path / "a.json", "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.json", "old")]


def test_lock_is_on_the_file_at_the_path(tmp_path, monkeypatch):
    first = files.lock(tmp_path / "x")
    with pytest.raises(BlockingIOError):
        files.lock(tmp_path / "x")
    (tmp_path / "x").unlink()
    second = files.lock(tmp_path / "x")  # another file
    assert files.at(tmp_path / "x", second.fileno()) and not files.at(tmp_path / "x", first.fileno())


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "full"),
        ValueError("RESOURCE_EXHAUSTED: quota"),
        Exception('I/O error: Os { code: 28, kind: StorageFull, message: "No space left on device" }'),
    ],
)
def test_faults_of_the_machine_are_known_by_their_numbers(error):
    wrapped = KeyError("x")
    wrapped.__cause__ = error
    assert machine_fault(error) and machine_fault(wrapped)
    assert machine_fault(ValueError("code")) is machine_fault(FileNotFoundError(2, "no")) is None

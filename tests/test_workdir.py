"""Who may train in a workdir, and what a lock that fails is taken for."""

import errno
import fcntl
import os
import re
import threading
import time

import pytest

from ssl_jax.errors import MachineFault, UserError
from ssl_jax.experiment.workdir import lock_workdir


def test_an_engine_waits_for_the_end_of_the_start_before(tmp_path, caplog):
    with lock_workdir(tmp_path):
        began = time.monotonic()
        with pytest.raises(UserError, match="in use by another process"):
            lock_workdir(tmp_path)
        assert time.monotonic() - began < 1
        with pytest.raises(UserError, match="in use by another process"):
            lock_workdir(tmp_path, patience=1.0)
        assert "waiting up to 1 s" in caplog.text
    lock = lock_workdir(tmp_path)
    caplog.clear()
    threading.Timer(0.5, lock.close).start()
    lock_workdir(tmp_path, patience=60.0).close()
    assert caplog.text.count("waiting up to 60 s for its end") == 1


@pytest.mark.parametrize(
    ("error", "raised", "told"),
    [
        (errno.ENOSYS, UserError, "its file system has no locks"),
        (errno.ENOLCK, MachineFault, "see that its file system's locks work"),
        (errno.ESTALE, MachineFault, "see that its file system's locks work"),
    ],
)
def test_a_lock_that_cannot_be_had_is_not_one_that_another_has(tmp_path, monkeypatch, error, raised, told):
    def flock(*_):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(raised, match=re.escape(f"cannot be locked ({os.strerror(error)})") + ".*" + told):
        lock_workdir(tmp_path, patience=60.0)

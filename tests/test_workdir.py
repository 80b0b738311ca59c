"""The lock of a workdir, and the errors of file systems without locks."""

import errno
import fcntl
import os
import re
import threading
import time

import pytest

from ssl_jax.errors import MachineFault, UserError
from ssl_jax.experiment.workdir import lock_workdir


def test_lock_waits_up_to_its_patience(tmp_path, caplog):
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
    ("error", "raised", "message"),
    [
        (errno.ENOSYS, UserError, "its file system has no locks"),
        (errno.ENOLCK, MachineFault, "see that its file system's locks work"),
        (errno.ESTALE, MachineFault, "see that its file system's locks work"),
    ],
)
def test_lock_that_fails_is_no_lock_in_use(tmp_path, monkeypatch, error, raised, message):
    def flock(*_):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(raised, match=re.escape(f"cannot be locked ({os.strerror(error)})") + ".*" + message):
        lock_workdir(tmp_path, patience=60.0)

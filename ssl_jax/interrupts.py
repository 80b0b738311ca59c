"""Ctrl-C while nothing listens for it: imports, opening data, compiling.

Python hears it between two of its own instructions only, and drops the KeyboardInterrupt where it is raised in a callback of a
library. So a thread reads the signals, too, and ends the process where the exception has not done so.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator

PATIENCE = 3.0  # seconds for KeyboardInterrupt to end the verb, as it does nearly always


@contextlib.contextmanager
def heard(patience: float = PATIENCE) -> Iterator[None]:
    """Context in which SIGINT ends the process within `patience` seconds, with exit code 130, unless another handler is set.

    SIGUSR1 asks a training for a checkpoint, so it does not end a process that has none to write yet. Nothing changes outside of the
    main thread, or for SIGINT where it is ignored, as in the background of a shell script.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    usr1 = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        with _listening(patience) if signal.getsignal(signal.SIGINT) is signal.default_int_handler else contextlib.nullcontext():
            yield
    finally:
        signal.signal(signal.SIGUSR1, usr1)


@contextlib.contextmanager
def _listening(patience: float) -> Iterator[None]:
    plain = signal.default_int_handler
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    over = threading.Event()

    def listen() -> None:
        while received := os.read(reader, 1):
            if received[0] == signal.SIGINT and signal.getsignal(signal.SIGINT) is plain and not over.wait(patience):
                sys.stderr.write("interrupted\n")
                sys.stderr.flush()
                os._exit(128 + signal.SIGINT)

    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    thread = threading.Thread(target=listen, name="interrupts", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        signal.set_wakeup_fd(before)
        os.close(writer)
        thread.join()
        os.close(reader)

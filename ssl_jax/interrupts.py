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

    It does nothing outside of the main thread, or where SIGINT is ignored, as in the background of a shell script.
    """
    plain = signal.default_int_handler
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is not plain:
        yield
        return
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

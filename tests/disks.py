"""A full disk for tests."""

import contextlib
import subprocess

import pytest


@contextlib.contextmanager
def full_disk(folder, size):
    """Context of `folder` as a file system of `size`, such as '64k'. Skips the test where mounting is not allowed."""
    folder.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("a full disk is a small tmpfs, and mounting is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)

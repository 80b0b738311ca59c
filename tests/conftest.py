"""Eight fake devices for every test, set before jax is imported anywhere; what may run at the same time; and the tiers of the tests.

  make test       the quick tests, unmarked: every method is built, and its step, its phases and its encoder are traced; objectives,
                  operations and evaluations are compared with their oracles; the command line trains a run from end to end.
  make test-all   also `full`: tests that compile or train for tens of seconds, or start many processes. What every method promises
                  when it runs (test_conformance), kill -9 and faults of disks and hosts, several processes, sampling and evaluating
                  whole runs, parity with PyTorch on whole networks, programs compiled for meshes. This is what CI runs.
  by hand         python -m pytest -m slow: `slow` takes hours.

A test marked `full` that has a config as its parameter `name` is also run by `make test` where the method's file or config differs from
the branch `main`: a new method is tested completely before it is merged. `python -m pytest tests/test_x.py` runs all of a file but
`slow`.
"""

import functools
import gc
import os
import pathlib
import subprocess

import pytest
from xla_flags import flags

ROOT = pathlib.Path(__file__).parent.parent
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["NPROC"] = "16"  # the CPU client deadlocks with more devices than threads
os.environ["XLA_FLAGS"] = f"{flags(8)} {os.environ.get('XLA_FLAGS', '')}".strip()
# Begun first, so that no worker is left alone with one of them.
LONG = ("test_two_stages", "test_faults", "test_processes", "test_sample", "test_conformance")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
gc.set_threshold(100_000, 50, 100)  # tracing makes millions of objects, few of which are garbage; modules end with a collection


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items):
    """With several workers a file stays together, and so does a config of the conformance tests: they share what they compile."""
    items.sort(key=lambda item: item.path.stem not in LONG)
    for item in items:
        if hasattr(item, "callspec") and item.callspec.params.get("name") in changed_methods():
            item.own_markers = [mark for mark in item.own_markers if mark.name != "full"]
        name = item.path.stem
        if name == "test_conformance":
            name += f":{item.callspec.params.get('name', '')}" if hasattr(item, "callspec") else ""
        item.add_marker(pytest.mark.xdist_group(name))


@functools.cache
def changed_methods():
    """Methods whose file or config was changed since the branch left `main`, committed or not; none where git does not tell."""
    folders, changed = ("configs", "ssl_jax/methods"), set()
    for command in (("diff", "--name-only", "--merge-base", "main"), ("ls-files", "--others", "--exclude-standard")):
        try:
            done = subprocess.run(["git", *command, "--", *folders], cwd=ROOT, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return set()
        changed |= {pathlib.Path(line).stem for line in done.stdout.splitlines()}
    return changed


def pytest_configure(config):
    """Workers that share out a file between them compile everything twice, and say nothing (pytest-xdist#1386)."""
    if config.getoption("dist", "no") == "loadgroup" and not hasattr(pytest.Item, "_nodeid"):
        raise pytest.UsageError(
            f"pytest-xdist cannot keep groups together under pytest {pytest.__version__}; pip install -r requirements-test.txt"
        )


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """A compiled program holds memory maps until it is dropped, and a process may have 65,530: one that kept the programs of all
    its files would abort within LLVM.
    """
    import jax  # which reads the environment above

    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Puts shell scripts before everything else in PATH; each call appends its arguments to <folder>/NAME.calls."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def put(name, text="true"):
        path = folder / name
        path.write_text(f'#!/bin/bash\nprintf "%s\\n" "$*" >> {folder}/{name}.calls\n{text}\n')
        path.chmod(0o755)
        return folder

    return put


@pytest.fixture
def no_programs(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))

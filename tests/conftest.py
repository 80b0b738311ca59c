"""Eight CPU devices for every test, set before jax is imported; scheduling of parallel workers; and the tiers of tests.

  make test       the quick, unmarked tests: build every method and trace its step, phases and encoder; compare objectives,
                  operations and evaluations with oracles; train one run from end to end by the command line.
  make test-all   also `full`: tests that compile or train for tens of seconds, or start many processes. They check the
                  conformance of every running method, damaged files of a run, the facts of published recipes, kill -9 and
                  faults of disks and hosts, several processes, sampling and evaluation of whole runs, parity with PyTorch on
                  whole networks, and programs compiled for meshes. CI runs them.
  by hand         python -m pytest -m slow: `slow` takes hours.

The facts of single methods that need their networks (leaks, float64 loops) are `full`, too.

`make test` also runs the `full` tests of changed methods: those with a config as parameter `name` whose method file or config
differs from the branch `main`. So a new method is tested completely before a merge. `python -m pytest tests/test_x.py` runs all
of a file except `slow`.
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
# Started first, in this order, so that none of them runs alone at the end. The first renders the embedded dataset where there is none,
# and the second does not need it.
LONG = ("test_faults", "test_processes", "test_two_stages", "test_sample", "test_conformance")
BESIDE = {"vq_prior": "maskgit", "segmentation": "detection", "vqa": "detection"}  # these stand on one tokenizer, or one encoder
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
gc.set_threshold(100_000, 50, 100)  # tracing creates millions of live objects; each module ends with a collection


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items):
    """Keep a file, or a config of test_conformance, on one worker, because its tests share compiled programs."""
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))
    for item in items:
        if hasattr(item, "callspec") and item.callspec.params.get("name") in changed_methods():
            item.own_markers = [mark for mark in item.own_markers if mark.name != "full"]
        name = item.path.stem
        if name == "test_conformance":
            method = item.callspec.params.get("name", "") if hasattr(item, "callspec") else ""
            name += f":{BESIDE.get(method, method)}"
        item.add_marker(pytest.mark.xdist_group(name))


@functools.cache
def changed_methods():
    """Methods whose file or config differs from the merge base with `main`, committed or not; none without git."""
    folders, changed = ("configs", "ssl_jax/methods"), set()
    for command in (("diff", "--name-only", "--merge-base", "main"), ("ls-files", "--others", "--exclude-standard")):
        try:
            done = subprocess.run(["git", *command, "--", *folders], cwd=ROOT, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return set()
        changed |= {pathlib.Path(line).stem for line in done.stdout.splitlines()}
    return changed


def pytest_configure(config):
    """Refuse versions in which pytest-xdist silently splits groups, so that workers compile twice (pytest-xdist#1386)."""
    if config.getoption("dist", "no") == "loadgroup" and not hasattr(pytest.Item, "_nodeid"):
        raise pytest.UsageError(
            f"pytest-xdist cannot keep groups together under pytest {pytest.__version__}; pip install -r requirements-test.txt"
        )


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Drop compiled programs after each file. They hold memory maps, of which a process may have 65,530 before LLVM aborts."""
    import jax  # reads the environment set above

    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """put(name, text): adds a shell script first in PATH. Each call of it appends its arguments to <folder>/NAME.calls."""
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

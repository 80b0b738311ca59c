"""Eight fake devices for every test, set before jax is imported anywhere; and what may run at the same time."""

import gc
import os

import pytest
from xla_flags import flags

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["NPROC"] = "16"  # the CPU client deadlocks with more devices than threads
os.environ["XLA_FLAGS"] = f"{flags(8)} {os.environ.get('XLA_FLAGS', '')}".strip()
LONG = ("test_two_stages", "test_faults")  # begun first, so that no worker is left alone with one of them
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
gc.set_threshold(100_000, 50, 100)  # tracing makes millions of objects, few of which are garbage; modules end with a collection


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items):
    """With several workers a file stays together, and so does a config of the conformance tests: they share what they compile."""
    items.sort(key=lambda item: item.path.stem not in LONG)
    for item in items:
        name = item.path.stem
        if name == "test_conformance":
            name += f":{item.callspec.params.get('name', '')}" if hasattr(item, "callspec") else ""
        item.add_marker(pytest.mark.xdist_group(name))


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

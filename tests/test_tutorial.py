"""docs/tutorials/add_a_method.md, followed word by word in a copy of the repository: its methods pass all conformance tests."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "tutorials" / "add_a_method.md"
FILE = re.compile(r"<!-- file: (\S+) -->\n```python\n(.*?)```\n", re.S)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The package, its configs and tests, and nothing but the files that the page names added."""
    folder = tmp_path_factory.mktemp("tutorial")
    for name in ("ssl_jax", "configs", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.tar.gz"))
    for name in ("launch.py", "pyproject.toml"):
        shutil.copy(ROOT / name, folder / name)
    for path, text in FILE.findall(PAGE.read_text()):
        assert not (folder / path).exists(), f"{path} is there already"
        (folder / path).write_text(text)
    return folder


def pytest_in(folder, *arguments):
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider", *arguments]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


def test_page_adds_two_files_for_a_method_and_an_objective_with_its_test():
    paths = [path for path, _ in FILE.findall(PAGE.read_text())]
    assert paths == [
        "ssl_jax/objectives/hypersphere.py", "tests/test_hypersphere.py", "ssl_jax/methods/hypersphere.py", "configs/hypersphere.py",
        "ssl_jax/methods/motion_regression.py", "configs/motion_regression.py",
    ]  # fmt: skip


@pytest.mark.full
def test_objective_of_the_tutorial_passes_its_oracle_test(copy):
    assert "2 passed" in pytest_in(copy, "tests/test_hypersphere.py")


@pytest.mark.full
@pytest.mark.parametrize("method", ["hypersphere", "motion_regression"])
def test_method_of_the_tutorial_passes_all_conformance_tests(copy, method):
    output = pytest_in(copy, "tests/test_conformance.py", "-m", "not slow", "-k", method)
    assert int(re.search(r"(\d+) passed", output)[1]) >= 13

"""`launch.py --help` is fast: the command line and the launchers import neither JAX nor the data libraries."""

import json
import pathlib
import subprocess
import sys

import pytest

from ssl_jax.export import FORMATS, TOLERANCES

ROOT = pathlib.Path(__file__).parent.parent
HEAVY = {"jax", "flax", "orbax", "tensorflow_datasets", "grain", "numpy", "scipy", "cv2", "PIL", "matplotlib", "ml_collections"}
VERBS = ("train", "evaluate", "sample", "export", "rehearse", "report", "submit", "status", "logs", "cancel")
HELP = """
import contextlib, io, json, re, sys
import launch
def page(*arguments):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        launch.main([*arguments, "--help"])
    return out.getvalue()
first = page()
pages = {verb: page(verb) for verb in re.findall(r"^    (\\w+) ", first, re.M)}
print(json.dumps([pages, [name.partition(".")[0] for name in sys.modules]]))
"""


def run_python(code):
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def pages():
    """({verb that `launch.py --help` lists: its own --help}, the packages that a process has imported to print them all)."""
    found, modules = run_python(HELP)
    return found, set(modules)


def test_help_imports_no_jax_and_no_data_library(pages):
    assert not pages[1] & HEAVY


def test_help_of_every_verb(pages):
    assert set(VERBS) <= set(pages[0])
    for verb in VERBS:
        assert pages[0][verb].startswith(f"usage: python launch.py {verb} [-h]")
        assert ("--topology" if verb == "rehearse" else "--workdir") in pages[0][verb]


def test_help_of_export_names_every_format_and_type(pages):
    assert {*FORMATS, *TOLERANCES} <= set(pages[0]["export"].replace(",", " ").split())


def test_help_of_submit_has_the_flags_of_every_engine(pages):
    for flags in ("--to=slurm", "--to=gke", "--to=tpu-vm", "--to=local", "--processes_per_node", "--image", "--zone"):
        assert flags in pages[0]["submit"]


def test_launchers_import_no_jax():
    code = """
import json, sys
from ssl_jax.experiment import launch_environment
from ssl_jax.launchers import jobs, supervise
for name in jobs.ENGINES:
    jobs.engine(name)
print(json.dumps("jax" in sys.modules))
"""
    assert run_python(code) is False

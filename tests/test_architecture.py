"""The structure of the code: stack depth from the command line to a loss, and imports of the command line."""

import graphlib
import subprocess
import sys
import traceback
from pathlib import Path

import grimp
import pytest

import launch
from ssl_jax.methods import simclr

ROOT = Path(__file__).resolve().parents[1]
MOST_FRAMES = 12  # of this project, from launch.py to the loss of a method; frames of libraries are not counted


class FoundLossError(Exception):
    """Raised by the stand-in for the loss, so that nothing is compiled."""


@pytest.mark.full
def test_at_most_12_project_frames_from_launch_to_the_loss(tmp_path, monkeypatch):
    frames = []

    def loss_of_views(*_):
        def loss(z):
            frames.extend(frame for frame in traceback.extract_stack() if Path(frame.filename).is_relative_to(ROOT / "ssl_jax"))
            raise FoundLossError

        return loss

    monkeypatch.setattr(simclr, "loss_of_views", loss_of_views)
    flags = ["--config=configs/simclr.py:smoke", f"--workdir={tmp_path}"]
    overrides = ["--config.baselines=()", "--config.evals={}", "--config.best_metric="]
    monkeypatch.chdir(ROOT)
    with pytest.raises(FoundLossError):
        launch.main(["train", *flags, *overrides])
    walk = [f"{Path(frame.filename).relative_to(ROOT)}:{frame.name}" for frame in frames]
    assert walk[0].endswith("main.py:main")
    assert walk[-1].endswith("simclr.py:loss"), "the loss of the method is the last frame but the stand-in"
    assert 1 + len(walk) <= MOST_FRAMES, "\n".join(["launch.py", *walk])


@pytest.mark.parametrize("folder", ["tests", "benchmarks"])
def test_tests_and_benchmarks_run_verbs_by_launch_main(folder):
    """They run verbs as a user does, and import other layers directly."""
    others = [path for path in (ROOT / folder).glob("*.py") if path.name != Path(__file__).name]
    assert [path.name for path in others if "ssl_jax.cli" in path.read_text()] == []


def test_no_module_imports_itself_through_others():
    graph = grimp.build_graph("ssl_jax")
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    order = graphlib.TopologicalSorter(imports)
    order.prepare()  # raises CycleError with the circle


def test_closed_output_ends_a_verb_without_a_traceback():
    command = f"{sys.executable} launch.py configs | head -1"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""

"""Shardings and collectives of recipes equal the golden files, which `golden_programs` writes."""

import importlib.util
import os
import subprocess
import sys

import golden_programs as golden
import pytest

from ssl_jax.models.backbones import vit
from ssl_jax.rehearsal.topology import open_topology

LONG = ("biggan_fsdp", "biggan_deep_tensor", "stylegan_fsdp")  # compile for a minute
UPDATE = "if the change is intended, run: python tests/golden_programs.py"


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch):
    monkeypatch.chdir(golden.ROOT)  # recipes of stages are relative paths


def found(name, topology):
    return golden.describe(golden.CASES[name], open_topology(topology))


@pytest.mark.full
@pytest.mark.parametrize("name", LONG)
def test_shardings_equal_the_golden_file(name):
    differences = golden.differences({**golden.read(name, ""), "collectives": {}}, golden.describe(golden.CASES[name], None))
    assert not differences, UPDATE


@pytest.mark.full
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in LONG else ()) for name in golden.CASES])
def test_collectives_on_eight_devices_equal_the_golden_file(name):
    assert not golden.differences(golden.read(name, "cpu:8"), found(name, "cpu:8")), UPDATE


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu: pip install -r requirements-rehearse.txt")
@pytest.mark.parametrize("name", golden.CASES)
def test_collectives_on_a_tpu_slice_equal_the_golden_file(name):
    assert not golden.differences(golden.read(name, golden.SLICE), found(name, golden.SLICE)), UPDATE


@pytest.mark.slow
def test_stylegan_step_has_no_involuntary_rematerialization():
    """XLA warns if it replicates an array in order to reshard it.

    The tests' environment hides its warnings, so a subprocess runs it.
    """
    command = [sys.executable, "launch.py", "rehearse", "--config=configs/stylegan.py:smoke", "--topology=cpu:8"]
    done = subprocess.run(
        [*command, "--config.mesh.data=1", "--config.mesh.fsdp=8"],
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "0"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "Involuntary full rematerialization" not in done.stderr


@pytest.mark.full
def test_golden_file_detects_unconstrained_activations(monkeypatch):
    """Without `shard_batch` XLA shards features instead of the batch, and all-reduces activations."""
    monkeypatch.setattr(vit, "shard_batch", lambda x: x)
    expected, loose = golden.read("vit_g14_fsdp", "cpu:8"), found("vit_g14_fsdp", "cpu:8")
    assert any("bytes per step" in line for line in golden.differences(expected, loose))
    assert sum(loose["collectives"].values()) > 3 * sum(expected["collectives"].values())


def test_differences_lists_shardings_and_bytes():
    collectives = {"all-reduce data": 1000, "all-gather fsdp": 1}
    program = {"shardings": {"a": "fsdp", "b": "- fsdp"}, "state_bytes": 8, "collectives": collectives}
    assert golden.differences(program, program) == []
    near = {**program, "collectives": {"all-reduce data": 1049, "all-gather fsdp": 2}}
    assert golden.differences(program, near) == []
    other = {"shardings": {"a": "fsdp"}, "state_bytes": 9, "collectives": {"all-reduce data": 1051, "all-to-all data": 5}}
    assert golden.differences(program, other) == [
        "b: - fsdp -> replicated",
        "state: 8 -> 9 bytes per device",
        "all-reduce data: 1,000 -> 1,051 bytes per step",
        "all-to-all data: 0 -> 5 bytes per step",
    ]

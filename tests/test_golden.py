"""How recipes lie on meshes and what their steps send is what it was; `golden_programs` says how to write it anew."""

import importlib.util
import os
import subprocess
import sys

import golden_programs as golden
import pytest

from ssl_jax.models.backbones import vit
from ssl_jax.rehearsal.topology import open_topology

LONG = ("biggan_fsdp", "biggan_deep_tensor", "stylegan_fsdp")  # a minute of compiling
ANEW = "if this is meant: python tests/golden_programs.py"


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch):
    monkeypatch.chdir(golden.ROOT)  # recipes of stages are relative paths


def found(name, topology):
    return golden.describe(golden.CASES[name], open_topology(topology))


@pytest.mark.full
@pytest.mark.parametrize("name", LONG)
def test_parameters_lie_where_they_lay(name):
    told = golden.differences({**golden.read(name, ""), "collectives": {}}, golden.describe(golden.CASES[name], None))
    assert not told, ANEW


@pytest.mark.full
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in LONG else ()) for name in golden.CASES])
def test_steps_send_what_they_sent(name):
    assert not golden.differences(golden.read(name, "cpu:8"), found(name, "cpu:8")), ANEW


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu: pip install -r requirements-rehearse.txt")
@pytest.mark.parametrize("name", golden.CASES)
def test_steps_of_a_slice_send_what_they_sent(name):
    assert not golden.differences(golden.read(name, golden.SLICE), found(name, golden.SLICE)), ANEW


@pytest.mark.slow
def test_no_activation_is_gathered_whole_on_the_way_through_a_discriminator():
    """XLA warns where it can only replicate what it has to split in another way; tests hide warnings, so another process listens."""
    command = [sys.executable, "launch.py", "rehearse", "--config=configs/stylegan.py:smoke", "--topology=cpu:8"]
    told = subprocess.run(
        [*command, "--config.mesh.data=1", "--config.mesh.fsdp=8"],
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "0"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "Involuntary full rematerialization" not in told.stderr


def test_activations_that_are_not_pinned_are_seen(monkeypatch):
    """Without `shard_batch` the partitioner splits features instead of the batch, and sums up activations."""
    monkeypatch.setattr(vit, "shard_batch", lambda x: x)
    expected, loose = golden.read("vit_g14_fsdp", "cpu:8"), found("vit_g14_fsdp", "cpu:8")
    assert any("bytes of a step" in line for line in golden.differences(expected, loose))
    assert sum(loose["collectives"].values()) > 3 * sum(expected["collectives"].values())


def test_what_differs_is_told():
    told = {"shardings": {"a": "fsdp", "b": "- fsdp"}, "state_bytes": 8, "collectives": {"all-reduce data": 1000, "all-gather fsdp": 1}}
    assert golden.differences(told, told) == []
    near = {**told, "collectives": {"all-reduce data": 1049, "all-gather fsdp": 2}}
    assert golden.differences(told, near) == []
    other = {"shardings": {"a": "fsdp"}, "state_bytes": 9, "collectives": {"all-reduce data": 1051, "all-to-all data": 5}}
    assert golden.differences(told, other) == [
        "b: - fsdp -> replicated",
        "state: 8 -> 9 bytes of a device",
        "all-reduce data: 1,000 -> 1,051 bytes of a step",
        "all-to-all data: 0 -> 5 bytes of a step",
    ]

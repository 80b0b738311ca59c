"""`rehearse --fit`: which candidates are tried, how they are ranked, and what is reported of those that do not fit."""

import json
import pathlib
import sys
import types

import jax
import pytest

from launch import main
from ssl_jax.engine.sharding import make_mesh
from ssl_jax.errors import UserError
from ssl_jax.experiment import config as configs
from ssl_jax.experiment import fit as search
from ssl_jax.experiment import rehearse as rehearsing
from ssl_jax.rehearsal import roofline
from ssl_jax.rehearsal.chips import CHIPS
from ssl_jax.rehearsal.topology import Slice
from ssl_jax.report.rehearsal_tables import show_fit

ROOT = pathlib.Path(__file__).parent.parent
PRIOR = f"{ROOT}/configs/vq_prior.py:smoke"
SUPERVISED = f"{ROOT}/configs/supervised.py:smoke"
VIT = dict(name="vit", variant="mu/8", remat="none", scan=True)
MLP = dict(name="mlp", widths=(256, 256))
LITTLE_MEMORY = 21_000_000  # bytes: slightly less than the state of that MLP with two moments


def chips(memory=2**30, devices=8):
    """Fake devices described as chips with this memory."""
    return Slice(jax.devices()[:devices], "cpu", CHIPS["v5e"]._replace(memory=memory), devices, 1)


def supervised(*overrides, **encoder):
    config = configs.load(SUPERVISED, overrides)
    with config.unlocked():
        config.model.encoder = encoder or VIT
        config.batch_size = 64
    return config


def bound(images_per_second):
    at = {"images_per_second": images_per_second, "step_seconds": 1.0}
    return {"bound": at, "expected": [at, at], "reached": [0.3, 0.7], "binding": "compute"}


def fake_rehearsal(most):
    """(fake rehearsal, its calls): memory is (batch per device) x 4, x 2 with remat 'dots', x 1 with 'full', and `most` fits."""
    seen = []

    def rehearse(exp):
        mesh, remat = exp.run.mesh.shape, exp.config.model.encoder.get("remat", "none")
        used = exp.config.batch_size // mesh["data"] // mesh["fsdp"] * {"none": 4, "dots": 2, "full": 1}[remat]
        seen.append((tuple(mesh.values()), exp.config.batch_size, remat))
        if used > most:
            return {"fits": False, "exhausted": {"used": used, "limit": most, "largest": []}}
        return {"fits": True, "needed_bytes": used, "prediction": bound(exp.config.batch_size + mesh["fsdp"])}

    return rehearse, seen


@pytest.fixture
def without_tracing(monkeypatch):
    """Replace experiments by records of a config and a mesh."""

    def build(config, devices, platform):
        run = types.SimpleNamespace(mesh=make_mesh(config.mesh, devices), abstract=())
        return types.SimpleNamespace(config=config, run=run)

    monkeypatch.setattr(search, "build_abstract", build)


def tried(most, **encoder):
    rehearse, seen = fake_rehearsal(most)
    return search.fit(supervised(**encoder), chips(), rehearse), seen


def test_rematerialization_is_tried_only_where_less_does_not_fit(without_tracing):
    report, seen = tried(most=32)  # 8 examples per device need 32
    assert {mesh for mesh, _, _ in seen} == {(8, 1, 1), (4, 2, 1), (1, 8, 1)}
    of_data = [(batch, remat) for mesh, batch, remat in seen if mesh == (8, 1, 1)]
    assert of_data == [(64, "none"), (128, "none"), (128, "dots")]
    assert [row["fits"] for row in report["candidates"]] == [True] * 6 + [False] * 3
    speeds = [row["prediction"]["bound"]["images_per_second"] for row in report["candidates"] if row["fits"]]
    assert speeds == sorted(speeds, reverse=True)
    assert report["flags"] == [
        "--config.mesh.data=1",
        "--config.mesh.fsdp=8",
        "--config.mesh.tensor=1",
        "--config.batch_size=128",
        "--config.model.encoder.remat=dots",
    ]
    assert report["own"]["fits"]


def test_batch_is_halved_where_rematerialization_does_not_suffice(without_tracing):
    report, seen = tried(most=4)
    of_data, of_fsdp = ([(batch, remat) for mesh, batch, remat in seen if mesh == wanted] for wanted in ((8, 1, 1), (1, 8, 1)))
    assert of_fsdp == [(64, "none"), (64, "dots"), (64, "full"), (32, "full")]
    # The config's own mesh. What did not fit with a smaller state is skipped.
    assert of_data == [(64, "none"), (64, "full"), (32, "full")]
    assert not report["own"]["fits"]
    assert report["candidates"][0]["batch_size"] == 32
    report, seen = tried(most=1, name="resnet", depth=10, width=0.125)  # this network has no rematerialization
    assert {remat for _, _, remat in seen} == {"none"}
    assert {batch for _, batch, _ in seen} == {64, 32, 16}
    assert report["flags"] == []
    assert [row["remat"] for row in report["candidates"]] == [None] * 9


def test_mesh_whose_state_exceeds_memory_is_not_compiled():
    rehearse, seen = fake_rehearsal(most=1000)
    report = search.fit(supervised(**MLP), chips(memory=LITTLE_MEMORY, devices=2), rehearse)
    (whole,) = (row for row in report["candidates"] if row["hopeless"])
    assert whole["mesh"] == {"data": 2, "fsdp": 1, "tensor": 1}
    assert {mesh for mesh, _, _ in seen} == {(1, 2, 1)}
    assert whole["exhausted"]["largest"][0]["of"].startswith("state.params")
    assert whole["bytes"] > LITTLE_MEMORY


def test_candidate_meshes():
    config = configs.load(PRIOR)
    with config.unlocked():
        config.sharding = ((r"blocks/mlp/fc1/kernel", ("fsdp", "tensor")), (".*", "fsdp"))
    assert {mesh[2] for mesh in search._meshes(config, chips(), None)} == {1, 4}
    assert {mesh[2] for mesh in search._meshes(configs.load(PRIOR), chips(), None)} == {1}
    two = chips()._replace(slices=2)
    assert {mesh[1] * mesh[2] for mesh in search._meshes(config, two, None)} == {1, 2, 4}  # within a slice of four
    assert search._meshes(configs.load(PRIOR), chips(), None) == [(1, 8, 1), (4, 2, 1), (8, 1, 1)]  # the smallest state first
    hosts = chips()._replace(platform="gpu", hosts=2)
    assert search._meshes(configs.load(PRIOR), hosts, None) == [(2, 4, 1), (4, 2, 1), (8, 1, 1)]  # within a host of four
    assert (2, 1, 4) in search._meshes(config, hosts, None)


def test_invalid_fit_is_a_user_error():
    rehearse, _ = fake_rehearsal(most=1000)
    with pytest.raises(UserError, match="--fit needs devices whose memory and speed are known"):
        search.fit(supervised(), chips()._replace(chip=None), rehearse)
    config = supervised()
    config.batch_size = 1024
    with pytest.raises(UserError, match=r"batch size 1024 is larger than data 'scenes' split 'train\[:512\]' \(512 examples\)"):
        search.fit(config, chips(), rehearse)


def test_gpu_candidates_are_ranked_without_their_network(without_tracing, capsys):
    chip = CHIPS["h100"]._replace(share=0.75)

    def rehearse(exp):
        found = fake_rehearsal(most=32)[0](exp)
        if found["fits"]:
            seconds = {"compute": exp.config.batch_size / 1e3, "memory": 1e-3}
            found["prediction"] = roofline.predict(seconds, 10, exp.config.batch_size, 8, 8, 1e12, chip)
        return found

    report = search.fit(supervised(), chips()._replace(chip=chip, platform="gpu"), rehearse)
    assert report["flags"] and (report["chip_bytes"], report["usable_bytes"]) == (84942979072, 63707234304)
    show_fit({**report, "config": "a", "overrides": [], "topology": "h100:1x8", "slices": 1}, sys.stdout)
    printed = capsys.readouterr().out
    assert "Of 79.11 GiB of a device JAX takes 59.33 GiB (XLA_CLIENT_MEM_FRACTION)." in printed
    assert "network not included: its bandwidth is not known" in printed and "published" not in printed


@pytest.mark.full
def test_fit_from_the_command_line(tmp_path, monkeypatch, capsys):
    """Compiled for two fake devices with little memory."""
    monkeypatch.setattr(rehearsing, "open_topology", lambda name, slices: chips(memory=30_000_000, devices=2))
    config = supervised(**MLP)
    loaded = lambda _, overrides: configs.apply_overrides(config.copy_and_resolve_references(), overrides)  # noqa: E731
    monkeypatch.setattr(rehearsing.configs, "load", loaded)
    arguments = [f"--config={SUPERVISED}", "--topology=v5e:2x4", f"--output={tmp_path}/report.json"]
    assert main(["rehearse", *arguments, "--fit"]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert {row["fits"] for row in report["candidates"]} == {True, False}
    assert all(row["exhausted"]["largest"][0]["bytes"] > 0 for row in report["candidates"] if not row["fits"])
    printed = capsys.readouterr().out
    assert "The fastest: --config.mesh.data=1 --config.mesh.fsdp=2" in printed
    assert "As it stands the config does not fit: it needs" in printed
    assert "expected: published runs reached 32 % to 76 %" in printed and "XLA_CLIENT_MEM_FRACTION" not in printed
    big = next(row for row in report["candidates"] if not row["fits"])
    assert main(["rehearse", *arguments, *big["flags"]]) == 1
    printed = capsys.readouterr()
    assert "error: this does not fit; add --fit to search for what fits" in printed.err
    assert "the largest arrays in the trace" in printed.out

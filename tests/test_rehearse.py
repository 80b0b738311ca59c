"""Rehearsals: the step equals that of `train`, needs neither data nor weights, and reports what does not fit into memory."""

import importlib.util
import io
import json
import pathlib
import re

import jax
import numpy as np
import pytest

from launch import main
from ssl_jax.data import catalog
from ssl_jax.data.sources import open_source
from ssl_jax.engine import sharding
from ssl_jax.engine.checkpoint import write_json
from ssl_jax.errors import UserError
from ssl_jax.experiment import config as configs
from ssl_jax.experiment import rehearse as rehearsing
from ssl_jax.experiment.abstract import build_abstract
from ssl_jax.experiment.build import build_experiment
from ssl_jax.rehearsal import gpus, memory, roofline
from ssl_jax.rehearsal.chips import CHIPS
from ssl_jax.rehearsal.collectives import Collective
from ssl_jax.rehearsal.exhausted import exhausted
from ssl_jax.rehearsal.topology import open_topology
from ssl_jax.report.rehearsal_tables import show

ROOT = pathlib.Path(__file__).parent.parent
SIMCLR = f"--config={ROOT}/configs/simclr.py:smoke"


def load(name, *overrides):
    return configs.load(f"{ROOT}/configs/{name}", overrides)


def abstract(name, *overrides):
    return build_abstract(load(name, *overrides), jax.devices()[:8], "cpu")


def program(exp, example):
    return exp.run.trace(exp.run.abstract, example, exp.run.root).lower().as_text()


@pytest.mark.full
def test_rehearsed_step_equals_the_step_of_train():
    """The same program text, with the same shapes, shardings and donated arguments."""
    overrides = ("--config.mesh.fsdp=2", "--config.batch_size=32")
    rehearsed = abstract("simclr.py:smoke", *overrides)
    trained = build_experiment(load("simclr.py:smoke", *overrides), jax.devices()[:8])
    assert rehearsed.config == trained.config
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), rehearsed.run.abstract) == jax.tree.map(
        lambda x: (x.shape, x.dtype, x.sharding), trained.run.abstract
    )
    assert program(rehearsed, rehearsed.example) == program(trained, rehearsed.example)
    assert rehearsed.total == trained.durations["total"]


@pytest.mark.full
@pytest.mark.parametrize("name", ["vq_prior", "maskgit"])
def test_stage_comes_from_its_recipe_or_from_a_workdir_without_weights(name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)  # recipes are relative paths
    from_recipe = abstract(f"{name}.py:smoke")
    assert from_recipe.run.abstract.frozen["tokenizer"]["params"]["tokenizer"]["encoder"]
    write_json(tmp_path / "config.json", configs.plain(abstract("vit_vqgan.py:smoke").config))
    from_workdir = abstract(f"{name}.py:smoke", f"--config.stages.tokenizer.workdir={tmp_path}")
    assert program(from_workdir, from_workdir.example) == program(from_recipe, from_recipe.example)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"stages\.tokenizer\.recipe=configs/vit_vqgan\.py:smoke: no such file"):
        abstract(f"{name}.py:smoke")


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """The JSON report for SimCLR on data 4 x fsdp 2."""
    output = tmp_path_factory.mktemp("rehearsal") / "deep" / "report.json"
    arguments = [SIMCLR, "--config.mesh.fsdp=2", "--config.batch_size=32", "--topology=cpu:8", f"--output={output}"]
    assert main(["rehearse", *arguments]) == 0
    return json.loads(output.read_text())


@pytest.mark.full
def test_reported_bytes_add_up(rehearsed):
    assert rehearsed["fits"]
    assert rehearsed["mesh"] == {"data": 4, "fsdp": 2, "tensor": 1}
    exp = abstract("simclr.py:smoke", "--config.mesh.fsdp=2", "--config.batch_size=32")
    state = exp.run.abstract
    assert rehearsed["trained"] == sum(x.size for x in jax.tree.leaves(state.params)) == rehearsed["parameters"]["net"]
    assert rehearsed["parameters"]["net"] == sum(n for name, n in rehearsed["parameters"].items() if "/" in name)
    held, found = rehearsed["state_bytes"], rehearsed["compiled_bytes"]
    assert found["aliased"] == held["parameters"] + held["optimizer"] + held["mutable"] + 4  # the whole state, and the step
    assert held["parameters"] < 4 * rehearsed["trained"] <= 2 * held["parameters"]  # large parameters are split in two
    assert found["total"] == found["arguments"] + found["outputs"] - found["aliased"] + found["temporaries"] + found["code"]
    (gathered,) = (x for x in rehearsed["collectives"] if (x["kind"], x["axes"]) == ("all-gather", "fsdp"))
    summed = sum(x["bytes"] for x in rehearsed["collectives"] if x["kind"] == "all-reduce")
    assert gathered["bytes"] >= 2 * (4 * rehearsed["trained"] - held["parameters"])  # all split parameters
    assert summed >= held["parameters"]  # gradients, and batch statistics


@pytest.mark.full
def test_report_shows_the_memory_of_a_chip(rehearsed):
    assert rehearsed["chip_bytes"] is None  # of a fake device
    file = io.StringIO()
    show({**rehearsed, "chip_bytes": 16 * 2**30, "usable_bytes": 16 * 2**30}, file)
    assert re.search(r"a device has +16 GiB", file.getvalue())


@pytest.mark.full
def test_gpu_memory_is_limited_to_the_share_of_jax(rehearsed, monkeypatch, tmp_path, capsys):
    """The minimal time of a step on several GPUs is reported without their network."""
    total = rehearsed["compiled_bytes"]["total"]
    chip = CHIPS["h100"]._replace(memory=1.2 * total, share=0.75)
    monkeypatch.setattr(rehearsing, "open_topology", lambda name, slices: open_topology("cpu:8")._replace(chip=chip))
    flags = ("--config.mesh.fsdp=2", "--config.batch_size=32", f"--output={tmp_path}/report.json")
    assert main(["rehearse", SIMCLR, "--topology=h100:1x8", *flags]) == 1
    report, printed = json.loads((tmp_path / "report.json").read_text()), capsys.readouterr()
    assert (report["chip_bytes"], report["usable_bytes"], report["needed_bytes"]) == (int(1.2 * total), int(0.9 * total), total)
    assert report["exhausted"]["limit"] == report["usable_bytes"]
    assert "XLA_CLIENT_MEM_FRACTION=0.95, here and for `train`, gives it more" in printed.err
    assert re.search(r"JAX takes of it \(XLA_CLIENT_MEM_FRACTION\) +[0-9.]+ MiB", printed.out)
    assert set(report["busy_seconds"]) == {"compute", "memory"}
    assert report["prediction"]["bound"]["step_seconds"] == max(report["busy_seconds"].values()) > 0
    assert report["prediction"]["expected"] == [] and "at 76 %" not in printed.out
    assert "network not included: its bandwidth is not known" in printed.out


def test_gpu_memory_share_comes_from_the_environment(monkeypatch):
    assert gpus.share({}) == 0.75
    assert gpus.share({"XLA_CLIENT_MEM_FRACTION": "0.9"}) == gpus.share({"XLA_PYTHON_CLIENT_MEM_FRACTION": ".9"}) == 0.9
    with pytest.raises(UserError, match="XLA_CLIENT_MEM_FRACTION=most is not a share of GPU memory; give a number"):
        gpus.share({"XLA_CLIENT_MEM_FRACTION": "most"})
    monkeypatch.setattr(gpus, "describe", lambda *_: jax.devices()[:8])  # without the GPU compiler
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.5")
    assert open_topology("h100:1x8").chip.usable == CHIPS["h100"].memory // 2
    assert CHIPS["v5e"].usable == CHIPS["v5e"].memory


def test_bytes_of_device_equal_the_shards():
    mesh = sharding.make_mesh({"data": 4, "fsdp": 2}, jax.devices()[:8])
    specs = {"whole": sharding.P(), "rows": sharding.P("fsdp"), "both": sharding.P("data", "fsdp"), "joint": sharding.BATCH}
    tree = {
        name: jax.device_put(np.zeros((16, 6), np.float16), jax.NamedSharding(mesh, spec)) for name, spec in specs.items()
    }
    assert memory.bytes_of_device(tree) == sum(x.addressable_shards[0].data.nbytes for x in tree.values()) == 2 * (96 + 48 + 12 + 12)


def test_catalog_equals_the_data():
    for split in ("train", "train[:512]", "train[10%:]+test"):
        source = open_source("scenes", split)
        data = load("simclr.py:smoke", f"--config.data.train_split={split}").data
        assert catalog.facts(data) == catalog.read_facts(data, source, {})
    assert catalog.facts(load("supervised.py:imagenet").data)[1:] == (1000, 1_281_167, {}, {"label": 1000})


@pytest.fixture(autouse=True, scope="module")
def eight_devices():
    """Initialize JAX's devices before a test asks for another number."""
    assert len(jax.devices()) == 8


def fails(capsys, *arguments):
    """Run `rehearse` with the arguments, which must fail; returns the one line on stderr."""
    assert main(["rehearse", *arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_invalid_rehearsals_are_one_line_errors(capsys, monkeypatch):
    assert "--topology=v9:2x2 is unknown; give KIND:SHAPE like cpu:8" in fails(capsys, SIMCLR, "--topology=v9:2x2")
    assert "cpu:2x2: give the number of fake devices" in fails(capsys, SIMCLR, "--topology=cpu:2x2")
    assert "JAX has already initialized 8 devices; set XLA_FLAGS" in fails(capsys, SIMCLR, "--topology=cpu:9")
    assert "config.batch_size=36 does not divide by 8 devices" in fails(
        capsys, SIMCLR, "--topology=cpu:8", "--config.batch_size=36"
    )
    assert "config.eval_batch_size=36 does not divide by 8 devices" in fails(
        capsys, SIMCLR, "--topology=cpu:8", "--config.eval_batch_size=36"
    )
    assert "does not exist; or" not in fails(capsys, SIMCLR, "--topology=cpu:8", "--config.mesh.fsdp=3")
    unknown_data = fails(capsys, SIMCLR, "--topology=cpu:8", "--config.data.name=/none")
    assert "is larger than data 'scenes' split 'train[:512]' (512 examples)" in fails(
        capsys, SIMCLR, "--topology=cpu:8", "--config.batch_size=1024", "--config.total=3 steps"
    )
    assert "--slices=2: give 1 or more for TPUs" in fails(capsys, SIMCLR, "--topology=cpu:8", "--slices=2")
    assert "--fit needs devices whose memory and speed are known" in fails(capsys, SIMCLR, "--topology=cpu:8", "--fit")
    assert "or say what is in it: --config.data.examples=N" in unknown_data
    assert "has no split 'nope'; it has train, test" in fails(capsys, SIMCLR, "--topology=cpu:8", "--config.data.train_split=nope")
    assert "--topology=h100:8: give hosts and the GPUs of each, like h100:128x8" in fails(capsys, SIMCLR, "--topology=h100:8")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install -r requirements-rehearse-gpu.txt (no GPU is needed)" in fails(capsys, SIMCLR, "--topology=h100:2x8")


def test_tpus_become_fake_devices_without_libtpu(monkeypatch, caplog):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name, slices in (("v5e:2x4", 1), ("v3:2x2", 1), ("v5e:2x2", 2)):
        where = open_topology(name, slices)
        assert (len(where.devices), where.platform, where.chip) == (8, "cpu", None)
        assert "pip install -r requirements-rehearse.txt (no TPU is needed)" in caplog.text and "8 fake CPU devices" in caplog.text
        caplog.clear()
    with pytest.raises(UserError, match="JAX has already initialized 8 devices; set XLA_FLAGS"):
        open_topology("v5e:4x4")


@pytest.mark.full
def test_rehearsal_of_data_described_in_the_config():
    data = ("--config.data.name=/path/to/folder", "--config.data.examples=1000", "--config.data.num_classes=7")
    exp = abstract("simclr.py:smoke", "--config.data.image_shape=(40,40,3)", *data)
    assert (exp.config.data.examples, exp.config.data.num_classes, exp.example["image"].shape[1:]) == (1000, 7, (40, 40, 3))
    with pytest.raises(UserError, match=r"images of many sizes; give config.data.ops"):
        abstract("simclr.py:smoke", *data)


def test_roofline_is_bound_by_the_slowest_resource():
    chip = CHIPS["v5e"]
    found = [Collective("all-reduce", "data", 4, 1, 10**9), Collective("collective-permute", "data", 2, 3, 10**8)]
    busy = roofline.times(chip, 197e12 * 0.02, 819e9 * 0.01, found)
    assert busy == pytest.approx({"compute": 0.02, "memory": 0.01, "network": (2 * 0.75e9 + 1e8) / 200e9})
    prediction = roofline.predict(busy, steps=1800, batch_size=64, devices=4, chips=4, model_flops=197e12 * 0.04, chip=chip)
    assert prediction["binding"] == "compute"
    assert prediction["bound"] == pytest.approx(
        {"step_seconds": 0.02, "images_per_second": 3200, "mfu": 0.5, "hours": 0.01, "chip_hours": 0.04}
    )
    assert [x["step_seconds"] for x in prediction["expected"]] == pytest.approx([0.02 / 0.76, 0.02 / 0.32])
    send = Collective("send", "slices", 2, 1, 10**8)
    apart = roofline.times(chip, 0, 0, [*found, send])
    assert (apart["network"], apart["slices"]) == pytest.approx((busy["network"], 1e8 / 3.125e9))
    assert "slices" not in roofline.times(CHIPS["v5p"], 0, 0, [send])  # its speed is undocumented
    assert roofline.hosts_need(3200, 2, 800) == {"hosts": 2, "images_per_second": 1600, "cores": 2, "rate_of_core": 800}
    assert roofline.moved_bytes(100, 10, 30) == 300  # a loop of three
    assert roofline.moved_bytes(100, 10, 5) == 100


MESSAGE = """RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 36.57G of 30.75G hbm. Exceeded hbm capacity by 5.82G.

  Largest program allocations in hbm:

  1. Size: 1.50G
     Operator: op_name="jit(step)/jvp(ViT)/block0/mlp/dot_general"
     Shape: bf16[64,257,4096]{2,1,0:T(8,128)(2,1)}
     Unpadded size: 1.50G
     ==========================

  2. Size: 640.00M
     Shape: f32[8]{0}
     ==========================
"""


@pytest.mark.full
@pytest.mark.parametrize(
    ("chip", "remedy"),
    [
        ("v5e", "this does not fit; add --fit to search for what fits, or use more or larger chips"),
        ("h100", "this does not fit; add --fit to search for what fits, or use more or larger chips"),
        (None, "this does not fit; lower config.batch_size, raise config.accumulate,"),
    ],
)
def test_program_that_does_not_fit_exits_with_1_and_a_report(monkeypatch, tmp_path, capsys, chip, remedy):
    def refuse(self, compiler_options=None):
        raise jax.errors.JaxRuntimeError(MESSAGE)

    where = open_topology("cpu:8")._replace(chip=CHIPS.get(chip))
    monkeypatch.setattr(rehearsing, "open_topology", lambda name, slices: where)
    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    assert main(["rehearse", SIMCLR, "--topology=cpu:8", f"--output={tmp_path}/report.json"]) == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert not report["fits"]
    assert report["exhausted"]["used"] == round(36.57 * 2**30)
    assert report["exhausted"]["largest"] == [
        {"bytes": round(1.5 * 2**30), "shape": "bf16[64,257,4096]", "of": "jit(step)/jvp(ViT)/block0/mlp/dot_general"},
        {"bytes": 640 * 2**20, "shape": "f32[8]", "of": ""},
    ]
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert remedy in printed.err
    assert "bf16[64,257,4096]" in printed.out
    assert exhausted("INTERNAL: another") is None
    far = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (190.94G) exceeds "
        "available HBM (15.75G)."
    )
    assert exhausted(far) == {"message": far, "used": round(190.94 * 2**30), "limit": round(15.75 * 2**30), "largest": []}


needs_libtpu = pytest.mark.skipif(
    not importlib.util.find_spec("libtpu"), reason="needs libtpu: pip install -r requirements-rehearse.txt"
)


@needs_libtpu
def test_topology_of_tpu_slices():
    where = open_topology("v4:2x2x2")
    assert (len(where.devices), where.chips, where.hosts) == (8, 8, 2)
    where = open_topology("v3:4x4")
    assert (len(where.devices), where.chips) == (32, 16)  # two cores in a chip
    where = open_topology("v5e:4x4", slices=2)
    assert (len(where.devices), where.chips, where.hosts, where.slices) == (32, 32, 8, 2)
    with pytest.raises(UserError, match="--topology=v5e:3x5: "):
        open_topology("v5e:3x5")


needs_cuda_compiler = pytest.mark.skipif(
    not importlib.util.find_spec("jax_cuda12_plugin"), reason="needs JAX's CUDA packages: pip install -r requirements-rehearse-gpu.txt"
)


@needs_cuda_compiler
def test_topology_of_gpu_hosts():
    where = open_topology("h100:4x8")
    assert (len(where.devices), where.chips, where.hosts, where.platform) == (32, 32, 4, "gpu")
    assert {device.device_kind for device in where.devices} == {"NVIDIA H100 80GB HBM3"}
    with pytest.raises(UserError, match="--slices=2: give 1 or more for TPUs"):
        open_topology("h100:4x8", slices=2)


@needs_cuda_compiler
def test_prediction_for_one_gpu():
    where = open_topology("h200:1x1")
    assert where.devices[0].device_kind == "NVIDIA H200"
    exp = build_abstract(load("supervised.py:smoke"), where.devices, where.platform)
    report = rehearsing.rehearse(exp, where, rehearsing.QUICK["gpu"])
    assert report["fits"]
    assert report["prediction"]["bound"]["step_seconds"] == report["busy_seconds"]["memory"] > report["busy_seconds"]["compute"] > 0
    assert "network" not in report["busy_seconds"]
    assert report["moved_bytes"] > report["state_bytes"]["parameters"] + report["state_bytes"]["optimizer"]


@needs_libtpu
def test_step_compiles_for_a_tpu_slice():
    where = open_topology("v5e:2x4")
    config = load("supervised.py:smoke", "--config.batch_size=64", "--config.mesh.fsdp=2")
    report = rehearsing.rehearse(build_abstract(config, where.devices, where.platform), where, rehearsing.QUICK["tpu"])
    assert report["fits"] and report["chip_bytes"] == 16 * 2**30
    assert report["dtype"] == "bfloat16"
    assert report["prediction"]["binding"] in ("compute", "memory", "network")
    assert {x["axes"] for x in report["collectives"]} <= {"data", "fsdp", "data+fsdp"}
    assert report["compiled_bytes"]["aliased"] >= sum(report["state_bytes"].values())
    assert report["needed_bytes"] == report["compiled_bytes"]["peak"] > 0  # a program may fit although its total exceeds a chip

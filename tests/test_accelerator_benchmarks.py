"""The benchmarks for accelerators, in small: what a compiled program wastes, and steps against PyTorch."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from ssl_jax.rehearsal import flops
from ssl_jax.rehearsal.traffic import moves

ROOT = Path(__file__).parents[1]

PROGRAM = """
%fused_turn (param_0: bf16[1024,1024]) -> bf16[1024,1024] {
  %param_0 = bf16[1024,1024]{1,0} parameter(0)
  ROOT %turned = bf16[1024,1024]{1,0} transpose(%param_0), dimensions={1,0}
}

%fused_scale (param_0.1: bf16[1024,1024]) -> f32[1024,1024] {
  %param_0.1 = bf16[1024,1024]{1,0} parameter(0)
  %wide = f32[1024,1024]{1,0} convert(%param_0.1)
  ROOT %twice = f32[1024,1024]{1,0} add(%wide, %wide), metadata={op_name="jit(step)/jvp(ViT)/block7/mlp/add"}
}

ENTRY %main (x: bf16[1024,1024], w: f32[512,512]) -> f32[1024,1024] {
  %x = bf16[1024,1024]{1,0} parameter(0)
  %w = f32[512,512]{1,0} parameter(1)
  %turn = bf16[1024,1024]{1,0} fusion(%x), kind=kLoop, calls=%fused_turn
  %small = bf16[8,8]{1,0} copy(%x)
  %again = bf16[1024,1024]{0,1} copy(%turn)
  %new_w = f32[512,512]{1,0} add(%w, %w)
  ROOT %scale = f32[1024,1024]{1,0} fusion(%again), kind=kLoop, calls=%fused_scale
}
"""


@pytest.fixture
def hlo_table(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import hlo_table

    return hlo_table


def test_copies_and_float32_results_of_a_program(hlo_table):
    """Two changes of layout of 2 MiB (read and written), one float32 array that is not of the state; the small copy is not counted."""
    megabyte, state = 2**20, {(512, 512)}
    total, places = hlo_table.account(moves(PROGRAM), state)
    assert total["copies"] == 2
    assert total["copies_gb"] == pytest.approx(2 * 4 * megabyte / 1e9)
    assert total["wide_gb"] == pytest.approx(4 * megabyte / 1e9)
    assert places["wide"] == {"no name": 0, "jvp(ViT)/block*/mlp/add": 4 * megabyte}
    small, weights = 2 * megabyte + 8 * 8 * 2, 3 * megabyte
    assert total["moved_gb"] == pytest.approx((2 * 4 * megabyte + small + weights + 6 * megabyte) / 1e9)


def test_products_of_float32_count_apart():
    half, wide = jnp.zeros((4, 8), jnp.bfloat16), jnp.zeros((4, 8), jnp.float32)
    program = jax.make_jaxpr(
        lambda a, b: (a @ a.T, b @ b.T, jax.lax.scan(lambda c, _: (c @ c.T @ c, None), b, length=3)[0])
    )
    counted = flops.count(program(half, wide))
    product = 2 * 4 * 4 * 8
    assert counted.wide == product + 3 * 2 * product
    assert counted.flops == counted.wide + product


@pytest.mark.slow  # compiles seven cases on both sides
def test_all_sides_run_in_small_with_equal_numbers_of_parameters(tmp_path):
    for module in ("torch", "torchvision", "timm"):
        pytest.importorskip(module)
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "accelerator.py"),
        "--smoke",
        "--cases",
        "vit_b16",
        "--minutes=4",
    ]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, f"--logs={tmp_path}"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])["cases"]["vit_b16"]
    assert result["ours"]["parameters"] == result["theirs"]["parameters"]
    with (tmp_path / "accelerator.csv").open() as file:
        rows = {row["metric"]: row for row in csv.DictReader(file)}
    assert float(rows["ratio"]["low"]) <= float(rows["ratio"]["value"]) <= float(rows["ratio"]["high"])
    assert rows["ratio"]["protocol"] == "pytorch-accelerator"


@pytest.mark.slow  # compiles seven cases on both sides
def test_a_case_that_is_too_late_is_reported(tmp_path):
    pytest.importorskip("torch")
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "accelerator.py"),
        "--smoke",
        "--cases",
        "vit_b16",
        "--minutes=0.02",
        "--ours",
    ]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, f"--logs={tmp_path}"], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "out of time" in done.stdout
    assert "failed: vit_b16 ours" in done.stderr

"""How recipes lie on meshes and what their steps send: JSON files in tests/golden, and the one way to write them anew.

  python tests/golden_programs.py            # all of them; or name some: python tests/golden_programs.py vit_g14_fsdp
  git diff tests/golden                      # read what has changed, and say in the commit why

With libtpu (requirements-rehearse.txt) the programs of a slice are written too; without it those that are there stay. A file is of
one config on eight devices: the axes along which its parameters are split, where they are, and the bytes of its collectives in a
step on each device, by kind and axes of the mesh.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import sys
from typing import NamedTuple

if __name__ == "__main__":
    import conftest  # noqa: F401  eight fake devices, before JAX is imported

    sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import jax

from ssl_jax.engine.sharding import leaf_names
from ssl_jax.experiment import config as configs
from ssl_jax.experiment.abstract import build_abstract
from ssl_jax.experiment.rehearse import QUICK
from ssl_jax.rehearsal import memory
from ssl_jax.rehearsal.collectives import collectives
from ssl_jax.rehearsal.topology import Slice, open_topology

ROOT = pathlib.Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"
SLICE = "v5e:2x4"


class Case(NamedTuple):
    config: str
    overrides: tuple[str, ...] = ()


def on(data=1, fsdp=1, tensor=1, *others: str) -> tuple[str, ...]:
    return (f"--config.mesh.data={data}", f"--config.mesh.fsdp={fsdp}", f"--config.mesh.tensor={tensor}", *others)


def resized(pixels):
    ops = f"(('resize_crop', {{'resize': {pixels}, 'crop': {pixels}}}),)"
    return f"--config.data.ops={ops}", f"--config.data.eval_ops={ops}"


CASES = {
    "simclr_data": Case("simclr.py:smoke", on(data=8)),
    "simclr_fsdp": Case("simclr.py:smoke", on(fsdp=8)),
    "vit_g14_fsdp": Case("supervised.py:imagenet_vit_g14", on(1, 8, 1, "--config.batch_size=256")),
    "vit_g14_tensor": Case("supervised.py:imagenet_vit_g14", on(2, 2, 2, "--config.batch_size=256")),
    "vq_prior_fsdp": Case("vq_prior.py:smoke", on(2, 4)),
    "biggan_fsdp": Case("biggan.py:smoke", on(2, 4, 1, "--config.batch_size=64")),
    "vim_large_tensor": Case("vq_prior.py:imagenet256_large", on(2, 2, 2, "--config.batch_size=64")),
    "biggan_deep_tensor": Case("biggan.py:deep128", on(2, 2, 2, "--config.batch_size=64", *resized(32))),  # of 128 pixels: minutes
    "stylegan_fsdp": Case("stylegan.py:smoke", on(fsdp=8)),
}


def describe(case: Case, where: Slice | None) -> dict:
    """{'shardings', 'state_bytes', and with `where` also 'collectives'} as the files have them. Recipes of stages are relative paths:
    run it in the root of the repository.
    """
    config = configs.load(f"{ROOT}/configs/{case.config}", case.overrides)
    devices, platform = (where.devices, where.platform) if where else (jax.devices()[:8], "cpu")
    this = build_abstract(config, devices, platform)
    params = this.run.abstract.params
    specs = dict(zip(leaf_names(params), (x.sharding.spec for x in jax.tree.leaves(params)), strict=True))
    told = {
        "shardings": {name: " ".join(axis or "-" for axis in spec) for name, spec in specs.items() if any(spec)},
        "state_bytes": sum(memory.bytes_of_device(x) for x in (params, this.run.abstract.opt)),
    }
    if where:
        traced = this.run.trace(this.run.abstract, this.example, this.run.root)
        hlo = traced.lower().compile(compiler_options=QUICK[platform]).as_text()
        sums = {}
        for x in collectives(hlo, this.run.mesh.shape)[0]:
            key = f"{x.kind} {x.axes}"
            sums[key] = sums.get(key, 0) + x.bytes
        told["collectives"] = dict(sorted(sums.items()))
    return told


def differences(expected: dict, found: dict, tolerance: float = 0.05) -> list[str]:
    """Lines of what differs: any sharding, and bytes by more than `tolerance` of theirs and a thousandth of all."""
    told = []
    for name in sorted({*expected["shardings"], *found["shardings"]}):
        before, after = (x["shardings"].get(name, "replicated") for x in (expected, found))
        if before != after:
            told.append(f"{name}: {before} -> {after}")
    if expected["state_bytes"] != found["state_bytes"]:
        told.append(f"state: {expected['state_bytes']:,} -> {found['state_bytes']:,} bytes of a device")
    before, after = (x.get("collectives", {}) for x in (expected, found))
    for key in sorted({*before, *after}):
        old, new = before.get(key, 0), after.get(key, 0)
        if abs(new - old) > max(tolerance * old, 1e-3 * sum(before.values())):
            told.append(f"{key}: {old:,} -> {new:,} bytes of a step")
    return told


def read(name: str, topology: str) -> dict:
    """What `describe` said when the file was written."""
    told = json.loads((GOLDEN / f"{name}.json").read_text())
    return {**told, "collectives": told["collectives"].get(topology, {})}


def write(name: str) -> None:
    case, path = CASES[name], GOLDEN / f"{name}.json"
    programs = json.loads(path.read_text())["collectives"] if path.exists() else {}
    told = describe(case, None)
    topologies = ["cpu:8", *([SLICE] if importlib.util.find_spec("libtpu") else [])]
    for topology in topologies:
        programs[topology] = describe(case, open_topology(topology))["collectives"]
    told |= {"config": case.config, "overrides": list(case.overrides), "collectives": programs}
    path.write_text(json.dumps(told, indent=1, sort_keys=True) + "\n")
    print(path.relative_to(ROOT), flush=True)


if __name__ == "__main__":
    os.chdir(ROOT)
    for name in sys.argv[1:] or CASES:
        write(name)

"""Golden files of shardings and collectives of recipes (tests/golden/*.json), and the script that writes them.

  python tests/golden_programs.py            # writes all files; or some: python tests/golden_programs.py vit_g14_fsdp
  git diff tests/golden                      # read what changed, and explain it in the commit

A file describes one config on eight devices: the axes over which parameters are sharded, and the bytes of the step's collectives
per device, by kind and mesh axes. With libtpu (requirements-rehearse.txt) the programs of a TPU slice are written, too; without it
those in the files stay.
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


def mesh_flags(data=1, fsdp=1, tensor=1, *others: str) -> tuple[str, ...]:
    return (f"--config.mesh.data={data}", f"--config.mesh.fsdp={fsdp}", f"--config.mesh.tensor={tensor}", *others)


def resized(pixels):
    ops = f"(('resize_crop', {{'resize': {pixels}, 'crop': {pixels}}}),)"
    return f"--config.data.ops={ops}", f"--config.data.eval_ops={ops}"


CASES = {
    "simclr_data": Case("simclr.py:smoke", mesh_flags(data=8)),
    "simclr_fsdp": Case("simclr.py:smoke", mesh_flags(fsdp=8)),
    "vit_g14_fsdp": Case("supervised.py:imagenet_vit_g14", mesh_flags(1, 8, 1, "--config.batch_size=256")),
    "vit_g14_tensor": Case("supervised.py:imagenet_vit_g14", mesh_flags(2, 2, 2, "--config.batch_size=256")),
    "vq_prior_fsdp": Case("vq_prior.py:smoke", mesh_flags(2, 4)),
    "biggan_fsdp": Case("biggan.py:smoke", mesh_flags(2, 4, 1, "--config.batch_size=64")),
    "vim_large_tensor": Case("vq_prior.py:imagenet256_large", mesh_flags(2, 2, 2, "--config.batch_size=64")),
    # Images of 128 pixels would take minutes.
    "biggan_deep_tensor": Case("biggan.py:deep128", mesh_flags(2, 2, 2, "--config.batch_size=64", *resized(32))),
    "stylegan_fsdp": Case("stylegan.py:smoke", mesh_flags(fsdp=8)),
}


def describe(case: Case, where: Slice | None) -> dict:
    """{'shardings', 'state_bytes', and with `where` also 'collectives'} in the format of the files.

    Recipes of stages are relative paths, so call it in the root of the repository.
    """
    config = configs.load(f"{ROOT}/configs/{case.config}", case.overrides)
    devices, platform = (where.devices, where.platform) if where else (jax.devices()[:8], "cpu")
    exp = build_abstract(config, devices, platform)
    params = exp.run.abstract.params
    specs = dict(zip(leaf_names(params), (x.sharding.spec for x in jax.tree.leaves(params)), strict=True))
    program = {
        "shardings": {name: " ".join(axis or "-" for axis in spec) for name, spec in specs.items() if any(spec)},
        "state_bytes": sum(memory.bytes_of_device(x) for x in (params, exp.run.abstract.opt)),
    }
    if where:
        traced = exp.run.trace(exp.run.abstract, exp.example, exp.run.root)
        hlo = traced.lower().compile(compiler_options=QUICK[platform]).as_text()
        sums = {}
        for x in collectives(hlo, exp.run.mesh.shape)[0]:
            key = f"{x.kind} {x.axes}"
            sums[key] = sums.get(key, 0) + x.bytes
        program["collectives"] = dict(sorted(sums.items()))
    return program


def differences(expected: dict, found: dict, tolerance: float = 0.05) -> list[str]:
    """One line per difference: any sharding, and bytes that differ by more than `tolerance` and by a thousandth of the total."""
    lines = []
    for name in sorted({*expected["shardings"], *found["shardings"]}):
        before, after = (x["shardings"].get(name, "replicated") for x in (expected, found))
        if before != after:
            lines.append(f"{name}: {before} -> {after}")
    if expected["state_bytes"] != found["state_bytes"]:
        lines.append(f"state: {expected['state_bytes']:,} -> {found['state_bytes']:,} bytes per device")
    before, after = (x.get("collectives", {}) for x in (expected, found))
    for key in sorted({*before, *after}):
        old, new = before.get(key, 0), after.get(key, 0)
        if abs(new - old) > max(tolerance * old, 1e-3 * sum(before.values())):
            lines.append(f"{key}: {old:,} -> {new:,} bytes per step")
    return lines


def read(name: str, topology: str) -> dict:
    """The result of `describe` that the golden file `name` records for `topology`."""
    recorded = json.loads((GOLDEN / f"{name}.json").read_text())
    return {**recorded, "collectives": recorded["collectives"].get(topology, {})}


def write(name: str) -> None:
    """Write the golden file `name`."""
    case, path = CASES[name], GOLDEN / f"{name}.json"
    programs = json.loads(path.read_text())["collectives"] if path.exists() else {}
    recorded = describe(case, None)
    topologies = ["cpu:8", *([SLICE] if importlib.util.find_spec("libtpu") else [])]
    for topology in topologies:
        programs[topology] = describe(case, open_topology(topology))["collectives"]
    recorded |= {"config": case.config, "overrides": list(case.overrides), "collectives": programs}
    path.write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n")
    print(path.relative_to(ROOT), flush=True)


if __name__ == "__main__":
    os.chdir(ROOT)
    for name in sys.argv[1:] or CASES:
        write(name)

"""Train steps on an accelerator: ours against PyTorch (compiled, bfloat16, channels-last) and against the rehearsal.

    PYTHONPATH=. python benchmarks/accelerator.py [--cases simclr_resnet50 vit_b16 vit_vqgan_small] [--predictions FILE]
    PYTHONPATH=. python benchmarks/accelerator.py --rehearse h200:1x1 --predictions FILE      # beforehand, on any machine

Ours is the step that `launch.py train` compiles for the config and overrides of a case, on one device, without augmentations. The
case `simclr_resnet50_augmented` has the recipe's augmentations, and no reference. The reference is torchvision's ResNet, timm's ViT
or `torch_vit_vqgan` with the same number of parameters, loss and optimizer (fused). Batches of random bytes lie on the device.

Each side runs in its own process. All compile before any is measured: ours one after the other, since XLA times kernels as it
compiles; theirs side by side. A time is the median over ten rounds (--rounds) of five steps, blocking on the last step. Memory
is the allocator's peak.

The first command ends with a table and a line of JSON. The second writes the results of `launch.py rehearse` for the cases.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
STEPS = 5  # per round


class Case(NamedTuple):
    config: str
    overrides: tuple[str, ...]
    batch: int
    pixels: int


CASES = {
    "simclr_resnet50": Case(
        "simclr.py:imagenet",
        (
            "--config.views=((),())",
            "--config.model.head.widths=(2048,128)",
            "--config.optim.net={'name':'sgd','lr':0.01,'weight_decay':1e-4}",
        ),
        256,
        224,
    ),
    "vit_b16": Case(
        "supervised.py:imagenet",
        (
            "--config.views=((),)",
            "--config.model.encoder={'name':'vit','variant':'B/16'}",
            "--config.optim.net={'name':'adamw','lr':1e-4,'weight_decay':0.05}",
        ),
        256,
        224,
    ),
    # Neither side recomputes. R1 is left out on both sides, because PyTorch does not compile second derivatives.
    "vit_vqgan_small": Case(
        "vit_vqgan.py:imagenet256",
        (
            "--config.views=((),)",
            "--config.model.encoder.remat=none",
            "--config.model.decoder.remat=none",
            "--config.model.r1.weight=0.0",
        ),
        64,
        256,
    ),
    "simclr_resnet50_augmented": Case("simclr.py:imagenet", ("--config.model.head.widths=(2048,128)",), 256, 224),
}


def config_of(case: Case, batch: int, pixels: int):
    """The config of a case, with images of `pixels` x `pixels`."""
    from ssl_jax.experiment.config import load

    config = load(str(ROOT / "configs" / case.config), [*case.overrides, f"--config.batch_size={batch}"])
    with config.unlocked():
        config.data.ops = tuple((name, {**options, "size": pixels}) for name, options in config.data.ops)
        config.dtype = "bfloat16"
    return config


# ---------------------------------------------------------------- ours


def ours(name: str, batch: int, pixels: int) -> list[Callable[[], dict]]:
    import jax
    import numpy as np
    import step_timing

    from ssl_jax.data.catalog import facts
    from ssl_jax.engine import sharding
    from ssl_jax.experiment import config as configs
    from ssl_jax.experiment.build import fill_in, make_run
    from ssl_jax.methods import build_method
    from ssl_jax.rehearsal import flops, memory
    from ssl_jax.rehearsal.traffic import traffic

    config = config_of(CASES[name], batch, pixels)
    data_facts, mesh = facts(config.data), sharding.make_mesh(config.mesh, jax.devices()[:1])
    config = fill_in(config, data_facts)
    total = configs.resolve(config, data_facts.examples)["total"]
    method = build_method(config)
    run, _, example = make_run(config, method, mesh, total, {})
    traced = run.trace(run.abstract, example, run.root)
    counted, lowered = flops.count(traced.jaxpr), traced.lower()

    compiled = None

    def compiling() -> dict:
        nonlocal compiled
        start = time.perf_counter()
        compiled = lowered.compile()
        return {"compiling": time.perf_counter() - start}

    def measure() -> dict:
        state, rng = run.init(), np.random.default_rng(0)

        def random(x):
            return jax.device_put(rng.integers(0, 256 if len(x.shape) > 2 else 1000, x.shape).astype(x.dtype))

        batches = [jax.tree.map(random, dict(example)) for _ in range(2)]
        done = 0

        def steps(count: int):
            nonlocal state, done
            for _ in range(count):
                state, metrics = compiled(state._replace(frozen={}), {}, batches[done % 2], run.root)
                done += 1
            jax.block_until_ready((state, metrics))
            return metrics

        metrics = {key: float(x) for key, x in steps(3).items()}
        loss = next(x for key, x in metrics.items() if key.endswith("/loss"))
        times = rounds(steps)
        memory_stats = jax.devices()[0].memory_stats() or {}  # before the profiler runs
        if profile := os.environ.get("PROFILE"):
            Path(profile, f"{name}.profile.txt").write_text(step_timing.report(lambda: steps(1), compiled.as_text(), longest=400))
        cost = compiled.cost_analysis() or {}
        return {
            **times,
            "loss": loss,
            "parameters": memory.size(run.abstract.params),
            "peak_bytes": memory_stats.get("peak_bytes_in_use"),
            "compiled_bytes": memory.of_program(compiled)["total"],
            "flops": counted.flops,
            "moved_bytes": traffic(compiled.as_text()),
            "bytes_by_xla": cost.get("bytes accessed"),
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
        }

    return [compiling, measure]


# ---------------------------------------------------------------- theirs


def theirs(name: str, batch: int, pixels: int) -> list[Callable[[], dict]]:
    import torch
    import torch_steps
    from train_step import references, torch_nt_xent

    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.manual_seed(0)
    encoders = references()  # before timm is imported
    make = {"simclr_resnet50": torch_steps.simclr, "vit_b16": torch_steps.vit, "vit_vqgan_small": torch_steps.vit_vqgan}[name]
    shape = (batch, 2, 3, pixels, pixels) if name == "simclr_resnet50" else (batch, 3, pixels, pixels)
    with torch.device(device):
        train, parameters = make(torch, pixels, encoders, torch_nt_xent)
        batches = [(torch.randint(0, 256, shape, dtype=torch.uint8), torch.randint(0, 1000, (batch,))) for _ in range(2)]
    done = 0

    def steps(count: int):
        nonlocal done
        for _ in range(count):
            loss = train(*batches[done % 2])
            done += 1
        if cuda:
            torch.cuda.synchronize()
        return loss

    def compiling() -> dict:
        start = time.perf_counter()
        loss = float(steps(3))
        if cuda:
            torch.cuda.empty_cache()  # for processes that are measured meanwhile
        return {"compiling": time.perf_counter() - start, "loss": loss}

    def measure() -> dict:
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        times = rounds(steps)
        peak = torch.cuda.max_memory_allocated() if cuda else None
        return {**times, "parameters": parameters, "peak_bytes": peak, "torch": torch.__version__}

    return [compiling, measure]


# ---------------------------------------------------------------- both


def rounds(steps: Callable) -> dict:
    """Seconds of a step: the median over rounds, the shortest and the longest."""
    count = int(os.environ["ROUNDS"])
    steps(STEPS if count > 1 else 1)
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        steps(STEPS)
        seconds.append((time.perf_counter() - start) / STEPS)
    return {"seconds": statistics.median(seconds), "range": [min(seconds), max(seconds)]}


def child(name: str, side: str, batch: int, pixels: int) -> None:
    """Build a case, then run one stage (compile, measure) for each line on stdin."""
    stages = {"ours": ours, "theirs": theirs}[side](name, batch, pixels)
    for stage in stages:
        sys.stdin.readline()
        print(json.dumps(stage()), flush=True)


class Process:
    """A child process. `found` holds its results, or 'error', the end of its log, if it failed or timed out."""

    def __init__(self, name: str, side: str, arguments):
        self.name, self.side, self.found = name, side, {}
        sizes = [str(arguments.batch or CASES[name].batch), str(arguments.pixels or CASES[name].pixels)]
        environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TF_CPP_MIN_LOG_LEVEL": "3"}
        environment |= {"ROUNDS": str(arguments.rounds)}
        if arguments.profile:  # kernels in CUDA graphs have no names
            flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_command_buffer="
            environment |= {"PROFILE": str(arguments.logs), "XLA_FLAGS": flags}
        self.log = Path(arguments.logs, f"{name}.{side}.txt")
        command = ["timeout", str(arguments.limit), sys.executable, __file__, "--child", name, side, *sizes]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
            )

    def start_stage(self) -> None:
        try:
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # `finish_stage` reports the error

    def finish_stage(self) -> None:
        line = self.process.stdout.readline()
        self.found |= json.loads(line) if line else {"error": self.log.read_text()[-1500:]}
        print(f"{time.strftime('%X')} {self.name} {self.side} {line.strip() or self.found['error']}", flush=True)


def measure_all(cases: list[str], arguments) -> dict[str, dict]:
    """{case: {side: results}}"""
    mine = [Process(name, "ours", arguments) for name in cases]
    compared = [] if arguments.ours else [name for name in cases if not name.endswith("augmented")]
    other = [Process(name, "theirs", arguments) for name in compared]
    for process in other:
        process.start_stage()
    for process in mine:
        process.start_stage()
        process.finish_stage()
    for process in other:
        process.finish_stage()
    for process in [*mine, *other]:
        if "error" not in process.found:
            process.start_stage()
            process.finish_stage()
        process.process.communicate()
    found = {name: {} for name in cases}
    for process in [*mine, *other]:
        found[process.name][process.side] = process.found
    return found


def rehearse(topology: str, path: Path, cases: list[str]) -> None:
    found = {}
    for name in cases:
        case, out = CASES[name], path.with_suffix(f".{name}.json")
        flags = [*case.overrides, f"--config.batch_size={case.batch}", "--config.dtype=bfloat16"]
        command = ["rehearse", f"--config={ROOT / 'configs' / case.config}", f"--topology={topology}", f"--output={out}", *flags]
        subprocess.run([sys.executable, str(ROOT / "launch.py"), *command], check=True)
        found[name] = json.loads(out.read_text())
        out.unlink()
        path.write_text(json.dumps(found, indent=1))


def table(found: dict[str, dict], predicted: dict) -> None:
    times = f"{'ours':>10}{'torch':>10}{'ratio':>7}{'bound':>10}{'reached':>9}"
    print(f"{'case':27}{times}{'GiB':>7}{'torch':>7}{'pred.':>7}{'MFU':>7}")
    for name, sides in found.items():
        mine, other, rehearsed = sides.get("ours", {}), sides.get("theirs", {}), predicted.get(name, {})
        bound = rehearsed.get("prediction", {}).get("bound", {}).get("step_seconds")
        compute = rehearsed.get("busy_seconds", {}).get("compute")
        chip = compute and rehearsed["flops"]["flops"] / compute  # FLOP/s
        second, theirs_ = mine.get("seconds"), other.get("seconds")
        cells = [
            (second and 1e3 * second, "8.1f", 10, " ms"),
            (theirs_ and 1e3 * theirs_, "7.1f", 10, " ms"),
            (second and theirs_ and theirs_ / second, ".2f", 7, ""),
            (bound and 1e3 * bound, "7.1f", 10, " ms"),
            (bound and second and 100 * bound / second, ".0f", 9, " %"),
            (mine.get("peak_bytes") and mine["peak_bytes"] / 2**30, ".1f", 7, ""),
            (other.get("peak_bytes") and other["peak_bytes"] / 2**30, ".1f", 7, ""),
            (rehearsed.get("compiled_bytes") and rehearsed["compiled_bytes"]["total"] / 2**30, ".1f", 7, ""),
            (chip and second and 100 * mine["flops"] / second / chip, ".0f", 7, " %"),
        ]
        print(f"{name:27}" + "".join(f"{format(x, form) + unit if x else '-':>{width}}" for x, form, width, unit in cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--predictions", type=Path, default=None, help="file written with --rehearse")
    parser.add_argument("--rehearse", default=None, metavar="TOPOLOGY", help="write --predictions instead of measuring")
    parser.add_argument("--logs", type=Path, default=Path("."), help="folder for the logs of the processes")
    parser.add_argument("--batch", type=int, default=None, help="batch size, for a quick try")
    parser.add_argument("--pixels", type=int, default=None, help="image size, for a quick try")
    parser.add_argument("--rounds", type=int, default=10, help="rounds of the median; 1 for a quick try")
    parser.add_argument("--ours", action="store_true", help="without PyTorch")
    parser.add_argument("--profile", action="store_true", help="without CUDA graphs; tables of our time by operation in --logs")
    parser.add_argument("--limit", type=float, default=480, help="seconds for each process, including waits")
    parser.add_argument("--child", nargs=4, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        name, side, *sizes = arguments.child
        return child(name, side, *map(int, sizes))
    if arguments.rehearse:
        if arguments.predictions is None:
            parser.error("--rehearse writes to --predictions=FILE; give one")
        return rehearse(arguments.rehearse, arguments.predictions, arguments.cases)
    predicted = json.loads(arguments.predictions.read_text()) if arguments.predictions else {}
    found = measure_all(arguments.cases, arguments)
    table(found, predicted)
    print(json.dumps({"benchmark": "accelerator", "cases": found}))


if __name__ == "__main__":
    main()

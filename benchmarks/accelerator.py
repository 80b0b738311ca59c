"""Train steps on an accelerator against PyTorch (compiled, bfloat16, channels-last), in less than ten minutes.

    PYTHONPATH=. python benchmarks/accelerator.py               # on a GPU with PyTorch, torchvision and timm
    JAX_PLATFORMS=cpu PYTHONPATH=. python benchmarks/accelerator.py --smoke         # all cases in small, on any machine

Ours is the step that `launch.py train` compiles for a case of `accelerator_cases.py`, on one device; the reference is that of
`torch_steps.py`, with the same number of parameters (checked), loss and optimizer (fused). Batches of random bytes lie on the device.

Each side of a case is a process. All compile first: ours one after the other, since XLA times kernels as it compiles, and
meanwhile theirs, three at a time. Then one after the other is measured: rounds of five steps, blocking on the last step, for an
equal share of the time that is left, ten rounds at most. What has not compiled after 6 1/2 minutes is given up. The command ends
before `--minutes`.

Prints a table, and appends rows to `--rows` after each case, so that an interrupted run keeps what it has. The bound is the time in
which the device could multiply and move what our compiled program does (`rehearsal.roofline`). Memory is the allocator's peak.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from accelerator_cases import CASES, Size, run_of

STEPS, ROUNDS = 5, 10  # of a round; of a measurement, at most
COMPILING = 0.7  # of the time
SPARE = 15.0  # seconds to end with

# ---------------------------------------------------------------- ours


def ours(name: str, size: Size) -> list[Callable[[float], dict]]:
    import jax
    import numpy as np
    import step_timing

    from ssl_jax.rehearsal import flops, memory
    from ssl_jax.rehearsal.traffic import traffic

    run = compiled = state = batches = None
    done = 0

    def steps(count: int):
        nonlocal state, done
        for _ in range(count):
            state, metrics = compiled(state._replace(frozen={}), {}, batches[done % 2], run.root)
            done += 1
        jax.block_until_ready((state, metrics))
        return metrics

    def compiling(_) -> dict:
        nonlocal run, compiled, state, batches
        start = time.perf_counter()
        run, example = run_of(name, size, jax.devices()[0], jax.default_backend())
        traced = run.trace(run.abstract, example, run.root)
        compiled, state, rng = traced.lower().compile(), run.init(), np.random.default_rng(0)

        def random(x):
            return jax.device_put(rng.integers(0, 256 if len(x.shape) > 2 else 1000, x.shape).astype(x.dtype))

        batches = [jax.tree.map(random, dict(example)) for _ in range(2)]
        counted, text = flops.count(traced.jaxpr), compiled.as_text()
        return {
            "compiling": time.perf_counter() - start,
            "parameters": memory.size(run.abstract.params),
            "flops": counted.flops,
            "moved_bytes": traffic(text),
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
        }

    def measure(seconds: float) -> dict:
        metrics = {key: float(x) for key, x in steps(3).items()}
        loss = next(x for key, x in metrics.items() if key.endswith("/loss"))
        times = rounds(steps, seconds)
        memory_stats = jax.devices()[0].memory_stats() or {}  # before the profiler runs
        if profile := os.environ.get("PROFILE"):
            report = step_timing.report(lambda: steps(1), compiled.as_text(), longest=400)
            Path(profile, f"{name}.profile.txt").write_text(report)
        return {**times, "loss": loss, "peak_bytes": memory_stats.get("peak_bytes_in_use")}

    return [compiling, measure]


# ---------------------------------------------------------------- theirs


def theirs(name: str, size: Size) -> list[Callable[[float], dict]]:
    import torch
    import torch_steps

    cuda = torch.cuda.is_available()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.manual_seed(0)
    train = batches = None
    done = 0

    def steps(count: int):
        nonlocal done
        for _ in range(count):
            loss = train(*batches[done % 2])
            done += 1
        if cuda:
            torch.cuda.synchronize()
        return loss

    def compiling(_) -> dict:
        nonlocal train, batches
        start = time.perf_counter()
        views = (2,) if name.startswith("simclr") else ()
        shape = (size.batch, *views, 3, size.pixels, size.pixels)
        with torch.device("cuda" if cuda else "cpu"):
            train, parameters = getattr(torch_steps, CASES[name].reference)(size)
            batches = [
                (torch.randint(0, 256, shape, dtype=torch.uint8), torch.randint(0, 1000, (size.batch,)))
                for _ in range(2)
            ]
        loss = float(steps(3))
        if cuda:
            torch.cuda.empty_cache()  # for processes that are measured meanwhile
        return {"compiling": time.perf_counter() - start, "loss": loss, "parameters": parameters}

    def measure(seconds: float) -> dict:
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        steps(1)
        times = rounds(steps, seconds)
        peak = torch.cuda.max_memory_allocated() if cuda else None
        return {**times, "peak_bytes": peak, "torch": torch.__version__}

    return [compiling, measure]


# ---------------------------------------------------------------- both


def rounds(steps: Callable, seconds: float) -> dict:
    """Seconds of a step: the median over rounds, the shortest and the longest. At least one round, at most for about `seconds`."""
    end, each = time.perf_counter() + seconds, []
    while not each or (len(each) < ROUNDS and time.perf_counter() + STEPS * each[-1] < end):
        start = time.perf_counter()
        steps(STEPS)
        each.append((time.perf_counter() - start) / STEPS)
    return {"seconds": statistics.median(each), "range": [min(each), max(each)], "rounds": len(each)}


def child(name: str, side: str, size: Size) -> None:
    """Build a case, then run one stage (compile, measure) for each line on stdin, which has the seconds to use."""
    for stage in {"ours": ours, "theirs": theirs}[side](name, size):
        print(json.dumps(stage(float(sys.stdin.readline()))), flush=True)


class Process:
    """A child process. `found` holds its results, or 'error', the end of its log, if it failed or was too late."""

    def __init__(self, name: str, side: str, arguments):
        self.name, self.side, self.found = name, side, {}
        environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TF_CPP_MIN_LOG_LEVEL": "3"}
        if arguments.profile:  # kernels in CUDA graphs have no names
            flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_command_buffer="
            environment |= {"PROFILE": str(arguments.logs), "XLA_FLAGS": flags}
        self.log = Path(arguments.logs, f"{name}.{side}.txt")
        command = [sys.executable, __file__, "--child", name, side, json.dumps(size_of(name, arguments))]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
            )

    def run(self, seconds: float, until: float) -> None:
        """Run the next stage, and give the process up at the time `until`."""
        if "error" in self.found:
            return
        try:
            self.process.stdin.write(f"{seconds}\n")
            self.process.stdin.flush()
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, until - time.perf_counter()))
            line = self.process.stdout.readline() if ready else ""
        except BrokenPipeError:
            ready, line = True, ""
        self.found |= json.loads(line) if line else {"error": self.log.read_text()[-1500:] if ready else "out of time"}
        print(f"{time.strftime('%X')} {self.name} {self.side} {line.strip() or self.found['error']}", flush=True)
        if "error" in self.found:
            self.end()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()


def size_of(name: str, arguments) -> Size:
    size = CASES[name].smoke if arguments.smoke else CASES[name].size
    return size if arguments.batch is None else size._replace(batch=arguments.batch)


def measure_all(arguments, done: Callable[[str, dict, dict], None]) -> dict[str, dict]:
    """{case: {side: results}}; `done(case, ours, theirs)` is called after each case."""
    end = time.perf_counter() + 60 * arguments.minutes - SPARE
    compiled = time.perf_counter() + 60 * arguments.minutes * COMPILING
    sides = ("ours",) if arguments.ours else ("ours", "theirs")
    found = {name: {} for name in arguments.cases}

    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(3) as three:

        def compile_(name: str, side: str) -> Process | None:
            if time.perf_counter() > compiled:
                return None
            process = Process(name, side, arguments)
            process.run(0, compiled)
            return process

        waiting = {
            (name, side): (one if side == "ours" else three).submit(compile_, name, side)
            for name in found
            for side in sides
        }
        processes = {key: future.result() for key, future in waiting.items()}
    left = len(processes)
    try:
        for name in found:
            for side in sides:
                process = processes[name, side]
                if process:
                    share = (end - time.perf_counter()) / left
                    process.run(max(0.0, share - 5), end)  # 5 seconds to warm up
                    process.end()
                found[name][side] = process.found if process else {"error": "out of time"}
                left -= 1
            done(name, found[name]["ours"], found[name].get("theirs", {}))
    finally:
        for process in filter(None, processes.values()):
            process.end()
    return found


# ---------------------------------------------------------------- results


def bound(mine: dict) -> tuple[float | None, float | None]:
    """(bound in seconds, peak in FLOP/s) of a step on a device of `rehearsal.chips`."""
    from ssl_jax.rehearsal import chips, gpus, roofline

    kind = next((kind for kind, device in gpus.NAMES.items() if mine.get("device") == device), None)
    if kind is None or "flops" not in mine:
        return None, None
    chip = chips.CHIPS[kind]
    return max(roofline.times(chip, mine["flops"], mine["moved_bytes"], []).values()), chip.flops


def metrics_of(mine: dict, other: dict) -> dict[str, tuple]:
    """{metric of docs/results/speed.csv: (value, low, high)}; without what is unknown."""
    second, theirs_, (least, peak) = mine.get("seconds"), other.get("seconds"), bound(mine)
    found = {
        "step_ms": second and tuple(1e3 * x for x in (second, *mine["range"])),
        "step_ms_pytorch": theirs_ and tuple(1e3 * x for x in (theirs_, *other["range"])),
        "ratio": second
        and theirs_
        and (theirs_ / second, other["range"][0] / mine["range"][1], other["range"][1] / mine["range"][0]),
        "mfu_percent": peak and second and (100 * mine["flops"] / second / peak,),
        "bound_ms": least and (1e3 * least,),
        "percent_of_bound": least and second and (100 * least / second,),
        "memory_gib": mine.get("peak_bytes") and (mine["peak_bytes"] / 2**30,),
        "memory_gib_pytorch": other.get("peak_bytes") and (other["peak_bytes"] / 2**30,),
        "compiling_s": mine.get("compiling") and (mine["compiling"],),
        "compiling_s_pytorch": other.get("compiling") and (other["compiling"],),
    }
    return {metric: value for metric, value in found.items() if value}


def rows(name: str, size: Size, mine: dict, other: dict) -> list[dict]:
    from hlo_table import commit

    common = dict(method=CASES[name].recipe.partition(".")[0], config="benchmarks/accelerator.py", protocol="pytorch-accelerator",
                  subject=f"{CASES[name].title}, batch {size.batch}", commit=commit(),
                  machine=mine.get("device", "").replace("NVIDIA ", "").lower().replace(" ", "-"),
                  note=f"jax {mine.get('jax')}, torch {other.get('torch')}, {mine.get('rounds')} rounds")  # fmt: skip
    found = metrics_of(mine, other)
    names = ("value", "low", "high")
    return [
        {**common, "metric": metric, **{name: f"{x:.4g}" for name, x in zip(names, value, strict=False)}}  # a value, or with its range
        for metric, value in found.items()
    ]


def table(found: dict[str, dict]) -> str:
    heads = (
        "step_ms",
        "step_ms_pytorch",
        "ratio",
        "mfu_percent",
        "bound_ms",
        "percent_of_bound",
        "memory_gib",
        "memory_gib_pytorch",
    )
    lines = [f"{'case':18}" + "".join(f"{head:>19}" for head in heads)]
    for name, sides in found.items():
        values = metrics_of(sides.get("ours", {}), sides.get("theirs", {}))
        lines.append(
            f"{name:18}" + "".join(f"{values[head][0]:19.2f}" if head in values else f"{'-':>19}" for head in heads)
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--smoke", action="store_true", help="small sizes, for a CPU; its times say nothing")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything")
    parser.add_argument(
        "--rows", type=Path, default=None, help="append to this CSV file; default accelerator.csv in --logs"
    )
    parser.add_argument("--logs", type=Path, default=Path("."), help="folder for the logs of the processes")
    parser.add_argument("--batch", type=int, default=None, help="batch size of all cases, for a quick try")
    parser.add_argument("--ours", action="store_true", help="without PyTorch")
    parser.add_argument(
        "--profile", action="store_true", help="without CUDA graphs; tables of our time by operation in --logs"
    )
    parser.add_argument("--child", nargs=3, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        name, side, size = arguments.child
        return child(name, side, Size(*json.loads(size)))
    arguments.logs.mkdir(parents=True, exist_ok=True)
    path = arguments.rows or arguments.logs / "accelerator.csv"

    def done(name: str, mine: dict, other: dict) -> None:
        from hlo_table import append

        if mine.get("parameters") and other.get("parameters") and mine["parameters"] != other["parameters"]:
            parser.exit(1, f"{name}: {mine['parameters']:,} parameters, the reference has {other['parameters']:,}\n")
        append(path, rows(name, size_of(name, arguments), mine, other))

    found = measure_all(arguments, done)
    print(table(found))
    print(json.dumps({"benchmark": "accelerator", "cases": found}))
    if failed := [
        f"{name} {side}" for name, sides in found.items() for side, result in sides.items() if "error" in result
    ]:
        parser.exit(1, f"failed: {', '.join(failed)}\n")


if __name__ == "__main__":
    main()

"""One SimCLR train step, ours against the same model, loss and optimizer in eager PyTorch, on the CPU.

    JAX_PLATFORMS=cpu PYTHONPATH=. python benchmarks/train_step.py [--cases resnet18_32 resnet50_224 vit_s16_224]
        [--pairs 5] [--profile profiles/] [--convolutions xla]

A step converts two uint8 crops per image to floats and runs forward, NT-Xent over the batch, backward and update. Ours is
the step that `launch.py train` compiles (`methods.simclr` with `engine.loop`, on one device), without augmentations. The
reference is torchvision's ResNet (channels-last) or timm's ViT with a two-layer head, and one thread per core. A pair is
two steps of each, in turns, of which the second is timed: in training one step follows another, and the first one after the
other side's works on memory that the system has taken back. The table gives medians over pairs, and the ratio of wall-clock
time with its range. A ratio above 1 means that ours is faster. Ends with one line of JSON.

Quote figures of a quiet machine only. PyTorch's threads wait by spinning, so other work on the cores costs the reference
more wall-clock and CPU time than ours, and both ratios come out too high. The table and the JSON have the load average
before and after each case. The benchmark itself adds up to one per core, so check that the first number is 1 or less, and
that later ones do not exceed the number of cores.

`--profile` writes, per case, the time of our step by kind of operation, and the longest operations.

XLA allocates its working memory in every step. Put GLIBC_TUNABLES of the Makefile before the command, as it does for training:
huge pages, and one heap that keeps freed memory, for both sides.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import step_timing
import torch
import torch_vision

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from ssl_jax.engine import loop, optim, sharding
from ssl_jax.experiment.config import load
from ssl_jax.methods import build_method
from ssl_jax.models import conv
from ssl_jax.objectives.contrastive import nt_xent

TEMPERATURE = 0.5


class Case(NamedTuple):
    encoder: dict  # config.model.encoder
    reference: str  # a key of `references`
    size: int  # pixels
    batch: int  # images, with two views each
    head: tuple[int, int]
    optimizer: dict  # config.optim.net


SGD = {"name": "sgd", "lr": 0.01, "weight_decay": 5e-4}
ADAMW = {"name": "adamw", "lr": 1e-4, "weight_decay": 0.05}
CASES = {
    "resnet18_32": Case({"name": "resnet", "depth": 18, "stem": "cifar"}, "resnet18", 32, 128, (512, 128), SGD),
    "resnet50_224": Case({"name": "resnet", "depth": 50, "stem": "imagenet"}, "resnet50", 224, 8, (2048, 128), SGD),
    "vit_s16_224": Case({"name": "vit", "variant": "S/16"}, "vit_small_patch16_224", 224, 8, (384, 128), ADAMW),
}


def ours(case: Case):
    """(step: batch -> loss, number of parameters, text of the compiled step)"""
    config = load(str(Path(__file__).parents[1] / "configs" / "simclr.py:cifar10"))
    with config.unlocked():
        config.batch_size, config.dtype, config.views = case.batch, "float32", ((), ())
        config.data.image_shape = (2, case.size, case.size, 3)
        config.model.encoder = case.encoder
        config.model.head = {"widths": case.head, "last_batch_norm": False}
        config.model.temperature = TEMPERATURE
        config.optim = {"net": {**case.optimizer, "weight_decay_mask": ((".*", 1.0),), "schedule": "constant"}}
    method = build_method(config)
    example = {"image": np.zeros((case.batch, *config.data.image_shape), np.uint8)}
    make_optimizers = functools.partial(
        optim.make_optimizers, config.optim, total=1000, batch_size=case.batch, examples=1000 * case.batch
    )
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    run, _ = loop.compile_run(method, make_optimizers, mesh, config.sharding, config.seed, example)
    state = run.init()
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))

    def step(images: np.ndarray) -> float:
        nonlocal state
        state, metrics = run.step(state, {"image": images}, run.root)
        return float(jax.block_until_ready((state, metrics))[1]["ssl/loss"])

    return step, parameters, lambda: run.trace(state, example, run.root).lower().compile().as_text()


def references():
    """{name: function that builds the network without its classifier}"""
    torchvision = torch_vision.torchvision()  # before timm, which imports it
    import timm

    def resnet18():
        model = torchvision.models.resnet18()
        model.conv1, model.maxpool = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False), torch.nn.Identity()
        return without_classifier(model)

    def without_classifier(model):
        model.fc = torch.nn.Identity()
        return model

    return {
        "resnet18": resnet18,
        "resnet50": lambda: without_classifier(torchvision.models.resnet50()),
        "vit_small_patch16_224": lambda: timm.create_model("vit_small_patch16_224", num_classes=0),
    }


def torch_nt_xent(z: torch.Tensor) -> torch.Tensor:
    """The loss of `ssl_jax.objectives.contrastive.nt_xent`: z [N, 2, D] -> mean over the 2N views."""
    n = len(z)
    z = torch.nn.functional.normalize(z, dim=-1).transpose(0, 1).reshape(2 * n, -1)
    logits = (z @ z.T / TEMPERATURE).fill_diagonal_(-torch.inf)
    return torch.nn.functional.cross_entropy(logits, torch.arange(2 * n, device=z.device).roll(n))


def theirs(case: Case):
    """(step: batch -> loss, number of parameters)"""
    torch.manual_seed(0)
    encoder = references()[case.reference]()
    hidden, out = case.head
    features = 2048 if case.reference == "resnet50" else hidden
    head = torch.nn.Sequential(
        torch.nn.Linear(features, hidden, bias=False),
        torch.nn.BatchNorm1d(hidden),
        torch.nn.ReLU(),
        torch.nn.Linear(hidden, out, bias=False),
    )
    layout = torch.channels_last if case.reference.startswith("resnet") else torch.contiguous_format
    model = torch.nn.Sequential(encoder, head).to(memory_format=layout).train()
    parameters = list(model.parameters())
    options = {"lr": case.optimizer["lr"], "weight_decay": case.optimizer["weight_decay"]}
    if case.optimizer["name"] == "sgd":
        optimizer = torch.optim.SGD(parameters, momentum=0.9, **options)
    else:
        optimizer = torch.optim.AdamW(parameters, **options)

    def step(images: np.ndarray) -> float:
        x = torch.from_numpy(images).flatten(0, 1).permute(0, 3, 1, 2).float().div(255).contiguous(memory_format=layout)
        loss = torch_nt_xent(model(x).unflatten(0, (-1, 2)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step, sum(p.numel() for p in parameters)


def check_losses_agree() -> None:
    """Raises AssertionError if the two losses differ."""
    z = np.random.default_rng(0).normal(size=(16, 2, 8)).astype(np.float32)
    np.testing.assert_allclose(nt_xent(z, TEMPERATURE)[0], torch_nt_xent(torch.from_numpy(z)), rtol=1e-5)


def timed(step, images) -> tuple[float, float]:
    """(wall-clock seconds, CPU seconds) of one step. Raises FloatingPointError if its loss is not finite."""
    wall, cpu = time.perf_counter(), time.process_time()
    loss = step(images)
    seconds = time.perf_counter() - wall, time.process_time() - cpu
    if not np.isfinite(loss):
        raise FloatingPointError(f"loss {loss}")
    return seconds


def compare(name: str, pairs: int, profile: Path | None) -> dict:
    """Times of both sides in one case, and their ratios."""
    case, load_before = CASES[name], load_average()
    (our_step, our_size, text), (their_step, their_size) = ours(case), theirs(case)
    assert our_size == their_size, f"{name}: {our_size} parameters against {their_size}"
    images = np.random.default_rng(0).integers(0, 256, (case.batch, 2, case.size, case.size, 3), np.uint8)
    for step in (our_step, their_step, our_step, their_step):  # compile, allocate
        step(images)
    seconds = np.empty((pairs, 2, 2))  # pair, (ours, theirs), (wall, CPU)
    for i in range(pairs):
        order = (0, 1) if i % 2 == 0 else (1, 0)
        for side in order:
            (our_step, their_step)[side](images)
            seconds[i, side] = timed((our_step, their_step)[side], images)
    if profile:
        profile.mkdir(parents=True, exist_ok=True)
        (profile / f"{name}.txt").write_text(step_timing.report(lambda: our_step(images), text()))
    ratios = seconds[:, 1] / seconds[:, 0]
    wall, cpu = np.median(seconds, 0).T
    return {
        "load": [load_before, load_average()],
        "batch": case.batch,
        "parameters": our_size,
        "ours_images_per_second": round(float(case.batch / wall[0]), 2),
        "torch_images_per_second": round(float(case.batch / wall[1]), 2),
        "ratio_wall": round(float(np.median(ratios[:, 0])), 3),
        "ratio_wall_range": [round(float(f(ratios[:, 0])), 3) for f in (np.min, np.max)],
        "ours_cpu_seconds": round(float(cpu[0]), 3),
        "torch_cpu_seconds": round(float(cpu[1]), 3),
        "ratio_cpu": round(float(np.median(ratios[:, 1])), 3),
    }


def load_average() -> float:
    """The load average of the last minute."""
    return round(os.getloadavg()[0], 1)


def machine() -> dict:
    """Processor, cores and versions."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "convolutions": conv.convolutions(),
        "huge_pages": "hugetlb=1" in os.environ.get("GLIBC_TUNABLES", ""),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("jax", "flax", "torch", "torchvision", "timm")},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--convolutions", default="auto", help="as config.convolutions")
    parser.add_argument(
        "--profile", type=Path, default=None, help="folder for tables of where our step spends its time"
    )
    arguments = parser.parse_args()
    if jax.default_backend() != "cpu":
        parser.error("this compares CPU steps; set JAX_PLATFORMS=cpu")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    check_losses_agree()
    conv.use_convolutions(arguments.convolutions)

    described = machine()
    print(", ".join(f"{key} {value}" for key, value in described.items()))
    print(
        f"{'case':14}{'batch':>6}{'ours':>9}{'torch':>9}{'ratio':>8}{'(range)':>14}{'CPU s':>9}{'torch':>8}{'ratio':>8}  load"
    )
    results = {}
    for name in arguments.cases:
        results[name] = r = compare(name, arguments.pairs, arguments.profile)
        low, high = r["ratio_wall_range"]
        print(
            f"{name:14}{r['batch']:6}{r['ours_images_per_second']:9.1f}{r['torch_images_per_second']:9.1f}"
            f"{r['ratio_wall']:8.2f}{f'{low:.2f}..{high:.2f}':>14}"
            f"{r['ours_cpu_seconds']:9.2f}{r['torch_cpu_seconds']:8.2f}{r['ratio_cpu']:8.2f}"
            f"  {' -> '.join(map(str, r['load']))}",
            flush=True,
        )
    print("ours, torch: images/s (an image is two views); ratio above 1: ours is faster")
    print(json.dumps({"benchmark": "train_step", "machine": described, "pairs": arguments.pairs, "cases": results}))


if __name__ == "__main__":
    main()

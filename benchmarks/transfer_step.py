"""Train steps of tasks on a ResNet-18, ours against the same networks, losses and optimizer in eager PyTorch, on the CPU.

    JAX_PLATFORMS=cpu PYTHONPATH=. python benchmarks/transfer_step.py [--tasks classification segmentation detection vqa]
        [--backbones trained frozen] [--pairs 5]

Ours is the step that `launch.py train` compiles for the task's config, without augmentations, on torchvision's ResNet-18 read from a
file. 32 embedded scenes are resized to 96 pixels. Both sides begin with the same weights, and their first losses must agree.
A pair is two steps of each, in turns, of which the second is timed (see benchmarks/train_step.py for why, and for what a quiet
machine is). The table gives medians over pairs, and the ratio of wall-clock time with its range; above 1 ours is faster. Ends with one
line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys
import tempfile

import jax
import numpy as np
import torch
import torch_tasks
import torch_vision
from safetensors.numpy import save_file
from train_step import load_average, machine, timed

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from ssl_jax.experiment.build import build_experiment
from ssl_jax.experiment.config import load

SIZE, BATCH = 96, 32
WIDTHS = {"layer1": 64, "layer2": 128, "layer3": 256, "layer4": 512, "pooled": 512}
WHOLE = f"(('resize', dict(height={SIZE}, width={SIZE})),)"
FLAGS = (f"--config.batch_size={BATCH}", "--config.dtype=float32", f"--config.data.ops={WHOLE}", f"--config.data.eval_ops={WHOLE}",
         "--config.optim.net.warmup=0 steps")  # fmt: skip
PLAIN = "--config.views=((),)"  # no augmentation
TASKS = {
    "classification": ("supervised.py:transfer", (PLAIN, "--config.data.train_split=train")),
    "segmentation": ("segmentation.py", (PLAIN,)),
    "detection": ("detection.py", ("--config.model.maps=('layer1','layer2','layer3')",)),
    "vqa": ("vqa.py", ()),
}


def their_head(task: str, config) -> torch_tasks.Head:
    model = config.model
    if task == "classification":
        return torch_tasks.Classifier(WIDTHS["pooled"], config.data.num_classes)
    if task == "segmentation":
        width = sum(WIDTHS[name] for name in model.maps)
        return torch_tasks.Segmenter(model.maps, width, model.head.channels, model.classes, model.ignore)
    if task == "detection":
        widths = [WIDTHS[name] for name in model.maps]
        doublings = (4 // model.head.stride).bit_length() - 1  # a quarter of the image is the finest map
        return torch_tasks.Detector(model.maps, widths, model.head.width, config.data.classes["box_label"], doublings, model.weights)
    fusion, question, sizes = model.fusion, model.question, config.data.vocabulary
    return torch_tasks.Answerer(
        model.layer, WIDTHS[model.layer], sizes.question, sizes.answer, question.embedding, question.width, fusion.width,
        fusion.blocks, fusion.projection, fusion.hidden,
    )  # fmt: skip


def sides(task: str, backbone: str, folder: pathlib.Path):
    """(our step, their step, whether ours has the same number of parameters); a step is a function of nothing that gives its loss."""
    torch.manual_seed(0)
    resnet, file = torch_vision.torchvision().models.resnet18(), folder / "weights.safetensors"
    save_file({name: np.ascontiguousarray(value.numpy()) for name, value in resnet.state_dict().items()}, file)
    recipe, flags = TASKS[task]
    root = pathlib.Path(__file__).parents[1]
    stage = (f"--config.stages.backbone.weights={file}", f"--config.model.backbone={backbone}")
    experiment = build_experiment(load(str(root / "configs" / recipe), (*FLAGS, *flags, *stage)), jax.devices()[:1])
    batch = {name: np.asarray(experiment.batches[0][name]) for name in experiment.method.inputs}
    run, state = experiment.run, experiment.run.init()
    net = jax.device_get(state.params["net"])
    name = "/".join(("", experiment.method.phases[0].name, "loss"))[1:]

    def ours() -> float:
        nonlocal state
        state, metrics = run.step(state, batch, run.root)
        return float(jax.block_until_ready((state, metrics))[1][name])

    config = experiment.config
    source = config.stages.backbone.config.model
    trunk = torch_tasks.Trunk(resnet, tuple(source.mean), tuple(source.std), backbone == "frozen")
    head = their_head(task, config)
    parts = {name: tree for name, tree in net.items() if name != "backbone"}
    if task in ("segmentation", "detection"):
        parts = parts["head"]
    elif task == "vqa":
        parts = {**parts["question"], **parts["fusion"]}
    torch_tasks.copy(head, parts)
    trunk, head = (module.to(memory_format=torch.channels_last) for module in (trunk, head.train()))
    weights = [p for module in (trunk, head) for p in module.parameters() if p.requires_grad]
    spec = config.optim.net
    optimizer = torch.optim.AdamW(weights, spec.lr, weight_decay=spec.weight_decay)

    def theirs() -> float:
        inputs = {name: torch.from_numpy(value) for name, value in batch.items()}
        images = inputs["image"].permute(0, 3, 1, 2).float().div(255).contiguous(memory_format=torch.channels_last)
        loss = head.loss(trunk(images), {**inputs, "image": images, **_longs(inputs)})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return ours, theirs


def _longs(inputs):
    return {name: inputs[name].long() for name in ("label", "question", "answer") if name in inputs}


def compare(task: str, backbone: str, pairs: int) -> dict:
    """Times of both sides and their ratio. Raises AssertionError if the first losses differ."""
    before = load_average()
    with tempfile.TemporaryDirectory() as folder:
        steps = sides(task, backbone, pathlib.Path(folder))
    first = [step() for step in steps]
    np.testing.assert_allclose(*first, rtol=2e-3, err_msg=f"{task}, {backbone}: first losses")
    for step in (*steps, *steps):
        step()
    seconds = np.empty((pairs, 2))
    for pair in range(pairs):
        for side in (0, 1) if pair % 2 == 0 else (1, 0):
            steps[side]()
            seconds[pair, side] = timed(lambda _, step=steps[side]: step(), None)[0]
    ratios, (ours, theirs) = seconds[:, 1] / seconds[:, 0], np.median(seconds, 0)
    return {
        "load": [before, load_average()],
        "first_losses": [round(value, 4) for value in first],
        "ours_images_per_second": round(BATCH / ours, 1),
        "torch_images_per_second": round(BATCH / theirs, 1),
        "ratio_wall": round(float(np.median(ratios)), 3),
        "ratio_wall_range": [round(float(f(ratios)), 3) for f in (np.min, np.max)],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--backbones", nargs="+", default=["trained", "frozen"], choices=["trained", "frozen"])
    parser.add_argument("--pairs", type=int, default=5)
    arguments = parser.parse_args()
    if jax.default_backend() != "cpu":
        parser.error("this compares CPU steps; set JAX_PLATFORMS=cpu")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    results = {}
    for task in arguments.tasks:
        for backbone in arguments.backbones:
            results[f"{task}, {backbone}"] = r = compare(task, backbone, arguments.pairs)
            print(f"{task:15} {backbone:8} ours {r['ours_images_per_second']:7.1f}/s  torch {r['torch_images_per_second']:7.1f}/s"
                  f"  ratio {r['ratio_wall']:.2f} {r['ratio_wall_range']}  load {r['load']}", flush=True)  # fmt: skip
    print(json.dumps({"benchmark": "transfer_step", "machine": machine(), "pairs": arguments.pairs, "cases": results}))


if __name__ == "__main__":
    main()

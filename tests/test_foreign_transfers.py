"""Every task on encoders of torchvision and timm, from files that these packages wrote: a few steps each."""

import pathlib

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from test_torch_layout import randomize
from torch_reference import require_timm, require_torchvision

from ssl_jax.engine.loop import to_device
from ssl_jax.experiment import config as configs
from ssl_jax.experiment.build import build_experiment

ROOT = pathlib.Path(__file__).parent.parent
TINY = ("--config.data.name=scenes/tiny", "--config.batch_size=8", "--config.eval_batch_size=8", "--config.total=2 steps",
        "--config.evaluate_every=0 steps", "--config.checkpoint_every=1 steps", "--config.optim.net.warmup=0 steps")  # fmt: skip


def of_torchvision(name):
    return lambda: randomize(getattr(require_torchvision().models, name)())


def of_timm(name, size):
    return lambda: randomize(require_timm().create_model(name, img_size=size))


ENCODERS = {  # (model, size of its images, names of its maps from fine to coarse)
    "ResNet-18 of torchvision": (of_torchvision("resnet18"), 48, ("layer2", "layer3")),
    "ResNet-50 of torchvision": (of_torchvision("resnet50"), 48, ("layer2", "layer3")),
    "ViT-S/16 of timm": (of_timm("vit_small_patch16_224", 48), 48, ("patches",)),
    "DINOv2 ViT-S/14": (of_timm("vit_small_patch14_dinov2", 56), 56, ("patches",)),
    "MAE ViT-B/16": (of_timm("vit_base_patch16_224", 48), 48, ("patches",)),
}


def tasks(size, maps):
    """{recipe: overrides}"""
    whole = f"(('resize', dict(height={size}, width={size})),)"
    crop = f"((('random_resized_crop', dict(size={size}, area=(0.5, 1.0))),),)"
    everywhere = (f"--config.data.ops={whole}", f"--config.data.eval_ops={whole}")
    return {
        "supervised.py:transfer": (f"--config.views={crop}", everywhere[1], "--config.data.train_split=train"),
        "segmentation.py": (*everywhere, f"--config.model.maps={maps}"),
        "detection.py": (*everywhere, f"--config.model.maps={maps}", f"--config.model.head.stride={size // (48 // 8)}"),
        "vqa.py": (*everywhere, f"--config.model.layer={maps[-1]}"),
    }


@pytest.mark.full
@pytest.mark.parametrize("name", ENCODERS)
def test_every_task_trains_on_the_encoder_of_a_file(name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    make, size, maps = ENCODERS[name]
    state = {key: np.ascontiguousarray(value.numpy()) for key, value in make().state_dict().items()}
    save_file(state, tmp_path / "weights.safetensors")
    for recipe, overrides in tasks(size, maps).items():
        stage = f"--config.stages.backbone.weights={tmp_path}/weights.safetensors"
        experiment = build_experiment(configs.load(f"configs/{recipe}", (*TINY, stage, *overrides)), jax.devices()[:1])
        run, state = experiment.run, experiment.run.init()
        before = jax.device_get(state.params)
        batches = ({name: experiment.batches[i][name] for name in experiment.method.inputs} for i in range(2))
        for batch in to_device(batches, run.mesh):
            state, metrics = run.step(state, batch, run.root)
            assert all(np.isfinite(value) for value in jax.device_get(metrics).values()), recipe
        after = jax.device_get(state.params)
        assert "backbone" not in after["net"]  # frozen
        assert any(np.any(x != y) for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)), recipe

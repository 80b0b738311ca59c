"""The train steps that `accelerator.py` times and `hlo_table.py` counts: one place for their sizes.

Each case has a config function, which changes a recipe of ours, and a reference of the same size in `torch_steps.py`. Images come
as they are, without augmentations.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Size(NamedTuple):
    network: int | str  # depth of the ResNet, variant of the ViT, size of the ViT-VQGAN, channels of BigGAN
    batch: int
    pixels: int


class Case(NamedTuple):
    title: str
    recipe: str
    change: Callable  # (config, size): the config of a size
    size: Size
    smoke: Size  # of the same step in seconds on a CPU
    reference: str  # a function of torch_steps.py


def simclr(config, size: Size) -> None:
    small = size.network == 18
    config.views = ((), ())
    config.model.encoder = dict(name="resnet", depth=size.network, stem="cifar" if small else "imagenet")
    config.model.head.widths = (512 if small else 2048, 128)
    config.optim = dict(net=dict(name="sgd", lr=0.01, weight_decay=1e-4))


def vit(config, size: Size) -> None:
    config.views = ((),)
    config.model.encoder = dict(name="vit", variant=size.network)
    config.model.smoothing = 0.1
    config.optim = dict(net=dict(name="adamw", lr=1e-4, weight_decay=0.05))


def masked_vit(config, size: Size) -> None:
    vit(config, size)
    config.optim = dict(net=dict(name="adamw", lr=1e-4, b2=0.95, weight_decay=0.05))


def vit_vqgan(config, size: Size) -> None:
    """Neither side recomputes. R1 is left out on both sides, since PyTorch does not compile second derivatives."""
    config.views = ((),)
    for part in (config.model.encoder, config.model.decoder):
        part.remat, part.size = "none", size.network
    config.model.r1.weight = 0.0
    if size.network == "mu":
        config.model.discriminator.channel_base, config.model.discriminator.channel_max = 128, 16


def biggan(config, size: Size) -> None:
    """A batch is two discriminator steps of half of it."""
    config.model.generator.channels = config.model.discriminator.channels = size.network
    if size.pixels == 32:
        config.model.generator.attention = config.model.discriminator.attention = (16,)
    config.model.orthogonal = 0.0  # the reference has none


CASES = {
    "simclr_resnet50": Case(
        "SimCLR, ResNet-50, 224 px", "simclr.py:imagenet", simclr, Size(50, 256, 224), Size(50, 4, 32), "simclr"
    ),
    "vit_b16": Case(
        "ViT-B/16, 224 px", "supervised.py:imagenet", vit, Size("B/16", 256, 224), Size("mu/16", 4, 32), "vit"
    ),
    "vit_l16": Case(
        "ViT-L/16, 224 px", "supervised.py:imagenet", vit, Size("L/16", 128, 224), Size("mu/16", 4, 48), "vit"
    ),
    "masked_vit_b16": Case(
        "masked ViT-B/16, 224 px",
        "supervised.py:imagenet",
        masked_vit,
        Size("B/16", 256, 224),
        Size("mu/16", 4, 64),
        "masked_vit",
    ),
    "vit_vqgan_small": Case(
        "ViT-VQGAN small, 256 px",
        "vit_vqgan.py:imagenet256",
        vit_vqgan,
        Size("small", 64, 256),
        Size("mu", 4, 32),
        "vit_vqgan",
    ),
    "biggan_128": Case("BigGAN, 128 px", "biggan.py:imagenet128", biggan, Size(96, 256, 128), Size(4, 4, 32), "biggan"),
    "simclr_resnet18": Case(
        "SimCLR, ResNet-18, 32 px", "simclr.py:imagenet", simclr, Size(18, 512, 32), Size(18, 4, 32), "simclr"
    ),
}


def config_of(name: str, size: Size):
    """The config of a case in bfloat16."""
    from ssl_jax.experiment.config import load

    case = CASES[name]
    config = load(str(ROOT / "configs" / case.recipe), [f"--config.batch_size={size.batch}"])
    with config.unlocked():
        crops = (
            dict(crop=size.pixels, resize=size.pixels)
            if config.data.ops[0][0] == "resize_crop"
            else dict(size=size.pixels)
        )
        config.data.ops = tuple((op, {**options, **crops}) for op, options in config.data.ops)
        config.dtype = "bfloat16"
        case.change(config, size)
    return config


def run_of(name: str, size: Size, device, platform: str, abstract: bool = False):
    """(run, shapes of a batch) of a case, by the functions of `launch.py train`; `abstract`: the device is a description."""
    from ssl_jax.data.catalog import facts
    from ssl_jax.engine import sharding
    from ssl_jax.experiment import config as configs
    from ssl_jax.experiment.build import fill_in, make_run
    from ssl_jax.methods import build_method

    config = config_of(name, size)
    data = facts(config.data)
    config = fill_in(config, data, platform)
    total = configs.resolve(config, data.examples)["total"]
    if CASES[name].change is masked_vit:
        import masked_vit as ours

        method = ours.build(config)
    else:
        method = build_method(config)
    run, _, example = make_run(config, method, sharding.make_mesh({}, [device]), total, {}, abstract=abstract)
    return run, example

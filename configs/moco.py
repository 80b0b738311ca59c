"""MoCo 1 to 3 (He et al. 2020, arXiv:1911.05722; Chen et al. 2020, arXiv:2003.04297; Chen et al. 2021, arXiv:2104.02057).

  python launch.py train --config=configs/moco.py --workdir=runs/moco
  python launch.py configs moco
"""

import ml_collections

from configs import common, simclr
from configs.common import Variant

ALL = ((".*", 1.0),)  # weight decay of every parameter


def version2(config, widths, queue, groups, momentum, temperature):
    """A head with biases and without BatchNorm."""
    config.model.projector = dict(widths=widths, batch_norm=False)
    config.model.update(dict(
        queue=queue, groups=groups, symmetric=False, temperature=temperature, weight=1.0,
        momentum=momentum, momentum_schedule="constant",
    ))  # fmt: skip


def version3(config, hidden, width, momentum, temperature):
    config.model.projector = dict(widths=(hidden, width), last_scale=False)
    config.model.predictor = dict(widths=(hidden, width), last_batch_norm=False)
    config.model.update(dict(
        queue=0, groups=1, symmetric=True, temperature=temperature, weight=2 * temperature,
        momentum=momentum, momentum_schedule="cosine",
    ))  # fmt: skip
    config.optim.predictor = config.optim.net.copy_and_resolve_references()


def scenes(config):
    simclr.relative(config, simclr.scenes)
    version2(config, (256, 128), 4096, 8, 0.98, 0.2)


def smoke(config):
    scenes(config)
    common.shrink(config, {
        "model.encoder.width": 0.125,
        "model.encoder.zero_init_residual": True,  # as in configs/simclr.py
        "model.projector.widths": (64, 32),
        "model.queue": 64,
        "model.groups": 2,
        "optim.net.warmup": "0.1 epochs",
    })  # fmt: skip


def scenes_one_batch_norm(config):
    """An ablation of version 1 (section 3.3): without groups and shuffled keys."""
    scenes(config)
    config.model.groups = 1


def scenes_v3(config):
    simclr.relative(config, simclr.scenes)
    version3(config, 256, 128, 0.98, 0.2)


def smoke_v3(config):
    scenes_v3(config)
    common.shrink(config, {
        "model.encoder.width": 0.125,
        "model.encoder.zero_init_residual": True,
        "model.projector.widths": (64, 32),
        "model.predictor.widths": (64, 32),
        "optim.net.warmup": "0.1 epochs",
        "optim.predictor.warmup": "0.1 epochs",
    })  # fmt: skip


def cifar10_small(config):
    simclr.relative(config, simclr.cifar10_small)
    version2(config, (256, 128), 4096, 8, 0.98, 0.2)


def cifar10_small_v3(config):
    simclr.relative(config, simclr.cifar10_small)
    version3(config, 256, 128, 0.98, 0.2)


def cifar10(config):
    """MoCo's CIFAR-10 demo: SGD 0.06 at batch 512, decay 5e-4 of all, queue 4096, momentum .99, tau .1, eight BatchNorms, no blur.

    Changed: JPEG CIFAR-10.
    """
    simclr.relative(config, simclr.cifar10)
    config.views = ((
        ("random_resized_crop", dict(size=32, area=(0.08, 1.0))), ("flip", dict(p=0.5)),
        ("color_jitter", dict(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, p=0.8, style="torchvision")),
        ("grayscale", dict(p=0.2)),
    ),) * 2  # fmt: skip
    config.total = "200 epochs"
    config.model.mean, config.model.std = common.CIFAR_MEAN, common.CIFAR_STD
    config.optim = dict(net=dict(name="sgd", lr=0.06, weight_decay=5e-4, weight_decay_mask=ALL))
    config.evals.knn = dict(kind="knn", k=200, temperature=0.1)
    version2(config, (128,), 4096, 8, 0.99, 0.1)


def imagenet(config):
    """Version 2: SGD 0.03 at batch 256, decay 1e-4 of all, 200 epochs, queue 65,536, momentum .999, tau .2, eight BatchNorms."""
    simclr.relative(config, simclr.imagenet)
    config.views = (simclr.moco_views(224, crop=False),) * 2
    config.data.ops = (("random_resized_crops", dict(size=224, crops=2, area=(0.2, 1.0), interpolation="bilinear")),)
    config.batch_size, config.total = 256, "200 epochs"
    config.model.encoder.flavor, config.model.encoder.zero_init_residual = "torchvision", False
    config.model.mean, config.model.std = common.IMAGENET_MEAN, common.IMAGENET_STD
    config.optim = dict(net=dict(name="sgd", lr=0.03, weight_decay=1e-4, weight_decay_mask=ALL))
    version2(config, (2048, 128), 65536, 8, 0.999, 0.2)


def imagenet_v3(config):
    """LARS 0.6 x B / 256 at batch 4096, decay 1e-6, 100 epochs with 10 of warm-up, momentum .99 rising to 1, tau 1."""
    simclr.relative(config, simclr.imagenet)
    config.views = simclr.asymmetric_views(224, (0.2, 1.0), crop=False)
    config.data.ops = (("random_resized_crops", dict(size=224, crops=2, area=(0.2, 1.0), interpolation="bilinear")),)
    config.model.encoder.flavor, config.model.encoder.zero_init_residual = "torchvision", True
    config.model.mean, config.model.std = common.IMAGENET_MEAN, common.IMAGENET_STD
    config.optim = dict(net=dict(name="lars", lr=0.6, lr_scale="linear", weight_decay=1e-6, warmup="10 epochs"))
    version3(config, 4096, 256, 0.99, 1.0)


def imagenet_v3_vit_s(config):
    """AdamW 1.5e-4 x B / 256 at batch 4096, decay .1, 300 epochs with 40 of warm-up, tau .2; the patch embedding is not trained."""
    imagenet_v3(config)
    config.total = "300 epochs"
    config.model.encoder = dict(name="vit", variant="S12/16", pool="cls", position="sincos2d")
    config.optim = dict(net=dict(
        name="adamw", lr=1.5e-4, lr_scale="linear", weight_decay=0.1, warmup="40 epochs",
        lr_multipliers=((r"/patch_embed/", 0.0), (".*", 1.0)),
    ))  # fmt: skip
    version3(config, 4096, 256, 0.99, 0.2)
    config.model.projector.widths = (4096, 4096, 256)
    config.model.predictor.update(dict(last_batch_norm=True, last_scale=False))
    config.optim.predictor.lr_multipliers = ALL


VARIANTS = (
    Variant("", scenes, "version 2 on embedded scenes, the encoder, views and budget of configs/simclr.py", hardware="2 CPU cores"),
    Variant("smoke", smoke, "the default in seconds, for tests"),
    Variant("scenes_one_batch_norm", scenes_one_batch_norm, "the default with one BatchNorm for the whole batch",
            hardware="2 CPU cores"),
    Variant("scenes_v3", scenes_v3, "version 3 on embedded scenes", hardware="2 CPU cores"),
    Variant("smoke_v3", smoke_v3, "version 3 in seconds, for tests"),
    Variant("cifar10_small", cifar10_small, "version 2 on JPEG CIFAR-10, as configs/simclr.py:cifar10_small", hardware="2 CPU cores"),
    Variant("cifar10_small_v3", cifar10_small_v3, "version 3 on JPEG CIFAR-10", hardware="2 CPU cores"),
    Variant("cifar10", cifar10, "version 1, ResNet-18, batch 512, 200 epochs", hardware="1 accelerator",
            expected="kNN 82.6 (k=200, T=0.1; the best epoch)", source="MoCo's CIFAR-10 demo"),
    Variant("imagenet", imagenet, "version 2, ResNet-50, batch 256, 200 epochs", hardware="8 GPUs",
            expected="linear 67.7 (67.5 ± 0.1)", source="the official README"),
    Variant("imagenet_v3", imagenet_v3, "version 3, ResNet-50, batch 4096, 100 epochs of LARS", expected="linear 68.9",
            source="the official README"),
    Variant("imagenet_v3_vit_s", imagenet_v3_vit_s, "version 3, ViT-S/16, batch 4096, 300 epochs of AdamW", expected="linear 73.2",
            source="the official README"),
)  # fmt: skip


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    return common.make("moco", VARIANTS, variant)

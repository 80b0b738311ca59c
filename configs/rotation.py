"""Rotation prediction, RotNet (Gidaris et al. 2018, arXiv:1803.07728).

  python launch.py train --config=configs/rotation.py --workdir=runs/rotation
  python launch.py configs rotation

`config.batch_size` counts images; the network sees each in all orientations.
"""

import ml_collections

from configs import common
from configs.common import Variant

NONE = dict(widths=())
ALL = ((".*", 1.0),)  # weight decay of every parameter


def scenes(config):
    common.pretext(config)
    # Mirrored first, then rotated by the method: a flip after the rotation would make 90 and 270 degrees the same.
    config.views = ((("random_resized_crop", dict(size=32, area=(0.4, 1.0))), ("flip", dict(p=0.5))),)
    config.model = dict(
        turns=(0, 1, 2, 3),
        encoder=dict(name="resnet", depth=10, width=0.25, stem="stride2", zero_init_residual=False),
        layer="pooled",
        embed=NONE,
        head=NONE,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
    )


def smoke(config):
    scenes(config)
    common.shrink_pretext(config)


def two(config):
    scenes(config)
    config.model.turns = (0, 2)


def cifar10_small(config):
    """The paper's augmentation: crops of a large part of a small photograph would hide what stands upright."""
    scenes(config)
    common.pretext_cifar10(config)
    config.views = ((("random_crop", dict(size=32, pad=4)), ("flip", dict(p=0.5))),)
    config.total = config.evaluate_every = "16 epochs"
    config.evals.pretext.examples = 10_000


def cifar10_nin(config):
    """SGD 0.1 with Nesterov's momentum, decay 5e-4, batch 128 (512 views), 200 epochs, rate times 0.2 after 60, 120 and 160.

    Changed: JPEG CIFAR-10; the classifier starts at zero.
    """
    config.data.name = "cifar10"
    config.batch_size = 128
    config.total = "200 epochs"
    config.views = ((("random_crop", dict(size=32, pad=4)), ("flip", dict(p=0.5))),)
    config.model = dict(
        turns=(0, 1, 2, 3), encoder=dict(name="nin", blocks=4), layer="pooled", embed=NONE, head=NONE,
        mean=common.CIFAR_MEAN, std=common.CIFAR_STD,
    )  # fmt: skip
    steps = dict(schedule="step", milestones=(0.3, 0.6, 0.8), factor=0.2)
    config.optim = dict(net=dict(name="sgd", lr=0.1, nesterov=True, weight_decay=5e-4, weight_decay_mask=ALL, **steps))
    config.evals = dict(
        nonlinear=dict(kind="nonlinear", layer="block2"),
        conv=dict(kind="convolutional", layer="block2"),
        layers=dict(kind="linear_by_layer", features=9600, pooling="max", normalization="channel", solver="sgd"),
        pretext=dict(kind="pretext", examples=10_000),
    )
    config.evaluate_every, config.checkpoint_every = "0 steps", "5 epochs"
    config.log_every_steps, config.baselines, config.best_metric = 50, ("untrained",), ""


def imagenet(config):
    common.pretext_imagenet(config)
    config.data.ops = (("random_resized_crops", dict(size=224, crops=1, area=(0.08, 1.0), interpolation="bilinear")),)
    config.data.eval_ops = common.IMAGENET_EVAL
    config.views = ((("flip", dict(p=0.5)),),)


def imagenet_alexnet(config):
    """SGD 0.01, batch 192 (768 views), 50 epochs, rate times 0.1 after 15, 30 and 45, decay 5e-4.

    AlexNet with BatchNorm and two layers of 4,096 on its last maps. Changed: the BatchNorm of the
    last one has no offset, and the classifier starts at zero.
    """
    imagenet(config)
    config.batch_size = 192
    config.total = "50 epochs"
    config.model = dict(
        turns=(0, 1, 2, 3),
        encoder=dict(name="alexnet", form="one_tower", norm="batch"),
        layer="pool5",
        embed=dict(widths=(4096, 4096)),
        head=NONE,
        mean=common.IMAGENET_MEAN,
        std=common.IMAGENET_STD,
    )
    steps = dict(schedule="step", milestones=(0.3, 0.6, 0.9))
    config.optim = dict(net=dict(name="sgd", lr=0.01, nesterov=True, weight_decay=5e-4, weight_decay_mask=ALL, **steps))
    config.evals.layers.pooling = "max"


def imagenet_r50(config):
    """mmselfsup's: SGD 0.2, batch 128 (512 views), 70 epochs with 5 of warm-up, rate times 0.1 after 30 and 50, decay 1e-4 of all.

    Changed: BatchNorm normalizes all views together (there 64 per GPU); the classifier starts at zero.
    """
    imagenet(config)
    config.batch_size = 128
    config.total = "70 epochs"
    config.model = dict(
        turns=(0, 1, 2, 3),
        encoder=dict(name="resnet", depth=50, zero_init_residual=False),
        layer="pooled",
        embed=NONE,
        head=NONE,
        mean=common.IMAGENET_MEAN,
        std=common.IMAGENET_STD,
    )
    steps = dict(schedule="step", milestones=(30 / 70, 50 / 70), warmup="5 epochs")
    config.optim = dict(net=dict(name="sgd", lr=0.2, weight_decay=1e-4, weight_decay_mask=ALL, **steps))


VARIANTS = (
    Variant("", scenes, "embedded scenes, ResNet-10 of width 1/4, 20 epochs of 64 images in four orientations",
            hardware="2 CPU cores"),
    Variant("smoke", smoke, "the default in seconds, for tests"),
    Variant("two", two, "the default with 0 and 180 degrees only", hardware="2 CPU cores"),
    Variant("cifar10_small", cifar10_small, "JPEG CIFAR-10, ResNet-10 of width 1/4, 16 epochs", hardware="2 CPU cores"),
    Variant("cifar10_nin", cifar10_nin,
            "the paper's: Network in Network of four blocks, 200 epochs; probes of block 2", hardware="1 accelerator"),
    Variant("imagenet_alexnet", imagenet_alexnet, "the paper's: AlexNet with BatchNorm, batch 192, 50 epochs",
            hardware="1 accelerator"),
    Variant("imagenet_r50", imagenet_r50, "ResNet-50, batch 128, 70 epochs", hardware="8 GPUs",
            expected="linear on stem and stages 1 to 4: 12.15, 31.99, 44.57, 54.20, 45.94", source="mmselfsup's README"),
)  # fmt: skip


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    return common.make("rotation", VARIANTS, variant)

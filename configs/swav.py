"""SwAV (Caron et al. 2020, arXiv:2006.09882): views predict each other's assignments to prototypes.

  python launch.py train --config=configs/swav.py --workdir=runs/swav
  python launch.py configs swav
"""

import ml_collections

from configs import common, simclr
from configs.common import Variant


def networks(config, widths, prototypes, queue=0, queue_from="0 steps", frozen="0 steps"):
    """BatchNorm in the head but not on its output, and biases, as in the official code."""
    config.model.projector = dict(widths=widths, bias=True, last_batch_norm=False)
    config.model.update(dict(
        prototypes=prototypes, frozen=frozen, temperature=0.1, epsilon=0.05, iterations=3, queue=queue, queue_from=queue_from,
    ))  # fmt: skip


def scenes(config):
    simclr.relative(config, simclr.scenes)
    networks(config, (256, 128), 128)


def smoke(config):
    scenes(config)
    common.shrink(config, {
        "model.encoder.width": 0.125,
        "model.encoder.zero_init_residual": True,  # as in configs/simclr.py
        "model.projector.widths": (64, 32),
        "model.prototypes": 16,
        "model.queue": 64,
        "model.queue_from": "2 steps",
        "model.frozen": "2 steps",
        "optim.net.warmup": "0.1 epochs",
    })  # fmt: skip


def smoke_crops(config):
    """Two views of 32 pixels and two of 16."""
    smoke(config)
    large, *others = config.views[0]
    small = (("random_resized_crop", dict(size=16, area=(0.05, 0.2))), *others)
    common.of_two_sizes(config, (large, *others), small, 2)


def cifar10_small(config):
    simclr.relative(config, simclr.cifar10_small)
    networks(config, (256, 128), 256)


def cifar10(config):
    """solo-learn's: LARS 0.6 x B / 256, decay 1e-6, 3000 prototypes, queue of 3840 from epoch 50, prototypes frozen for 2 epochs.

    Changed: JPEG CIFAR-10; the trust ratio is not clipped; BatchNorm normalizes all views together.
    """
    simclr.relative(config, simclr.cifar10)
    config.views = simclr.small_images_views()
    config.batch_size, config.total = 256, "1000 epochs"
    config.model.mean, config.model.std = common.CIFAR_MEAN, common.CIFAR_STD
    config.optim = dict(net=dict(name="lars", lr=0.6, lr_scale="linear", trust=0.02, weight_decay=1e-6, warmup="10 epochs"))
    networks(config, (2048, 128), 3000, queue=3840, queue_from="50 epochs", frozen="2 epochs")


def imagenet(config):
    """Two crops of 224 pixels and six of 96; LARS 0.3 x B / 256 at batch 4096, decay 1e-6, 800 epochs with 10 of warm-up.

    Changed: the device crops from one large crop of the host; LARS has the rate inside the momentum.
    """
    simclr.relative(config, simclr.imagenet)
    config.data.ops = (("resize_crop", dict(resize=256, crop=256, interpolation="bilinear")),)
    color = (
        ("flip", dict(p=0.5)),
        ("color_jitter", dict(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, p=0.8, style="torchvision")),
        ("grayscale", dict(p=0.2)), ("blur", dict(p=0.5, sigma=(0.1, 2.0))),
    )  # fmt: skip
    large = (("random_resized_crop", dict(size=224, area=(0.14, 1.0))), *color)
    small = (("random_resized_crop", dict(size=96, area=(0.05, 0.14))), *color)
    common.of_two_sizes(config, large, small, 6)
    config.total = "800 epochs"
    config.model.encoder.flavor, config.model.encoder.zero_init_residual = "torchvision", False
    config.model.mean, config.model.std = common.IMAGENET_MEAN, common.IMAGENET_STD
    config.optim = dict(net=dict(name="lars", lr=0.3, lr_scale="linear", weight_decay=1e-6, warmup="10 epochs", end=0.001))
    networks(config, (2048, 128), 3000, frozen="1 epoch")


VARIANTS = (
    Variant("", scenes, "embedded scenes, the encoder, views and budget of configs/simclr.py", hardware="2 CPU cores"),
    Variant("smoke", smoke, "the default in seconds, with a queue, for tests"),
    Variant("smoke_crops", smoke_crops, "the same with views of two sizes"),
    Variant("cifar10_small", cifar10_small, "JPEG CIFAR-10, the encoder, views and budget of configs/simclr.py:cifar10_small",
            hardware="2 CPU cores"),
    Variant("cifar10", cifar10, "ResNet-18, batch 256, 1000 epochs of LARS", hardware="1 accelerator",
            expected="linear 89.17 (trained online, on augmented views)", source="solo-learn's README"),
    Variant("imagenet", imagenet, "ResNet-50, 2 + 6 crops, batch 4096, 800 epochs", hardware="64 GPUs", expected="linear 75.3",
            source="the official README"),
)  # fmt: skip


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    return common.make("swav", VARIANTS, variant)

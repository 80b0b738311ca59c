"""Barlow Twins (Zbontar et al. 2021, arXiv:2103.03230): the cross-correlation of two embeddings becomes the identity.

  python launch.py train --config=configs/barlow_twins.py --workdir=runs/barlow_twins
  python launch.py configs barlow_twins
"""

import ml_collections

from configs import common, simclr
from configs.common import Variant


def networks(config, widths, off_diagonal, scale):
    """Linear layers have no biases; the embedding has no BatchNorm but that of the loss."""
    config.model.projector = dict(widths=widths, last_batch_norm=False)
    config.model.weights = dict(off_diagonal=off_diagonal, scale=scale)


def scenes(config):
    simclr.relative(config, simclr.scenes)
    networks(config, (512, 512, 512), 0.005, 0.1)


def smoke(config):
    scenes(config)
    common.shrink(config, {
        "model.encoder.width": 0.125,
        "model.encoder.zero_init_residual": True,  # as in configs/simclr.py
        "model.projector.widths": (64, 64),
        "optim.net.warmup": "0.1 epochs",
    })  # fmt: skip


def cifar10_small(config):
    simclr.relative(config, simclr.cifar10_small)
    networks(config, (512, 512, 512), 0.005, 0.1)


def cifar10(config):
    """solo-learn's: LARS 0.3 x B / 256, decay 1e-4, projector 2048-2048-2048, loss times .1.

    Changed: JPEG CIFAR-10; the trust ratio is not clipped; BatchNorm normalizes both views together.
    """
    simclr.relative(config, simclr.cifar10)
    config.views = simclr.small_images_views()
    config.batch_size, config.total = 256, "1000 epochs"
    config.model.mean, config.model.std = common.CIFAR_MEAN, common.CIFAR_STD
    config.optim = dict(net=dict(name="lars", lr=0.3, lr_scale="linear", trust=0.02, weight_decay=1e-4, warmup="10 epochs"))
    networks(config, (2048, 2048, 2048), 0.005, 0.1)


def imagenet(config):
    """LARS 0.2 x B / 256, decay 1e-6, batch 2048, 1000 epochs with 10 of warm-up.

    The official gradients are 1 / devices of the true ones, 16 in the README: the loss is scaled by that. Changed: biases and
    BatchNorm have their rate, .0048 x B / 256, by a multiplier; BatchNorm normalizes both views together.
    """
    simclr.relative(config, simclr.imagenet)
    config.views = simclr.asymmetric_views(224, (0.08, 1.0), crop=False)
    config.batch_size, config.total = 2048, "1000 epochs"
    config.model.encoder.flavor, config.model.encoder.zero_init_residual = "torchvision", True
    config.model.mean, config.model.std = common.IMAGENET_MEAN, common.IMAGENET_STD
    config.optim = dict(net=dict(
        name="lars", lr=0.2, lr_scale="linear", weight_decay=1e-6, warmup="10 epochs", end=0.001,
        lr_multipliers=((r"/(bias|scale)$", 0.0048 / 0.2), (".*", 1.0)),
    ))  # fmt: skip
    networks(config, (8192, 8192, 8192), 0.0051, 1 / 16)


VARIANTS = (
    Variant("", scenes, "embedded scenes, the encoder, views and budget of configs/simclr.py", hardware="2 CPU cores"),
    Variant("smoke", smoke, "the default in seconds, for tests"),
    Variant("cifar10_small", cifar10_small, "JPEG CIFAR-10, the encoder, views and budget of configs/simclr.py:cifar10_small",
            hardware="2 CPU cores"),
    Variant("cifar10", cifar10, "ResNet-18, batch 256, 1000 epochs of LARS", hardware="1 accelerator",
            expected="linear 92.10 (trained online, on augmented views)", source="solo-learn's README"),
    Variant("imagenet", imagenet, "ResNet-50, batch 2048, 1000 epochs of LARS", hardware="16 GPUs",
            expected="linear 73.5", source="the official README"),
)  # fmt: skip


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    return common.make("barlow_twins", VARIANTS, variant)

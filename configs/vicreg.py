"""VICReg (Bardes et al. 2022, arXiv:2105.04906): invariance, variance and covariance of two embeddings.

  python launch.py train --config=configs/vicreg.py --workdir=runs/vicreg
  python launch.py configs vicreg
"""

import ml_collections

from configs import common, simclr
from configs.common import Variant


def networks(config, widths):
    """Linear layers before a BatchNorm have biases, the last one has none, as in the official code."""
    config.model.projector = dict(widths=widths, bias=True, last_bias=False, last_batch_norm=False)
    config.model.weights = dict(invariance=25.0, variance=25.0, covariance=1.0)


def scenes(config):
    simclr.relative(config, simclr.scenes)
    networks(config, (512, 512, 512))


def smoke(config):
    scenes(config)
    common.shrink(config, {
        "model.encoder.width": 0.125,
        "model.encoder.zero_init_residual": True,  # as in configs/simclr.py
        "model.projector.widths": (64, 64),
        "optim.net.warmup": "0.1 epochs",
    })  # fmt: skip


def scenes_no_variance(config):
    """An ablation of the paper (table 7): it collapses."""
    scenes(config)
    config.model.weights.variance = 0.0


def cifar10_small(config):
    simclr.relative(config, simclr.cifar10_small)
    networks(config, (512, 512, 512))


def cifar10(config):
    """solo-learn's: LARS 0.3 x B / 256, decay 1e-4, projector 2048-2048, crops from 20 %, both views solarized at times.

    Changed: JPEG CIFAR-10; the trust ratio is not clipped; the variance terms are averaged, not added; BatchNorm normalizes both
    views together.
    """
    simclr.relative(config, simclr.cifar10)
    _, *others = simclr.small_images_views()[0]
    config.views = ((("random_resized_crop", dict(size=32, area=(0.2, 1.0))), *others, ("solarize", dict(p=0.1))),) * 2
    config.batch_size, config.total = 256, "1000 epochs"
    config.model.mean, config.model.std = common.CIFAR_MEAN, common.CIFAR_STD
    config.optim = dict(net=dict(name="lars", lr=0.3, lr_scale="linear", trust=0.02, weight_decay=1e-4, warmup="10 epochs"))
    networks(config, (2048, 2048))


def imagenet(config):
    """LARS 0.2 x B / 256, decay 1e-6, batch 2048, 1000 epochs with 10 of warm-up, expander of 8192.

    Changed: BatchNorm normalizes both views together.
    """
    simclr.relative(config, simclr.imagenet)
    config.views = simclr.asymmetric_views(224, (0.08, 1.0), crop=False)
    config.batch_size, config.total = 2048, "1000 epochs"
    config.model.encoder.flavor, config.model.encoder.zero_init_residual = "torchvision", True
    config.model.mean, config.model.std = common.IMAGENET_MEAN, common.IMAGENET_STD
    config.optim = dict(net=dict(name="lars", lr=0.2, lr_scale="linear", weight_decay=1e-6, warmup="10 epochs", end=0.001))
    networks(config, (8192, 8192, 8192))


VARIANTS = (
    Variant("", scenes, "embedded scenes, the encoder, views and budget of configs/simclr.py", hardware="2 CPU cores"),
    Variant("smoke", smoke, "the default in seconds, for tests"),
    Variant("scenes_no_variance", scenes_no_variance, "the default without the variance term, which collapses", hardware="2 CPU cores"),
    Variant("cifar10_small", cifar10_small, "JPEG CIFAR-10, the encoder, views and budget of configs/simclr.py:cifar10_small",
            hardware="2 CPU cores"),
    Variant("cifar10", cifar10, "ResNet-18, batch 256, 1000 epochs of LARS", hardware="1 accelerator",
            expected="linear 92.07 (trained online, on augmented views)", source="solo-learn's README"),
    Variant("imagenet", imagenet, "ResNet-50, batch 2048, 1000 epochs of LARS", expected="linear 73.2", source="the official README"),
)  # fmt: skip


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    return common.make("vicreg", VARIANTS, variant)

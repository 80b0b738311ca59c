"""BYOL (Grill et al. 2020, arXiv:2006.07733): a predictor matches a slowly moving average of the network; no negatives.

  python launch.py train --config=configs/byol.py --workdir=runs/byol
  python launch.py configs byol
"""

import ml_collections

from configs import common, simclr
from configs.common import Variant


def networks(config, hidden, width, momentum):
    """Linear layers before a BatchNorm have biases, the last ones have none, as in the official code."""
    head = dict(widths=(hidden, width), bias=True, last_bias=False, last_batch_norm=False)
    config.model.projector, config.model.predictor = dict(head), dict(head)
    config.model.momentum, config.model.momentum_schedule = momentum, "cosine"
    config.optim.predictor = config.optim.net.copy_and_resolve_references()


def scenes(config):
    simclr.relative(config, simclr.scenes)
    networks(config, 256, 128, 0.98)  # 1 / (1 - m) is a twentieth of the steps


def smoke(config):
    scenes(config)
    common.shrink(config, SMALL)


SMALL = {
    "model.encoder.width": 0.125,
    "model.encoder.zero_init_residual": True,  # as in configs/simclr.py
    "model.projector.widths": (64, 32),
    "model.predictor.widths": (64, 32),
    "optim.net.warmup": "0.1 epochs",
    "optim.predictor.warmup": "0.1 epochs",
}


def scenes_no_predictor(config):
    """An ablation of the paper (table 5b): it collapses."""
    scenes(config)
    config.model.predictor.widths = ()
    del config.optim["predictor"]


def cifar10_small(config):
    simclr.relative(config, simclr.cifar10_small)
    networks(config, 256, 128, 0.98)


def cifar10(config):
    """solo-learn's: LARS 1.0 x B / 256, decay 1e-5, projector 4096-256, predictor 4096-256, momentum .99.

    Changed: JPEG CIFAR-10; the trust ratio is not clipped; BatchNorm normalizes both views together.
    """
    simclr.relative(config, simclr.cifar10)
    config.views = simclr.small_images_views()
    config.batch_size, config.total = 256, "1000 epochs"
    config.model.mean, config.model.std = common.CIFAR_MEAN, common.CIFAR_STD
    config.optim = dict(net=dict(name="lars", lr=1.0, lr_scale="linear", trust=0.02, weight_decay=1e-5, warmup="10 epochs"))
    networks(config, 4096, 256, 0.99)


def imagenet(config):
    """LARS 0.2 x B / 256, decay 1.5e-6, batch 4096, 1000 epochs with 10 of warm-up, momentum .996 rising to 1.

    Changed: BatchNorm normalizes both views together; strided convolutions pad both sides alike.
    """
    simclr.relative(config, simclr.imagenet)
    config.views = simclr.asymmetric_views(224, (0.08, 1.0), crop=False)
    config.total = "1000 epochs"
    config.model.mean, config.model.std = common.IMAGENET_MEAN, common.IMAGENET_STD
    config.optim = dict(net=dict(name="lars", lr=0.2, lr_scale="linear", weight_decay=1.5e-6, warmup="10 epochs"))
    networks(config, 4096, 256, 0.996)


VARIANTS = (
    Variant("", scenes, "embedded scenes, the encoder, views and budget of configs/simclr.py", hardware="2 CPU cores"),
    Variant("smoke", smoke, "the default in seconds, for tests"),
    Variant("scenes_no_predictor", scenes_no_predictor, "the default without its predictor, which collapses", hardware="2 CPU cores"),
    Variant("cifar10_small", cifar10_small, "JPEG CIFAR-10, the encoder, views and budget of configs/simclr.py:cifar10_small",
            hardware="2 CPU cores"),
    Variant("cifar10", cifar10, "ResNet-18, batch 256, 1000 epochs of LARS", hardware="1 accelerator",
            expected="linear 92.58 (trained online, on augmented views)", source="solo-learn's README"),
    Variant("imagenet", imagenet, "ResNet-50, batch 4096, 1000 epochs of LARS",
            expected="linear 74.3", source="Grill et al. 2020"),
)  # fmt: skip


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    return common.make("byol", VARIANTS, variant)

"""Equivariance to egomotion (Jayaraman and Grauman 2015, arXiv:1505.02206): a linear map of the features for each motion.

  python launch.py train --config=configs/equivariance.py --workdir=runs/equivariance
  python launch.py configs equivariance

The paper's own recipes are not here: no code of it is public, and no TFDS builder has pairs of KITTI's odometry.
"""

import ml_collections

from configs import common
from configs.common import Variant


def moves(shift: float, turn: float, log_zoom: float):
    """Right, left, down, up (pixels), both turns (radians), in and out."""
    return (
        (shift, 0.0, 0.0, 0.0), (-shift, 0.0, 0.0, 0.0), (0.0, shift, 0.0, 0.0), (0.0, -shift, 0.0, 0.0),
        (0.0, 0.0, turn, 0.0), (0.0, 0.0, -turn, 0.0), (0.0, 0.0, 0.0, log_zoom), (0.0, 0.0, 0.0, -log_zoom),
    )  # fmt: skip


def scenes(config):
    common.pretext(config)
    # Without labels; `:joint` adds them. The first window is moved, too, so that interpolation blurs both.
    config.model = dict(
        pairs=dict(size=32, start=(0.5, 0.5, 0.1, 0.0), motions=moves(5.0, 0.25, 0.18)),
        encoder=dict(name="resnet", depth=10, width=0.25, stem="stride2", zero_init_residual=False),
        layer="layer4",  # a map: pooled features do not know where things are
        head=dict(widths=(256, 64), batch_norm=False),
        margin=1.0,
        supervised=dict(weight=0.0),
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
    )


def joint(config):
    scenes(config)
    config.model.supervised.weight = 1.0


def smoke(config):
    joint(config)
    common.shrink(config, {
        "model.encoder.width": 0.125,
        "model.encoder.zero_init_residual": True,  # as in configs/simclr.py
        "model.head.widths": (32, 16),
        "optim.net.warmup": "0.1 epochs",
    })  # fmt: skip


def cifar10_small(config):
    """Windows of 22 of 32 pixels, moved by 3."""
    scenes(config)
    common.pretext_cifar10(config)
    config.model.pairs = dict(size=22, start=(0.5, 0.5, 0.08, 0.0), motions=moves(3.0, 0.25, 0.18))


VARIANTS = (
    Variant("", scenes, "embedded scenes, windows of 32 pixels, eight motions, ResNet-10 of width 1/4, 20 epochs",
            hardware="2 CPU cores"),
    Variant("smoke", smoke, ":joint in seconds, for tests"),
    Variant("joint", joint, "the default with the cross-entropy of all labels", hardware="2 CPU cores"),
    Variant("cifar10_small", cifar10_small, "JPEG CIFAR-10, windows of 22 pixels, 5 epochs", hardware="2 CPU cores"),
)  # fmt: skip


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    return common.make("equivariance", VARIANTS, variant)

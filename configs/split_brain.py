"""Split-brain autoencoders (Zhang et al. 2017, arXiv:1611.09842): lightness predicts colors, and colors predict lightness.

  python launch.py train --config=configs/split_brain.py --workdir=runs/split_brain
  python launch.py configs split_brain
"""

import ml_collections

from configs import colorization, common
from configs.common import Variant


def halves(config, width, grid=10):
    """The encoder of configs/colorization.py in two halves of `width`."""
    config.model.encoder.width = width
    del config.model["target"]
    config.model.update(dict(loss="classification", grid=grid, levels=50))
    if "linear" in config.evals:  # each half alone, beside both
        for half in ("lightness", "color"):
            config.evals[f"linear_{half}"] = dict(config.evals.linear, layer=half)


def scenes(config):
    colorization.scenes(config)
    halves(config, 0.125, grid=20)


def smoke(config):
    scenes(config)
    common.shrink(config, {
        "model.encoder.width": 0.0625,
        "model.encoder.zero_init_residual": True,  # as in configs/colorization.py
        "model.head.width": 16,
        "optim.net.warmup": "0.1 epochs",
    })  # fmt: skip


def scenes_regression(config):
    scenes(config)
    config.model.loss = "regression"


def cifar10_small(config):
    colorization.cifar10_small(config)
    halves(config, 0.125)


def cifar10_small_regression(config):
    cifar10_small(config)
    config.model.loss = "regression"


def imagenet_alexnet(config):
    """Two halves of an AlexNet on 180 pixels, which predict 12 x 12 places.

    Changed: hypercolumns of five layers; the 261 bins that colors of sRGB have. The optimizer is that of configs/colorization.py,
    since the published code has none; 50 levels of lightness, which are not known either.
    """
    colorization.imagenet_alexnet(config)
    config.data.ops = (("resize_random_crop", dict(resize=256, crop=180)),)
    config.data.eval_ops = (("resize_crop", dict(resize=256, crop=180)),)
    config.model.encoder.groups = 1  # a half has no groups
    halves(config, 0.5)
    config.model.stride = 15


VARIANTS = (
    Variant("", scenes, "embedded scenes: two ResNet-10 of width 1/8, 77 bins of a and b, 50 of L", hardware="2 CPU cores"),
    Variant("smoke", smoke, "the default in seconds, for tests"),
    Variant("scenes_regression", scenes_regression, "the default with squared errors", hardware="2 CPU cores"),
    Variant("cifar10_small", cifar10_small, "JPEG CIFAR-10: 261 bins, the networks of the default, 7 epochs", hardware="2 CPU cores"),
    Variant("cifar10_small_regression", cifar10_small_regression, "the same with squared errors", hardware="2 CPU cores"),
    Variant("imagenet_alexnet", imagenet_alexnet, "two halves of an AlexNet, 180 pixels, batch 40, 500,000 steps of Adam",
            hardware="1 accelerator"),
)  # fmt: skip


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    return common.make("split_brain", VARIANTS, variant)

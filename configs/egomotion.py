"""Egomotion (Agrawal et al. 2015, arXiv:1505.01596): the motion of the camera between two views, in bins.

  python launch.py train --config=configs/egomotion.py --workdir=runs/egomotion
  python launch.py configs egomotion

Pairs come with the embedded scenes. `:synthetic` makes them from any images: --config.data.name=NAME.
"""

import ml_collections

from configs import common
from configs.common import Variant


def scenes(config):
    common.pretext(config)
    # dx and dy in pixels, rotation in radians, log zoom: the limits of ssl_jax/data/scenes.py.
    config.model = dict(
        pairs=dict(name="data", length=4),
        axes=(("dx", 4.0, 9), ("dy", 4.0, 9), ("rotation", 0.25, 9), ("zoom", 0.12, 9)),
        encoder=dict(name="resnet", depth=10, width=0.25, stem="stride2", zero_init_residual=False),
        layer="layer4",  # a map: pooled features do not know where things are
        embed=dict(widths=()),
        head=dict(widths=(256,)),
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
    )
    config.evals.motion = dict(kind="motion")


def smoke(config):
    scenes(config)
    common.shrink_pretext(config, {"model.head.widths": (32,)})


def synthetic(config):
    """Windows of 16 pixels of images from 32 x 32 on, moved by up to 3 pixels and half a radian: 7, 7 and 20 bins."""
    scenes(config)
    config.model.pairs = dict(name="synthetic", size=16, start=(0.4, 0.4, 0.1, 0.0), limits=(3.0, 3.0, 0.5, 0.0), whole_pixels=True)
    config.model.axes = (("dx", 3.5, 7), ("dy", 3.5, 7), ("rotation", 0.5, 20))
    config.model.encoder.stem = "cifar"


def cifar10_small(config):
    synthetic(config)
    common.pretext_cifar10(config)


def smallnorb(config):
    """Two views of a toy, up to 10 degrees of elevation and 40 of azimuth apart: five bins each. ResNet-18 on 64 pixels, 20 epochs."""
    scenes(config)
    config.data.name = "smallnorb/pairs"
    config.data.ops = config.data.eval_ops = common.resized(64)
    config.batch_size = 128
    config.model.pairs.length = 2
    config.model.axes = (("elevation", 12.5, 5), ("azimuth", 50.0, 5))
    config.model.encoder = dict(name="resnet", depth=18, stem="imagenet", zero_init_residual=False)
    config.log_every_steps = 50


def kitti_alexnet(config):
    """The authors' code: AlexNet on 227 pixels, batch 128, 60,000 steps, SGD 1e-3, halved every 20,000, decay 5e-4.

    Pairs at most seven frames apart. The motion is two translations and the yaw, each divided by its deviation: 20 bins from -10 to
    10 and one beyond each end. No TFDS builder has such pairs, so make one with the features image, image2, motion [3] and label,
    by `ssl_jax.augment.motions.relative_pose`. Changed: the authors' code labels the difference of two poses in the world; the output
    layer starts at zero.
    """
    config.data.name = "kitti_odometry"
    config.data.ops = config.data.eval_ops = common.resized(227)
    config.data.specs = dict(image2=((227, 227, 3), "uint8"), motion=((3,), "float32"))
    config.data.workers = 16
    config.batch_size = 128
    config.total = "60_000 steps"
    config.model = dict(
        pairs=dict(name="data", length=3),
        axes=(("x", 11.0, 22), ("z", 11.0, 22), ("yaw", 11.0, 22)),
        encoder=dict(name="alexnet", form="two_towers", norm="lrn", groups=2, conv1=(11, 4, 0)),
        layer="conv5", embed=dict(widths=()), head=dict(widths=(4096,), batch_norm=False),
        mean=common.IMAGENET_MEAN, std=common.IMAGENET_STD,
    )  # fmt: skip
    steps = dict(schedule="step", milestones=(1 / 3, 2 / 3), factor=0.5)
    config.optim = dict(net=dict(name="sgd", lr=1e-3, weight_decay=5e-4, **steps))
    config.evals = dict(pretext=dict(kind="pretext", examples=10_000), motion=dict(kind="motion", examples=10_000))
    config.evaluate_every, config.checkpoint_every = "0 steps", "2_000 steps"
    config.log_every_steps, config.baselines, config.best_metric = 50, (), ""


VARIANTS = (
    Variant("", scenes, "embedded scenes and their second views, ResNet-10 of width 1/4, 20 epochs", hardware="2 CPU cores"),
    Variant("smoke", smoke, "the default in seconds, for tests"),
    Variant("synthetic", synthetic, "windows of single images, moved by known motions; any images from 32 x 32 pixels on",
            hardware="2 CPU cores"),
    Variant("cifar10_small", cifar10_small, "the same on JPEG CIFAR-10, 5 epochs", hardware="2 CPU cores"),
    Variant("smallnorb", smallnorb, "smallNORB: views of one toy in one light, ResNet-18, 20 epochs", hardware="1 accelerator"),
    Variant("kitti_alexnet", kitti_alexnet, "the authors' code: AlexNet on pairs of KITTI's odometry, which you prepare",
            hardware="1 accelerator"),
)  # fmt: skip


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    return common.make("egomotion", VARIANTS, variant)

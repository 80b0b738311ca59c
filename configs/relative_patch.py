"""Relative patch location (Doersch et al. 2015, arXiv:1505.05192): where does one patch lie, seen from another?

  python launch.py train --config=configs/relative_patch.py --workdir=runs/relative_patch
  python launch.py configs relative_patch

The paper's own recipe is not here: it takes a million steps on summed losses at a rate of 1e-5.
"""

import ml_collections

from configs import common
from configs.common import Variant


def scenes(config):
    common.pretext(config)
    # Half of the images gray: colors alone must not tell. Tiles of 12 pixels in cells of 16, so gaps have 2 to 6 pixels.
    crop = ("random_resized_crop", dict(size=48, area=(0.5, 1.0), ratio=(1.0, 1.0)))
    config.views = ((crop, ("flip", dict(p=0.5)), ("grayscale", dict(p=0.5))),)
    config.model = dict(
        grid=3, tile=12, jitter=2, tile_operations=(),
        encoder=dict(name="resnet", depth=10, width=0.25, stem="stride2", zero_init_residual=False),
        layer="pooled", embed=dict(widths=()), head=dict(widths=(256,)), standardize=True,
    )  # fmt: skip


def smoke(config):
    scenes(config)
    common.shrink_pretext(config, {"model.head.widths": (32,)})


def small_images(config):
    """Images of 32 pixels, enlarged to the size of the default. Its resized crops hide the blocks of JPEG, which tell places."""
    common.pretext_cifar10(config)
    config.data.ops = config.data.eval_ops = common.resized(48)


def cifar10_small(config):
    scenes(config)
    small_images(config)


def large_images(config, resize, views):
    """ImageNet: a random square of 255 pixels, 3 x 3 cells of 85, tiles of 64 with a jitter of 21."""
    common.pretext_imagenet(config)
    config.data.ops = (("resize_random_crop", dict(resize=resize, crop=255)),)
    config.data.eval_ops = (("resize_crop", dict(resize=resize, crop=255)),)
    config.views = (views,)


def imagenet_r50(config):
    """mmselfsup's: SGD 0.2, batch 512, 70 epochs with 5 of warm-up, rate times 0.1 after 30 and 50, decay 1e-4, of the head 5e-4.

    Normalized by ImageNet's mean and deviation, not patch by patch. Changed: the head's output layer starts at zero; one layer of
    4,096 reads both patches.
    """
    large_images(config, 292, (("grayscale", dict(p=0.66)),))
    config.batch_size = 512
    config.total = "70 epochs"
    config.model = dict(
        grid=3, tile=64, jitter=21, tile_operations=(),
        encoder=dict(name="resnet", depth=50, zero_init_residual=False),
        layer="pooled", embed=dict(widths=()), head=dict(widths=(4096,)),
        mean=common.IMAGENET_MEAN, std=common.IMAGENET_STD,
    )  # fmt: skip
    steps = dict(schedule="step", milestones=(30 / 70, 50 / 70), warmup="5 epochs")
    mask = ((r"(head|classifier)/", 5.0), (".*", 1.0))
    config.optim = dict(net=dict(name="sgd", lr=0.2, weight_decay=1e-4, weight_decay_mask=mask, **steps))


VARIANTS = (
    Variant("", scenes, "embedded scenes, ResNet-10 of width 1/4 on patches of 12 pixels, 20 epochs", hardware="2 CPU cores"),
    Variant("smoke", smoke, "the default in seconds, for tests"),
    Variant("cifar10_small", cifar10_small, "JPEG CIFAR-10 at 48 pixels, the network and patches of the default, 5 epochs",
            hardware="2 CPU cores"),
    Variant("imagenet_r50", imagenet_r50, "ResNet-50, batch 512, 70 epochs", hardware="8 GPUs",
            expected="linear on stem and stages 1 to 4: 15.11, 30.47, 42.83, 51.20, 40.96", source="mmselfsup's README"),
)  # fmt: skip


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    return common.make("relative_patch", VARIANTS, variant)

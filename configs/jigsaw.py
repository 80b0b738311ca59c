"""Jigsaw puzzles (Noroozi and Favaro 2016, arXiv:1603.09246): by which permutation were the tiles of an image shuffled?

  python launch.py train --config=configs/jigsaw.py --workdir=runs/jigsaw
  python launch.py configs jigsaw
"""

import ml_collections

from configs import common, relative_patch
from configs.common import Variant


def scenes(config):
    relative_patch.scenes(config)  # its views, tiles, encoder and optimizer
    config.model.permutations = dict(kind="affine", count=0)  # 72, which differ in 8 of 9 slots
    config.model.puzzles = 4
    config.model.embed = dict(widths=(64,))
    config.model.head = dict(widths=(256,))


def smoke(config):
    scenes(config)
    common.shrink_pretext(config, {"model.embed.widths": (16,), "model.head.widths": (32,)})


def cifar10_small(config):
    scenes(config)
    relative_patch.small_images(config)


def imagenet_alexnet(config):
    """The official code's: SGD 0.01, batch 256, 350,000 steps, rate times 0.1 each 100,000, decay 5e-4, 1,000 permutations.

    No mirrored images. Half of the images gray, half of the others projected. Changed: no dropout, the colors of a tile are not
    shifted against each other, tiles are standardized, the output layer starts at zero. For probes the paper sets the stride of conv1
    back to 4; here they read images at the stride of 2.
    """
    relative_patch.large_images(config, 256, (("project_colors", dict(p=0.5)), ("grayscale", dict(p=0.5))))
    config.batch_size = 256
    config.total = "350_000 steps"
    config.model = dict(
        grid=3, tile=64, jitter=21, tile_operations=(), permutations=dict(kind="average", count=1000), puzzles=1,
        encoder=dict(name="alexnet", form="two_towers", norm="lrn", groups=2, conv1=(11, 2, 0)),
        layer="pool5", embed=dict(widths=(1024,), batch_norm=False), head=dict(widths=(4096,), batch_norm=False), standardize=True,
    )  # fmt: skip
    steps = dict(schedule="step", milestones=(100 / 350, 200 / 350, 300 / 350))
    config.optim = dict(net=dict(name="sgd", lr=0.01, weight_decay=5e-4, **steps))
    config.checkpoint_every = "5000 steps"


def imagenet_r50(config):
    """VISSL's: SGD 0.1, batch 256, 105 epochs with 5 of warm-up, rate times 0.1 after 30, 60, 90 and 100, decay 1e-4.

    2,000 permutations. Normalized by ImageNet's mean and deviation, not tile by tile. Changed: the permutations are generated, as far
    apart on average; the output layer starts at zero, and that of a tile has no offset.
    """
    relative_patch.large_images(config, 256, (("flip", dict(p=0.5)), ("grayscale", dict(p=0.66))))
    config.batch_size = 256
    config.total = "105 epochs"
    config.model = dict(
        grid=3, tile=64, jitter=21, tile_operations=(), permutations=dict(kind="average", count=2000), puzzles=1,
        encoder=dict(name="resnet", depth=50, zero_init_residual=False),
        layer="pooled", embed=dict(widths=(1000,)), head=dict(widths=()),
        mean=common.IMAGENET_MEAN, std=common.IMAGENET_STD,
    )  # fmt: skip
    steps = dict(schedule="step", milestones=(30 / 105, 60 / 105, 90 / 105, 100 / 105), warmup="5 epochs")
    config.optim = dict(net=dict(name="sgd", lr=0.1, weight_decay=1e-4, **steps))


VARIANTS = (
    Variant("", scenes, "embedded scenes, ResNet-10 of width 1/4 on tiles of 12 pixels, 72 permutations, 20 epochs",
            hardware="2 CPU cores"),
    Variant("smoke", smoke, "the default in seconds, for tests"),
    Variant("cifar10_small", cifar10_small, "JPEG CIFAR-10 at 48 pixels, the network and tiles of the default, 5 epochs",
            hardware="2 CPU cores"),
    Variant("imagenet_alexnet", imagenet_alexnet, "the official code's: AlexNet in two groups, 1,000 permutations, 350,000 steps",
            hardware="1 accelerator"),
    Variant("imagenet_r50", imagenet_r50, "ResNet-50, 2,000 permutations, batch 256, 105 epochs", hardware="8 GPUs",
            expected="linear 46.73 (with 100 permutations 48.57)", source="VISSL's model zoo"),
)  # fmt: skip


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    return common.make("jigsaw", VARIANTS, variant)

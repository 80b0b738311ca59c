"""Contrastive predictive coding (van den Oord et al. 2018, arXiv:1807.03748; Henaff et al. 2020, arXiv:1905.09272): predict the
features of patches from those above, below, left and right of them.

  python launch.py train --config=configs/cpc.py --workdir=runs/cpc
  python launch.py sample --workdir=runs/cpc
  python launch.py configs cpc
"""

import ml_collections

from configs import common
from configs.common import Variant

FOUR = ("down", "up", "left", "right")


def scenes(config):
    common.pretext(config)
    # Every patch is cut in 12 pixels with a stride of 6, so patches two rows apart do not overlap. Colors of each patch change by
    # themselves; else the cast of an image would tell its patches from all others.
    config.views = ((("random_resized_crop", dict(size=48, area=(0.5, 1.0), ratio=(1.0, 1.0))), ("flip", dict(p=0.5))),)
    config.batch_size, config.total = 32, "8 epochs"
    config.model = dict(
        patch=12, stride=6,
        patch_operations=(
            ("color_jitter", dict(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, p=0.8, style="torchvision")),
            ("grayscale", dict(p=0.25)),
        ),
        encoder=dict(name="resnet_v2", depth=10, width=0.25, stem="stride2", norm="layer"),
        context=dict(channels=64, blocks=5),
        directions=("down", "right"), offsets=(2, 3, 4), target_dim=64, embedding_scale=0.1,
        mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25),
    )  # fmt: skip
    config.evals.linear_1 = dict(kind="linear", solver="lbfgs", l2=(1e-2,), labels=0.01)  # of the labels: 6 of each class
    config.evaluate_every, config.checkpoint_every = "8 epochs", "1 epoch"


def smoke(config):
    scenes(config)
    config.optim.net.schedule = "constant"  # predictions start at zero: a rate that falls within eight steps shows nothing
    common.shrink(config, {
        "model.encoder.width": 0.125,
        "model.patch": 16,
        "model.stride": 8,
        "model.offsets": (1, 2),
        "model.context.channels": 16,
        "model.context.blocks": 2,
        "model.embedding_scale": 1.0,
        "optim.net.lr": 1e-2,
        "optim.net.warmup": "0.1 epochs",
    })  # fmt: skip


def cifar10_small(config):
    """Patches of 8 pixels with a stride of 4: 7 x 7, and patches two rows apart do not overlap."""
    scenes(config)
    common.pretext_cifar10(config)
    config.views = ((("random_crop", dict(size=32, pad=4)), ("flip", dict(p=0.5))),)
    config.model.patch, config.model.stride = 8, 4
    config.total, config.evaluate_every, config.checkpoint_every = "3 epochs", "3 epochs", "0.25 epochs"


def large_images(config, resize, crop):
    common.pretext_imagenet(config)
    config.data.ops = (("resize_random_crop", dict(resize=resize, crop=crop)),)
    config.data.eval_ops = (("resize_crop", dict(resize=resize, crop=crop)),)
    config.batch_size = 512
    probes = {name: dict(kind="linear", solver="sgd", labels=labels) for name, labels in (("linear_1", 0.01), ("linear_10", 0.1))}
    config.evals = dict(linear=dict(kind="linear", solver="sgd"), **probes, pretext=config.evals.pretext)


def imagenet_v1(config):
    """Version 1: the first three groups of ResNet-v2-101 without normalization, 7 x 7 patches of 64 pixels, downwards.

    Rate, batch and crops have not been checked against the text of the paper. Length and color operations are ours. Changed: the
    context network is that of version 2; half of the images are gray, since probes see colors; predictions start at zero.
    """
    large_images(config, 300, 256)
    config.total = "100 epochs"
    config.views = ((("flip", dict(p=0.5)), ("grayscale", dict(p=0.5))),)
    config.model = dict(
        patch=64, stride=32,
        patch_operations=(("random_crop", dict(size=64, pad=4)),),  # moves each patch by up to 4 pixels
        encoder=dict(name="resnet_v2", depth=101, groups=3, norm="none", last_norm=False),
        context=dict(channels=256, blocks=5),
        directions=("down",), offsets=(2, 3, 4, 5), target_dim=0, embedding_scale=1.0,
        mean=common.IMAGENET_MEAN, std=common.IMAGENET_STD,
    )  # fmt: skip
    config.optim = dict(net=dict(name="adam", lr=2e-4, schedule="constant"))


def imagenet_r161(config):
    """Version 2: ResNet-161 with layer normalization, 6 x 6 patches of 80 pixels, four directions.

    The optimizer's constants and the crops have not been checked against the text of the paper. Its pseudocode can be read as one
    offset of 3 or as offsets 3 to 5; we take 3 to 5. Changed: of the operations on patches only color jitter and gray; networks
    and projections of their own for each direction; the loss is the mean over offsets and directions; predictions start at zero;
    weights are not averaged.
    """
    large_images(config, 300, 260)
    config.total = "200 epochs"
    config.views = ((("flip", dict(p=0.5)),),)
    config.model = dict(
        patch=80, stride=36,
        patch_operations=(
            ("color_jitter", dict(brightness=0.125, contrast=0.5, saturation=0.5, hue=0.2, p=0.8, style="torchvision")),
            ("grayscale", dict(p=0.25)),
        ),
        encoder=dict(name="resnet_v2", depth=161, norm="layer", last_norm=False, remat=True),
        context=dict(channels=256, blocks=5),
        directions=FOUR, offsets=(3, 4, 5), target_dim=64, embedding_scale=0.1,
        mean=common.IMAGENET_MEAN, std=common.IMAGENET_STD,
    )  # fmt: skip
    config.optim = dict(net=dict(name="adam", lr=4e-4, b1=0.8, b2=0.999, schedule="constant", clip_norm=0.01))


def imagenet_r50(config):
    """Version 2 with ResNet-v2-50, otherwise as `imagenet_r161`."""
    imagenet_r161(config)
    config.model.encoder = dict(name="resnet_v2", depth=50, norm="layer", last_norm=False)


VARIANTS = (
    Variant("", scenes, "embedded scenes, ResNet-v2-10 of width 1/4 on patches of 12 pixels, 8 epochs", hardware="2 CPU cores"),
    Variant("smoke", smoke, "the default in seconds, for tests"),
    Variant("cifar10_small", cifar10_small, "JPEG CIFAR-10, the networks of the default on patches of 8 pixels, 3 epochs",
            hardware="2 CPU cores"),
    Variant("imagenet_v1", imagenet_v1, "version 1: three groups of ResNet-v2-101, downwards", hardware="32 accelerators"),
    Variant("imagenet_r161", imagenet_r161, "version 2: ResNet-161, four directions, 200 epochs", hardware="32 accelerators",
            expected="linear 71.5 (top 5: 90.1)", source="Chen et al. 2020 (SimCLR), table 6"),
    Variant("imagenet_r50", imagenet_r50, "version 2: ResNet-v2-50, four directions, 200 epochs", hardware="32 accelerators",
            expected="linear 63.8 (top 5: 85.3)", source="Chen et al. 2020 (SimCLR), table 6"),
)  # fmt: skip


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    return common.make("cpc", VARIANTS, variant)

"""Colorization (Zhang et al. 2016, arXiv:1603.08511; Larsson et al. 2016, arXiv:1603.06668): predict the colors of a gray image.

  python launch.py train --config=configs/colorization.py --workdir=runs/colorization
  python launch.py sample --workdir=runs/colorization
  python launch.py configs colorization
"""

import ml_collections

from configs import common
from configs.common import Variant

LAYERS = ("layer1", "layer2", "layer3", "layer4")  # of a ResNet


def ab(grid=10, neighbors=5):
    return dict(name="ab_bins", grid=grid, neighbors=neighbors, sigma=5.0, rebalance=0.5)


def scenes(config):
    config.views = ((("random_resized_crop", dict(size=32, area=(0.2, 1.0))), ("flip", dict(p=0.5))),)
    config.total = "45 epochs"
    config.model = dict(
        encoder=dict(name="resnet", depth=10, width=0.25, stem="stride2", zero_init_residual=False),
        maps=LAYERS,
        head=dict(width=128),
        stride=4,
        target=ab(grid=20),  # 77 bins: the soft code of 261 bins takes longer than the network on CPUs
    )
    config.optim = dict(net=dict(name="adamw", lr=2e-3, weight_decay=1e-4, warmup="1 epoch"))
    config.evals.linear.update(dict(l2=(1e-3, 1e-2, 1e-1)))
    config.evals.layers = dict(kind="linear_by_layer")
    config.evals.colors = dict(kind="colors")
    config.evaluate_every, config.checkpoint_every = "45 epochs", "3 epochs"


def smoke(config):
    scenes(config)
    common.shrink(config, {
        "model.encoder.width": 0.125,
        "model.encoder.zero_init_residual": True,  # smooth at the start, so that tests can compare devices over several steps
        "model.head.width": 32,
        "optim.net.warmup": "0.1 epochs",
    })  # fmt: skip


def histograms(config):
    config.model.target = dict(name="hue_chroma", bins=32, window=config.model.stride + 4, hue_weight=5.0)


def scenes_hue(config):
    scenes(config)
    histograms(config)


def scenes_regression(config):
    scenes(config)
    config.model.target = dict(name="ab_regression")


def cifar10_small(config):
    scenes(config)
    config.data.name = "cifar10"
    config.model.stride, config.model.target.grid = 2, 10
    config.total = "7 epochs"
    config.optim.net.warmup = "0.25 epochs"
    config.evaluate_every, config.checkpoint_every = "7 epochs", "1 epoch"


def cifar10_small_hue(config):
    cifar10_small(config)
    histograms(config)


def imagenet(config, size):
    """Random squares of `size` pixels of images whose short side has 256, mirrored half of the time."""
    config.data.name, config.data.test_split = "imagenet2012", "validation"
    config.data.ops = (("resize_random_crop", dict(resize=256, crop=size)),)
    config.data.eval_ops = (("resize_crop", dict(resize=256, crop=size)),)
    config.data.workers = 16
    config.views = ((("flip", dict(p=0.5)),),)
    config.evals = dict(
        layers=dict(kind="linear_by_layer", features=9600, normalization="channel", solver="sgd"),
        linear=dict(kind="linear", solver="sgd"),
    )
    config.best_metric = "layers/best_top1"
    config.evaluate_every, config.checkpoint_every = "50_000 steps", "5000 steps"
    config.log_every_steps, config.baselines = 50, ()


def imagenet_alexnet(config):
    """The optimizer, crops, colors and soft code of Zhang et al.'s code, for AlexNet: Adam 3e-5, / 10 each 225,000 steps, batch 40.

    Changed: their network for pictures is another, and the recipe of their AlexNet was not found; hypercolumns of five layers; the
    261 bins that colors of sRGB have; the mean color of a cell of 4 x 4 pixels instead of one of them; decoupled weights are those
    of kernels only; bins are counted while training.
    """
    imagenet(config, 176)
    config.batch_size = 40
    config.total = "500_000 steps"
    config.model = dict(
        encoder=dict(name="alexnet", form="two_towers", groups=2, conv1=(11, 4, 0)),
        maps=("conv1", "conv2", "conv3", "conv4", "conv5"),
        head=dict(width=256),
        stride=4,
        target=ab(neighbors=10),
    )
    config.optim = dict(
        net=dict(name="adam", lr=3e-5, b2=0.99, weight_decay=1e-3, schedule="step", milestones=(0.45, 0.9))
    )


def imagenet_r50(config):
    """As `imagenet_alexnet`. The recipe of the published figure was not found."""
    imagenet_alexnet(config)
    config.model.encoder = dict(name="resnet", depth=50, width=1.0, stem="imagenet")
    config.model.maps = LAYERS


def imagenet_vgg16_hue(config):
    """Larsson et al.'s code: VGG-16 with BatchNorm on gray pixels, SGD 1e-3 / 10 at 1, 1.5 and 1.75 million steps, batch 8.

    Changed: a grid of 44 x 44 windows of 12 pixels instead of 128 random ones of 7; no dropout; the short side has 480 pixels,
    not 352 to 600; BatchNorm has scales and offsets, and pixels are no part of the hypercolumn.
    """
    imagenet(config, 352)
    config.data.ops = (("resize_random_crop", dict(resize=480, crop=352)),)
    config.data.eval_ops = (("resize_crop", dict(resize=480, crop=352)),)
    config.batch_size = 8
    config.total = "2_000_000 steps"
    layers = [f"conv{group}_{index}" for group, count in enumerate((2, 2, 3, 3, 3), 1) for index in range(1, count + 1)]
    config.model = dict(
        encoder=dict(name="vgg", fc=1024), maps=(*layers, "fc6", "fc7"), head=dict(width=1024), stride=8, target={}
    )
    histograms(config)
    config.optim = dict(
        net=dict(name="sgd", lr=1e-3, weight_decay=5e-4, schedule="step", milestones=(0.5, 0.75, 0.875))
    )


VARIANTS = (
    Variant("", scenes, "embedded scenes: 77 bins of a and b, ResNet-10 of width 1/4, 45 epochs", hardware="2 CPU cores"),
    Variant("smoke", smoke, "the default in seconds, for tests"),
    Variant("scenes_hue", scenes_hue, "the default with histograms of hue and chroma", hardware="2 CPU cores"),
    Variant("scenes_regression", scenes_regression, "the default with squared errors of a and b", hardware="2 CPU cores"),
    Variant("cifar10_small", cifar10_small, "JPEG CIFAR-10: 261 bins, the network of the default, 7 epochs", hardware="2 CPU cores"),
    Variant("cifar10_small_hue", cifar10_small_hue, "the same with histograms of hue and chroma", hardware="2 CPU cores"),
    Variant("imagenet_alexnet", imagenet_alexnet, "AlexNet, 176 pixels, batch 40, 500,000 steps of Adam",
            hardware="1 accelerator", expected="linear probe 30.39 (AlexNet of vissl)", source="model zoo of vissl"),
    Variant("imagenet_r50", imagenet_r50, "the same with a ResNet-50",
            hardware="1 accelerator", expected="linear probe 40.11 (ResNet-50 of vissl)", source="model zoo of vissl"),
    Variant("imagenet_vgg16_hue", imagenet_vgg16_hue, "Larsson et al.: VGG-16, 352 pixels, batch 8, 2 million steps of SGD",
            hardware="1 accelerator"),
)  # fmt: skip


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    return common.make("colorization", VARIANTS, variant)

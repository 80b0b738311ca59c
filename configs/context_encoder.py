"""Context encoders (Pathak et al. 2016, arXiv:1604.07379): paint what is missing of an image.

  python launch.py train --config=configs/context_encoder.py --workdir=runs/context_encoder
  python launch.py sample --workdir=runs/context_encoder
  python launch.py configs context_encoder
"""

import ml_collections

from configs import common
from configs.common import Variant

CENTER = dict(name="center", size=20, overlap=2)  # 16 pixels are hidden
REGIONS = dict(name="random_region", area=(0.2, 0.3), cell=8)
NOBODY = dict(weight=0.0, discriminator=dict(name="dcgan"))


def scenes(config):
    config.data.ops = config.data.eval_ops = common.resized(32)
    config.views = ((("random_crop", dict(size=32)), ("flip", dict(p=0.5))),)
    config.total = "45 epochs"
    config.model = dict(
        encoder=dict(name="resnet", depth=10, width=0.25, stem="stride2", zero_init_residual=False),
        map="layer4",
        decoder=dict(widths=(128, 64, 32, 16)),
        mask=REGIONS,
        overlap_weight=10.0,
        adversary=NOBODY,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
    )
    config.optim = dict(net=dict(name="adamw", lr=2e-3, weight_decay=1e-4, warmup="1 epoch"))
    config.evals.linear.update(dict(l2=(1e-3, 1e-2, 1e-1)))
    config.evals.layers = dict(kind="linear_by_layer")
    config.evals.inpainting = dict(kind="inpainting")
    config.evaluate_every, config.checkpoint_every = "45 epochs", "3 epochs"


def adversarial(config, channels, stages):
    """Pathak et al. 2016, section 3.2, and their code: 0.001 of the loss is the adversary's; its Adam has a tenth of the rate."""
    config.model.mask = CENTER
    config.model.adversary = dict(weight=1e-3, discriminator=dict(name="dcgan", channels=channels, stages=stages))
    config.optim.discriminator = dict(name="adam", lr=2e-4, b1=0.5, schedule="constant")


def smoke(config):
    scenes(config)
    adversarial(config, channels=8, stages=2)
    config.optim.net.schedule = "constant"  # a rate that falls within eight steps shows little
    config.optim.net.lr = 1e-2
    common.shrink(config, {
        "model.encoder.width": 0.125,
        "model.encoder.zero_init_residual": True,  # smooth at the start, so that tests can compare devices over several steps
        "model.decoder.widths": (32, 16, 8, 8),
        "optim.net.warmup": "0.1 epochs",
    })  # fmt: skip


def scenes_center(config):
    scenes(config)
    config.model.mask = CENTER


def scenes_adversarial(config):
    scenes(config)
    adversarial(config, channels=32, stages=2)


def cifar10_small(config):
    scenes(config)
    config.data.name = "cifar10"
    config.data.ops = config.data.eval_ops = ()
    config.total = "7 epochs"
    config.optim.net.warmup = "0.25 epochs"
    config.evaluate_every, config.checkpoint_every = "7 epochs", "1 epoch"


def cifar10_small_center(config):
    cifar10_small(config)
    config.model.mask = CENTER


def imagenet_alexnet(config):
    """AlexNet with a layer for each channel behind its last pool, random regions, squared error alone.

    The mask is that of the published code, and so are Adam's numbers. The recipe of the features is not published as code: batch,
    length, decoder and the fill with the mean are ours.
    """
    config.data.name, config.data.test_split = "imagenet2012", "validation"
    config.data.ops = (("resize_random_crop", dict(resize=256, crop=224)),)
    config.data.eval_ops = common.IMAGENET_EVAL
    config.data.workers = 16
    config.views = ((("flip", dict(p=0.5)),),)
    config.batch_size = 256
    config.total = "100 epochs"
    config.model = dict(
        encoder=dict(name="alexnet"),
        map="pool5",
        decoder=dict(widths=(256, 128, 64, 32, 16)),
        mask=dict(name="random_region", area=(0.2, 0.3), cell=16),
        overlap_weight=10.0,
        adversary=NOBODY,
        mean=common.IMAGENET_MEAN,
        std=common.IMAGENET_STD,
    )
    config.optim = dict(net=dict(name="adam", lr=2e-3, b1=0.5))
    config.evals = dict(
        layers=dict(kind="linear_by_layer", features=9600, normalization="channel", solver="sgd"),
        linear=dict(kind="linear", solver="sgd"),
    )
    config.best_metric = "layers/best_top1"
    config.evaluate_every, config.checkpoint_every = "10 epochs", "1 epoch"
    config.log_every_steps, config.baselines = 50, ()


VARIANTS = (
    Variant("", scenes, "embedded scenes: random regions of 20 to 30 %, ResNet-10 of width 1/4, 45 epochs", hardware="2 CPU cores"),
    Variant("smoke", smoke, "the default with a hole in the center and an adversary in seconds, for tests"),
    Variant("scenes_center", scenes_center, "the default with a hole of 16 pixels in the center", hardware="2 CPU cores"),
    Variant("scenes_adversarial", scenes_adversarial, "the same with an adversary, which judges what is painted",
            hardware="2 CPU cores"),
    Variant("cifar10_small", cifar10_small, "JPEG CIFAR-10, the networks of the default, 7 epochs", hardware="2 CPU cores"),
    Variant("cifar10_small_center", cifar10_small_center, "the same with a hole of 16 pixels in the center", hardware="2 CPU cores"),
    Variant("imagenet_alexnet", imagenet_alexnet, "AlexNet, random regions, 100 epochs of Adam", hardware="1 accelerator"),
)  # fmt: skip


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    return common.make("context_encoder", VARIANTS, variant)

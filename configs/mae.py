"""Masked autoencoders (He et al. 2022, arXiv:2111.06377): a ViT sees a quarter of an image, and a decoder paints the rest.

  python launch.py train --config=configs/mae.py --workdir=runs/mae
  python launch.py configs mae
"""

import ml_collections

from configs import common
from configs.common import Variant


def networks(config, variant, width, depth, heads):
    config.model = dict(
        encoder=dict(name="vit", variant=variant, pool="cls", position="sincos2d"),
        decoder=dict(width=width, depth=depth, heads=heads),
        mask_ratio=0.75,
        norm_pix=True,
        mean=common.IMAGENET_MEAN,
        std=common.IMAGENET_STD,
    )


def scenes(config):
    config.views = ((("random_resized_crop", dict(size=48, area=(0.2, 1.0))), ("flip", dict(p=0.5))),)
    config.batch_size, config.total = 256, "45 epochs"
    networks(config, "mini/6", 64, 2, 4)
    config.optim = dict(net=dict(name="adamw", lr=1.5e-3, b2=0.95, weight_decay=0.05, warmup="4 epochs"))
    config.evals.linear.update(dict(l2=(1e-3, 1e-2, 1e-1)))
    config.evals.layers = dict(kind="linear_by_layer")
    config.evals.inpainting = dict(kind="inpainting")
    config.evaluate_every, config.checkpoint_every = "45 epochs", "3 epochs"


def smoke(config):
    scenes(config)
    common.shrink(config, {
        "model.encoder.variant": "mu/12",
        "model.decoder": dict(width=16, depth=1, heads=2),
        "optim.net.warmup": "0.1 epochs",
    })  # fmt: skip


def cifar10_small(config):
    scenes(config)
    config.data.name = "cifar10"
    config.online_probe = 1e-3
    config.views = ((("random_resized_crop", dict(size=32, area=(0.2, 1.0))), ("flip", dict(p=0.5))),)
    config.total = config.evaluate_every = "14 epochs"  # one view an image: as many views as configs/simclr.py:cifar10_small
    config.checkpoint_every, config.log_every_steps = "1 epoch", 50
    networks(config, "mini/4", 64, 2, 4)
    config.optim.net.warmup = "1 epoch"


def imagenet(config):
    """ViT-B/16: AdamW 1.5e-4 x B / 256 at batch 4096, decay .05, 1600 epochs with 40 of warm-up, decoder of 8 blocks of 512."""
    config.data.name, config.data.test_split = "imagenet2012", "validation"
    config.data.ops = (("random_resized_crops", dict(size=224, crops=1, area=(0.2, 1.0), interpolation="bicubic")),)
    config.data.eval_ops = (("resize_crop", dict(resize=256, crop=224, interpolation="bicubic")),)
    config.data.workers = 16
    config.views = ((("flip", dict(p=0.5)),),)
    config.batch_size, config.total = 4096, "1600 epochs"
    networks(config, "B/16", 512, 8, 16)
    config.optim = dict(
        net=dict(name="adamw", lr=1.5e-4, lr_scale="linear", b2=0.95, weight_decay=0.05, warmup="40 epochs", weight_decay_mask=DECAYED)
    )
    config.evals = dict(linear=dict(kind="linear", solver="sgd"))
    config.evaluate_every, config.checkpoint_every = "100 epochs", "5 epochs"
    config.log_every_steps, config.baselines, config.best_metric = 50, (), ""


def imagenet_l(config):
    imagenet(config)
    config.model.encoder.variant = "L/16"


DECAYED = ((r"/(bias|scale)$", 0.0), (".*", 1.0))  # class and mask tokens are decayed, as in the official code

VARIANTS = (
    Variant("", scenes, "embedded scenes, a ViT of four blocks of 96 on patches of 6 pixels, 45 epochs", hardware="2 CPU cores"),
    Variant("smoke", smoke, "the default in seconds, for tests"),
    Variant("cifar10_small", cifar10_small, "JPEG CIFAR-10, the same ViT on patches of 4 pixels, 14 epochs", hardware="2 CPU cores"),
    Variant("imagenet", imagenet, "ViT-B/16, batch 4096, 1600 epochs",
            expected="fine-tuned 83.6, linear 68.0", source="He et al. 2022"),
    Variant("imagenet_l", imagenet_l, "ViT-L/16, batch 4096, 1600 epochs", hardware="64 GPUs",
            expected="fine-tuned 85.9, linear 75.8", source="He et al. 2022"),
)  # fmt: skip


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    return common.make("mae", VARIANTS, variant)

"""DINO (Caron et al. 2021, arXiv:2104.14294): views predict a teacher's assignments of the large views to prototypes.

  python launch.py train --config=configs/dino.py --workdir=runs/dino
  python launch.py configs dino
"""

import ml_collections

from configs import common, simclr
from configs.common import Variant


def networks(config, widths, bottleneck, prototypes, momentum, temperatures, warmup, frozen="1 epoch"):
    """`temperatures`: of the teacher, first and last."""
    config.model.projector = dict(widths=widths, bottleneck=bottleneck, prototypes=prototypes, last_scale=False)
    config.model.update(dict(
        momentum=momentum, momentum_schedule="cosine", center_momentum=0.9, frozen=frozen, temperature=0.1,
        teacher_temperature=temperatures[0], teacher_temperature_end=temperatures[1], teacher_warmup=warmup,
    ))  # fmt: skip


def scenes(config):
    simclr.relative(config, simclr.scenes)
    networks(config, (256,), 64, 512, 0.98, (0.04, 0.07), "5 epochs")
    config.optim.net.update(dict(weight_decay=0.04, weight_decay_end=0.4, clip_tensor_norm=3.0))


def smoke(config):
    scenes(config)
    common.shrink(config, {
        "model.encoder.width": 0.125,
        "model.encoder.zero_init_residual": True,  # as in configs/simclr.py
        "model.projector.widths": (32,),
        "model.projector.bottleneck": 16,
        "model.projector.prototypes": 24,
        "model.frozen": "2 steps",
        "model.teacher_warmup": "4 steps",
        "optim.net.warmup": "0.1 epochs",
    })  # fmt: skip


def smoke_crops(config):
    """A ViT on two views of 32 pixels and two of 16, with a stochastic depth."""
    smoke(config)
    config.model.encoder = dict(name="vit", variant="mu/8", pool="cls", drop_path=0.1)
    large, *others = config.views[0]
    common.of_two_sizes(config, (large, *others), (("random_resized_crop", dict(size=16, area=(0.05, 0.2))), *others), 2)


def scenes_no_centering(config):
    """An ablation of the paper (section 5.3): one prototype wins for all images."""
    scenes(config)
    config.model.center_momentum = 1.0


def scenes_no_sharpening(config):
    """An ablation of the paper (section 5.3): all prototypes become equally likely."""
    scenes(config)
    config.model.teacher_temperature = config.model.teacher_temperature_end = 1.0


def cifar10_small(config):
    simclr.relative(config, simclr.cifar10_small)
    networks(config, (256,), 64, 512, 0.98, (0.04, 0.07), "1 epoch", "0.25 epochs")
    config.optim.net.update(dict(weight_decay=0.04, weight_decay_end=0.4, clip_tensor_norm=3.0))


def cifar10(config):
    """solo-learn's: LARS 0.3 x B / 256, decay 1e-6, 4096 prototypes, momentum .9995.

    Changed: JPEG CIFAR-10; the trust ratio is not clipped; BatchNorm normalizes both views together.
    """
    simclr.relative(config, simclr.cifar10)
    config.views = simclr.small_images_views()
    config.batch_size, config.total = 256, "1000 epochs"
    config.model.mean, config.model.std = common.CIFAR_MEAN, common.CIFAR_STD
    config.optim = dict(net=dict(name="lars", lr=0.3, lr_scale="linear", trust=0.02, weight_decay=1e-6, warmup="10 epochs"))
    networks(config, (2048, 2048), 256, 4096, 0.9995, (0.04, 0.07), "50 epochs")


def imagenet_vit_s(config):
    """ViT-S/16: AdamW 5e-4 x B / 256 at batch 1024, 800 epochs with 10 of warm-up, two crops of 224 and ten of 96 pixels.

    Weight decay .04 rising to .4, gradients of each array clipped at 3, momentum .996 rising to 1. Changed: the device crops from one
    large crop of the host; positions of small crops are interpolated without the official offset of a tenth of a patch.
    """
    simclr.relative(config, simclr.imagenet)
    config.data.ops = (("resize_crop", dict(resize=256, crop=256, interpolation="bicubic")),)
    color = (
        ("flip", dict(p=0.5)), ("color_jitter", dict(simclr.JITTER)), ("grayscale", dict(p=0.2)),
        ("blur", dict(p=0.5, sigma=(0.1, 2.0))),
    )  # fmt: skip
    large = (("random_resized_crop", dict(size=224, area=(0.25, 1.0))), *color)
    common.of_two_sizes(config, large, (("random_resized_crop", dict(size=96, area=(0.05, 0.25))), *color), 10)
    config.batch_size, config.total = 1024, "800 epochs"
    config.model.encoder = dict(name="vit", variant="S/16", pool="cls", drop_path=0.1)
    config.model.mean, config.model.std = common.IMAGENET_MEAN, common.IMAGENET_STD
    config.optim = dict(net=dict(
        name="adamw", lr=5e-4, lr_scale="linear", warmup="10 epochs", end=2e-3, weight_decay=0.04, weight_decay_end=0.4,
        clip_tensor_norm=3.0,
    ))  # fmt: skip
    networks(config, (2048, 2048), 256, 65536, 0.996, (0.04, 0.07), "30 epochs")


VARIANTS = (
    Variant("", scenes, "embedded scenes, the encoder, views and budget of configs/simclr.py", hardware="2 CPU cores"),
    Variant("smoke", smoke, "the default in seconds, for tests"),
    Variant("smoke_crops", smoke_crops, "a ViT with views of two sizes, for tests"),
    Variant("scenes_no_centering", scenes_no_centering, "the default without centering, which collapses", hardware="2 CPU cores"),
    Variant("scenes_no_sharpening", scenes_no_sharpening, "the default without sharpening, which collapses", hardware="2 CPU cores"),
    Variant("cifar10_small", cifar10_small, "JPEG CIFAR-10, the encoder, views and budget of configs/simclr.py:cifar10_small",
            hardware="2 CPU cores"),
    Variant("cifar10", cifar10, "ResNet-18, batch 256, 1000 epochs of LARS", hardware="1 accelerator",
            expected="linear 89.52 (trained online, on augmented views)", source="solo-learn's README"),
    Variant("imagenet_vit_s", imagenet_vit_s, "ViT-S/16, 2 + 10 crops, batch 1024, 800 epochs", expected="kNN 74.5, linear 77.0",
            source="the official README"),
)  # fmt: skip


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    return common.make("dino", VARIANTS, variant)

"""iBOT (Zhou et al. 2022, arXiv:2111.07832) and DINOv2 (Oquab et al. 2023, arXiv:2304.07193): DINO with masked patches.

  python launch.py train --config=configs/ibot.py --workdir=runs/ibot
  python launch.py configs ibot
"""

import ml_collections

from configs import common, simclr
from configs.common import Variant


def networks(config, variant, widths, bottleneck, prototypes, momentum, temperatures, warmup, frozen):
    """`temperatures`: of the teacher, first and last."""
    config.model = dict(
        encoder=dict(name="vit", variant=variant, pool="cls"),
        projector=dict(widths=widths, bottleneck=bottleneck, prototypes=prototypes, last_scale=False),
        shared_head=True,
        masked_share=0.5,
        masked_ratio=(0.1, 0.5),
        centering="softmax",
        center_momentum=0.9,
        momentum=momentum,
        momentum_schedule="cosine",
        temperature=0.1,
        teacher_temperature=temperatures[0],
        teacher_temperature_end=temperatures[1],
        teacher_warmup=warmup,
        frozen=frozen,
        weights=dict(masked=1.0, koleo=0.0),
        koleo_group=32,
        mean=common.IMAGENET_MEAN,
        std=common.IMAGENET_STD,
    )


def dino_v2(config, koleo_group):
    """The changes of DINOv2 to iBOT."""
    config.model.shared_head, config.model.centering = False, "sinkhorn"
    config.model.weights.koleo, config.model.koleo_group = 0.1, koleo_group
    config.model.encoder.layer_scale = 1e-5


def scenes(config):
    simclr.relative(config, simclr.scenes)
    _, *others = config.views[0]
    config.views = ((("random_resized_crop", dict(size=48, area=(0.25, 1.0))), *others),) * 2
    networks(config, "mini/6", (256,), 64, 512, 0.98, (0.04, 0.07), "5 epochs", "1 epoch")
    config.optim = dict(net=dict(
        name="adamw", lr=1e-3, warmup="4 epochs", weight_decay=0.04, weight_decay_end=0.4, clip_tensor_norm=3.0,
    ))  # fmt: skip
    config.evals.layers = dict(kind="linear_by_layer")


def smoke(config):
    scenes(config)
    common.shrink(config, SMALL)


SMALL = {
    "model.encoder.variant": "mu/12",
    "model.projector": dict(widths=(32,), bottleneck=16, prototypes=24, last_scale=False),
    "model.frozen": "2 steps",
    "model.teacher_warmup": "4 steps",
    "model.koleo_group": 8,
    "optim.net.warmup": "0.1 epochs",
}


def smoke_v2(config):
    """DINOv2 with views of two sizes and stochastic depth."""
    scenes(config)
    dino_v2(config, 8)
    config.model.encoder.drop_path = 0.1
    common.shrink(config, SMALL)
    crop, *others = config.views[0]
    common.of_two_sizes(config, (crop, *others), (("random_resized_crop", dict(size=24, area=(0.05, 0.25))), *others), 2)


def scenes_v2(config):
    scenes(config)
    dino_v2(config, 64)


def cifar10_small(config):
    scenes(config)
    simclr.relative(config, simclr.cifar10_small)
    networks(config, "mini/4", (256,), 64, 512, 0.98, (0.04, 0.07), "1 epoch", "0.25 epochs")
    config.optim = dict(net=dict(
        name="adamw", lr=1e-3, warmup="0.5 epochs", weight_decay=0.04, weight_decay_end=0.4, clip_tensor_norm=3.0,
    ))  # fmt: skip


def crops(config, area, small_area, count):
    """Two views of 224 pixels and `count` of 96, cut on the device from a crop of 256."""
    config.data.ops = (("resize_crop", dict(resize=256, crop=256, interpolation="bicubic")),)
    color = (
        ("flip", dict(p=0.5)), ("color_jitter", dict(simclr.JITTER)), ("grayscale", dict(p=0.2)),
        ("blur", dict(p=0.5, sigma=(0.1, 2.0))),
    )  # fmt: skip
    large = (("random_resized_crop", dict(size=224, area=area)), *color)
    common.of_two_sizes(config, large, (("random_resized_crop", dict(size=96, area=small_area)), *color), count)


def imagenet_vit_s(config):
    """iBOT on ViT-S/16: AdamW 5e-4 x B / 256 at batch 1024, 800 epochs with 10 of warm-up, 2 + 10 crops, 8192 prototypes.

    Changed: patches are masked at random (the paper: as good as its blocks, on ViT-B and L); the device crops from one large crop.
    """
    simclr.relative(config, simclr.imagenet)
    crops(config, (0.25, 1.0), (0.05, 0.25), 10)
    config.batch_size, config.total = 1024, "800 epochs"
    networks(config, "S/16", (2048, 2048), 256, 8192, 0.996, (0.04, 0.07), "30 epochs", "1 epoch")
    config.model.encoder.drop_path = 0.1
    config.optim = dict(net=dict(
        name="adamw", lr=5e-4, lr_scale="linear", warmup="10 epochs", end=2e-3, weight_decay=0.04, weight_decay_end=0.4,
        clip_tensor_norm=3.0,
    ))  # fmt: skip


def imagenet_v2_vit_l(config):
    """DINOv2's short recipe, ViT-L/16: AdamW .004 x sqrt(B / 1024) at batch 2048, 100 epochs with 10 of warm-up, 65,536 prototypes.

    Changed: one learning rate for all layers (the official code: .9 for each layer below, and .2 for patches); stochastic depth rises
    over the layers; KoLeo among 64 images, as on each of 32 devices; patches are masked at random.
    """
    simclr.relative(config, simclr.imagenet)
    crops(config, (0.32, 1.0), (0.05, 0.32), 8)
    config.batch_size, config.total = 2048, "100 epochs"
    networks(config, "L/16", (2048, 2048), 256, 65536, 0.992, (0.04, 0.07), "30 epochs", "1 epoch")
    dino_v2(config, 64)
    config.model.shared_head, config.model.centering = True, "softmax"
    config.model.encoder.drop_path = 0.3
    config.optim = dict(net=dict(
        name="adamw", lr=0.004 / 32, lr_scale="sqrt", warmup="10 epochs", weight_decay=0.04, weight_decay_end=0.4, clip_norm=3.0,
    ))  # fmt: skip


VARIANTS = (
    Variant("", scenes, "iBOT on embedded scenes, a ViT of four blocks of 96 on patches of 6 pixels, 45 epochs",
            hardware="2 CPU cores"),
    Variant("smoke", smoke, "the default in seconds, for tests"),
    Variant("scenes_v2", scenes_v2, "the default with the changes of DINOv2", hardware="2 CPU cores"),
    Variant("smoke_v2", smoke_v2, "DINOv2 with views of two sizes in seconds, for tests"),
    Variant("cifar10_small", cifar10_small, "JPEG CIFAR-10, the same ViT on patches of 4 pixels, 7 epochs", hardware="2 CPU cores"),
    Variant("imagenet_vit_s", imagenet_vit_s, "iBOT, ViT-S/16, 2 + 10 crops, batch 1024, 800 epochs",
            expected="kNN 75.2, linear 77.9", source="the official README"),
    Variant("imagenet_v2_vit_l", imagenet_v2_vit_l, "DINOv2's short recipe, ViT-L/16, batch 2048, 100 epochs", hardware="32 A100",
            time="1 day", expected="kNN 81.6, linear 82.9", source="the official README"),
)  # fmt: skip


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    return common.make("ibot", VARIANTS, variant)

"""Supervised classification, from scratch or from a pretrained encoder.

  python launch.py train --config=configs/supervised.py --workdir=runs/supervised
  python launch.py configs supervised
"""

import ml_collections
from ml_collections import config_dict

from configs import common, simclr
from configs.common import Variant
from ssl_jax.engine.layer_decay import resnet_layer_decay, vit_layer_decay


def scenes(config):
    simclr.scenes(config)
    size = common.SCENES_SIZE
    config.views = ((("random_resized_crop", dict(size=size, area=(0.5, 1.0))), ("flip", dict(p=0.5))),)
    config.total = "20 epochs"
    config.evaluate_every = "20 epochs"
    del config.model["temperature"]
    config.model.head_layers = 0  # hidden layers of model.head below the classifier
    config.model.smoothing = 0.0
    config.evals.classifier = dict(kind="classifier")
    config.best_metric, config.references = "", {}


def smoke(config):
    scenes(config)
    common.shrink(config, {
        "model.encoder.width": 0.125,
        "model.encoder.zero_init_residual": True,  # as in configs/simclr.py
        "optim.net.warmup": "0.1 epochs",
    })  # fmt: skip


def cifar10_small(config):
    scenes(config)
    config.data.name = "cifar10"
    config.views = ((("random_resized_crop", dict(size=32, area=(0.2, 1.0))), ("flip", dict(p=0.5))),)


def imagenet(config):
    """torchvision's: SGD 0.1, divided by 10 after 30 and 60 epochs, batch 256, decay 1e-4 of all parameters, no smoothing.

    Changed: BatchNorm normalizes the 256 images together (torchvision: 32 per GPU), and the classifier starts at zero.
    """
    config.data.name = "imagenet2012"
    config.data.test_split = "validation"
    config.data.ops = (("random_resized_crops", dict(size=224, crops=1, area=(0.08, 1.0), interpolation="bilinear")),)
    config.data.eval_ops = (("resize_crop", dict(resize=256, crop=224, interpolation="bilinear")),)
    config.data.workers = 16
    config.batch_size = 256
    config.total = "90 epochs"
    config.views = ((("flip", dict(p=0.5)),),)
    config.model = dict(
        encoder=dict(name="resnet", depth=50, width=1.0, stem="imagenet", zero_init_residual=False),
        head=dict(widths=(2048, 128), kernel_std=0.01),
        head_layers=0,
        smoothing=0.0,
        mean=common.IMAGENET_MEAN,
        std=common.IMAGENET_STD,
    )
    config.optim = dict(
        net=dict(name="sgd", lr=0.1, lr_scale="linear", schedule="step", milestones=(1 / 3, 2 / 3), weight_decay=1e-4,
                 weight_decay_mask=((".*", 1.0),))
    )  # fmt: skip
    config.evals.linear = dict(kind="linear", solver="sgd")
    config.evals.classifier = dict(kind="classifier")
    config.evaluate_every, config.checkpoint_every = "10 epochs", "1 epoch"
    config.log_every_steps, config.baselines, config.best_metric = 50, (), ""


def imagenet_vit_g14(config):
    """For rehearsals, not to reproduce a figure.

    The optimizer (AdamW 1e-4 x B / 256, betas .9 and .95, decay 0.3, batch 4096, 20 of 200 epochs of warmup) follows no checked
    source. RandAugment, mixup, CutMix, drop path and averaged weights are missing.
    """
    from ssl_jax.models.backbones.vit import TENSOR_RULES

    imagenet(config)
    config.batch_size = 4096
    config.total = "200 epochs"
    config.data.ops = (("random_resized_crops", dict(size=224, crops=1, area=(0.08, 1.0))),)
    config.data.eval_ops = common.IMAGENET_EVAL
    config.model.smoothing = 0.1
    config.model.encoder = dict(name="vit", variant="g/14", remat="full", scan=True)
    config.optim = dict(
        net=dict(name="adamw", lr=1e-4, lr_scale="linear", b2=0.95, weight_decay=0.3, warmup="20 epochs")
    )
    config.mesh = dict(data=-1, fsdp=16, tensor=1)
    config.sharding = (*TENSOR_RULES, (".*", "fsdp"))


def transfer(config):
    """A classifier on a tenth of the labels, above the encoder of a finished run."""
    scenes(config)
    config.stages.backbone = common.backbone("configs/simclr.py")
    config.data.train_split = "train[:10%]"
    config.batch_size = 64
    for key in ("encoder", "head", "mean", "std", "loss", "similarities"):  # the encoder and its input are those of the stage
        del config.model[key]
    config.model.backbone = "frozen"
    config.optim = dict(net=dict(name="adamw", lr=2e-3, weight_decay=1e-4, warmup="1 epoch", lr_multipliers=common.SAME))
    config.evals = dict(classifier=dict(kind="classifier"))
    config.best_metric, config.baselines = "classifier/top1", ()


def finetune_backbone(config):
    """All weights, with the rates of earlier layers decayed."""
    transfer(config)
    config.model.backbone = "trained"
    config.optim.net.lr_multipliers = resnet_layer_decay(0.8)


def scratch(config):
    """The same network and training as :finetune_backbone, from the initial weights of that run; no rates are decayed."""
    transfer(config)
    config.stages.backbone.untrained = True
    config.model.backbone = "trained"


def transfer_cifar10(config):
    """The same on a tenth of JPEG CIFAR-10, 20 epochs."""
    transfer(config)
    config.stages.backbone.recipe = "configs/simclr.py:cifar10_small"
    config.data.name = "cifar10"
    config.views = ((("random_resized_crop", dict(size=32, area=(0.2, 1.0))), ("flip", dict(p=0.5))),)


def finetune_smoke(config):
    """Every part of the published recipes at once."""
    finetune_backbone(config)
    config.stages.backbone.recipe = "configs/simclr.py:smoke"
    size = common.SCENES_SIZE
    config.views = ((
        ("random_resized_crop", dict(size=size, area=(0.5, 1.0))), ("flip", dict(p=0.5)),
        ("rand_augment", dict(layers=2, magnitude=9.0, deviation=0.5)), ("erase", dict(p=0.25)),
    ),)  # fmt: skip
    config.model.update(dict(smoothing=0.1, drop_path=0.1, head_std=0.01, mix=dict(MIX), ema=dict(decay=0.5)))
    common.shrink(config, {"optim.net.warmup": "0.1 epochs"})


def finetune(config):
    """From the middle of SimCLR v2's head."""
    scenes(config)
    config.data.train_split = "train[:10%]"
    config.batch_size = 64
    config.total = "20 epochs"
    config.model.head_layers = 1
    config.warm_start = dict(workdir=config_dict.placeholder(str), rules=((r"^net/(encoder|head)/", r"net/\1/"),))
    config.optim = dict(net=dict(name="sgd", nesterov=True, lr=0.05, weight_decay=0.0))


def imagenet_10pct(config):
    """Batch 1024, LARS 0.005 x sqrt(B) without warm-up or decay, SimCLR's crops and flips without jitter.

    The figure is of a run that starts at one of configs/simclr.py:imagenet_v2, --config.warm_start.workdir=DIR (required; an empty
    one means random initial weights).
    """
    imagenet(config)
    config.batch_size = 1024
    config.data.ops = (("random_resized_crops", dict(size=224, crops=1, area=(0.08, 1.0), sampling="simclr")),)
    config.data.eval_ops = common.IMAGENET_EVAL
    config.data.name, config.data.train_split = "imagenet2012_subset/10pct", "train"
    config.total = "30 epochs"
    config.model.encoder.update(dict(flavor="simclr", zero_init_residual=True))
    config.model.head.widths = (2048, 2048, 128)
    config.model.head_layers = 1
    config.model.mean, config.model.std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    config.warm_start = dict(workdir=config_dict.placeholder(str), rules=((r"^net/(encoder|head)/", r"net/\1/"),))
    # As in the published code, the classifier has no layer-wise rate: it starts at zero, where LARS would hardly update it.
    adapted = ((r"(bias|scale)$|classifier/", 0.0), (".*", 1.0))
    config.optim = dict(net=dict(name="lars", lr=0.005, lr_scale="sqrt", weight_decay=0.0, weight_decay_mask=adapted))


def imagenet_1pct(config):
    """As :imagenet_10pct, 60 epochs."""
    imagenet_10pct(config)
    config.data.name, config.total = "imagenet2012_subset/1pct", "60 epochs"


MIX = dict(mixup=0.8, cutmix=1.0, p=1.0, switch=0.5)  # of DeiT and MAE; the label smoothing is inside the targets
# In timm normalizations, biases, positions and the class token do not decay.
VIT_DECAYED = ((r"(bias|scale|pos_embed|cls_token|registers)$", 0.0), (".*", 1.0))


def vit_b16(config):
    """ViT-B/16 at 224 pixels with DeiT's augmentations, from a run whose encoder is this network.

    Changed: positions stay those of the pretraining, fixed sines and cosines (published: trained from there on), and RandAugment's
    affine maps are bilinear (bicubic).
    """
    imagenet(config)
    config.data.ops = (("random_resized_crops", dict(size=224, crops=1, area=(0.08, 1.0))),)
    config.data.eval_ops = common.IMAGENET_EVAL
    augmented = (
        ("flip", dict(p=0.5)), ("rand_augment", dict(layers=2, magnitude=9.0, deviation=0.5)), ("erase", dict(p=0.25)),
    )  # fmt: skip
    config.views = (augmented,)
    config.model = dict(
        encoder=dict(name="vit", variant="B/16", pool="cls", position="sincos2d", remat="none"),
        head_layers=0,
        pool="pooled",
        head_std=0.0,
        smoothing=0.1,
        mix=dict(MIX),
        drop_path=0.1,
        mean=common.IMAGENET_MEAN,
        std=common.IMAGENET_STD,
    )
    config.warm_start = dict(workdir=config_dict.placeholder(str), rules=((r"^net/encoder/", "net/encoder/"),))


def vit_b16_mae(config):
    """MAE's fine-tuning of ViT-B/16: AdamW 5e-4 x B / 256, batch 1024, decay .05, layer decay .65, 100 epochs, 5 of warm-up.

    The classifier reads the mean of the patches through its own normalization. Changed: see `vit_b16`.
    """
    vit_b16(config)
    config.batch_size, config.total = 1024, "100 epochs"
    config.model.pool, config.model.head_std = "mean_norm", 2e-5
    config.optim = dict(
        net=dict(name="adamw", lr=5e-4, lr_scale="linear", warmup="5 epochs", end=5e-4,  # 1e-6 of 2e-3
                 weight_decay=0.05, weight_decay_mask=VIT_DECAYED, lr_multipliers=vit_layer_decay(12, 0.65))
    )  # fmt: skip


def cifar10_moco_v3(config):
    """MoCo v3's fine-tuning of ViT-B/16 on CIFAR-10: AdamW 3e-4, batch 128, decay .1, drop path .1, 100 epochs, 3 of warm-up.

    Augmentations are DeiT's, in whose code it runs. Changed: see `vit_b16`.
    """
    vit_b16(config)
    config.data.name, config.data.test_split = "cifar10", "test"
    config.data.eval_ops = common.resized(224)
    config.batch_size, config.total = 128, "100 epochs"
    config.optim = dict(
        net=dict(name="adamw", lr=3e-4, warmup="3 epochs", weight_decay=0.1, weight_decay_mask=VIT_DECAYED)
    )


VARIANTS = (
    Variant("", scenes, "embedded scenes, the encoder of configs/simclr.py: an upper bound for self-supervised numbers",
            hardware="2 CPU cores", expected="kNN 92.54 ± 1.22, linear 92.70 ± 1.25", source="ours, 3 seeds"),
    Variant("smoke", smoke, "the default in seconds, for tests"),
    Variant("cifar10_small", cifar10_small, "JPEG CIFAR-10, ResNet-10 of width 1/4", hardware="2 CPU cores"),
    Variant("imagenet", imagenet, "ResNet-50, batch 256, 90 epochs, SGD 0.1 x B / 256 in three steps",
            hardware="8 V100", expected="top-1 76.1", source="torchvision ResNet-50"),
    Variant("imagenet_vit_g14", imagenet_vit_g14,
            "ViT-g/14 with FSDP, rematerialization and a scan over blocks: for rehearsals",
            hardware="64 TPU v5p or as large"),
    Variant("finetune", finetune,
            "embedded scenes with a tenth of the labels: --config.warm_start.workdir=<a run of configs/simclr.py>",
            hardware="2 CPU cores", expected="kNN 71.39, linear 74.50 (from scratch 49.61, 56.11)",
            source="ours, 1 seed"),
    Variant("transfer", transfer,
            "a classifier on the same labels, above the frozen encoder of any run: --config.stages.backbone.workdir=DIR",
            hardware="2 CPU cores"),
    Variant("transfer_cifar10", transfer_cifar10,
            "a classifier on a tenth of JPEG CIFAR-10, above the same: --config.stages.backbone.workdir=DIR", hardware="2 CPU cores"),
    Variant("finetune_backbone", finetune_backbone, "the encoder of :transfer is trained, too", hardware="2 CPU cores"),
    Variant("scratch", scratch, "the same network and labels from initial weights: --config.stages.backbone.workdir=DIR",
            hardware="2 CPU cores"),
    Variant("finetune_smoke", finetune_smoke, "every part of fine-tuning in seconds, for tests"),
    Variant("imagenet_1pct", imagenet_1pct, "SimCLR v2 fine-tuning on 1 % of the labels, 60 epochs"),
    Variant("imagenet_10pct", imagenet_10pct, "SimCLR v2 fine-tuning on 10 % of the labels, 30 epochs",
            expected="top-1 68.4 (ResNet-50, from :imagenet_v2 of configs/simclr.py)", source="Chen et al. 2020b"),
    Variant("vit_b16_mae", vit_b16_mae, "MAE's fine-tuning of ViT-B/16: --config.warm_start.workdir=<a run with such an encoder>",
            expected="top-1 83.66 (83.46 to 83.66 over 4 seeds; 83.3 after 400 epochs of pretraining)",
            source="facebookresearch/mae; open-mmlab/mmpretrain"),
    Variant("cifar10_moco_v3", cifar10_moco_v3,
            "MoCo v3's fine-tuning of ViT-B/16 on CIFAR-10: --config.warm_start.workdir=<a run with such an encoder>",
            expected="top-1 98.9", source="facebookresearch/moco-v3"),
)  # fmt: skip


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    return common.make("supervised", VARIANTS, variant)

"""Semantic segmentation with a pretrained encoder (Long et al. 2015, arXiv:1411.4038; Oquab et al. 2023, arXiv:2304.07193).

  python launch.py train --config=configs/simclr.py --workdir=runs/simclr
  python launch.py train --config=configs/segmentation.py --config.stages.backbone.workdir=runs/simclr --workdir=runs/segments
  python launch.py configs segmentation

`backbone='frozen'` keeps the encoder of that run; 'trained' starts from a copy of it.
"""

import ml_collections

from configs import common
from configs.common import Variant

SCENES_CLASSES = ("ground", "object", "pebbles")
CAMVID_CLASSES = (
    "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist",
)  # fmt: skip


def scenes(config):
    config.stages = dict(backbone=common.backbone("configs/simclr.py"))
    config.batch_size, config.total = 64, "10 epochs"
    config.data.ops = (("resize", dict(height=48, width=48, flip=0.5)),)
    config.views = ((("color_jitter", dict(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.05, p=0.8)),),)
    config.model = dict(
        backbone="frozen",
        maps=("layer2", "layer3", "layer4"),  # of 12, 6 and 3 pixels; with layer1, of 24, a step costs four times as much
        head=dict(name="fcn", channels=64),
        classes=3,
        ignore=255,
    )
    config.optim = dict(net=dict(name="adamw", lr=2e-3, weight_decay=1e-4, warmup="1 epoch", lr_multipliers=common.SAME))
    config.evals = dict(segmentation=dict(kind="segmentation", names=SCENES_CLASSES))
    config.evaluate_every, config.checkpoint_every = "5 epochs", "1 epoch"
    config.best_metric, config.baselines = "segmentation/miou", ()


def smoke(config):
    scenes(config)
    config.stages.backbone.recipe = "configs/simclr.py:smoke"
    config.optim.net.schedule = "constant"
    common.shrink(config, {"model.head.channels": 16, "optim.net.lr": 1e-2})


def linear(config):
    scenes(config)
    config.model.head = dict(name="linear", dropout=0.1)


def finetune(config):
    scenes(config)
    config.model.backbone = "trained"
    config.optim.net.lr_multipliers = common.SLOWER_BACKBONE


def scratch(config):
    scenes(config)
    config.stages.backbone.untrained = True
    config.model.backbone = "trained"


def camvid(config):
    """Frames of 360 x 480 pixels at half their size; each training crop shows 30 to 100 % of a frame at 160 x 160 pixels."""
    scenes(config)
    config.stages.backbone.recipe = "configs/simclr.py:cifar10_small"
    config.data.name, config.data.features = "camvid", dict(mask="segmentation_mask")
    config.data.ops = (("random_resized_crop", dict(size=160, area=(0.3, 1.0), interpolation="bilinear", flip=0.5)),)
    config.data.eval_ops = (("resize", dict(height=180, width=240, interpolation="bilinear")),)
    config.batch_size, config.eval_batch_size, config.total = 16, 32, "40 epochs"
    config.model.classes, config.model.ignore = 11, 11
    config.optim.net.warmup = "5 epochs"
    config.evals.segmentation.update(dict(ignore=11, names=CAMVID_CLASSES))
    config.evals.cells = dict(kind="segmentation_linear", layer="layer3", ignore=11, names=CAMVID_CLASSES)
    config.evaluate_every, config.checkpoint_every = "40 epochs", "5 epochs"


def folder(config):
    """Images and masks of any size: FOLDER/images/a.jpg with FOLDER/masks/a.png, whose values are the classes; 255 is ignored."""
    scenes(config)
    config.data.name = "/path/to/folder"
    config.data.ops = (("random_resized_crop", dict(size=160, area=(0.3, 1.0), flip=0.5)),)
    config.data.eval_ops = (("resize_crop", dict(resize=160, crop=160)),)
    config.batch_size, config.eval_batch_size = 16, 32
    config.model.classes = 2
    config.evals.segmentation.names = ()


def ade20k_linear(config):
    """DINOv2's linear protocol: BatchNorm, dropout 0.1 and a 1x1 convolution on the last maps; AdamW 1e-3, decay 1e-3, batch 16,
    40,000 steps with 1,500 of warm-up, crops of 512 pixels, mirrored.

    The folder is ADEChallengeData2016, where the value 0 is 'other': it is ignored, so that 150 of the 151 classes count.

    Changed: crops have the distribution of torchvision's, not scales of 0.5 to 2; test images are seen as one square of 512 pixels,
    not by a sliding window; the loss is a mean over the valid pixels.
    """
    scenes(config)
    config.stages.backbone.recipe = "configs/simclr.py:imagenet"
    config.data.name, config.data.train_split, config.data.test_split = "/path/to/ADEChallengeData2016", "training", "validation"
    config.data.ops = (("random_resized_crop", dict(size=512, area=(0.25, 1.0), interpolation="bilinear", flip=0.5)),)
    config.data.eval_ops = (("resize_crop", dict(resize=512, crop=512, interpolation="bilinear")),)
    config.data.workers = 16
    config.batch_size, config.eval_batch_size, config.total = 16, 16, "40_000 steps"
    config.model = dict(backbone="frozen", maps=("last",), head=dict(name="linear", dropout=0.1), classes=151, ignore=0)
    config.views = ((),)
    config.optim = dict(net=dict(name="adamw", lr=1e-3, weight_decay=1e-3, warmup="1500 steps"))
    config.evals.segmentation.update(dict(ignore=0, names=()))
    config.evaluate_every, config.checkpoint_every, config.log_every_steps = "0 steps", "2000 steps", 50


VARIANTS = (
    Variant("", scenes, "embedded scenes, on a run of configs/simclr.py: frozen maps, two convolutions, 10 epochs",
            hardware="2 CPU cores"),
    Variant("smoke", smoke, "the default in seconds, for tests"),
    Variant("linear", linear, "the default with a linear head: does the encoder know what is where?", hardware="2 CPU cores"),
    Variant("finetune", finetune, "the default with a trained encoder, at a tenth of the head's rate", hardware="2 CPU cores"),
    Variant("scratch", scratch, "the same from the initial weights of that run: what pretraining adds", hardware="2 CPU cores"),
    Variant("camvid", camvid, "CamVid at 180 x 240 pixels, on a run of configs/simclr.py:cifar10_small, 40 epochs",
            hardware="2 CPU cores"),
    Variant("folder", folder, "your own images and masks: --config.data.name=/path/to/folder --config.model.classes=N",
            hardware="2 CPU cores"),
    Variant("ade20k_linear", ade20k_linear, "DINOv2's linear protocol: ADE20K, 512 pixels, 40,000 steps of 16 images",
            hardware="1 accelerator"),
)  # fmt: skip


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    return common.make("segmentation", VARIANTS, variant)

"""Detection on a pretrained backbone (heads of Zhou et al. 2019, arXiv:1904.07850, and Tian et al. 2019, arXiv:1904.01355).

  python launch.py train --config=configs/simclr.py --workdir=runs/simclr
  python launch.py train --config=configs/detection.py --config.stages.backbone.workdir=runs/simclr --workdir=runs/detection
  python launch.py configs detection

Any run with maps will do as a backbone. --config.stages.backbone.untrained=True takes its initial weights, for comparison.
"""

import ml_collections

from configs import common
from configs.common import Variant

FEATURES = dict(boxes="objects/bbox", box_label="objects/label")


def scenes(config):
    config.stages = dict(backbone=common.backbone("configs/simclr.py"))
    config.data.features = FEATURES
    config.data.classes = dict(box_label=None)  # from the data
    # Half of the image or more: boxes whose center is outside are dropped.
    config.data.ops = (("random_resized_crop", dict(size=48, area=(0.5, 1.0), flip=0.5)),)
    config.batch_size, config.total = 64, "20 epochs"
    config.model = dict(
        backbone="frozen",
        maps=("layer2", "layer3", "layer4"),  # of 12, 6 and 3 pixels
        head=dict(name="points", width=64, stride=4),
        weights=dict(heat=1.0, size=0.1, offset=1.0),
        objects=8,
        detections=100,
    )
    config.optim = dict(net=dict(name="adamw", lr=2e-3, weight_decay=1e-4, warmup="1 epoch", lr_multipliers=common.SAME))
    config.evals = dict(detection=dict(kind="detection"))
    config.best_metric, config.baselines = "detection/ap", ()
    config.evaluate_every, config.checkpoint_every = "10 epochs", "2 epochs"


def smoke(config):
    scenes(config)
    config.stages.backbone.recipe = "configs/simclr.py:smoke"
    config.optim.net.schedule = "constant"
    common.shrink(config, {"model.head.width": 16, "optim.net.lr": 1e-2, "optim.net.warmup": "0.1 epochs"})


def finetune(config):
    scenes(config)
    config.model.backbone = "trained"
    config.optim.net.lr_multipliers = common.SLOWER_BACKBONE


def scratch(config):
    """The network of :finetune from its initial weights, at the full learning rate."""
    scenes(config)
    config.stages.backbone.untrained = True
    config.model.backbone = "trained"


def fcos(config):
    scenes(config)
    _fcos(config, reach=(1.5, 3.0), candidates=200)  # objects have half diagonals of 3 to 25 pixels


def bccd(config):
    """Blood cells, 480 x 640 pixels halved; the backbone is trained with them at a tenth of the rate."""
    finetune(config)
    config.stages.backbone.recipe = "configs/simclr.py:cifar10_small"
    _photographs(config, "bccd", 240, 320)
    config.batch_size, config.total = 8, "60 epochs"
    config.model.maps = ("layer3", "layer4")  # of strides 8 and 16
    config.model.head.stride = 8
    config.model.objects = 40
    config.optim.net.update(dict(lr=1e-3, warmup="5 epochs"))
    config.evaluate_every, config.checkpoint_every = "30 epochs", "10 epochs"


def folder(config):
    """COCO's folders: pictures, and a JSON file of annotations (docs/guides/data.md). Crowds are ignored."""
    scenes(config)
    config.stages.backbone.recipe = "configs/simclr.py:imagenet"
    _photographs(config, "/path/to/folder", 512, 512)
    config.data.features = {**FEATURES, "box_ignored": "objects/is_crowd"}
    config.data.workers = 16
    config.model.backbone = "trained"
    _fcos(config, reach=(4.0, 10.0), candidates=1000)
    config.model.head.update(dict(width=256, towers=4))
    config.model.objects = 100
    config.batch_size, config.total = 64, "24 epochs"
    config.optim.net.update(dict(lr=5e-4, warmup="0.5 epochs", lr_multipliers=common.SLOWER_BACKBONE))


def _fcos(config, reach, candidates):
    config.model.head = dict(name="fcos", width=64, towers=2, reach=reach, candidates=candidates, overlap=0.6)
    config.model.weights = {"class": 1.0, "box": 2.0}


def _photographs(config, name, height, width):
    whole = dict(height=height, width=width)
    config.data.name, config.data.test_split = name, "validation"
    config.data.ops, config.data.eval_ops = (("resize", {**whole, "flip": 0.5}),), (("resize", whole),)
    config.log_every_steps = 20


VARIANTS = (
    Variant("", scenes, "embedded scenes: centers on a frozen run of configs/simclr.py, 20 epochs", hardware="2 CPU cores"),
    Variant("smoke", smoke, "the default in seconds, for tests"),
    Variant("finetune", finetune, "the backbone is trained, too, at a tenth of the rate", hardware="2 CPU cores"),
    Variant("scratch", scratch, "the same network without pretraining", hardware="2 CPU cores"),
    Variant("fcos", fcos, "FCOS on strides of 4, 8 and 16 pixels", hardware="2 CPU cores"),
    Variant("bccd", bccd, "blood cells of three classes at 240 x 320 pixels, backbone trained, 60 epochs", hardware="2 CPU cores"),
    Variant("folder", folder, "your own pictures with annotations in COCO's JSON: --config.data.name=/path/to/folder",
            hardware="1 accelerator"),
)  # fmt: skip


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    return common.make("detection", VARIANTS, variant)

"""Supervised classification, from scratch or from a pretrained encoder.

  python launch.py train --config=configs/supervised.py --workdir=runs/supervised

Variants:
  (default)       embedded scenes, the encoder of configs/simclr.py: the ceiling that self-supervised numbers are read against
  :smoke          the same in seconds, for tests
  :cifar10_small  JPEG CIFAR-10, ResNet-10 of width 1/4
  :imagenet       ResNet-50, 90 epochs, SGD-Nesterov 0.1 x B / 256. Published: torchvision ResNet-50 76.1
  :imagenet_vit_g14  ViT-g/14 with FSDP, rematerialization and its blocks in one loop: for rehearsals, not for a figure. Its rates
                  (AdamW 1e-4 x B / 256, betas .9 and .95, decay 0.3, batch 4096, 20 of 200 epochs of warm-up) are of no source that
                  was checked, and RandAugment, mixup, CutMix, drop path and averaged weights are not here
  :finetune       embedded scenes with one tenth of the labels, from the middle of SimCLR v2's head:
                  --config.warm_start.workdir=<a run of configs/simclr.py>
  :imagenet_10pct SimCLR v2 fine-tuning on 10 % of the labels (batch 1024, LARS 0.16, 30 epochs). Published: 68.4 (ResNet-50).
                  Wants a --config.warm_start.workdir, too; an empty one begins with random weights
"""

import ml_collections
from ml_collections import config_dict

from configs import common, simclr
from ssl_jax.models.backbones.vit import TENSOR_RULES


def scenes(config):
    simclr.scenes(config)
    size = common.SCENES_SIZE
    config.views = ((("random_resized_crop", dict(size=size, area=(0.5, 1.0))), ("flip", dict(p=0.5))),)
    config.total_epochs = 20.0
    config.evaluate_every_epochs = 20.0
    del config.model["temperature"]
    config.model.head_layers = 0  # hidden layers of model.head under the classifier
    config.model.smoothing = 0.0
    config.evals.classifier = dict(kind="classifier")
    config.best_metric, config.references = "", {}


def smoke(config):
    scenes(config)
    views, model = config.views, config.model.to_dict()
    simclr.smoke(config)
    model["encoder"] |= dict(width=0.125, zero_init_residual=True)
    config.evals.classifier = dict(kind="classifier")
    config.views, config.model, config.best_metric, config.references = views, model, "", {}


def cifar10_small(config):
    scenes(config)
    config.data.name = "cifar10"
    config.views = ((("random_resized_crop", dict(size=32, area=(0.2, 1.0))), ("flip", dict(p=0.5))),)


def imagenet(config):
    config.data.name = "imagenet2012"
    config.data.test_split = "validation"
    config.data.ops = (("random_resized_crops", dict(size=224, crops=1, area=(0.08, 1.0))),)
    config.data.eval_ops = common.IMAGENET_EVAL
    config.data.workers = 16
    config.batch_size = 1024
    config.total_epochs = 90.0
    config.views = ((("flip", dict(p=0.5)),),)
    config.model = dict(
        encoder=dict(name="resnet", depth=50, width=1.0, stem="imagenet"),
        head=dict(widths=(2048, 128), kernel_std=0.01),
        head_layers=0,
        smoothing=0.1,
        mean=common.IMAGENET_MEAN,
        std=common.IMAGENET_STD,
    )
    config.optim = dict(
        net=dict(name="sgd", nesterov=True, lr=0.1, lr_scale="linear", weight_decay=1e-4, warmup_epochs=5.0)
    )
    config.evals.linear = dict(kind="linear", solver="sgd")
    config.evals.classifier = dict(kind="classifier")
    config.evaluate_every_epochs, config.checkpoint_every_epochs = 10.0, 1.0
    config.log_every_steps, config.baselines, config.best_metric = 50, (), ""


def imagenet_vit_g14(config):
    imagenet(config)
    config.batch_size = 4096
    config.total_epochs = 200.0
    config.model.encoder = dict(name="vit", variant="g/14", remat="full", scan=True)
    config.optim = dict(
        net=dict(name="adamw", lr=1e-4, lr_scale="linear", b2=0.95, weight_decay=0.3, warmup_epochs=20.0)
    )
    config.mesh = dict(data=-1, fsdp=16, tensor=1)
    config.sharding = (*TENSOR_RULES, (".*", "fsdp"))


def finetune(config):
    scenes(config)
    config.data.train_split = "train[:10%]"
    config.batch_size = 64
    config.total_epochs = 20.0
    config.model.head_layers = 1
    config.warm_start = dict(workdir=config_dict.placeholder(str), rules=((r"^net/(encoder|head)/", r"net/\1/"),))
    config.optim = dict(net=dict(name="sgd", nesterov=True, lr=0.05, weight_decay=0.0))


def imagenet_10pct(config):
    imagenet(config)
    config.data.name, config.data.train_split = "imagenet2012_subset/10pct", "train"
    config.total_epochs = 30.0
    config.model.encoder.flavor = "simclr"
    config.model.head.widths = (2048, 2048, 128)
    config.model.head_layers = 1
    config.model.smoothing = 0.0
    config.model.mean, config.model.std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    config.warm_start = dict(workdir=config_dict.placeholder(str), rules=((r"^net/(encoder|head)/", r"net/\1/"),))
    # As in its code the classifier, which starts at zero, is left out of the layer-wise rates: from zero they would hardly let it move.
    adapted = ((r"(bias|scale)$|classifier/", 0.0), (".*", 1.0))
    config.optim = dict(net=dict(name="lars", lr=0.005, lr_scale="sqrt", weight_decay=0.0, decay=adapted))


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    config = common.base("supervised")
    named = {"": scenes, "smoke": smoke, "cifar10_small": cifar10_small, "imagenet": imagenet,
             "imagenet_vit_g14": imagenet_vit_g14, "finetune": finetune,
             "imagenet_10pct": imagenet_10pct}  # fmt: skip
    common.variant_of(variant, named)(config)
    return config

"""I-JEPA (Assran et al. 2023, arXiv:2301.08243): codes of parts of an image are predicted from its other parts.

  python launch.py train --config=configs/ijepa.py --workdir=runs/ijepa
  python launch.py configs ijepa
"""

import ml_collections

from configs import common
from configs.common import Variant


def networks(config, variant, predictor, targets, context, kept, momentum):
    """`predictor`: its width, depth and heads. `targets`, `context`: (rows, columns) of their blocks."""
    width, depth, heads = predictor
    config.model = dict(
        encoder=dict(name="vit", variant=variant, pool="gap", position="sincos2d"),
        predictor=dict(width=width, depth=depth, heads=heads),
        targets=4,
        target_size=targets,
        context_size=context,
        kept=kept,
        momentum=momentum,
        momentum_schedule="linear",
        mean=common.IMAGENET_MEAN,
        std=common.IMAGENET_STD,
    )


def scenes(config):
    config.views = ((("random_resized_crop", dict(size=48, area=(0.3, 1.0))),),)
    config.batch_size, config.total = 256, "45 epochs"
    networks(config, "mini/6", (48, 2, 4), (3, 3), (8, 8), 16, 0.98)
    adam = dict(name="adamw", lr=1e-3, warmup="4 epochs", weight_decay=0.04, weight_decay_end=0.4)
    config.optim = dict(net=adam, predictor=dict(adam))
    config.evals.linear.update(dict(l2=(1e-3, 1e-2, 1e-1)))
    config.evals.layers = dict(kind="linear_by_layer")
    config.evaluate_every, config.checkpoint_every = "45 epochs", "3 epochs"


def smoke(config):
    scenes(config)
    common.shrink(config, {
        "model.encoder.variant": "mu/8",
        "model.predictor": dict(width=16, depth=1, heads=2),
        "model.target_size": (2, 2),
        "model.context_size": (6, 6),
        "model.kept": 12,
        "optim.net.warmup": "0.1 epochs",
        "optim.predictor.warmup": "0.1 epochs",
    })  # fmt: skip


def cifar10_small(config):
    scenes(config)
    config.data.name = "cifar10"
    config.online_probe = 1e-3
    config.views = ((("random_resized_crop", dict(size=32, area=(0.3, 1.0))),),)
    config.total = config.evaluate_every = "14 epochs"  # one view an image: as many views as configs/simclr.py:cifar10_small
    config.checkpoint_every, config.log_every_steps = "1 epoch", 50
    networks(config, "mini/4", (48, 2, 4), (3, 3), (8, 8), 16, 0.98)
    config.optim.net.warmup = config.optim.predictor.warmup = "1 epoch"


def imagenet(config):
    """ViT-H/14: AdamW 1e-3 at batch 2048, decay .04 rising to .4, 300 epochs with 40 of warm-up, momentum .996 rising to 1 linearly.

    Changed: blocks of fixed sizes, 6 x 6 for targets (the paper: 15 to 20 % of 16 x 16 patches, of aspect .75 to 1.5) and 15 x 15
    around the context, of which 80 random patches are kept; initial weights are those of the house's ViT.
    """
    config.data.name, config.data.test_split = "imagenet2012", "validation"
    config.data.ops = (("random_resized_crops", dict(size=224, crops=1, area=(0.3, 1.0), interpolation="bilinear")),)
    config.data.eval_ops = common.IMAGENET_EVAL
    config.data.workers = 16
    config.views = ((),)
    config.batch_size, config.total = 2048, "300 epochs"
    networks(config, "H/14", (384, 12, 12), (6, 6), (15, 15), 80, 0.996)
    adam = dict(name="adamw", lr=1e-3, warmup="40 epochs", end=1e-3, weight_decay=0.04, weight_decay_end=0.4)
    config.optim = dict(net=adam, predictor=dict(adam))
    config.evals = dict(linear=dict(kind="linear", solver="sgd"))
    config.evaluate_every, config.checkpoint_every = "20 epochs", "1 epoch"
    config.log_every_steps, config.baselines, config.best_metric = 50, (), ""


VARIANTS = (
    Variant("", scenes, "embedded scenes, a ViT of four blocks of 96 on patches of 6 pixels, 45 epochs", hardware="2 CPU cores"),
    Variant("smoke", smoke, "the default in seconds, for tests"),
    Variant("cifar10_small", cifar10_small, "JPEG CIFAR-10, the same ViT on patches of 4 pixels, 14 epochs", hardware="2 CPU cores"),
    Variant("imagenet", imagenet, "ViT-H/14, batch 2048, 300 epochs", hardware="16 A100"),
)  # fmt: skip


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    return common.make("ijepa", VARIANTS, variant)

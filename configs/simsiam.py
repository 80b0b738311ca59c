"""SimSiam (Chen and He 2021, arXiv:2011.10566): a predictor, and targets without a gradient; neither negatives nor a teacher.

  python launch.py train --config=configs/simsiam.py --workdir=runs/simsiam
  python launch.py configs simsiam
"""

import ml_collections

from configs import common, simclr
from configs.common import Variant

ALL = ((".*", 1.0),)  # weight decay of every parameter


def networks(config, widths, hidden):
    """The last BatchNorm of the projector has neither scale nor offset. The rate of the predictor does not fall."""
    config.model.projector = dict(widths=widths, last_scale=False)
    config.model.predictor = dict(widths=(hidden, widths[-1]), last_batch_norm=False, last_bias=True)
    config.model.stop_gradient = True
    config.optim.predictor = config.optim.net.copy_and_resolve_references()
    config.optim.predictor.schedule = "constant"


def scenes(config):
    simclr.relative(config, simclr.scenes)
    networks(config, (256, 256, 256), 64)


def smoke(config):
    scenes(config)
    common.shrink(config, {
        "model.encoder.width": 0.125,
        "model.encoder.zero_init_residual": True,  # as in configs/simclr.py
        "model.projector.widths": (64, 64, 64),
        "model.predictor.widths": (16, 64),
        "optim.net.warmup": "0.1 epochs",
        "optim.predictor.warmup": "0.1 epochs",
    })  # fmt: skip


def scenes_no_stop_gradient(config):
    """An ablation of the paper (figure 2): it collapses."""
    scenes(config)
    config.model.stop_gradient = False


def cifar10_small(config):
    simclr.relative(config, simclr.cifar10_small)
    networks(config, (256, 256, 256), 64)


def cifar10(config):
    """The paper's appendix: SGD 0.03 x B / 256 at batch 512, decay 5e-4 of all, 800 epochs, projector of two layers, no blur.

    Changed: JPEG CIFAR-10; BatchNorm normalizes both views together.
    """
    simclr.relative(config, simclr.cifar10)
    config.views = (simclr.small_images_views()[0],) * 2
    config.total = "800 epochs"
    config.model.mean, config.model.std = common.CIFAR_MEAN, common.CIFAR_STD
    config.optim = dict(net=dict(name="sgd", lr=0.03, lr_scale="linear", weight_decay=5e-4, weight_decay_mask=ALL))
    networks(config, (2048, 2048), 512)


def imagenet(config):
    """SGD 0.05 x B / 256 at batch 512, decay 1e-4 of all parameters, 100 epochs.

    Changed: BatchNorm normalizes both views together; the linear layer before the last BatchNorm has no bias, whose gradient is zero.
    """
    simclr.relative(config, simclr.imagenet)
    config.views = (simclr.moco_views(224, crop=False),) * 2
    config.data.ops = (("random_resized_crops", dict(size=224, crops=2, area=(0.2, 1.0), interpolation="bilinear")),)
    config.batch_size, config.total = 512, "100 epochs"
    config.model.encoder.flavor, config.model.encoder.zero_init_residual = "torchvision", True
    config.model.mean, config.model.std = common.IMAGENET_MEAN, common.IMAGENET_STD
    config.optim = dict(net=dict(name="sgd", lr=0.05, lr_scale="linear", weight_decay=1e-4, weight_decay_mask=ALL))
    networks(config, (2048, 2048, 2048), 512)


VARIANTS = (
    Variant("", scenes, "embedded scenes, the encoder, views and budget of configs/simclr.py", hardware="2 CPU cores"),
    Variant("smoke", smoke, "the default in seconds, for tests"),
    Variant("scenes_no_stop_gradient", scenes_no_stop_gradient, "the default with gradients through targets, which collapses",
            hardware="2 CPU cores"),
    Variant("cifar10_small", cifar10_small, "JPEG CIFAR-10, the encoder, views and budget of configs/simclr.py:cifar10_small",
            hardware="2 CPU cores"),
    Variant("cifar10", cifar10, "ResNet-18, batch 512, 800 epochs of SGD", hardware="1 accelerator"),
    Variant("imagenet", imagenet, "ResNet-50, batch 512, 100 epochs of SGD", hardware="8 GPUs",
            expected="linear 68.1", source="the official README"),
)  # fmt: skip


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    return common.make("simsiam", VARIANTS, variant)

"""SimCLR (Chen et al. 2020, arXiv:2002.05709 and arXiv:2006.10029): two views of an image attract, views of other images repel.

  python launch.py train --config=configs/simclr.py --workdir=runs/simclr
  python launch.py configs simclr
"""

import ml_collections

from configs import common
from configs.common import Variant

JITTER = dict(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, p=0.8, style="torchvision")  # of BYOL and its followers

def scenes(config):
    # Color must not help to match views, or nothing else is learned. torchvision's operations clip less than TensorFlow's.
    recipe = (
        ("random_resized_crop", dict(size=32, area=(0.2, 1.0))),  # from 48 pixels: shapes keep their size, and a step costs half
        ("flip", dict(p=0.5)),
        ("color_jitter", dict(brightness=0.6, contrast=0.6, saturation=0.8, hue=0.2, p=0.8, style="torchvision")),
        ("grayscale", dict(p=0.2)),
    )
    config.views = (recipe, recipe)
    config.total = "45 epochs"
    config.model = dict(
        # With residual branches that start at zero the network is at first a stack of 1x1 convolutions, which see only color.
        encoder=dict(name="resnet", depth=10, width=0.25, stem="stride2", zero_init_residual=False),
        head=dict(widths=(256, 128)),
        temperature=0.2,
        loss="nt_xent",
        similarities="dense",
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
    )
    config.optim = dict(net=dict(name="adamw", lr=2e-3, weight_decay=1e-4, warmup="1 epoch"))
    config.evals.linear.update(dict(l2=(1e-3, 1e-2, 1e-1)))
    config.references = {"supervised (recorded)": {"knn/top1": 92.54, "linear/top1": 92.70}}  # docs/methods/supervised.md
    config.evaluate_every = "15 epochs"
    config.checkpoint_every = "3 epochs"


def smoke(config):
    scenes(config)
    common.shrink(config, {
        "model.encoder.width": 0.125,
        "model.encoder.zero_init_residual": True,  # smooth at the start, so that tests can compare devices over several steps
        "optim.net.warmup": "0.1 epochs",
    })  # fmt: skip


def scenes_moco(config):
    scenes(config)
    config.model.loss = "moco"


def scenes_clip(config):
    scenes(config)
    config.model.loss = "clip"


def cifar10_small(config):
    cifar10(config)
    config.batch_size = 256
    config.total = "7 epochs"
    config.model.encoder = dict(name="resnet", depth=10, width=0.25, stem="stride2", zero_init_residual=False)
    config.model.head = dict(widths=(256, 128))
    config.model.temperature = 0.2
    config.optim = dict(net=dict(name="adamw", lr=3e-3, weight_decay=1e-4, warmup="0.25 epochs"))
    config.evals = dict(
        knn=dict(kind="knn", k=20, temperature=0.07),
        knn200=dict(kind="knn", k=200, temperature=0.1),
        linear=dict(kind="linear", solver="lbfgs", l2=(1e-3, 1e-2, 1e-1)),
    )
    config.evaluate_every, config.checkpoint_every = "7 epochs", "1 epoch"


def cifar10(config):
    """dkobak/simclr-cifar10: SGD 0.06 x B / 256, no blur, no normalization, head 1024-128 without BatchNorm, tau 0.5.

    Its BatchNorm normalizes each view separately; ours normalizes both views together.
    """
    config.references = {}
    config.data.name = "cifar10"
    config.online_probe = 1e-3
    config.batch_size = 512
    config.total = "100 epochs"
    config.views = (
        (
            ("random_resized_crop", dict(size=32, area=(0.2, 1.0), interpolation="bilinear")),
            ("flip", dict(p=0.5)),
            ("color_jitter", dict(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, p=0.8, style="torchvision")),
            ("grayscale", dict(p=0.1)),
        ),
    ) * 2
    config.model = dict(
        encoder=dict(name="resnet", depth=18, width=1.0, stem="cifar", zero_init_residual=False),
        head=dict(widths=(1024, 128), batch_norm=False),
        temperature=0.5,
        loss="nt_xent",
        similarities="dense",
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
    )
    config.optim = dict(
        net=dict(name="sgd", lr=0.06, lr_scale="linear", weight_decay=5e-4, weight_decay_mask=((".*", 1.0),))  # decays everything
    )
    config.evals = dict(
        knn=dict(kind="knn", k=10, temperature=0.0),  # 0: unweighted votes
        linear=dict(kind="linear", solver="lbfgs"),
    )
    config.evaluate_every, config.checkpoint_every = "20 epochs", "5 epochs"
    config.log_every_steps = 50


def cifar10_lightly(config):
    cifar10(config)
    config.total = "200 epochs"
    config.views = (
        (
            ("random_resized_crop", dict(size=32, area=(0.08, 1.0), interpolation="bilinear")),
            ("flip", dict(p=0.5)),
            ("color_jitter", dict(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, p=0.8, style="torchvision")),
            ("grayscale", dict(p=0.2)),
        ),
    ) * 2
    config.model.head = dict(widths=(512, 128))
    config.model.mean, config.model.std = common.IMAGENET_MEAN, common.IMAGENET_STD
    config.optim.net.lr = 0.12  # 0.06 x B / 128
    config.evals.knn = dict(kind="knn", k=200, temperature=0.1)


def cifar10_simclr(config):
    """The command in the official README: LARS 1.0 x B / 256, decay 1e-4, tau 0.5, no blur, head of three layers."""
    cifar10(config)
    config.total = "1000 epochs"
    config.views = (common.simclr_views(32, strength=0.5, blur=False),) * 2
    config.model.encoder.flavor, config.model.encoder.zero_init_residual = "simclr", True
    config.model.head = dict(widths=(512, 512, 128), kernel_std=0.01)
    config.model.loss = "nt_xent_sum"
    config.optim = dict(
        net=dict(name="lars", lr=1.0, lr_scale="linear", weight_decay=1e-4, warmup="10 epochs")
    )


def imagenet(config):
    """The command in the official README: LARS 0.075 x sqrt(B), decay 1e-4, tau 0.1, head of three layers, version 2's jitter.

    The loss is the sum over both views as in the official code. LARS adapts only weights, so the sum doubles the updates of
    BatchNorm's scales and offsets. The paper's own recipe is `imagenet_v1`.
    """
    config.data.name = "imagenet2012"
    config.data.test_split = "validation"
    # The host decodes once and crops twice; photometric operations run on the device.
    config.data.ops = (("random_resized_crops", dict(size=224, crops=2, area=(0.08, 1.0), sampling="simclr")),)
    config.data.eval_ops = common.IMAGENET_EVAL
    config.data.workers = 16
    config.batch_size = 4096
    config.total = "100 epochs"
    config.views = (common.simclr_views(224, strength=1.0, blur=True, style="simclr_v2", crop=False),) * 2
    config.model = dict(
        encoder=dict(name="resnet", depth=50, width=1.0, stem="imagenet", flavor="simclr"),
        head=dict(widths=(2048, 2048, 128), kernel_std=0.01),
        temperature=0.1,
        loss="nt_xent_sum",
        similarities="ring",  # of 8,192 views; "dense" takes a quarter of a gigabyte
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
    )
    config.optim = dict(net=dict(name="lars", lr=0.075, lr_scale="sqrt", weight_decay=1e-4, warmup="10 epochs"))
    config.evals = dict(
        knn=dict(kind="knn", k=20, temperature=0.07),
        linear=dict(kind="linear", solver="sgd"),
    )
    config.evaluate_every, config.checkpoint_every = "10 epochs", "1 epoch"
    config.log_every_steps, config.baselines = 50, ()


def imagenet_v1(config):
    """The paper's: LARS 0.3 x B / 256, decay 1e-6, head 2048-128, additive brightness. For 100 epochs, --config.total="100 epochs"."""
    imagenet(config)
    config.total = "1000 epochs"
    config.views = (common.simclr_views(224, strength=1.0, blur=True, style="simclr_v1", crop=False),) * 2
    config.model.head.widths = (2048, 128)
    config.optim.net.update(dict(lr=0.3, lr_scale="linear", weight_decay=1e-6))


def imagenet_v2(config):
    """LARS 0.1 x sqrt(B)."""
    imagenet(config)
    config.total = "800 epochs"
    config.optim.net.update(dict(lr=0.1, warmup="40 epochs"))


def imagenet_v2_sk(config):
    imagenet_v2(config)
    config.model.encoder.sk = True


def relative(config, recipe) -> None:
    """Encoder, views, budget and evaluations of a recipe above, for methods with a projector of their own and no temperature."""
    recipe(config)
    for key in ("head", "temperature", "loss", "similarities"):
        del config.model[key]
    config.references = {}


def asymmetric_views(size, area, crop=True):
    """The views of BYOL (Grill et al. 2020, appendix B): the first is nearly always blurred, the second at times solarized."""
    first = [("random_resized_crop", dict(size=size, area=area))] if crop else []
    first += [("flip", dict(p=0.5)), ("color_jitter", dict(JITTER)), ("grayscale", dict(p=0.2))]
    second = [*first, ("blur", dict(p=0.1, sigma=(0.1, 2.0))), ("solarize", dict(p=0.2))]
    return (*first, ("blur", dict(p=1.0, sigma=(0.1, 2.0)))), tuple(second)


def moco_views(size, crop=True):
    """MoCo v2's, which SimSiam uses, too."""
    recipe = [("random_resized_crop", dict(size=size, area=(0.2, 1.0)))] if crop else []
    recipe += [
        ("color_jitter", dict(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, p=0.8, style="torchvision")),
        ("grayscale", dict(p=0.2)), ("blur", dict(p=0.5, sigma=(0.1, 2.0))), ("flip", dict(p=0.5)),
    ]  # fmt: skip
    return tuple(recipe)


def small_images_views(size=32):
    """solo-learn's asymmetric views of CIFAR: no blur, the second view at times solarized."""
    first = (("random_resized_crop", dict(size=size, area=(0.08, 1.0))), ("flip", dict(p=0.5)), ("color_jitter", dict(JITTER)),
             ("grayscale", dict(p=0.2)))  # fmt: skip
    return first, (*first, ("solarize", dict(p=0.2)))


def folder(config):
    scenes(config)
    config.data.name = "/path/to/folder"
    config.data.ops = (("random_resized_crops", dict(size=64, crops=2, area=(0.2, 1.0))),)
    config.data.eval_ops = (("resize_crop", dict(resize=72, crop=64)),)
    config.views = (common.simclr_views(64, strength=0.5, blur=True, crop=False),) * 2
    config.batch_size = 64
    config.evals = dict(representation=dict(kind="representation"))  # a folder may have no labels
    config.best_metric, config.references = "", {}


VARIANTS = (
    Variant("", scenes, "embedded scenes, ResNet-10 of width 1/4, 45 epochs",
            hardware="2 CPU cores", time="4 to 12 min",
            expected="kNN 61.80 ± 3.90, linear 67.04 ± 1.90 (untrained 17.55 ± 2.07, 17.32 ± 2.05)",
            source="ours, 3 seeds"),
    Variant("smoke", smoke, "the default in seconds, for tests"),
    Variant("scenes_moco", scenes_moco,
            "MoCo's loss without its second encoder: negatives are the other views only, and keys have no gradient",
            expected="after 8 epochs kNN 19.11, linear 27.11 (default: 21.39, 27.83)", source="ours, 1 seed"),
    Variant("scenes_clip", scenes_clip, "CLIP's loss: negatives are the other views only, with gradients on both sides",
            expected="after 8 epochs kNN 18.56, linear 27.33 (default: 21.39, 27.83)", source="ours, 1 seed"),
    Variant("cifar10_small", cifar10_small, "JPEG CIFAR-10, ResNet-10 of width 1/4, 7 epochs",
            hardware="2 CPU cores", time="6 to 10 min",
            expected="kNN (k=20) 52.55 ± 0.26, linear 52.28 ± 0.36 (untrained 31.58 ± 2.22, 36.12 ± 1.12)",
            source="ours, 3 seeds"),
    Variant("cifar10", cifar10, "ResNet-18, batch 512, 100 epochs of SGD",
            hardware="1 A100", time="20 min",
            expected="loss 5.18 +- .01, kNN (k=10, cosine) 83.2 +- .2, linear on stored features 85.6 +- .2",
            source="dkobak/simclr-cifar10, 3 runs"),
    Variant("cifar10_lightly", cifar10_lightly, "ResNet-18, batch 512, 200 epochs of SGD",
            hardware="1 accelerator",
            expected="kNN 84.8 (k=200, T=0.1; the best epoch of one run, on the test split)",
            source="lightly's CIFAR-10 benchmark"),
    Variant("cifar10_simclr", cifar10_simclr, "ResNet-18, batch 512, 1000 epochs of LARS",
            hardware="1 accelerator", expected="linear about 91", source="the official README"),
    Variant("imagenet", imagenet, "ResNet-50, batch 4096, 100 epochs of LARS, head of three layers",
            hardware="128 TPU v3 cores", time="1.5 h", expected="linear about 64.5", source="the official README"),
    Variant("imagenet_v1", imagenet_v1, "the paper's v1: ResNet-50, head of two layers, 1000 epochs of LARS",
            expected="linear 69.3 (100 epochs: about 64.5)",
            source="Chen et al. 2020a; first version of the official README"),
    Variant("imagenet_v2", imagenet_v2, "v2: ResNet-50, head of three layers, 800 epochs of LARS",
            expected="linear 71.7", source="Chen et al. 2020b"),
    Variant("imagenet_v2_sk", imagenet_v2_sk, "v2 with selective kernels: ResNet-50 SK",
            expected="linear 74.6", source="Chen et al. 2020b"),
    Variant("folder", folder, "your own photographs: --config.data.name=/path/to/folder", hardware="2 CPU cores"),
)  # fmt: skip


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    return common.make("simclr", VARIANTS, variant)

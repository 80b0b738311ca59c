"""BiGAN (Donahue, Krahenbuhl and Darrell 2017, arXiv:1605.09782): a GAN whose encoder inverts its generator.

  python launch.py train --config=configs/bigan.py --workdir=runs/bigan
  python launch.py configs bigan
"""

import ml_collections

from configs import common
from configs.common import Variant

HALF = (0.5, 0.5, 0.5)


def flipped(size):
    """A random window of `size` pixels, mirrored half of the time."""
    return ((("random_crop", dict(size=size)), ("flip", dict(p=0.5))),)


def adam(**options):
    """The optimizer of the published code, for all three networks."""
    spec = dict(name="adam", lr=2e-4, b1=0.5, schedule="exponential", hold=0.5, end=0.01, weight_decay=2.5e-5, **options)
    return {group: dict(spec) for group in ("generator", "encoder", "discriminator")}


def scenes(config):
    config.data.ops = config.data.eval_ops = (("resize_crop", dict(resize=32, crop=32)),)
    config.views = flipped(32)
    config.batch_size = 64
    config.total = "5000 steps"
    config.model = dict(
        # The published initial weights of the latent are 25 times as large: for longer than these runs take, D then ignores the
        # image and G ignores positions.
        generator=dict(name="conv", shape=(32, 32, 3), widths=(128, 64, 32), condition_std=0.02),
        encoder=dict(name="conv", widths=(32, 64, 128)),
        discriminator=dict(name="conv", widths=(32, 64, 128), condition_std=0.02),
        latent=dict(kind="uniform", size=50),
        mean=HALF,
        std=HALF,
    )
    config.optim = adam()
    config.evals.linear.update(dict(l2=(1e-3, 1e-2, 1e-1)))
    config.evals.reconstruction = dict(kind="reconstruction", extractor="none")
    config.best_metric = "linear/top1"
    config.evaluate_every, config.checkpoint_every = "2500 steps", "500 steps"
    config.log_every_steps = 50


def smoke(config):
    scenes(config)
    common.shrink(config, {
        "model.generator.widths": (16, 8),
        "model.encoder.widths": (8, 16),
        "model.discriminator.widths": (8, 16),
        "model.latent.size": 8,
    })  # fmt: skip


def cifar10_small(config):
    scenes(config)
    config.data.name, config.data.ops, config.data.eval_ops = "cifar10", (), ()


def in_epochs(config, total, evaluate, checkpoint):
    config.total, config.evaluate_every, config.checkpoint_every = f"{total} epochs", f"{evaluate} epochs", f"{checkpoint} epochs"


def cifar10(config):
    cifar10_small(config)
    config.batch_size = 128
    in_epochs(config, 200.0, 20.0, 5.0)
    config.model.generator.widths = (512, 256, 128)
    config.model.encoder.widths = config.model.discriminator.widths = (128, 256, 512)
    config.model.latent.size = 100


def mnist(config):
    """50 uniform latents, Adam 2e-4 with beta1 0.5, L2 2.5e-5 in the gradient; 200 epochs, then 200 to a hundredth of the rate."""
    scenes(config)
    config.data.name, config.data.ops, config.data.eval_ops = "mnist", (), ()
    config.views = ((("random_crop", dict(size=28)),),)  # the whole image
    config.batch_size = 128
    in_epochs(config, 400.0, 25.0, 5.0)
    config.model = dict(
        generator=dict(name="mlp", shape=(28, 28, 1), widths=(1024, 1024)),
        encoder=dict(name="mlp", widths=(1024, 1024)),
        discriminator=dict(name="mlp", widths=(1024, 1024)),
        latent=dict(kind="uniform", size=50),
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
    )
    config.optim = adam(weight_decay_mask=((".*", 1.0),))
    config.evals = dict(
        knn=dict(kind="knn", k=1, temperature=0.0, metric="euclidean"),
        latent=dict(kind="knn", k=1, temperature=0.0, metric="euclidean", layer="latent"),
        reconstruction=dict(kind="reconstruction", extractor="none"),
    )
    config.best_metric = "knn/top1"


def imagenet64(config):
    """200 uniform latents; a random square of 64 pixels of the image with its short side at 72, not mirrored."""
    scenes(config)
    config.data.name = "imagenet2012"
    config.data.test_split = "validation"
    config.data.ops = (("resize_random_crop", dict(resize=72, crop=64)),)
    config.data.eval_ops = (("resize_crop", dict(resize=72, crop=64)),)
    config.views = ((),)
    config.data.workers = 16
    config.batch_size = 128
    in_epochs(config, 100.0, 10.0, 1.0)
    config.model = dict(
        generator=dict(name="conv", shape=(64, 64, 3), widths=(512, 256, 128, 64)),
        encoder=dict(name="alexnet"),
        discriminator=dict(name="conv", widths=(64, 128, 256, 512)),
        latent=dict(kind="uniform", size=200),
        mean=HALF,
        std=HALF,
    )
    config.evals.linear = dict(kind="linear", solver="sgd", layer="layer3")
    config.baselines = ()


def imagenet112(config):
    """A random square of 112 pixels of the image with its short side at 128, not mirrored.

    The figure is of fine-tuning in Caffe from fc6 on, which ssl_jax does not have.
    """
    imagenet64(config)
    config.data.ops = (("resize_random_crop", dict(resize=128, crop=112)),)
    config.data.eval_ops = (("resize_crop", dict(resize=128, crop=112)),)


VARIANTS = (
    Variant("", scenes, "embedded scenes at 32 pixels, strided convolutions",
            hardware="2 CPU cores", expected="linear 35.50, 32.83, 31.00 (untrained 20.06, 22.67, 21.06)",
            source="ours, 3 seeds"),
    Variant("smoke", smoke, "the default in seconds, for tests"),
    Variant("cifar10_small", cifar10_small, "JPEG CIFAR-10, the networks of the default",
            hardware="2 CPU cores",
            expected="linear after 2,500 of 5,000 steps 46.57, 45.96, 47.12 (untrained 41.32, 40.80, 40.18)",
            source="ours, 3 seeds"),
    Variant("cifar10", cifar10, "CIFAR-10, four times as wide, 200 epochs",
            hardware="1 accelerator", expected="no figure was published"),
    Variant("mnist", mnist, "the permutation-invariant recipe: three fully connected networks, 400 epochs",
            hardware="1 accelerator",
            expected="1-NN 97.39 (untrained encoder 96.84), reconstruction ratio 5.95 / 9.60 = 0.62",
            source="log of the authors' code"),
    Variant("imagenet64", imagenet64,
            "ImageNet at 64 pixels, DCGAN's networks, AlexNet's conv1 to conv5 as encoder, 50 + 50 epochs"),
    Variant("imagenet112", imagenet112,
            'the same with an encoder that sees 112 pixels where the others see 64 ("generalized", section 3)',
            expected="VOC07 classification with fc6 trained on top 52.5 (52.8 with the authors' code)",
            source="Donahue et al. 2017"),
)  # fmt: skip


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    return common.make("bigan", VARIANTS, variant)

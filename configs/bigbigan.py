"""BigBiGAN (Donahue and Simonyan 2019, arXiv:1907.02544): BiGAN with BigGAN's networks.

  python launch.py train --config=configs/bigbigan.py --workdir=runs/bigbigan
  python launch.py configs bigbigan

The paper gives batch size and networks. Of learning rates it only says that ten times the generator's rate for the encoder gains
1.5 points and more. The rates here start from BigGAN's and are ours. The steps of the discriminator share a batch.
"""

import ml_collections

from configs import common
from configs.common import Variant

HALF = (0.5, 0.5, 0.5)


def adam(generator, discriminator, encoder):
    rates = dict(generator=generator, discriminator=discriminator, encoder=encoder)
    return {group: dict(name="adam", lr=lr, b1=0.0, b2=0.999, schedule="constant") for group, lr in rates.items()}


def scenes(config):
    config.data.ops = config.data.eval_ops = common.resized(32)
    config.views = ((("flip", dict(p=0.5)),),)
    config.batch_size = 64
    config.total = "5000 steps"
    config.model = dict(
        size=32,
        generator=dict(name="biggan", channels=16, multiples=(8, 4, 2, 1), embedding=32),
        discriminator=dict(channels=16, multiples=(1, 2, 4, 8), width=256, layers=3),
        encoder=dict(name="resnet", depth=10, width=0.25, stem="stride2", head=(256,)),
        latent=dict(kind="normal", size=64),
        discriminator_steps=1,
        ema=dict(decay=0.999, start=1000),
        mean=HALF,
        std=HALF,
    )
    config.optim = adam(2e-4, 2e-4, 4e-4)
    common.generation(config)
    config.evals.crelu = dict(kind="linear", solver="lbfgs", layer="crelu", l2=(1e-3, 1e-2, 1e-1))
    config.evals.reconstruction = dict(kind="reconstruction", extractor="none")
    config.best_metric = "linear/top1"
    config.evaluate_every, config.checkpoint_every = "2500 steps", "500 steps"


def smoke(config):
    scenes(config)
    common.shrink(config, {
        # Orthogonal kernels: normalized small normal ones have gradients so large that results on several devices diverge.
        "model.generator": dict(name="biggan", channels=4, multiples=(2, 2, 1), embedding=8),
        "model.discriminator": dict(channels=4, multiples=(1, 2, 2), width=16, layers=2),
        "model.encoder": dict(name="resnet", depth=10, width=0.125, stem="stride2", head=(16,)),
        "model.latent.size": 12,
        "model.discriminator_steps": 2,
        "model.ema": dict(decay=0.9, start=2),
    })  # fmt: skip


def cifar10_small(config):
    scenes(config)
    config.data.name, config.data.ops, config.data.eval_ops = "cifar10", (), ()
    config.views = ((("random_crop", dict(size=32)), ("flip", dict(p=0.5))),)
    config.total = "16_000 steps"
    config.evaluate_every, config.checkpoint_every = "4000 steps", "1000 steps"


def cifar10(config):
    cifar10_small(config)
    config.batch_size = 2 * 256
    config.total = "100_000 steps"
    config.model.generator = dict(name="biggan", channels=64)
    config.model.discriminator = dict(channels=64, width=256, layers=3)
    config.model.encoder = dict(name="resnet", depth=18, stem="cifar", head=(256, 256, 256))
    config.model.latent.size = 80
    config.model.discriminator_steps = 2
    config.model.ema = dict(decay=0.9999, start=1000)
    config.evaluate_every, config.checkpoint_every = "10_000 steps", "1000 steps"
    config.evals.generation.examples = 50_000


def imagenet128(config):
    cifar10(config)
    config.data.name = "imagenet2012"
    config.data.test_split = "validation"
    config.data.ops = (("random_resized_crop", dict(size=256)),)
    config.data.eval_ops = (("resize_crop", dict(resize=256, crop=256)),)
    config.data.workers = 16
    config.views = ((("flip", dict(p=0.5)),),)
    config.batch_size = 2 * 2048
    config.total = "500_000 steps"
    config.model.size = 128
    config.model.generator = dict(name="biggan", channels=96, attention=(64,))
    config.model.discriminator = dict(channels=96, attention=(64,), width=2048, layers=8)
    config.model.encoder = dict(name="resnet", depth=50, stem="imagenet", head=(4096, 4096, 4096))
    config.model.latent.size = 120
    config.model.ema = dict(decay=0.9999, start=20_000)
    config.optim = adam(5e-5, 2e-4, 5e-4)
    config.evals.linear = dict(kind="linear", solver="sgd")
    config.evals.crelu = dict(kind="linear", solver="sgd", layer="crelu")
    config.baselines = ()


def imagenet128_revnet(config):
    imagenet128(config)
    config.model.encoder = dict(name="revnet", depth=50, width=4.0, remat=True, head=(4096, 4096, 4096))


VARIANTS = (
    Variant("", scenes, "embedded scenes at 32 pixels, narrow networks, ResNet-10 of width 1/4",
            hardware="2 CPU cores",
            expected="after 3,000 of 5,000 steps linear 16.78 (untrained 11.72), Frechet (random_conv) 0.75 "
            "(untrained 124.5)", source="ours, 1 seed"),
    Variant("smoke", smoke, "the default in seconds, for tests"),
    Variant("cifar10_small", cifar10_small, "JPEG CIFAR-10, the networks of the default",
            hardware="2 CPU cores",
            expected="linear after 1,500 steps of a run of 3,000 35.46, 36.30, 36.20 (untrained 28.76, 28.30, "
            "29.16)", source="ours, 3 seeds"),
    Variant("cifar10", cifar10, "ch 64, ResNet-18, H and J of 3 x 256, two discriminator steps of 256",
            hardware="1 accelerator", expected="no figure was published"),
    Variant("imagenet128", imagenet128, "GAN at 128 pixels, encoder ResNet-50 at 256, batch 2048, 500,000 steps",
            hardware="32 to 512 TPU v3 cores", expected="linear on 'crelu' 56.6, on 'pooled' 55.4",
            source="Donahue and Simonyan 2019"),
    Variant("imagenet128_revnet", imagenet128_revnet, "the same with RevNet-50 of width 4 (86 M)",
            hardware="32 to 512 TPU v3 cores",
            expected="linear on 'crelu' 61.3, on 'pooled' 60.8, kNN about 43; FID of the generation runs 22.3, "
            "after a million steps 20.3", source="Donahue and Simonyan 2019"),
)  # fmt: skip


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    return common.make("bigbigan", VARIANTS, variant)

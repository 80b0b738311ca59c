"""SS-GAN (Chen et al. 2019, arXiv:1811.11212): a GAN whose discriminator also predicts rotations.

  python launch.py train --config=configs/ssgan.py --workdir=runs/ssgan
  python launch.py sample --workdir=runs/ssgan
  python launch.py configs ssgan

Published FIDs are of Inception features; give --config.evals.generation.extractor=inception:/path/to/weights to compute them.
"""

import ml_collections

from configs import common
from configs.common import Variant


def adam(lr, b1=0.0, b2=0.9, **options):
    return dict(name="adam", lr=lr, b1=b1, b2=b2, **{"schedule": "constant", **options})


def networks(config, generator, discriminator, name, latent, steps, rotated, ema=(0.999, 1000)):
    config.model = dict(
        generator=dict(name=name, **generator),
        discriminator=dict(name=name, **discriminator),
        latent=dict(kind="normal", size=latent),
        discriminator_steps=steps,
        rotated=rotated,
        weights=dict(game=1.0, discriminator=1.0, generator=0.2),
        ema=dict(decay=ema[0], start=ema[1]),
    )


def narrow(config, channels):
    generator = dict(channels=channels, multiples=(8, 4, 2, 1), embedding=32)
    discriminator = dict(channels=channels, multiples=(1, 2, 4, 8))
    networks(config, generator, discriminator, name="biggan", latent=64, steps=1, rotated=8)


def scenes(config):
    config.data.ops = config.data.eval_ops = common.resized(32)
    config.views = ((("flip", dict(p=0.5)),),)
    config.batch_size = 64
    config.total = "6000 steps"
    narrow(config, channels=16)
    config.optim = dict(generator=adam(2e-4, b2=0.999), discriminator=adam(4e-4, b2=0.999))
    common.generation(config)
    config.evaluate_every, config.checkpoint_every = "2000 steps", "500 steps"
    config.log_every_steps = 100


def smoke(config):
    scenes(config)
    networks(config, dict(channels=8), dict(channels=4), name="sngan", latent=8, steps=2, rotated=4, ema=(0.9, 2))
    common.shrink(config)


def rotation(config):
    scenes(config)
    config.model.rotated = config.batch_size
    config.model.weights = dict(game=0.0, discriminator=1.0, generator=0.0)
    del config.evals["generation"], config.evals["judge"]
    config.best_metric = "knn/top1"


def cifar10_small(config):
    scenes(config)
    config.data.name = "cifar10"
    config.data.ops = config.data.eval_ops = ()
    config.total = "12_000 steps"
    narrow(config, channels=24)
    config.evaluate_every, config.checkpoint_every = "4000 steps", "1000 steps"


def cifar10(config):
    """Adam 2e-4 to 0, betas 0 and .9, no mirrored images.

    64 rotated images, as in mimicry: a quarter of the batch by each of the four angles. Changed: here one quarter of the batch is
    turned by all four; the generator is averaged. The paper rotates 16 images: --config.model.rotated=4.
    """
    cifar10_small(config)
    config.views = ((),)
    config.batch_size = 5 * 64
    config.total = "100_000 steps"
    networks(config, dict(channels=256), dict(channels=128), name="sngan", latent=128, steps=5, rotated=16)
    rate = adam(2e-4, schedule="linear")
    config.optim = dict(generator=rate, discriminator=rate)
    config.evaluate_every, config.checkpoint_every = "5000 steps", "1000 steps"
    config.evals.generation.examples = 50_000


def imagenet128(config):
    """Square crops of at least half of the image, as in compare_gan, no mirrored images."""
    cifar10(config)
    config.data.name = "imagenet2012"
    config.data.test_split = "validation"
    crop = dict(size=128, area=(0.5, 1.0), ratio=(1.0, 1.0), sampling="simclr", interpolation="bilinear")
    config.data.ops = (("random_resized_crop", crop),)
    config.data.eval_ops = common.resized(128)
    config.data.workers = 16
    config.evals.linear = dict(kind="linear", solver="sgd")
    config.baselines = ()
    config.batch_size = 2 * 2048
    config.total = "150_000 steps"
    large = dict(channels=96, attention=(64,))
    networks(config, large, large, name="biggan", latent=120, steps=2, rotated=128, ema=(0.9999, 20_000))
    config.optim = dict(generator=adam(5e-5, b2=0.999), discriminator=adam(2e-4, b2=0.999))


VARIANTS = (
    Variant("", scenes, "embedded scenes at 32 px, without labels, narrow networks", hardware="2 CPU cores"),
    Variant("smoke", smoke, "the default in seconds, for tests"),
    Variant("rotation", rotation,
            "embedded scenes: the discriminator alone, which only predicts rotations of all images of a batch",
            hardware="2 CPU cores"),
    Variant("cifar10_small", cifar10_small, "JPEG CIFAR-10, 1.5 times as wide",
            hardware="1 accelerator", expected="Frechet (random_conv) 1.21 at step 3,000 of 12,000",
            source="ours, 1 seed"),
    Variant("cifar10", cifar10,
            "mimicry's: residual networks of SNGAN, hinge, batch 64, five discriminator steps, 100,000 steps",
            hardware="1 accelerator",
            expected="FID 14.65 (50,000 samples; SNGAN 16.77); with 16 rotated and 10,000 generated images 17.88 +- .64",
            source="mimicry; Chen et al. 2019"),
    Variant("imagenet128", imagenet128, "the large-scale experiment: BigGAN without labels, batch 2048",
            expected="FID 23.4; 20.6, IS 24.9; linear probe of the discriminator 38.3",
            source="Chen et al. 2019; its released module; Chen et al. 2019"),
)  # fmt: skip


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    return common.make("ssgan", VARIANTS, variant)

"""Generative adversarial networks: Goodfellow et al. 2014, DCGAN, WGAN-GP, SNGAN.

  python launch.py train --config=configs/gan.py --workdir=runs/gan
  python launch.py sample --workdir=runs/gan
  python launch.py configs gan

Published FIDs are of 2048-dimensional Inception features; to compute them, give
--config.evals.generation.extractor=inception:/path/to/weights. Samples come from averaged weights, even if a published run had
none; --config.model.ema.decay=0 turns averaging off.
"""

import ml_collections

from configs import common
from configs.common import Variant


def adam(lr=2e-4, b1=0.5, b2=0.999, **options):
    return dict(name="adam", lr=lr, b1=b1, b2=b2, schedule="constant", **options)


def networks(
    config, generator, discriminator, game="non_saturating", latent=("normal", 128), steps=1, fakes=1, penalty=("none", 0.0)
):
    config.model = dict(
        game=game,
        generator=generator,
        discriminator=discriminator,
        latent=dict(kind=latent[0], size=latent[1]),
        discriminator_steps=steps,
        fakes=fakes,
        penalty=dict(name=penalty[0], weight=penalty[1]),
        ema=dict(decay=0.999, start=1000),
    )


def sndcgan(config, channels, stages=3, **options):
    networks(
        config,
        dict(name="dcgan", channels=channels, stages=stages, kernel=4, final_kernel=3),
        dict(name="sndcgan", channels=channels, stages=stages, norm="spectral"),
        **options,
    )


def dcgan(config, channels, stages=3, kernel=4, **options):
    networks(
        config,
        dict(name="dcgan", channels=channels, stages=stages, kernel=kernel),
        dict(name="dcgan", channels=channels, stages=stages, kernel=kernel, norm="batch", head_bias=False),
        **options,
    )


def scenes(config):
    config.data.ops = config.data.eval_ops = common.resized(32)
    config.views = ((("flip", dict(p=0.5)),),)
    config.batch_size = 64
    config.total = "4000 steps"
    sndcgan(config, channels=16)
    config.optim = dict(generator=adam(), discriminator=adam())
    common.generation(config)
    config.evaluate_every, config.checkpoint_every = "1000 steps", "500 steps"


def scenes_dcgan(config):
    scenes(config)
    dcgan(config, channels=24, latent=("normal", 100))


def smoke(config):
    scenes(config)
    config.data.ops = config.data.eval_ops = common.resized(16)
    sndcgan(config, channels=8, stages=2, latent=("normal", 16), steps=2)
    common.shrink(config, {"model.ema.decay": 0.9, "model.ema.start": 2})


def cifar10_images(config):
    scenes(config)
    config.data.name = "cifar10"
    config.data.ops = config.data.eval_ops = ()


def cifar10_small(config):
    cifar10_images(config)
    # At the generator's rate this narrow discriminator falls behind: in the end it gets most real images wrong, and samples blur.
    sndcgan(config, channels=24, game="hinge")
    config.optim.discriminator = adam(4e-4)
    config.total = "9000 steps"
    config.evaluate_every, config.checkpoint_every = "3000 steps", "500 steps"


def cifar10_small_dcgan(config):
    cifar10_images(config)
    dcgan(config, channels=32, latent=("normal", 100))
    config.total = "6000 steps"
    config.evaluate_every, config.checkpoint_every = "2000 steps", "500 steps"


def cifar10(config):
    """Adam 2e-4, betas .5 and .999, no mirrored images. Changed: the generator is averaged."""
    cifar10_images(config)
    config.views = ((),)
    sndcgan(config, channels=64)
    config.total = "200_000 steps"
    config.evaluate_every, config.checkpoint_every = "10_000 steps", "2000 steps"
    config.evals.generation.update(dict(examples=10_000, split="test"))


def cifar10_dcgan(config):
    """Mirrored images, Adam 2e-4, betas .5 and .999.

    Changed: StudioGAN's discriminator has two convolutions where this one, of the paper, has one, and sums over pixels; the
    generator is averaged.
    """
    cifar10(config)
    config.views = ((("flip", dict(p=0.5)),),)
    config.batch_size = 128
    dcgan(config, channels=64, steps=2)


def cifar10_wgan_gp(config):
    """Five critic steps of 64 images, Adam 2e-4 to 0, betas 0 and .9, no mirrored images.

    The quoted run is mimicry's: a generator of 256 channels, whose step makes 64 images. Gulrajani's code has 128 channels and 128
    images. The critic is Gulrajani's, which averages over pixels. Changed: the generator is averaged.
    """
    cifar10(config)
    config.batch_size = 5 * 64
    config.total = "100_000 steps"
    config.evals.generation.update(dict(examples=50_000, split="train"))
    networks(
        config,
        dict(name="sngan", channels=256),
        dict(name="sngan", channels=128, norm="none", flavor="gulrajani"),
        game="wasserstein", steps=5, penalty=("gradient_penalty", 10.0),
    )  # fmt: skip
    rate = {**adam(b1=0.0, b2=0.9), "schedule": "linear"}
    config.optim = dict(generator=rate, discriminator=rate)


def cifar10_sngan(config):
    """Five discriminator steps of 64, 128 samples for the generator, Adam 2e-4 to 0, betas 0 and .9, no mirrored images.

    Changed: the generator is averaged. Mimicry's generator takes steps of 64 samples.
    """
    cifar10_wgan_gp(config)
    networks(config, dict(name="sngan", channels=256), dict(name="sngan", channels=128), game="hinge", steps=5, fakes=2)


def mnist_mlp(config):
    """SGD 0.1, divided by 1.000004 in every step, with momentum .5 (in the paper it rises to .7 over 250 epochs), batch 100."""
    cifar10(config)
    config.data.name = "mnist"
    config.batch_size, config.total = 100, "300_000 steps"
    config.views = ((),)
    networks(config, dict(name="mlp"), dict(name="mlp"), latent=("uniform", 100))
    momentum = dict(name="sgd", lr=0.1, momentum=0.5, schedule="exponential", end=1.000004**-300_000)
    config.optim = dict(generator=momentum, discriminator=momentum)


def folder(config):
    scenes(config)
    config.data.name = "/path/to/folder"
    config.data.ops = (("random_resized_crop", dict(size=64, area=(0.8, 1.0))),)
    config.data.eval_ops = common.resized(64)
    sndcgan(config, channels=64)
    config.total = "100_000 steps"
    config.evaluate_every, config.checkpoint_every = "5000 steps", "1000 steps"


def lsun_dcgan(config):
    """Adam 2e-4, beta1 .5, L2 1e-5; the central square of each image, not mirrored. Changed: the generator is averaged."""
    folder(config)
    config.data.ops = config.data.eval_ops
    config.views = ((),)
    config.batch_size = 128
    dcgan(config, channels=128, stages=4, kernel=5, latent=("uniform", 100))
    config.optim = dict(generator=adam(weight_decay=1e-5), discriminator=adam(weight_decay=1e-5))


VARIANTS = (
    Variant("", scenes, "embedded scenes at 32 px: SNDCGAN at a quarter of its width, non-saturating",
            hardware="2 CPU cores", expected="Frechet (random_conv) 3.2 (untrained 335.9)", source="ours, 1 seed"),
    Variant("smoke", smoke, "the default in seconds, for tests"),
    Variant("scenes_dcgan", scenes_dcgan, "embedded scenes: DCGAN, narrow",
            hardware="2 CPU cores",
            expected="Frechet (random_conv) 1.96 at step 2,000, 30.8 at 4,000 (untrained 378.8)",
            source="ours, 1 seed"),
    Variant("cifar10_small", cifar10_small,
            "JPEG CIFAR-10, 1.5 times as wide, hinge, the discriminator at twice the generator's rate",
            hardware="2 CPU cores", expected="Frechet (random_conv) 0.80, on an H200 0.84 (untrained 418.8)",
            source="ours, 1 seed each"),
    Variant("cifar10_small_dcgan", cifar10_small_dcgan, "JPEG CIFAR-10, DCGAN, non-saturating",
            hardware="2 CPU cores",
            expected="Frechet (random_conv) 1.78 to 2.98 at step 4,000, then rising (untrained 446.5)",
            source="ours, 2 runs"),
    Variant("cifar10", cifar10, "SNDCGAN as in compare_gan (2018): non-saturating, batch 64, 200,000 steps",
            hardware="1 accelerator",
            expected="FID 25.27 (10,000 samples against 10,000 images; without normalization 33.23)",
            source="compare_gan (2018)"),
    Variant("cifar10_dcgan", cifar10_dcgan, "DCGAN of 32 px, batch 64, two discriminator steps, 200,000 steps",
            hardware="1 accelerator", expected="FID 48.29, with a deeper discriminator", source="PyTorch-StudioGAN"),
    Variant("cifar10_wgan_gp", cifar10_wgan_gp,
            "WGAN-GP as in mimicry: residual networks of 256 and 128 channels, gradient penalty 10, 100,000 steps",
            hardware="1 accelerator", expected="FID 22.29 (50,000 samples)", source="mimicry"),
    Variant("cifar10_sngan", cifar10_sngan, "Miyato et al. 2018: residual networks, hinge, 100,000 steps",
            hardware="1 accelerator", expected="FID 21.7, 16.77", source="Miyato et al. 2018; mimicry"),
    Variant("mnist_mlp", mnist_mlp, "Goodfellow et al. 2014: maxout perceptrons with dropout, SGD, uniform noise",
            hardware="1 accelerator"),
    Variant("lsun_dcgan", lsun_dcgan, "Radford et al. 2016: DCGAN of 64 px, batch 128; images from a folder",
            hardware="1 accelerator"),
    Variant("folder", folder, "your own photographs at 64 px: --config.data.name=/path/to/folder",
            hardware="1 accelerator"),
)  # fmt: skip


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    return common.make("gan", VARIANTS, variant)

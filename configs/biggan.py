"""BigGAN and BigGAN-deep (Brock et al. 2019, arXiv:1809.11096): large class-conditional GANs.

  python launch.py train --config=configs/biggan.py --workdir=runs/biggan
  python launch.py sample --workdir=runs/biggan
  python launch.py configs biggan

Published FID and IS are of Inception features; give --config.evals.generation.extractor=inception:/path/to/weights to compute them.
"""

import ml_collections

from configs import common
from configs.common import Variant


def adam(lr, b1=0.0, b2=0.999):
    return dict(name="adam", lr=lr, b1=b1, b2=b2, schedule="constant")


def networks(config, generator, discriminator, latent, steps, name="biggan", orthogonal=0.0, ema=(0.999, 1000)):
    config.model = dict(
        generator=dict(name=name, **generator),
        discriminator=dict(name=name, **discriminator),
        latent=dict(kind="normal", size=latent),
        conditional=True,
        discriminator_steps=steps,
        orthogonal=orthogonal,
        ema=dict(decay=ema[0], start=ema[1]),
    )


def narrow(config, channels):
    # Most channels at low resolution, as in the tables for larger images. The paper's table for 32 px costs ten times as much.
    generator = dict(channels=channels, multiples=(8, 4, 2, 1), embedding=32)
    networks(config, generator, dict(channels=channels, multiples=(1, 2, 4, 8)), latent=64, steps=1)


def scenes(config):
    config.data.ops = config.data.eval_ops = common.resized(32)
    config.views = ((("flip", dict(p=0.5)),),)
    config.batch_size = 64
    config.total = "6000 steps"
    narrow(config, channels=16)
    config.optim = dict(generator=adam(2e-4), discriminator=adam(4e-4))
    common.generation(config)
    config.evaluate_every, config.checkpoint_every = "2000 steps", "500 steps"
    config.log_every_steps = 100


def smoke(config):
    scenes(config)
    # The paper's epsilon in low precision. With a smaller one Adam takes full steps along gradients that are rounding errors.
    config.optim = dict(generator=dict(adam(2e-4), eps=1e-4), discriminator=dict(adam(4e-4), eps=1e-4))
    networks(
        config,
        dict(channels=4, multiples=(2, 2, 1), attention=(16,), embedding=8),
        dict(channels=4, multiples=(1, 2, 2), attention=(16,)),
        latent=12,
        steps=2,
        orthogonal=1e-4,
        ema=(0.9, 2),
    )
    common.shrink(config)


def unconditional(config):
    scenes(config)
    config.model.conditional = False


def cifar10_small(config):
    scenes(config)
    config.data.name = "cifar10"
    config.data.ops = config.data.eval_ops = ()
    config.total = "12_000 steps"
    narrow(config, channels=24)
    config.evaluate_every, config.checkpoint_every = "4000 steps", "1000 steps"


def cifar10(config):
    """PyTorch-StudioGAN: Adam 2e-4, betas .5 and .999."""
    cifar10_small(config)
    config.batch_size = 5 * 64
    config.total = "100_000 steps"
    networks(
        config,
        dict(channels=96, attention=(16,)),
        dict(channels=48, attention=(16,)),  # our table multiplies by 4, theirs by 2
        latent=80,
        steps=5,
        ema=(0.9999, 1000),
    )
    config.optim = dict(generator=adam(2e-4, b1=0.5), discriminator=adam(2e-4, b1=0.5))
    config.evaluate_every, config.checkpoint_every = "5000 steps", "1000 steps"
    config.evals.generation.examples = 50_000


def imagenet128(config, size=128, latent=120, attention=64, **fields):
    """Adam 5e-5 and 2e-4, betas 0 and .999, orthogonal regularization 1e-4. Training collapses late: use the best checkpoint."""
    cifar10(config)
    config.data.name = "imagenet2012"
    config.data.test_split = "validation"
    config.data.ops = config.data.eval_ops = common.resized(size)
    config.data.workers = 16
    config.evals.linear = dict(kind="linear", solver="sgd")
    config.baselines = ()
    config.views = ((),)
    config.batch_size = 2 * 2048
    config.total = "150_000 steps"
    networks(
        config,
        dict(channels=96, attention=(attention,)),
        dict(channels=96, attention=(64,), **fields),
        latent=latent,
        steps=2,
        orthogonal=1e-4,
        ema=(0.9999, 20_000),
    )
    config.optim = dict(generator=adam(5e-5), discriminator=adam(2e-4))


def imagenet256(config):
    imagenet128(config, size=256, latent=140, attention=128, project_equal=False)


def imagenet512(config):
    imagenet128(config, size=512, latent=160, project_equal=False)


def deep128(config, size=128):
    from ssl_jax.models.gan.biggan_deep import TENSOR_RULES

    imagenet128(config, size)
    networks(
        config,
        dict(channels=128),
        dict(channels=128),
        latent=128,
        steps=2,
        name="biggan_deep",
        orthogonal=1e-4,
        ema=(0.9999, 20_000),
    )
    config.sharding = (*TENSOR_RULES, (".*", "fsdp"))


def deep256(config):
    deep128(config, size=256)
    config.optim = dict(generator=adam(2.5e-5), discriminator=adam(2.5e-5))


VARIANTS = (
    Variant("", scenes, "embedded scenes at 32 px, 12 classes, narrow networks",
            hardware="2 CPU cores",
            expected="Frechet (random_conv) 0.53 at step 2,000, 1.24 at 6,000 (untrained 55.5)",
            source="ours, 1 seed"),
    Variant("smoke", smoke, "the default in seconds, for tests"),
    Variant("unconditional", unconditional, "the default without labels", hardware="2 CPU cores"),
    Variant("cifar10_small", cifar10_small, "JPEG CIFAR-10, 1.5 times as wide",
            hardware="2 CPU cores", expected="Frechet (random_conv) 0.65 at step 2,000 of 12,000 (untrained 185.7)",
            source="ours, 1 seed"),
    Variant("cifar10", cifar10, "ch 96, attention, batch 64, five discriminator steps, 100,000 steps",
            hardware="1 accelerator", expected="FID 4.16, IS 9.96 (50,000 samples against the training images)",
            source="PyTorch-StudioGAN"),
    Variant("imagenet128", imagenet128, "the paper's: ch 96, batch 2048, two discriminator steps",
            hardware="128 to 512 TPU v3 cores",
            expected="FID 8.7, IS 98.8; with these rates FID 8.35, IS 97.76 (200,000 steps); the published weights "
            "evaluated again: FID 10.14, IS 96.7", source="Brock et al. 2019; PyTorch-StudioGAN; mmgeneration"),
    Variant("imagenet256", imagenet256,
            "the same at 256 px, networks as in google/compare_gan (attention at 128 px in the generator)",
            hardware="256 TPU v3 cores"),
    Variant("imagenet512", imagenet512, "the same at 512 px", hardware="512 TPU v3 cores"),
    Variant("deep128", deep128, "BigGAN-deep: ch 128, z 128",
            expected="the published weights evaluated again: FID 5.95, IS 107.2", source="mmgeneration"),
    Variant("deep256", deep256, "the same at 256 px, both rates 2.5e-5",
            expected="evaluated again: FID 11.3, IS 135.1", source="mmgeneration"),
)  # fmt: skip


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    return common.make("biggan", VARIANTS, variant)

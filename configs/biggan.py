"""BigGAN and BigGAN-deep (Brock et al. 2019, arXiv:1809.11096).

  python launch.py train --config=configs/biggan.py --workdir=runs/biggan
  python launch.py sample --workdir=runs/biggan

Variants (published figures are quoted from their source; ours are in docs/results.md; FID and IS there are of Inception features, which
these configs compute where --config.evals.generation.extractor=inception:/path/to/weights is given):
  (default)         embedded scenes at 32 px, 12 classes, narrow networks
  :smoke            the same in seconds, for tests
  :unconditional    the default without labels
  :cifar10_small    JPEG CIFAR-10, half as wide again
  :cifar10          PyTorch-StudioGAN: ch 96, attention, batch 64, five discriminator steps, Adam 2e-4, betas .5 and .999, 100,000
                    steps. Published: FID 4.16, IS 9.96 (50,000 samples against the training images)
  :imagenet128      the paper's: ch 96, batch 2048, two discriminator steps, Adam 5e-5 and 2e-4, betas 0 and .999, orthogonal
                    regularization 1e-4; 128 to 512 TPU v3 cores. Training collapses late, so the best checkpoint is kept. Published:
                    FID 8.7, IS 98.8; with these rates FID 8.35, IS 97.76 (PyTorch-StudioGAN, 200,000 steps); the published
                    weights evaluated again: FID 10.14, IS 96.7 (mmgeneration)
  :imagenet256      the same at 256 px, networks as in google/compare_gan (attention at 128 px in the generator); 256 TPU v3 cores
  :imagenet512      the same at 512 px; 512 TPU v3 cores
  :deep128          BigGAN-deep: ch 128, z 128. The published weights evaluated again: FID 5.95, IS 107.2 (mmgeneration)
  :deep256          the same at 256 px, both rates 2.5e-5. Evaluated again: FID 11.3, IS 135.1 (mmgeneration)
"""

import ml_collections

from configs import common
from ssl_jax.models.gan.biggan_deep import TENSOR_RULES


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
    # Most channels where pixels are few, as in the tables of larger images; the paper's table for 32 px costs ten times as much.
    generator = dict(channels=channels, multiples=(8, 4, 2, 1), embedding=32)
    networks(config, generator, dict(channels=channels, multiples=(1, 2, 4, 8)), latent=64, steps=1)


def scenes(config):
    config.data.ops = config.data.eval_ops = common.resized(32)
    config.views = ((("flip", dict(p=0.5)),),)
    config.batch_size = 64
    config.total_steps = 6000
    narrow(config, channels=16)
    config.optim = dict(generator=adam(2e-4), discriminator=adam(4e-4))
    common.generation(config)
    config.evaluate_every_steps, config.checkpoint_every_steps = 2000, 500
    config.log_every_steps = 100


def smoke(config):
    scenes(config)
    config.batch_size = 32
    config.total_steps, config.evaluate_every_steps, config.checkpoint_every_steps = 8, 4, 2
    config.log_every_steps = 1
    # The paper's epsilon in low precision: without it Adam makes steps of its full rate of gradients that are mere rounding.
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
    common.generation_smoke(config)


def unconditional(config):
    scenes(config)
    config.model.conditional = False


def cifar10_small(config):
    scenes(config)
    config.data.name = "cifar10"
    config.data.ops = config.data.eval_ops = ()
    config.total_steps = 12000
    narrow(config, channels=24)
    config.evaluate_every_steps, config.checkpoint_every_steps = 4000, 1000


def cifar10(config):
    cifar10_small(config)
    config.batch_size = 5 * 64
    config.total_steps = 100_000
    networks(
        config,
        dict(channels=96, attention=(16,)),
        dict(channels=48, attention=(16,)),  # the table multiplies by 4 where theirs does by 2
        latent=80,
        steps=5,
        ema=(0.9999, 1000),
    )
    config.optim = dict(generator=adam(2e-4, b1=0.5), discriminator=adam(2e-4, b1=0.5))
    config.evaluate_every_steps, config.checkpoint_every_steps = 5000, 1000
    config.evals.generation.examples = 50_000


def imagenet128(config, size=128, latent=120, attention=64, **fields):
    cifar10(config)
    config.data.name = "imagenet2012"
    config.data.test_split = "validation"
    config.data.ops = config.data.eval_ops = common.resized(size)
    config.data.workers = 16
    config.evals.linear = dict(kind="linear", solver="sgd")
    config.baselines = ()
    config.views = ((),)
    config.batch_size = 2 * 2048
    config.total_steps = 150_000
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


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    config = common.base("biggan")
    named = {"": scenes, "smoke": smoke, "unconditional": unconditional, "cifar10_small": cifar10_small, "cifar10": cifar10,
             "imagenet128": imagenet128, "imagenet256": imagenet256, "imagenet512": imagenet512, "deep128": deep128,
             "deep256": deep256}  # fmt: skip
    common.variant_of(variant, named)(config)
    return config

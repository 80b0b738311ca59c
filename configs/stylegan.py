"""StyleGAN 1 and 2 (Karras et al. 2019, arXiv:1812.04948; 2020a, arXiv:1912.04958; 2020b, arXiv:2006.06676).

  python launch.py train --config=configs/stylegan.py --workdir=runs/stylegan

A lazy regularizer takes a step of its own every n steps, in which Adam moves once more. So its group has the rate and beta2 of
n / (n + 1) of a step: generators with path lengths every 4 steps lr x 4/5 and .99^(4/5) = .991992, discriminators with R1 every 16
steps lr x 16/17 and .99^(16/17) = .990585 (2020a, appendix B).

Variants (published figures are quoted from their source; ours are in docs/results.md; FID there is of 2048-dimensional Inception
features, which these configs compute where --config.evals.generation.extractor=inception:/path/to/weights is given):
  (default)         embedded scenes at 32 px: StyleGAN2 of up to 128 channels, adaptive augmentation
  :smoke            the same in seconds, for tests
  :cifar10_small    JPEG CIFAR-10, twice the channels of the default at 32 px, augmentation that always applies (DiffAugment)
  :cifar10          2020b, `cifar`: 512 channels, mapping of 2 layers, plain discriminator, R1 .01, path lengths without
                    weight (the rate of the generator is that of lazy ones still), no mixing, batch 64, 100,000,000 images. Its
                    augmentation is adaptive; ours has its control and the operations of DiffAugment. Published: FID 2.92
  :cifar10_conditional  the same with labels. Published: FID 2.42, IS 10.14
  :stylegan1_ffhq256    2019, the network for 256 px at its rate there, .002, and batch 32, at a fixed resolution
  :stylegan1_ffhq1024   2019, R1 10 at every step, batch 32, 25,000,000 images, but at a fixed resolution (the paper grows from 8 px).
                    Published: FID 4.40 (4.4159 measured again by its authors); 8 V100
  :ffhq256          2020b, `paper256`: half the channels, batch 64, R1 1, 25,000,000 images, no augmentation
  :ffhq1024         2020a, configuration F: batch 32, R1 10, 25,000,000 images. Published: FID 2.84 +- .03, path length (end, w)
                    145.0 +- .5; 8 V100
FFHQ is a folder of images: --config.data.name=/path/to/ffhq. The published path length is that of LPIPS:
--config.evals.path.distance=lpips --config.evals.path.path=FILE --config.evals.path.sha256=HEX (see ssl_jax.models.pretrained.vgg).
"""

import ml_collections

from configs import common


def adam(lr, b2=0.99):
    return dict(name="adam", lr=lr, b1=0.0, b2=b2, schedule="constant")


def networks(config, base, widest=512, features=512, mapping_layers=8, group=4, residual=True):
    config.model.generator = dict(
        name="stylegan2", channel_base=base, channel_max=widest, features=features, mapping_layers=mapping_layers
    )
    config.model.discriminator = dict(name="stylegan2", channel_base=base, channel_max=widest, group=group, residual=residual)
    config.model.latent = dict(size=features)


def scenes(config):
    config.data.ops = config.data.eval_ops = common.resized(32)
    config.views = ((("flip", dict(p=0.5)),),)
    config.batch_size = 32
    config.total_steps = 6000
    config.model = dict(
        conditional=False,
        mixing=0.9,
        r1=dict(weight=0.1, interval=16),
        path_length=dict(weight=2.0, interval=4),
        augment=dict(policy=("color", "translation", "cutout"), target=0.6),
        ema=dict(half_life_examples=10_000, ramp=0.05),
        truncation_layers=8,
    )
    networks(config, base=512, widest=128, features=128, mapping_layers=4)
    config.optim = dict(generator=adam(0.002 * 4 / 5, 0.991992), discriminator=adam(0.002 * 16 / 17, 0.990585))
    common.generation(config)
    config.evals.path = dict(kind="perceptual_path", distance="random_conv", path="", sha256="", epsilon=1e-3, crop=False)
    config.evaluate_every_steps, config.checkpoint_every_steps = 2000, 500
    config.log_every_steps = 100


def smoke(config):
    scenes(config)
    config.data.ops = config.data.eval_ops = common.resized(8)  # four networks twice differentiated: small ones compile in seconds
    config.total_steps, config.evaluate_every_steps, config.checkpoint_every_steps = 8, 4, 2
    config.log_every_steps = 1
    networks(config, base=128, widest=16, features=16, mapping_layers=2)
    config.model.r1.interval = config.model.path_length.interval = 2
    common.generation_smoke(config)
    config.evals.path.examples = 64


def cifar10_small(config):
    scenes(config)
    config.data.name = "cifar10"
    config.data.ops = config.data.eval_ops = ()
    config.total_steps = 12_000
    networks(config, base=1024, widest=128, features=128, mapping_layers=2)
    config.model.r1.weight = 0.01
    config.model.augment.target = 0.0
    config.evaluate_every_steps, config.checkpoint_every_steps = 4000, 1000


def cifar10(config):
    cifar10_small(config)
    config.batch_size = 64
    networks(config, base=32768, mapping_layers=2, group=32, residual=False)
    config.model.mixing = 0.0
    config.model.path_length.weight = 0.0
    config.model.augment.target = 0.6
    config.model.ema = dict(half_life_examples=500_000, ramp=0.05)
    config.optim = dict(generator=adam(0.0025 * 4 / 5, 0.991992), discriminator=adam(0.0025 * 16 / 17, 0.990585))
    config.total_steps, config.total_examples = None, 100_000_000
    config.evaluate_every_steps, config.checkpoint_every_steps = 50_000, 5000
    config.evals.generation.examples = 50_000


def cifar10_conditional(config):
    cifar10(config)
    config.model.conditional = True
    del config.evals["judge"]  # which has no labels to give


def ffhq1024(config):
    scenes(config)
    config.data.name = "/path/to/ffhq"
    config.data.train_split, config.data.test_split = "all", "all"  # of a folder; the published runs held nothing out
    config.data.ops = config.data.eval_ops = common.resized(1024)
    config.data.workers = 16
    config.batch_size = 32
    config.total_steps, config.total_examples = None, 25_000_000
    networks(config, base=32768)
    config.model.r1.weight = 10.0
    config.model.augment.policy = ()
    config.model.ema.ramp = 0.0
    config.model.truncation_layers = 18
    config.eval_batch_size = 32
    # No labels and no images to hold out.
    config.evals = dict(
        generation=dict(config.evals.generation, examples=50_000), path=dict(config.evals.path, examples=50_000, epsilon=1e-4)
    )
    config.evaluate_every_steps, config.checkpoint_every_steps = 50_000, 5000


def ffhq256(config):
    ffhq1024(config)
    config.data.ops = config.data.eval_ops = common.resized(256)
    config.batch_size = 64
    networks(config, base=16384, group=8)
    config.model.r1.weight = 1.0
    config.model.ema.half_life_examples = 20_000
    config.model.truncation_layers = 14
    config.optim = dict(generator=adam(0.0025 * 4 / 5, 0.991992), discriminator=adam(0.0025 * 16 / 17, 0.990585))


def stylegan1_ffhq1024(config):
    ffhq1024(config)
    config.model.generator.update(dict(name="stylegan1", channel_base=16384))
    config.model.discriminator = dict(name="stylegan1", channel_base=16384, channel_max=512, group=4)
    config.model.r1.interval = 1
    config.model.path_length.weight = 0.0
    config.model.truncation_layers = 8
    config.evals.path.crop = True
    config.optim = dict(generator=adam(0.003), discriminator=adam(0.003))


def stylegan1_ffhq256(config):
    stylegan1_ffhq1024(config)
    config.data.ops = config.data.eval_ops = common.resized(256)
    config.optim = dict(generator=adam(0.002), discriminator=adam(0.002))


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    config = common.base("stylegan")
    named = {"": scenes, "smoke": smoke, "cifar10_small": cifar10_small, "cifar10": cifar10,
             "cifar10_conditional": cifar10_conditional, "stylegan1_ffhq256": stylegan1_ffhq256,
             "stylegan1_ffhq1024": stylegan1_ffhq1024, "ffhq256": ffhq256, "ffhq1024": ffhq1024}  # fmt: skip
    common.variant_of(variant, named)(config)
    return config

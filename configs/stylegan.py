"""StyleGAN 1 and 2 (Karras et al. 2019, arXiv:1812.04948; 2020a, arXiv:1912.04958; 2020b, arXiv:2006.06676).

  python launch.py train --config=configs/stylegan.py --workdir=runs/stylegan
  python launch.py configs stylegan

A lazy regularizer adds an Adam step every n steps. So its optimizer has the rate and beta2 of n / (n + 1) of a step (2020a,
appendix B). Generators with path lengths every 4 steps have lr x 4/5 and .99^(4/5) = .991992; discriminators with R1 every 16 steps
have lr x 16/17 and .99^(16/17) = .990585.

Published FIDs are of 2048-dimensional Inception features; to compute them, give
--config.evals.generation.extractor=inception:/path/to/weights. Published path lengths are those of LPIPS:
--config.evals.path.distance=lpips --config.evals.path.path=FILE --config.evals.path.sha256=HEX (see ssl_jax.models.pretrained.vgg).
FFHQ is a folder of images: --config.data.name=/path/to/ffhq.
"""

import ml_collections

from configs import common
from configs.common import Variant


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
    config.total = "6000 steps"
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
    config.evaluate_every, config.checkpoint_every = "2000 steps", "500 steps"
    config.log_every_steps = 100


def smoke(config):
    scenes(config)
    config.data.ops = config.data.eval_ops = common.resized(8)  # second derivatives of four networks: small ones compile in seconds
    networks(config, base=128, widest=16, features=16, mapping_layers=2)
    common.shrink(config, {
        "model.r1.interval": 2,
        "model.path_length.interval": 2,
        "evals.path.examples": 64,
    })  # fmt: skip


def cifar10_small(config):
    scenes(config)
    config.data.name = "cifar10"
    config.data.ops = config.data.eval_ops = ()
    config.total = "12_000 steps"
    networks(config, base=1024, widest=128, features=128, mapping_layers=2)
    config.model.r1.weight = 0.01
    config.model.augment.target = 0.0
    config.evaluate_every, config.checkpoint_every = "4000 steps", "1000 steps"


def cifar10(config):
    """R1 .01, no mixing, batch 64, path lengths of weight 0 (but the generator's rate of lazy ones), no mirrored images.

    Changed: the augmentation is adaptive as in the paper, but with the operations of DiffAugment instead of the paper's own
    ("ADA"), so the quoted figures are of another augmentation.
    """
    cifar10_small(config)
    config.views = ((),)
    config.batch_size = 64
    networks(config, base=32768, mapping_layers=2, group=32, residual=False)
    config.model.mixing = 0.0
    config.model.path_length.weight = 0.0
    config.model.augment.target = 0.6
    config.model.ema = dict(half_life_examples=500_000, ramp=0.05)
    config.optim = dict(generator=adam(0.0025 * 4 / 5, 0.991992), discriminator=adam(0.0025 * 16 / 17, 0.990585))
    config.total = "100_000_000 examples"
    config.evaluate_every, config.checkpoint_every = "50_000 steps", "5000 steps"
    config.evals.generation.examples = 50_000


def cifar10_conditional(config):
    cifar10(config)
    config.model.conditional = True
    del config.evals["judge"]  # it cannot pass labels to the discriminator


def ffhq1024(config):
    scenes(config)
    config.data.name = "/path/to/ffhq"
    config.data.train_split, config.data.test_split = "all", "all"  # of a folder; the published runs hold out no images
    config.data.ops = config.data.eval_ops = common.resized(1024)
    config.data.workers = 16
    config.batch_size = 32
    config.total = "25_000_000 examples"
    networks(config, base=32768)
    config.model.r1.weight = 10.0
    config.model.augment.policy = ()
    config.model.ema.ramp = 0.0
    config.model.truncation_layers = 18
    config.eval_batch_size = 32
    # No evaluations that need labels or held-out images.
    config.evals = dict(
        generation=dict(config.evals.generation, examples=50_000), path=dict(config.evals.path, examples=50_000, epsilon=1e-4)
    )
    config.evaluate_every, config.checkpoint_every = "50_000 steps", "5000 steps"


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
    """The paper grows the networks from 8 px."""
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


VARIANTS = (
    Variant("", scenes, "embedded scenes at 32 px: StyleGAN2 of up to 128 channels, adaptive augmentation",
            hardware="2 CPU cores",
            expected="Frechet (random_conv) 0.76 at step 4,000, 0.98 at 6,000 (untrained 97.6)",
            source="ours, 1 seed"),
    Variant("smoke", smoke, "the default in seconds, for tests"),
    Variant("cifar10_small", cifar10_small,
            "JPEG CIFAR-10, twice the channels of the default at 32 px, DiffAugment in every step",
            hardware="1 accelerator",
            expected="Frechet (random_conv) 3.40 at step 6,000 of 12,000 (untrained 272.3)", source="ours, 1 seed"),
    Variant("cifar10", cifar10,
            "2020b, `cifar`: 512 channels, mapping of 2 layers, plain discriminator, 100,000,000 images",
            hardware="1 accelerator", expected="FID 2.92, with the paper's own augmentations", source="Karras et al. 2020b"),
    Variant("cifar10_conditional", cifar10_conditional, "the same with labels",
            hardware="1 accelerator", expected="FID 2.42, IS 10.14, with the paper's own augmentations",
            source="Karras et al. 2020b"),
    Variant("stylegan1_ffhq256", stylegan1_ffhq256,
            "2019, the network for 256 px with its rate .002, batch 32, fixed resolution",
            hardware="8 V100"),
    Variant("stylegan1_ffhq1024", stylegan1_ffhq1024,
            "2019, R1 10 at every step, batch 32, 25,000,000 images, fixed resolution",
            hardware="8 V100", expected="FID 4.40 (4.4159 measured again by its authors)",
            source="Karras et al. 2019"),
    Variant("ffhq256", ffhq256,
            "2020b, `paper256`: half the channels, batch 64, R1 1, 25,000,000 images, no augmentation",
            hardware="8 V100"),
    Variant("ffhq1024", ffhq1024, "2020a, configuration F: batch 32, R1 10, 25,000,000 images",
            hardware="8 V100", expected="FID 2.84 +- .03, path length (end, w) 145.0 +- .5",
            source="Karras et al. 2020a"),
)  # fmt: skip


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    return common.make("stylegan", VARIANTS, variant)

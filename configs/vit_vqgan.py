"""ViT-VQGAN, stage 1 (Yu et al. 2022, arXiv:2110.04627): transformers from images to tokens and back. Stage 2: vq_prior.py.

  python launch.py train --config=configs/vit_vqgan.py --workdir=runs/tokens
  python launch.py configs vit_vqgan

FID of reconstructions: --config.evals.reconstruction.extractor=inception:/path/to/weights.
Watch `usage_of_batch`: a public reimplementation with batches of 64 uses 0.3 % of the codes and reaches 29.2 (arXiv:2410.06424,
table 4).

LPIPS, for synthesis: --config.model.perceptual.kind=vgg_lpips --config.model.perceptual.path=FILE
--config.model.perceptual.sha256=HEX (weight 0.1 in the ViTs, 1 in VQGAN; ssl_jax.models.pretrained.vgg.convert makes FILE). Do not
use it for tokens whose features you probe, because its network was trained with ImageNet's labels.
"""

import ml_collections

from configs import common
from configs.common import Variant


def tokens(size, dim, **options):
    from ssl_jax.objectives.codebooks import LEARNED

    return dict(LEARNED, name="learned", size=size, dim=dim, **{"normalize": True, **options})


def vits(config, encoder, decoder, patch):
    config.model.encoder = dict(name="vit", size=encoder, patch=patch)
    config.model.decoder = dict(name="vit", size=decoder, patch=patch)


def rate(peak, warmup, end=0.5):
    return dict(name="adamw", lr=peak, b1=0.9, b2=0.99, weight_decay=1e-4, schedule="cosine", warmup=warmup, end=end)


def adversarial(config, weight=0.1, start=0, game="non_saturating", adaptive=False):
    config.model.adversarial = dict(weight=weight, game=game, start=start, adaptive=adaptive)
    config.optim.discriminator = dict(config.optim.tokenizer)


def scenes(config):
    config.data.ops = config.data.eval_ops = common.resized(32)
    config.views = ((("flip", dict(p=0.5)),),)
    config.batch_size = 64
    config.total = "2000 steps"
    config.model = dict(
        quantizer=tokens(1024, 8),
        squared=1.0,
        absolute=0.0,
        logit_laplace=0.0,
        perceptual=dict(kind="none", weight=0.1, path="", sha256=""),
        adversarial=dict(weight=0.0, game="non_saturating", start=0, adaptive=False),
        discriminator=dict(name="stylegan2", channel_base=512, channel_max=128),
        r1=dict(weight=10.0, interval=16),
    )
    vits(config, "tiny", "tiny", 4)
    config.optim = dict(tokenizer=rate(5e-4, "200 steps", end=0.05))
    config.evals.linear.update(dict(l2=(1e-3, 1e-2, 1e-1)))
    config.evals.reconstruction = dict(kind="reconstruction", extractor="random_conv")
    config.evals.codebook = dict(kind="codebook")
    config.best_metric = "reconstruction/psnr"
    config.evaluate_every, config.checkpoint_every = "500 steps", "250 steps"
    config.log_every_steps = 50


def scenes_adversarial(config):
    scenes(config)
    adversarial(config)
    config.evals.judge = dict(kind="discriminator_memorization")


def scenes_random(config):
    scenes(config)
    config.model.perceptual.kind = "random_conv"


def scenes_encoder(config):
    scenes(config)
    config.model.perceptual.kind = "self_encoder"
    config.stages = dict(encoder=common.stage("configs/simclr.py"))


def scenes_rotation(config):
    scenes(config)
    config.model.quantizer.straight_through = "rotation"


def scenes_wide_codes(config):
    scenes(config)
    config.model.quantizer = tokens(1024, 128, normalize=False)


def smoke(config):
    scenes_adversarial(config)
    config.data.ops = config.data.eval_ops = common.resized(16)
    vits(config, "mu", "mu", 4)
    common.shrink(config, {
        "model.quantizer.size": 64,
        "model.logit_laplace": 0.1,
        "model.discriminator.channel_base": 64,
        "model.discriminator.channel_max": 8,
        "model.r1.interval": 2,
        "optim": {group: rate(1e-3, "2 steps") for group in ("tokenizer", "discriminator")},
    })  # fmt: skip


def mnist_t10k_patches(config):
    scenes(config)
    config.data.name, config.data.ops, config.data.eval_ops = "mnist_t10k", (), ()
    config.views = ((),)
    config.model.quantizer = tokens(512, 8)
    vits(config, "patches", "patches", 4)
    config.total = "1000 steps"


def cifar10_small(config):
    scenes(config)
    config.data.name, config.data.ops, config.data.eval_ops = "cifar10", (), ()
    vits(config, "mini", "mini", 4)
    config.total = "6000 steps"
    config.evaluate_every, config.checkpoint_every = "2000 steps", "500 steps"


def cifar10(config):
    cifar10_small(config)
    vits(config, "small", "small", 4)
    config.model.logit_laplace = 0.1
    config.model.discriminator = dict(name="stylegan2", channel_base=4096, channel_max=512)
    config.batch_size, config.total = 128, "50_000 steps"
    config.optim = dict(tokenizer=rate(2e-4, "2000 steps"))
    adversarial(config)
    config.evals.judge = dict(kind="discriminator_memorization")


def imagenet256(config):
    """Codes of 32 numbers; Adam to 1e-4 over 50,000 steps, down to 5e-5, batch 256."""
    scenes(config)
    config.data.name, config.data.test_split, config.data.workers = "imagenet2012", "validation", 16
    config.data.ops = (("random_resized_crop", dict(size=256, area=(0.8, 1.0))),)
    config.data.eval_ops = common.resized(256)
    config.batch_size, config.total = 256, "500_000 steps"
    config.model.quantizer = tokens(8192, 32)
    config.model.logit_laplace = 0.1
    config.model.discriminator = dict(name="stylegan2", channel_base=16_384, channel_max=512)
    vits(config, "small", "small", 8)
    config.model.encoder.remat = config.model.decoder.remat = "full"
    config.optim = dict(tokenizer=rate(1e-4, "50_000 steps"))
    adversarial(config)
    config.evals = dict(reconstruction=dict(kind="reconstruction", extractor="random_conv"), codebook=dict(kind="codebook"))
    config.evaluate_every, config.checkpoint_every = "25_000 steps", "2500 steps"
    config.baselines = ()


def imagenet256_base(config):
    imagenet256(config)
    config.model.encoder.size = config.model.decoder.size = "base"


def imagenet256_large(config):
    imagenet256(config)
    config.model.decoder.size = "large"


def cnn_vqgan(config):
    """Random squares of the image with its short side at 256, not mirrored. Losses of the published code.

    Its images are in [-1, 1], so its absolute error is twice ours. It weighs the commitment by 1 and the codebook loss by .25, the
    other way round than the VQ-VAE. The rate is its 4.5e-6 per image. Changed: the batch of 96 is ours.
    """
    imagenet256(config)
    config.data.ops = (("resize_random_crop", dict(resize=256, crop=256)),)
    config.views = ((),)
    config.model.quantizer = tokens(1024, 256, normalize=False, init="uniform", commitment=1.0, codebook_weight=0.25)
    config.model.encoder = config.model.decoder = dict(name="vqgan")
    config.model.squared, config.model.absolute, config.model.logit_laplace = 0.0, 2.0, 0.0
    config.model.perceptual.weight = 1.0
    config.model.discriminator = dict(name="patch")
    config.model.r1.weight = 0.0
    config.batch_size, config.total = 96, "500_000 steps"
    config.optim = dict(tokenizer=dict(name="adam", lr=4.5e-6 * 96, b1=0.5, b2=0.9, schedule="constant"))
    adversarial(config, weight=0.8, start=250_001, game="hinge", adaptive=True)


VARIANTS = (
    Variant("", scenes,
            "embedded scenes at 32 px, patches of 4, 64 tokens of 1024 codes (8 numbers, norm 1); squared error "
            "alone",
            hardware="2 CPU cores", expected="codes used in 256 images 60.9 %, PSNR 22.79", source="ours, 1 seed"),
    Variant("smoke", smoke, "with everything, in seconds, for tests"),
    Variant("scenes_adversarial", scenes_adversarial, "the default and a discriminator", hardware="2 CPU cores"),
    Variant("scenes_random", scenes_random, "the default and the features of a random network",
            hardware="2 CPU cores"),
    Variant("scenes_encoder", scenes_encoder,
            "the default and the features of a SimCLR run, --config.stages.encoder.workdir=DIR",
            hardware="2 CPU cores"),
    Variant("scenes_rotation", scenes_rotation, "the default with the rotation trick", hardware="2 CPU cores"),
    Variant("scenes_wide_codes", scenes_wide_codes, "the default with codes as wide as the encoder, of any norm",
            hardware="2 CPU cores",
            expected="for 256 pixels 4 % of the codes used (96 % with narrow ones of norm 1); here 0.2, 0.2, 0.6 % "
            "after 600 steps", source="Yu et al. 2022; ours, 3 seeds"),
    Variant("mnist_t10k_patches", mnist_t10k_patches,
            "digits, patches of 4 without attention: 49 tokens of 512 codes, each from its patch alone",
            hardware="1 CPU core", expected="codes used 75 %, PSNR 20.5", source="ours, 1 seed"),
    Variant("cifar10_small", cifar10_small,
            "JPEG CIFAR-10, encoder and decoder twice as deep and 1.5 times as wide",
            hardware="1 accelerator",
            expected="after 4,000 of 6,000 steps codes used in 256 images 66.4 %, PSNR 23.8", source="ours, 1 seed"),
    Variant("cifar10", cifar10,
            "JPEG CIFAR-10, networks and losses of SS without the perceptual loss, patches of 4: 64 tokens of 1024 codes",
            hardware="1 accelerator", expected="no such recipe was published; size and rates are ours"),
    Variant("imagenet256", imagenet256,
            "SS: encoder and decoder Small, 256 px, patches of 8, 1024 tokens of 8192 codes, 500,000 steps",
            hardware="128 TPUv4", time="about a day",
            expected="with LPIPS FID of reconstructions 1.99, 95 % of the codes used in 256 images, squared error "
            "3.34e-3", source="Yu et al. 2022"),
    Variant("imagenet256_base", imagenet256_base, "BB: both Base",
            hardware="128 TPUv4", expected="1.55, 96 %, 3.09e-3", source="Yu et al. 2022"),
    Variant("imagenet256_large", imagenet256_large, "SL: the decoder Large",
            hardware="128 TPUv4", expected="1.28, 95 %, 2.88e-3", source="Yu et al. 2022"),
    Variant("cnn_vqgan", cnn_vqgan,
            "VQGAN: convolutions, 16 x 16 tokens of 1024 codes, PatchGAN from step 250,001, adaptive weight",
            expected="FID 7.94, with LPIPS", source="Esser et al. 2021"),
)  # fmt: skip


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    return common.make("vit_vqgan", VARIANTS, variant)

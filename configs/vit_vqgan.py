"""ViT-VQGAN, stage 1 (Yu et al. 2022, arXiv:2110.04627): Transformers from images to tokens and back. Stage 2 is configs/vq_prior.py.

  python launch.py train --config=configs/vit_vqgan.py --workdir=runs/tokens

Variants (published figures are quoted from their source; ours are in docs/results.md):
  (default)            embedded scenes at 32 px, patches of 4, 64 tokens of 1024 codes (8 numbers, norm 1); squared error alone
  :smoke               with everything, in seconds, for tests
  :scenes_adversarial  the default and a discriminator
  :scenes_random       the default and the features of a random network
  :scenes_encoder      the default and the features of a SimCLR run, --config.stages.encoder.workdir=DIR
  :scenes_rotation     the default with the rotation trick
  :scenes_wide_codes   the default with codes as wide as the encoder, of any norm. Published, for 256 pixels: 4 % of the codes used,
                       96 % with narrow ones of norm 1
  :mnist_t10k_patches  digits, patches of 4 without any attention: 49 tokens of 512 codes, each of its patch alone
  :cifar10_small       JPEG CIFAR-10, encoder and decoder twice as deep and half as wide again
  :cifar10             JPEG CIFAR-10 with the networks and losses of SS (no perceptual one) on patches of 4: 64 tokens of 1024 codes.
                       No such recipe was published; size and rates are ours
  :imagenet256         SS: encoder and decoder Small, 256 px, patches of 8, 1024 tokens of 8192 codes (32 numbers); Adam to 1e-4 over
                       50,000 steps, down to 5e-5, batch 256, 500,000 steps. Published, with LPIPS, on 128 TPUv4 for about a day:
                       FID of reconstructions 1.99, 95 % of the codes used in 256 images, squared error 3.34e-3
  :imagenet256_base    BB: both Base. Published 1.55, 96 %, 3.09e-3
  :imagenet256_large   SL: the decoder Large. Published 1.28, 95 %, 2.88e-3
  :cnn_vqgan           VQGAN (Esser et al. 2021): convolutions, 16 x 16 tokens of 1024 codes, PatchGAN from step 250,001, adaptive
                       weight. Published: FID 7.94, with LPIPS
FID of reconstructions: --config.evals.reconstruction.extractor=inception:/path/to/weights.
A public reimplementation trained with batches of 64 uses 0.3 % of the codes and reaches 29.2 (arXiv:2410.06424, table 4): look at
`usage_of_batch`.

LPIPS, for synthesis: --config.model.perceptual.kind=vgg_lpips --config.model.perceptual.path=FILE --config.model.perceptual.sha256=HEX
(weight 0.1 in the ViTs, 1 in VQGAN; FILE is made with ssl_jax.models.pretrained.vgg.convert). Not for tokens whose features are to be probed: its
network has seen ImageNet's labels.
"""

import ml_collections

from configs import common
from ssl_jax.objectives.codebooks import LEARNED


def tokens(size, dim, **options):
    return dict(LEARNED, name="learned", size=size, dim=dim, **{"normalize": True, **options})


def vits(config, encoder, decoder, patch):
    config.model.encoder = dict(name="vit", size=encoder, patch=patch)
    config.model.decoder = dict(name="vit", size=decoder, patch=patch)


def rate(peak, warmup, end=0.5):
    return dict(
        name="adamw", lr=peak, b1=0.9, b2=0.99, weight_decay=1e-4, schedule="cosine", warmup_steps=warmup, end=end
    )


def adversarial(config, weight=0.1, start=0, game="non_saturating", adaptive=False):
    config.model.adversarial = dict(weight=weight, game=game, start=start, adaptive=adaptive)
    config.optim.discriminator = dict(config.optim.tokenizer)


def scenes(config):
    config.data.ops = config.data.eval_ops = common.resized(32)
    config.views = ((("flip", dict(p=0.5)),),)
    config.batch_size = 64
    config.total_steps = 2000
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
    config.optim = dict(tokenizer=rate(5e-4, 200, end=0.05))
    config.evals.linear.update(dict(l2=(1e-3, 1e-2, 1e-1), iterations=50))
    config.evals.reconstruction = dict(kind="reconstruction", extractor="random_conv")
    config.evals.codebook = dict(kind="codebook")
    config.best_metric = "reconstruction/psnr"
    config.evaluate_every_steps, config.checkpoint_every_steps = 500, 250
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
    config.batch_size = 32
    config.total_steps, config.evaluate_every_steps, config.checkpoint_every_steps = 8, 4, 2
    config.log_every_steps = 1
    config.data.ops = config.data.eval_ops = common.resized(16)
    config.data.train_split, config.data.test_split = "train[:512]", "test[:256]"
    config.model.quantizer.size = 64
    config.model.logit_laplace = 0.1
    config.model.discriminator.update(channel_base=64, channel_max=8)
    config.model.r1.interval = 2
    vits(config, "mu", "mu", 4)
    config.optim = {group: rate(1e-3, 2) for group in ("tokenizer", "discriminator")}
    config.evals.linear.update(dict(l2=(1e-2,), iterations=20))


def mnist_t10k_patches(config):
    scenes(config)
    config.data.name, config.data.ops, config.data.eval_ops = "mnist_t10k", (), ()
    config.views = ((),)
    config.model.quantizer = tokens(512, 8)
    vits(config, "patches", "patches", 4)
    config.total_steps = 1000


def cifar10_small(config):
    scenes(config)
    config.data.name, config.data.ops, config.data.eval_ops = "cifar10", (), ()
    vits(config, "mini", "mini", 4)
    config.total_steps = 6000
    config.evaluate_every_steps, config.checkpoint_every_steps = 2000, 500


def cifar10(config):
    cifar10_small(config)
    vits(config, "small", "small", 4)
    config.model.logit_laplace = 0.1
    config.model.discriminator = dict(name="stylegan2", channel_base=4096, channel_max=512)
    config.batch_size, config.total_steps = 128, 50_000
    config.optim = dict(tokenizer=rate(2e-4, 2000))
    adversarial(config)
    config.evals.judge = dict(kind="discriminator_memorization")


def imagenet256(config):
    scenes(config)
    config.data.name, config.data.test_split, config.data.workers = "imagenet2012", "validation", 16
    config.data.ops = (("random_resized_crop", dict(size=256, area=(0.8, 1.0))),)
    config.data.eval_ops = common.resized(256)
    config.batch_size, config.total_steps = 256, 500_000
    config.model.quantizer = tokens(8192, 32)
    config.model.logit_laplace = 0.1
    config.model.discriminator = dict(name="stylegan2", channel_base=16_384, channel_max=512)
    vits(config, "small", "small", 8)
    config.model.encoder.remat = config.model.decoder.remat = "full"
    config.optim = dict(tokenizer=rate(1e-4, 50_000))
    adversarial(config)
    config.evals = dict(reconstruction=dict(kind="reconstruction", extractor="random_conv"), codebook=dict(kind="codebook"))
    config.evaluate_every_steps, config.checkpoint_every_steps = 25_000, 2500
    config.baselines = ()


def imagenet256_base(config):
    imagenet256(config)
    config.model.encoder.size = config.model.decoder.size = "base"


def imagenet256_large(config):
    imagenet256(config)
    config.model.decoder.size = "large"


def cnn_vqgan(config):
    imagenet256(config)
    config.model.quantizer = tokens(1024, 256, normalize=False, init="uniform")
    config.model.encoder = config.model.decoder = dict(name="vqgan")
    config.model.squared, config.model.absolute, config.model.logit_laplace = 0.0, 1.0, 0.0
    config.model.perceptual.weight = 1.0
    config.model.discriminator = dict(name="patch")
    config.model.r1.weight = 0.0
    config.batch_size, config.total_steps = 96, 500_000
    config.optim = dict(tokenizer=dict(name="adam", lr=4.5e-6 * 96, b1=0.5, b2=0.9, schedule="constant"))
    adversarial(config, weight=0.8, start=250_001, game="hinge", adaptive=True)


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    config = common.base("vit_vqgan")
    named = {"": scenes, "smoke": smoke, "scenes_adversarial": scenes_adversarial, "scenes_random": scenes_random,
             "scenes_encoder": scenes_encoder, "scenes_rotation": scenes_rotation, "scenes_wide_codes": scenes_wide_codes,
             "mnist_t10k_patches": mnist_t10k_patches, "cifar10_small": cifar10_small, "cifar10": cifar10,
             "imagenet256": imagenet256, "imagenet256_base": imagenet256_base, "imagenet256_large": imagenet256_large,
             "cnn_vqgan": cnn_vqgan}  # fmt: skip
    common.variant_of(variant, named)(config)
    return config

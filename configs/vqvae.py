"""VQ-VAE (van den Oord, Vinyals and Kavukcuoglu 2017, arXiv:1711.00937): images as grids of tokens.

  python launch.py train --config=configs/vqvae.py --workdir=runs/vqvae
  python launch.py configs vqvae

The variants of mnist_t10k show codebook collapse and its remedies: 8,000 MNIST digits, 28 px to 7 x 7 tokens of 512 codes,
400 steps of Adam 1e-3.
"""

import ml_collections

from configs import common
from configs.common import Variant


def adam(lr):
    return dict(name="adam", lr=lr, schedule="constant")


def networks(config, width, blocks, block_width, stages=2):
    for part in ("encoder", "decoder"):
        config.model[part] = dict(name="residual", width=width, stages=stages, blocks=blocks, block_width=block_width)


def codes(dim, **options):
    from ssl_jax.objectives.codebooks import LEARNED

    return dict(LEARNED, name="learned", size=512, dim=dim, **options)


def averages(dim, **options):
    return codes(dim, codebook_update="average", **options)


def scenes(config):
    config.data.ops = config.data.eval_ops = common.resized(32)
    config.views = ((("flip", dict(p=0.5)),),)
    config.batch_size = 64
    config.total = "4000 steps"
    config.model = dict(channels=3, variance=0.0625, quantizer=averages(32, revive=0.1))
    networks(config, width=64, blocks=2, block_width=32)
    config.optim = dict(net=adam(1e-3))
    config.evals.linear.update(dict(l2=(1e-3, 1e-2, 1e-1)))
    config.evals.reconstruction = dict(kind="reconstruction", extractor="random_conv")
    config.evals.codebook = dict(kind="codebook")
    config.best_metric = "reconstruction/psnr"
    config.evaluate_every, config.checkpoint_every = "1000 steps", "500 steps"
    config.log_every_steps = 50


def smoke(config):
    scenes(config)
    config.data.ops = config.data.eval_ops = common.resized(16)
    networks(config, width=32, blocks=1, block_width=8)
    common.shrink(config, {"model.quantizer.size": 32, "model.quantizer.dim": 8})


def cifar10_small(config):
    scenes(config)
    config.data.name, config.data.ops, config.data.eval_ops = "cifar10", (), ()
    config.model.variance = 0.06327


def cifar10(config):
    """Codes are moving averages of their vectors; at the start they have variance 1/64, as in Sonnet."""
    cifar10_small(config)
    config.batch_size, config.total = 32, "10_000 steps"
    config.views = ((),)
    config.model.quantizer = averages(64, debias=True, init="fan_in")
    networks(config, width=128, blocks=2, block_width=32)
    config.optim = dict(net=adam(3e-4))


def mnist_t10k(config):
    scenes(config)
    config.data.name, config.data.ops, config.data.eval_ops = "mnist_t10k", (), ()
    config.views = ((),)
    config.batch_size, config.total = 100, "400 steps"
    config.model = dict(channels=1, variance=0.0949, quantizer=codes(64, init="uniform"))
    networks(config, width=64, blocks=1, block_width=32)
    config.evaluate_every, config.checkpoint_every = "200 steps", "100 steps"
    config.log_every_steps = 20


def mnist_t10k_ema(config):
    mnist_t10k(config)
    config.model.quantizer = averages(64)


def mnist_t10k_revival(config):
    mnist_t10k(config)
    config.model.quantizer = averages(64, revive=0.1)


def mnist_t10k_l2(config):
    """The gradient passes the normalization.

    The plain straight-through gradient, without a LayerNorm before, leaves the norm unbounded: 1e9 after 400 steps, with 2 % of the
    codes in use.
    """
    mnist_t10k(config)
    config.model.quantizer = codes(8, normalize=True, straight_through="normalized")


def mnist_t10k_rotation(config):
    mnist_t10k_l2(config)
    config.model.quantizer.straight_through = "rotation"


def mnist_t10k_fsq(config):
    mnist_t10k(config)
    config.model.quantizer = dict(name="fsq", levels=(8, 8, 8))


def mnist(config):
    mnist_t10k_revival(config)
    config.data.name = "mnist"
    config.total = "6000 steps"
    config.evaluate_every, config.checkpoint_every = "2000 steps", "500 steps"


def imagenet128(config):
    """256 maps, Adam 2e-4, batch 128."""
    scenes(config)
    config.data.name, config.data.test_split, config.data.workers = "imagenet2012", "validation", 16
    config.data.ops = (("random_resized_crop", dict(size=128, area=(0.8, 1.0))),)
    config.data.eval_ops = common.resized(128)
    config.batch_size, config.total = 128, "250_000 steps"
    config.model.quantizer = codes(64, init="uniform")
    networks(config, width=256, blocks=2, block_width=256)
    config.optim = dict(net=adam(2e-4))
    config.evals = dict(reconstruction=dict(kind="reconstruction", extractor="random_conv"), codebook=dict(kind="codebook"))
    config.evaluate_every, config.checkpoint_every = "25_000 steps", "2500 steps"
    config.baselines = ()


VARIANTS = (
    Variant("", scenes, "embedded scenes at 32 px to 8 x 8 tokens of 512 codes, moving averages with revival",
            hardware="2 CPU cores"),
    Variant("smoke", smoke, "the default in seconds, for tests"),
    Variant("cifar10_small", cifar10_small, "JPEG CIFAR-10, the networks of the default", hardware="2 CPU cores"),
    Variant("cifar10", cifar10,
            "Sonnet's example: 128 maps, 512 codes of 64 numbers, Adam 3e-4, batch 32, 10,000 steps",
            hardware="1 GPU", time="4.5 min",
            expected="at steps 100, 1000, 2000, 5000, 10,000 squared error / variance .483, .105, .081, .061, .056 "
            "and perplexity 10, 72, 154, 327, 326", source="Sonnet's published log"),
    Variant("mnist", mnist, "MNIST, 7 x 7 tokens of 512 codes with revival", hardware="2 CPU cores"),
    Variant("imagenet128", imagenet128,
            "the paper's ImageNet: 128 px to 32 x 32 tokens of 512 codes by gradient, 250,000 steps",
            hardware="1 accelerator"),
    Variant("mnist_t10k", mnist_t10k, "codes of 64 numbers by gradient, from U(-1/K, 1/K)",
            hardware="2 CPU cores", expected="usage 2.1 %, perplexity 6.1, PSNR 17.1", source="ours, 1 seed"),
    Variant("mnist_t10k_ema", mnist_t10k_ema, "moving averages, from N(0, 1)",
            hardware="2 CPU cores", expected="usage 2.5 %, perplexity 8.4, PSNR 19.6", source="ours, 1 seed"),
    Variant("mnist_t10k_revival", mnist_t10k_revival, "the same, and unused codes are reset",
            hardware="2 CPU cores",
            expected="usage 96.1, 82.2, 39.8 %, perplexity 343, 233, 110, PSNR 21.2, 21.2, 19.7",
            source="ours, 3 seeds"),
    Variant("mnist_t10k_l2", mnist_t10k_l2,
            "codes of 8 numbers and norm 1; the gradient passes the norm of the vectors",
            hardware="2 CPU cores",
            expected="usage 96.7, 90.8, 93.2 %, perplexity 123, 96, 131, PSNR 21.6, 21.8, 21.6",
            source="ours, 3 seeds"),
    Variant("mnist_t10k_rotation", mnist_t10k_rotation, "the same with the rotation trick",
            hardware="2 CPU cores", expected="usage 82.2 %, perplexity 52, PSNR 20.9", source="ours, 1 seed"),
    Variant("mnist_t10k_fsq", mnist_t10k_fsq, "a grid of 8 x 8 x 8, no codebook",
            hardware="2 CPU cores", expected="usage 7.6 %, perplexity 16.7, PSNR 20.0", source="ours, 1 seed"),
)  # fmt: skip


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    return common.make("vqvae", VARIANTS, variant)

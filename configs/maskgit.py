"""MaskGIT: a bidirectional transformer that fills in masked tokens, many at once (Chang et al. 2022, arXiv:2202.04200).

  python launch.py train --config=configs/vit_vqgan.py --workdir=runs/tokens
  python launch.py train --config=configs/maskgit.py --config.stages.tokenizer.workdir=runs/tokens --workdir=runs/maskgit
  python launch.py configs maskgit
"""

import ml_collections

from configs import common, vq_prior
from configs.common import Variant


def scenes(config):
    vq_prior.scenes(config)
    transformer = config.model.transformer
    config.model = dict(
        transformer=transformer,
        conditional=True,
        schedule="cosine",
        smoothing=0.1,
        probe_block=1,
        sampling=dict(steps=8, choice_temperature=4.5, temperature=1.0, top_k=0, top_p=1.0),
    )
    del config.evals["prior"]  # masked tokens give no likelihood of an image
    config.best_metric = "-generation/frechet"


def smoke(config):
    scenes(config)
    vq_prior.small(config)
    config.model.sampling.steps = 3


def mnist_t10k(config):
    scenes(config)
    vq_prior.digits(config)


def cifar10_small(config):
    scenes(config)
    config.data.name, config.data.ops, config.data.eval_ops = "cifar10", (), ()
    config.stages.tokenizer.recipe = "configs/vit_vqgan.py:cifar10_small"
    config.total = "20_000 steps"
    vq_prior.transformer(config, depth=6, width=256, heads=4)
    config.model.probe_block = 2
    config.optim.net.warmup = "500 steps"
    config.evaluate_every, config.checkpoint_every = "5000 steps", "1000 steps"


def cifar10(config):
    cifar10_small(config)
    config.stages.tokenizer.recipe = "configs/vit_vqgan.py:cifar10"
    config.batch_size, config.total = 128, "50_000 steps"
    vq_prior.transformer(config, depth=24, width=512, heads=8)
    config.model.probe_block = 11
    config.optim.net.lr = 5e-4


def imagenet256(config):
    """AdamW 1e-4 (.9, .96), decay 0.045, smoothing 0.1, at least half of the tokens masked, the transformer of the published code.

    Published for an autoregressive transformer of this size: FID 18.65, IS 80.4. FID by schedule: cosine 6.06, square 6.35, cubic
    7.26, linear 7.51, root 12.33.

    Changed: the figures are of a tokenizer of the authors, with as many tokens and codes as :cnn_vqgan but without attention and
    with other losses. The warm-up and the crops are ours, since the training code was not published.
    """
    scenes(config)
    config.data.name, config.data.test_split = "imagenet2012", "validation"
    config.data.ops = (("random_resized_crop", dict(size=256, area=(0.8, 1.0))),)
    config.data.eval_ops = common.resized(256)
    config.data.workers = 16
    config.batch_size, config.total = 256, "300 epochs"
    config.stages.tokenizer.recipe = "configs/vit_vqgan.py:cnn_vqgan"
    vq_prior.transformer(config, depth=24, width=768, heads=16, remat="full")
    config.model.transformer.flavor = "maskgit"
    config.model.least_masked = 0.5
    config.model.probe_block = 11
    config.optim = dict(net=dict(name="adamw", lr=1e-4, b2=0.96, schedule="constant", warmup="5000 steps", weight_decay=0.045))
    config.evals.generation.examples = 50_000
    config.evals.linear = dict(kind="linear", solver="sgd")
    del config.evals["classified"], config.evals["depth"], config.evals["knn"]
    config.evaluate_every = "25 epochs"
    config.checkpoint_every, config.baselines = "2000 steps", ()


VARIANTS = (
    Variant("", scenes, "embedded scenes at 32 px: four blocks of width 128, eight steps per image",
            hardware="2 CPU cores"),
    Variant("smoke", smoke, "the default in seconds, for tests"),
    Variant("mnist_t10k", mnist_t10k, "digits, on a run of configs/vqvae.py:mnist_t10k_l2: six blocks of width 128",
            hardware="1 CPU core",
            expected="after 1,000 steps samples of their class 19.5, 23.5, 22.4 % (chance 10), linear 80.6, 79.8, "
            "81.5", source="ours, 3 seeds"),
    Variant("cifar10_small", cifar10_small, "JPEG CIFAR-10: six blocks of width 256", hardware="1 accelerator"),
    Variant("cifar10", cifar10, "the same on a run of configs/vit_vqgan.py:cifar10: 24 blocks of width 512",
            hardware="1 accelerator"),
    Variant("imagenet256", imagenet256, "24 blocks of width 768, post-normalized as BERT's, batch 256, 300 epochs",
            expected="on another tokenizer of 16 x 16 tokens FID 6.18, IS 182.1 in 8 steps",
            source="Chang et al. 2022"),
)  # fmt: skip


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    return common.make("maskgit", VARIANTS, variant)

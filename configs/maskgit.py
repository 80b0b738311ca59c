"""MaskGIT: a bidirectional transformer that fills in masked tokens, many at once (Chang et al. 2022, arXiv:2202.04200).

  python launch.py train --config=configs/vit_vqgan.py --workdir=runs/tokens
  python launch.py train --config=configs/maskgit.py --config.stages.tokenizer.workdir=runs/tokens --workdir=runs/maskgit

Variants (published figures are quoted from their source; ours are in docs/results.md):
  (default)       embedded scenes at 32 px: four blocks of width 128, eight steps for a picture
  :smoke          the same in seconds, for tests
  :mnist_t10k     digits, on a run of configs/vqvae.py:mnist_t10k_l2: six blocks of width 128
  :cifar10_small  JPEG CIFAR-10: six blocks of width 256
  :cifar10        the same on a run of configs/vit_vqgan.py:cifar10: 24 blocks of width 512
  :imagenet256    24 blocks of width 768, post-normalized as BERT's, batch 256, AdamW 1e-4 (.9, .96), decay 0.045, smoothing 0.1, 300
                  epochs; the warm-up is ours. Published, on 16 x 16 tokens of a convolutional tokenizer: FID 6.18, IS 182.1 in 8 steps;
                  an autoregressive transformer of this size has 18.65 and 80.4. FID by schedule: cosine 6.06, square 6.35, cubic 7.26,
                  linear 7.51, root 12.33. The tokenizer here is that of configs/vit_vqgan.py; for this pair no figure was published
"""

import ml_collections

from configs import common, vq_prior


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
    del config.evals["prior"]  # a likelihood of masked tokens is none of an image
    config.best_metric = "-generation/frechet"


def smoke(config):
    scenes(config)
    model = config.model.to_dict()
    vq_prior.smoke(config)
    model["transformer"] = config.model.transformer.to_dict()
    model["sampling"]["steps"] = 3
    config.model = model
    del config.evals["prior"]
    config.best_metric = "-generation/frechet"


def mnist_t10k(config):
    scenes(config)
    vq_prior.digits(config)


def cifar10_small(config):
    scenes(config)
    config.data.name, config.data.ops, config.data.eval_ops = "cifar10", (), ()
    config.stages.tokenizer.recipe = "configs/vit_vqgan.py:cifar10_small"
    config.total_steps = 20_000
    vq_prior.transformer(config, depth=6, width=256, heads=4)
    config.model.probe_block = 2
    config.optim.net.warmup_steps = 500
    config.evaluate_every_steps, config.checkpoint_every_steps = 5000, 1000


def cifar10(config):
    cifar10_small(config)
    config.stages.tokenizer.recipe = "configs/vit_vqgan.py:cifar10"
    config.batch_size, config.total_steps = 128, 50_000
    vq_prior.transformer(config, depth=24, width=512, heads=8)
    config.model.probe_block = 11
    config.optim.net.lr = 5e-4


def imagenet256(config):
    scenes(config)
    config.data.name, config.data.test_split = "imagenet2012", "validation"
    config.data.ops = (("random_resized_crop", dict(size=256, area=(0.8, 1.0))),)
    config.data.eval_ops = common.resized(256)
    config.data.workers = 16
    config.batch_size, config.total_steps, config.total_epochs = 256, None, 300.0
    config.stages.tokenizer.recipe = "configs/vit_vqgan.py:imagenet256"
    vq_prior.transformer(config, depth=24, width=768, heads=16, remat="full")
    config.model.probe_block = 11
    config.optim = dict(net=dict(name="adamw", lr=1e-4, b2=0.96, schedule="constant", warmup_steps=5000, weight_decay=0.045))
    config.evals.generation.examples = 50_000
    config.evals.linear = dict(kind="linear", solver="sgd")
    del config.evals["classified"], config.evals["depth"], config.evals["knn"]
    config.evaluate_every_steps, config.evaluate_every_epochs = None, 25.0
    config.checkpoint_every_steps, config.baselines = 2000, ()


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    config = common.base("maskgit")
    named = {"": scenes, "smoke": smoke, "mnist_t10k": mnist_t10k, "cifar10_small": cifar10_small,
             "cifar10": cifar10, "imagenet256": imagenet256}  # fmt: skip
    common.variant_of(variant, named)(config)
    return config

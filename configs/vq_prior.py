"""Vector-quantized image modeling: a transformer over the tokens of a trained tokenizer (Yu et al. 2022, arXiv:2110.04627).

  python launch.py train --config=configs/vit_vqgan.py --workdir=runs/tokens
  python launch.py train --config=configs/vq_prior.py --config.stages.tokenizer.workdir=runs/tokens --workdir=runs/prior
  python launch.py sample --workdir=runs/prior

Variants (published figures are quoted from their source; ours are in docs/results.md):
  (default)        embedded scenes at 32 px: four blocks of width 128, told the class of nine images in ten, so that it samples classes
                   and has features of images whose class nobody knows
  :smoke           the same in seconds, for tests
  :unconditional   the default without classes
  :mnist_t10k      digits, on a run of configs/vqvae.py:mnist_t10k_l2: six blocks of width 128
  :mnist_t10k_probe  digits for features: twelve blocks of width 64 without classes and dropout, on a run of
                   configs/vit_vqgan.py:mnist_t10k_patches
  :cifar10_small   JPEG CIFAR-10: six blocks of width 256, 5.3 million parameters; generation_half measures the half of its samples that
                   a classifier prefers
  :cifar10         JPEG CIFAR-10, on a run of configs/vit_vqgan.py:cifar10: 24 blocks of width 512. Size and rates are ours
  :cifar10_probe   the same for its features: without classes. Published, for iGPT-L, on pixels and trained on ImageNet: a linear probe
                   reaches 96.3 on CIFAR-10, and the last block is 2.4 points below the best one
  :imagenet256_base   VIM-Base: 24 blocks of width 1536, batch 1024, Adam (.9, .96), 450,000 steps: 5,000 of warm-up to 4.5e-4, which
                   is held up to step 80,000 and then falls exponentially to 1e-5. How weights were regularized and images augmented was
                   not published. Published (650M parameters: three square matrices in an attention, here four): FID 8.81, IS 110.8
  :imagenet256_large  VIM-Large: 36 blocks of width 2048. Published (1697M): FID 4.17, IS 175.1 as sampled, 3.04 and 227.4 of the half
                   that a ResNet-101 prefers; generation_half asks a linear probe of its extractor instead
  :imagenet256_large_adafactor  the same with a factored second moment and half a first one: as the published run, which kept the first
                   in 8 bits, it fits where Adam's moments do not
  :imagenet256_base_probe, :imagenet256_large_probe  for their features: without classes, the large one without dropout; the tokenizer
                   must be one without perceptual loss, as configs/vit_vqgan.py:imagenet256 trains it when told nothing else, because
                   the network of that loss has seen labels. Published, linear probe: 65.1 (block 10 of 24) and 73.2 (15 of 36)

The published runs were pure data parallelism on 128 TPUs v4. Here parameters and moments are spread over all devices; with
--config.mesh.tensor=n the matrices are split n ways besides.
"""

import ml_collections

from configs import common
from ssl_jax.models.tokenizers.prior import TENSOR_RULES


def transformer(config, depth, width, heads, dropout=0.1, remat="none"):
    config.model.transformer = dict(depth=depth, width=width, heads=heads, hidden=4 * width, dropout=dropout, remat=remat)


def scenes(config):
    config.data.ops = config.data.eval_ops = common.resized(32)
    config.views = ((("flip", {}),),)
    config.batch_size = 64
    config.total_steps = 2000
    config.stages = dict(tokenizer=common.stage("configs/vit_vqgan.py"))
    config.model = dict(
        conditional=True,
        label_dropout=0.1,
        smoothing=0.0,
        probe_block=1,
        sampling=dict(temperature=1.0, top_k=0, top_p=1.0, guidance=1.0),
    )
    transformer(config, depth=4, width=128, heads=4)
    config.optim = dict(net=dict(name="adamw", lr=1e-3, b2=0.96, warmup_steps=100, weight_decay=0.045))
    config.evals.prior = dict(kind="token_likelihood")
    config.evals.depth = dict(kind="linear_by_layer")
    config.evals.generation = dict(kind="generation", extractor="random_conv", examples=2048)
    config.evals.classified = dict(kind="sample_class_accuracy", examples=1024)
    config.evals.linear.update(dict(l2=(1e-3, 1e-2, 1e-1), iterations=50))
    config.best_metric = "-prior/bits_per_token"
    config.baselines = ("untrained",)
    config.evaluate_every_steps, config.checkpoint_every_steps = 1000, 500
    config.log_every_steps = 50


def without_classes(config):
    config.model.conditional, config.model.label_dropout = False, 0.0
    del config.evals["classified"]


def unconditional(config):
    scenes(config)
    without_classes(config)


def smoke(config):
    scenes(config)
    config.batch_size = 32
    config.total_steps, config.evaluate_every_steps, config.checkpoint_every_steps = 8, 4, 2
    config.log_every_steps = 1
    config.data.ops = config.data.eval_ops = common.resized(16)
    config.data.train_split, config.data.test_split = "train[:512]", "test[:256]"
    config.stages.tokenizer.recipe = "configs/vit_vqgan.py:smoke"
    transformer(config, depth=2, width=32, heads=2)
    config.model.sampling.guidance = 2.0
    config.optim = dict(net=dict(name="adamw", lr=1e-2, b2=0.96, schedule="constant", weight_decay=0.045))
    config.evals.linear.update(dict(l2=(1e-2,), iterations=20))
    config.evals.generation.examples = config.evals.classified.examples = config.evals.prior.examples = 128


def digits(config):
    config.data.name, config.data.ops, config.data.eval_ops = "mnist_t10k", (), ()
    config.views = ((),)
    config.stages.tokenizer.recipe = "configs/vqvae.py:mnist_t10k_l2"
    transformer(config, depth=6, width=128, heads=4)
    config.model.probe_block = 2


def mnist_t10k(config):
    scenes(config)
    digits(config)


def mnist_t10k_probe(config):
    mnist_t10k(config)
    without_classes(config)
    config.stages.tokenizer.recipe = "configs/vit_vqgan.py:mnist_t10k_patches"
    transformer(config, depth=12, width=64, heads=4, dropout=0.0)
    config.model.probe_block = 5


def half(config):
    config.evals.generation_half = dict(config.evals.generation, acceptance=0.5)


def cifar10_small(config):
    scenes(config)
    half(config)
    config.data.name, config.data.ops, config.data.eval_ops = "cifar10", (), ()
    config.stages.tokenizer.recipe = "configs/vit_vqgan.py:cifar10_small"
    config.total_steps = 20_000
    transformer(config, depth=6, width=256, heads=4)
    config.model.probe_block = 2
    config.optim.net.warmup_steps = 500
    config.evaluate_every_steps, config.checkpoint_every_steps = 5000, 1000


def cifar10(config):
    cifar10_small(config)
    config.stages.tokenizer.recipe = "configs/vit_vqgan.py:cifar10"
    config.batch_size, config.total_steps = 128, 50_000
    transformer(config, depth=24, width=512, heads=8)
    config.model.probe_block = 11
    config.optim.net.lr = 5e-4


def cifar10_probe(config):
    cifar10(config)
    without_classes(config)
    del config.evals["generation"], config.evals["generation_half"]


def imagenet256_base(config):
    scenes(config)
    config.data.name, config.data.test_split = "imagenet2012", "validation"
    config.data.ops = (("random_resized_crop", dict(size=256, area=(0.8, 1.0))),)
    config.data.eval_ops = common.resized(256)
    config.data.workers = 16
    config.batch_size, config.total_steps = 1024, 450_000
    config.stages.tokenizer.recipe = "configs/vit_vqgan.py:imagenet256"
    config.model.label_dropout, config.model.probe_block = 0.0, 9
    transformer(config, depth=24, width=1536, heads=16, remat="full")
    config.optim = dict(
        net=dict(name="adam", lr=4.5e-4, b2=0.96, warmup_steps=5000, schedule="exponential", hold=80 / 450, end=1e-5 / 4.5e-4)
    )
    config.mesh = dict(data=1, fsdp=-1, tensor=1)
    config.xla = "overlap"
    config.sharding = (*TENSOR_RULES, (".*", "fsdp"))
    config.evals.generation.examples = 50_000
    config.evals.linear = dict(kind="linear", solver="sgd")
    del config.evals["classified"], config.evals["depth"], config.evals["knn"]
    config.evaluate_every_steps, config.checkpoint_every_steps, config.baselines = 50_000, 2000, ()


def imagenet256_large(config):
    imagenet256_base(config)
    transformer(config, depth=36, width=2048, heads=32, remat="full")
    config.model.probe_block = 14
    half(config)


def imagenet256_large_adafactor(config):
    imagenet256_large(config)
    rate = config.optim.net.to_dict()
    del rate["b2"]
    config.optim = dict(net={**rate, "name": "adafactor"})


def imagenet256_base_probe(config):
    imagenet256_base(config)
    config.model.conditional = False
    config.evals.depth = dict(kind="linear_by_layer", solver="sgd")


def imagenet256_large_probe(config):
    imagenet256_large(config)
    config.model.conditional = False
    config.evals.depth = dict(kind="linear_by_layer", solver="sgd")
    del config.evals["generation_half"]
    config.model.transformer.dropout = 0.0


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    config = common.base("vq_prior")
    named = {"": scenes, "smoke": smoke, "unconditional": unconditional, "mnist_t10k": mnist_t10k,
             "mnist_t10k_probe": mnist_t10k_probe, "cifar10_small": cifar10_small,
             "cifar10": cifar10, "cifar10_probe": cifar10_probe,
             "imagenet256_base": imagenet256_base, "imagenet256_large": imagenet256_large,
             "imagenet256_large_adafactor": imagenet256_large_adafactor,
             "imagenet256_base_probe": imagenet256_base_probe, "imagenet256_large_probe": imagenet256_large_probe}  # fmt: skip
    common.variant_of(variant, named)(config)
    return config

"""What does each kind of supervision teach the same encoder, with the same number of images?

  python launch.py sweep --sweep=sweeps/families.py --workdir=sweeps_out/families --jobs=2
  python launch.py sweep --sweep=sweeps/families_vit.py --workdir=sweeps_out/families_vit --jobs=2
  python launch.py sweep --sweep=sweeps/families_cifar10.py --workdir=sweeps_out/families_cifar10 --jobs=2
  python launch.py compare sweeps_out/families
  python launch.py train --config=sweeps/families.py:jigsaw --config.seed=1 --workdir=runs/jigsaw     one cell of the table

Every method trains the same encoder with the views, batch size and optimizer of its own recipe. The images are equal, and the compute
is not: rotation sees each image four times. All encoders are judged by the same probes. Supervised classification is the reference,
and the untrained encoder the floor. There are three blocks:

  NAME          embedded scenes, a ResNet-10 of width 1/4, 144,000 images
  vit_NAME      the same images, a ViT of four blocks of 96
  cifar10_NAME  JPEG CIFAR-10, a ResNet-10 of width 1/4, 350,000 images

What is not equal: split-brain has two encoders of width 1/8; CPC's encoder has LayerNorm before its convolutions; co-occurrence
reads patches without a stride in the stem; the encoders of the tokenizers and the discriminators of the GANs are their own networks.
"""

import importlib

import ml_collections

from ssl_jax.errors import UserError
from ssl_jax.experiment.sweep import Sweep, Variation

RESNET = dict(name="resnet", depth=10, width=0.25, stem="stride2", zero_init_residual=False)
L2 = (1e-3, 1e-2, 1e-1)
EVALS = dict(
    knn=dict(kind="knn", k=20, temperature=0.07),
    linear=dict(kind="linear", solver="lbfgs", l2=L2),
    layers=dict(kind="linear_by_layer"),
    fewshot=dict(kind="fewshot"),
    representation=dict(kind="representation"),
)
AUTOENCODERS = ("autoencoder", "vae")  # their own encoders are smaller: they get the common one below their code
FAMILIES = (
    "supervised", "autoencoder", "vae", "bigbigan", "rotation", "relative_patch", "jigsaw", "colorization", "split_brain",
    "context_encoder", "cooccurrence", "egomotion", "equivariance", "cpc", "simclr", "moco", "byol", "simsiam", "barlow_twins",
    "vicreg", "swav", "dino",
)  # fmt: skip
TRANSFORMERS = ("supervised", "simclr", "moco", "byol", "dino", "ibot", "mae", "ijepa")
MASKED = ("ibot", "mae", "ijepa")  # with a ViT, a class token and an optimizer of their own
BLOCKS = {"": FAMILIES, "vit_": TRANSFORMERS, "cifar10_": FAMILIES}


def get_config(variant: str = "simclr") -> ml_collections.ConfigDict:
    """The recipe of configs/NAME.py for the block of `variant`, with the images and the evaluations of this study."""
    block = next((prefix for prefix in ("vit_", "cifar10_") if variant.startswith(prefix)), "")
    name = variant.removeprefix(block)
    if name not in BLOCKS[block]:
        raise UserError(f"config variant {variant!r} does not exist; there are {', '.join(p + n for p in BLOCKS for n in BLOCKS[p])}")
    recipe = {"cifar10_": "cifar10_small", "vit_": "scenes_v3" if name == "moco" else ""}.get(block, "")
    config = importlib.import_module(f"configs.{name}").get_config(recipe)
    with config.unlocked():
        if name in AUTOENCODERS:
            config.model.encoder = dict(RESNET)
        if block == "vit_" and name not in MASKED:
            config.model.encoder = dict(name="vit", variant="mini/6", pool="cls")
            config.views = tuple(tuple((op, {**given, **({"size": 48} if "size" in given else {})}) for op, given in view)
                                 for view in config.views)  # 32 pixels are no whole number of patches
            for optimizer in config.optim.values():
                optimizer.lr = min(optimizer.lr, 1e-3)
        pretext = {"pretext": dict(kind="pretext")} if "pretext" in config.evals else {}
        cells = {} if block == "cifar10_" else {"cells": dict(kind="segmentation_linear", layer="patches" if block else "layer3")}
        config.evals = {**EVALS, **cells, **pretext}
        config.references, config.best_metric, config.online_probe = {}, "knn/top1", 0.0
    config.total = config.evaluate_every = "350_000 examples" if block == "cifar10_" else "144_000 examples"
    config.checkpoint_every = "14_400 examples"
    config.baselines = ("raw pixels", "untrained")
    return config


def of_block(block: str) -> Sweep:
    """All methods of a block, three seeds."""
    variations = [Variation(name.replace("_", " "), f"sweeps/families.py:{block}{name}") for name in BLOCKS[block]]
    return Sweep(variations, seeds=(0, 1, 2), baseline="supervised")


def get_sweep() -> Sweep:
    return of_block("")

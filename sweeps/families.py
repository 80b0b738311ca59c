"""What does each kind of supervision teach the same encoder, with the same number of images?

  python launch.py sweep --sweep=sweeps/families.py --workdir=sweeps_out/families --jobs=2
  python launch.py compare sweeps_out/families
  python launch.py train --config=sweeps/families.py:jigsaw --config.seed=1 --workdir=runs/jigsaw     one cell of the table

Every method trains a ResNet-10 of width 1/4 on 144,000 images of the embedded scenes, 20 epochs, with the views, batch size and
optimizer of its own recipe. So the images are equal, and the compute is not: rotation sees each image four times. All encoders are
judged by the same probes. Supervised classification is the reference, and the untrained encoder the floor.

What is not equal: split-brain has two encoders of width 1/8; CPC's encoder has LayerNorm before its convolutions; co-occurrence
reads patches without a stride in the stem; the encoders of the tokenizers and the discriminators of the GANs are their own networks.
"""

import importlib

import ml_collections

from ssl_jax.errors import UserError
from ssl_jax.experiment.sweep import Sweep, Variation

IMAGES = "144_000 examples"
RESNET = dict(name="resnet", depth=10, width=0.25, stem="stride2", zero_init_residual=False)
L2 = (1e-3, 1e-2, 1e-1)
EVALS = dict(
    knn=dict(kind="knn", k=20, temperature=0.07),
    linear=dict(kind="linear", solver="lbfgs", l2=L2),
    layers=dict(kind="linear_by_layer"),
    fewshot=dict(kind="fewshot"),
    representation=dict(kind="representation"),
    cells=dict(kind="segmentation_linear", layer="layer3"),
)
AUTOENCODERS = ("autoencoder", "vae")  # their own encoders are smaller: they get the common one below their code
FAMILIES = (
    "supervised", "autoencoder", "vae", "bigbigan", "rotation", "relative_patch", "jigsaw", "colorization", "split_brain",
    "context_encoder", "cooccurrence", "egomotion", "equivariance", "cpc", "simclr", "moco", "byol", "simsiam", "barlow_twins",
    "vicreg", "swav", "dino",
)  # fmt: skip


def get_config(variant: str = "simclr") -> ml_collections.ConfigDict:
    """The default recipe of configs/VARIANT.py, with the images and the evaluations of this study."""
    if variant not in FAMILIES:
        raise UserError(f"config variant {variant!r} does not exist; there are {', '.join(FAMILIES)}")
    config = importlib.import_module(f"configs.{variant}").get_config()
    with config.unlocked():
        if variant in AUTOENCODERS:
            config.model.encoder = dict(RESNET)
        config.evals = {**EVALS, **({"pretext": dict(kind="pretext")} if "pretext" in config.evals else {})}
        config.references, config.best_metric = {}, "knn/top1"
    config.total = config.evaluate_every = IMAGES
    config.checkpoint_every = "14_400 examples"
    config.baselines = ("raw pixels", "untrained")
    return config


def get_sweep() -> Sweep:
    variations = [Variation(name.replace("_", " "), f"sweeps/families.py:{name}") for name in FAMILIES]
    return Sweep(variations, seeds=(0, 1, 2), baseline="supervised")

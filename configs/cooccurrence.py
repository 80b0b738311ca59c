"""Co-occurrence of patches (Isola et al. 2016, arXiv:1511.06811): neighbors in one image, or patches of different images?

  python launch.py train --config=configs/cooccurrence.py --workdir=runs/cooccurrence
  python launch.py configs cooccurrence

The paper's own recipe is not here: no code of it is public.
"""

import ml_collections

from configs import common
from configs.common import Variant


def scenes(config):
    common.pretext(config)
    # Patches of 8 pixels in cells of 12: gaps have 2 to 6 pixels. Gray patches by chance, each by itself: colors alone must not tell.
    config.views = ((("flip", dict(p=0.5)),),)
    config.model = dict(
        grid=4, tile=8, jitter=2, tile_operations=(("grayscale", dict(p=0.5)),), stride=4,
        encoder=dict(name="resnet", depth=10, width=0.25, stem="cifar", zero_init_residual=False),
        layer="pooled", embed=dict(widths=()), head=dict(widths=(128,), batch_norm=False),
        mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0),
    )  # fmt: skip
    config.evals.affinity = dict(kind="affinity")


def smoke(config):
    scenes(config)
    common.shrink_pretext(config, {"model.head.widths": (32,), "model.stride": 8, "evals.affinity.examples": 16})


def cifar10_small(config):
    """Gray patches of 8 pixels, each with mean 0 and deviation 1, two pixels apart, of random crops of 30 pixels."""
    scenes(config)
    common.pretext_cifar10(config)
    config.views = ((("random_crop", dict(size=30)), ("flip", dict(p=0.5))),)
    config.model.grid, config.model.jitter, config.model.tile_operations = 3, 0, (("grayscale", dict(p=1.0)),)
    del config.model["mean"], config.model["std"]
    config.model.standardize = True
    del config.evals["affinity"]  # it has no masks


VARIANTS = (
    Variant("", scenes, "embedded scenes, ResNet-10 of width 1/4 on patches of 8 pixels, 20 epochs", hardware="2 CPU cores"),
    Variant("smoke", smoke, "the default in seconds, for tests"),
    Variant("cifar10_small", cifar10_small, "JPEG CIFAR-10, gray patches, 5 epochs", hardware="2 CPU cores"),
)


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    return common.make("cooccurrence", VARIANTS, variant)

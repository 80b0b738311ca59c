"""What every config starts from: durations, intervals, data, evaluations, and the recipes of views the papers use."""

import ml_collections
from ml_collections import config_dict

from ssl_jax.errors import UserError

SCENES_SIZE = 48  # pixels, the embedded dataset


def base(method: str) -> ml_collections.ConfigDict:
    """Every key that the house itself reads, with the values of a small run on the embedded dataset."""
    config = ml_collections.ConfigDict()
    config.method = method
    config.seed = 0
    config.batch_size = 256
    config.accumulate = 1  # parts of a batch whose gradients are averaged before an update
    config.dtype = "auto"  # of the computation: 'float32', 'bfloat16', or 'auto': bfloat16 on accelerators
    config.xla = "default"  # options of XLA by name, see ssl_jax/engine/xla_options.py
    config.on_nonfinite = "stop"  # or 'skip': leave a step out whose loss or gradient is not finite

    for name in ("total", "evaluate_every", "checkpoint_every"):  # exactly one unit of each (0: only at the end)
        config[f"{name}_steps"] = config_dict.placeholder(int)
        config[f"{name}_epochs"] = config_dict.placeholder(float)
        config[f"{name}_examples"] = config_dict.placeholder(int)
    config.log_every_steps = 10
    config.keep_checkpoints = 2  # the last ones; the best by `best_metric` is kept besides
    config.best_metric = "knn/top1"

    config.data = dict(
        name="scenes",  # 'scenes' (embedded), a TFDS name, a prepared TFDS directory, or a folder of images
        data_dir="",  # of TFDS; '' is $TFDS_DATA_DIR, then TFDS's default
        train_split="train",
        test_split="test",
        ops=(),  # host geometry: () for images of one size, which are cropped on the device
        eval_ops=(),
        workers=0,  # decoding processes; 0 decodes in threads
        image_shape=(),  # filled in from the data, like the two below
        num_classes=config_dict.placeholder(int),
        examples=config_dict.placeholder(int),
    )
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.sharding = ((".*", "fsdp"),)  # (regex, 'fsdp' | 'replicate' | mesh axes per dimension); must cover every parameter
    config.stages = {}  # runs that this one stands on: {name: dict(workdir=..., recipe=...)}
    # Weights of another run to begin with ('': random ones; None: has to be given), and (regex, replacement) on names of leaves.
    config.warm_start = dict(workdir="", rules=((r"^net/encoder/", "net/encoder/"),))
    config.evals = dict(
        knn=dict(kind="knn", k=20, temperature=0.07),
        linear=dict(kind="linear", solver="lbfgs"),
    )
    config.eval_batch_size = 256
    config.references = {}  # {name: {metric: value}} shown beside the results of a run
    config.baselines = ("raw pixels", "untrained")  # evaluated before the first step
    return config


def variant_of(name: str, variants: dict) -> object:
    """`variants[name]`, or one clear line."""
    if name not in variants:
        raise UserError(f"config variant {name!r} does not exist; there are {', '.join(v or '(none: the default)' for v in variants)}")
    return variants[name]


def simclr_views(size: int, strength: float, blur: bool, area=(0.08, 1.0), gray=0.2, style="simclr_v2", sampling="simclr", crop=True):
    """SimCLR's operators in its order (Chen et al. 2020a, appendix A): crop, flip, color jitter, grayscale, blur.

    `strength` scales brightness, contrast, saturation (0.8) and hue (0.2). crop=False: the host has cropped already.
    """
    recipe = [("random_resized_crop", dict(size=size, area=area, sampling=sampling))] if crop else []
    recipe += [
        ("flip", dict(p=0.5)),
        ("color_jitter", dict(brightness=0.8 * strength, contrast=0.8 * strength, saturation=0.8 * strength,
                              hue=0.2 * strength, p=0.8, style=style)),
        ("grayscale", dict(p=gray)),
    ]  # fmt: skip
    if blur:
        recipe.append(("blur", dict(p=0.5, sigma=(0.1, 2.0))))
    return tuple(recipe)


def resized(size: int):
    """Host geometry: the central square of an image at `size` pixels."""
    return (("resize_crop", dict(resize=size, crop=size)),)


def stage(recipe) -> dict:
    """A finished run that this one stands on: its directory, and a step if not the newest."""
    return dict(workdir="", step=config_dict.placeholder(int), recipe=recipe)


def generation(config) -> None:
    """Evaluations of a model that samples: its samples, and its features. Kept is the checkpoint with the nearest samples."""
    config.evals.generation = dict(kind="generation", extractor="random_conv", examples=2048)
    config.evals.judge = dict(kind="discriminator_memorization")
    config.evals.linear.update(dict(l2=(1e-3, 1e-2, 1e-1), iterations=50))
    config.best_metric = "-generation/frechet"
    config.baselines = ("untrained",)
    config.log_every_steps = 50


def generation_smoke(config) -> None:
    """The same on little data."""
    config.data.train_split, config.data.test_split = "train[:512]", "test[:256]"
    config.evals.generation.examples = 128
    config.evals.linear.update(dict(l2=(1e-2,), iterations=20))


IMAGENET_EVAL = (("resize_crop", dict(resize=256, crop=224)),)  # the central 87.5 %
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

"""Shared parts of the configs: the keys with their defaults, small versions for tests, and the views of SimCLR."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections
from ml_collections import config_dict

from ssl_jax.errors import UserError

SCENES_SIZE = 48  # pixels, the embedded dataset


class Variant(NamedTuple):
    """One row of a file's VARIANTS: a recipe and its published facts. `launch.py configs` prints them."""

    name: str  # NAME in --config=configs/FILE.py:NAME; "" is the default
    apply: Callable[[ml_collections.ConfigDict], None]
    about: str  # one line
    hardware: str = ""  # intended, or as published
    time: str = ""  # of a whole run on that hardware, such as "40 min"; "" if unknown
    expected: str = ""  # numbers to compare a run with, as in `source`
    source: str = ""  # of those numbers: a paper, a repository, or "ours" (docs/results)


def make(method: str, variants: Sequence[Variant], name: str) -> ml_collections.ConfigDict:
    """The config of the variant `name`. Raises UserError if there is no such variant."""
    table = {variant.name: variant for variant in variants}
    if name not in table:
        raise UserError(f"config variant {name!r} does not exist; there are {', '.join(v or '(none: the default)' for v in table)}")
    config = base(method)
    table[name].apply(config)
    return config


def base(method: str) -> ml_collections.ConfigDict:
    """Every key that ssl_jax reads for all methods, with values for a small run on the embedded dataset."""
    config = ml_collections.ConfigDict()
    config.method = method
    config.seed = 0
    config.batch_size = 256
    config.accumulate = 1  # parts of a batch; an update averages their gradients
    config.online_probe = 0.0  # learning rate of a linear classifier of detached features, beside the method; 0: none
    config.dtype = "auto"  # of the computation: 'float32', 'bfloat16', or 'auto': bfloat16 on accelerators
    config.convolutions = "auto"  # on CPUs by xla or onednn (requirements-cpu.txt); auto: onednn if installed
    config.xla = "default"  # options of XLA by name, see ssl_jax/engine/xla_options.py
    config.on_nonfinite = "stop"  # or 'skip': skip steps whose loss or gradient is not finite

    # Durations in any unit: "200 steps", "45 epochs", "3M examples".
    config.total = config_dict.placeholder(str)  # required
    config.evaluate_every = "0 steps"  # 0: only at the end
    config.checkpoint_every = "0 steps"
    config.log_every_steps = 10
    config.keep_checkpoints = 2  # newest ones; the best by `best_metric` is kept, too
    config.best_metric = "knn/top1"

    config.data = dict(
        name="scenes",  # 'scenes' (embedded), a TFDS name, a prepared TFDS directory, or a folder of images
        data_dir="",  # of TFDS; '' is $TFDS_DATA_DIR, then TFDS's default
        train_split="train",
        test_split="test",
        bank_split="",  # labeled split for kNN and probes if the train split has no labels; "": the train split
        ops=(),  # host geometry; () for images of one size, which the device crops
        eval_ops=(),
        features={},  # {name in the batch: feature of the dataset}: {'boxes': 'objects/bbox'}; others keep their names
        kinds={},  # {name in the batch: kind} to override the dataset's, see ssl_jax/data/features.py: {'landmarks': 'points'}
        vocabulary={},  # texts that become token ids: {name in the batch: None}; None becomes the number of tokens
        specs={},  # features to rehearse without the data, if no catalog has them: {'motion': ((4,), 'float32')}
        follow_links=False,  # in a folder of images: follow links to folders, and to files out of it
        workers=0,  # decoding processes; 0 decodes in threads
        image_shape=(),  # from the data, as the next two
        num_classes=config_dict.placeholder(int),
        examples=config_dict.placeholder(int),
    )
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.sharding = ((".*", "fsdp"),)  # (regex, 'fsdp' | 'replicate' | mesh axes per dimension); covers every parameter
    config.stages = {}  # finished runs that this one uses: {name: dict(workdir=..., recipe=...)}
    # Initial weights from another run or a file of others ('': random; None: required), and (regex, replacement) for parameter names.
    config.warm_start = dict(workdir="", rules=((r"^net/encoder/", "net/encoder/"),))
    config.evals = dict(
        knn=dict(kind="knn", k=20, temperature=0.07),
        linear=dict(kind="linear", solver="lbfgs"),
    )
    config.eval_batch_size = 256
    config.references = {}  # {name: {metric: value}} shown beside the results
    config.baselines = ("raw pixels", "untrained")  # evaluated behind the first evaluation of the run
    return config


def shrink(config, changes: Mapping[str, Any] | None = None) -> None:
    """Turn any config into a run of seconds on a CPU: 8 steps of 32 images, few images to train and evaluate on.

    The networks stay unchanged; `changes` can make them narrow.

    Args:
        changes: {dotted key: value}, assigned last.
    """
    config.batch_size = 32
    config.total, config.evaluate_every, config.checkpoint_every, config.log_every_steps = "8 steps", "4 steps", "2 steps", 1
    config.data.train_split, config.data.test_split = first(config.data.train_split, 512), first(config.data.test_split, 256)
    config.data.workers = 0
    for optimizer in config.optim.values():
        if "warmup" in optimizer:
            optimizer.warmup = "1 step"
    for evaluation in config.evals.values():
        if evaluation.kind == "linear" and evaluation.get("solver") == "lbfgs":
            evaluation.update(dict(l2=(1e-2,), iterations=20))
        if "examples" in evaluation:
            evaluation.examples = min(evaluation.examples, 128)
    config.update_from_flattened_dict(changes or {})


def first(split: str, count: int) -> str:
    """The first `count` examples of a split: 'train[:512]' of 'train' or of 'train[:10%]'."""
    return re.sub(r"\[.*", "", split) + f"[:{count}]"


def simclr_views(
    size: int, strength: float, blur: bool, area=(0.08, 1.0), gray=0.2, style="simclr_v2", sampling="simclr", crop=True
):
    """SimCLR's operations in its order (Chen et al. 2020a, appendix A): crop, flip, color jitter, grayscale, blur.

    `strength` scales brightness, contrast, saturation (0.8) and hue (0.2). Use crop=False if the host crops.
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


def pretext(config) -> None:
    """A task about views on the embedded scenes: 20 epochs of 64 images, then its own accuracy and a probe of every layer."""
    config.batch_size, config.total = 64, "20 epochs"
    config.optim = dict(net=dict(name="adamw", lr=2e-3, weight_decay=1e-4, warmup="1 epoch"))
    config.evals.linear.update(dict(l2=(1e-3, 1e-2, 1e-1)))
    config.evals.pretext = dict(kind="pretext")
    config.evals.layers = dict(kind="linear_by_layer")  # the last layers belong to the task: watch the middle ones
    config.evaluate_every, config.checkpoint_every = "20 epochs", "2 epochs"


def shrink_pretext(config, changes: Mapping[str, Any] | None = None) -> None:
    """`shrink` for such a task: narrow, smooth at the start, and with a constant rate.

    Answers start at zero, so a rate that falls within eight steps would show nothing.
    """
    config.optim.net.schedule = "constant"
    shrink(config, {
        "model.encoder.width": 0.125,
        "model.encoder.zero_init_residual": True,  # as in configs/simclr.py
        "optim.net.lr": 1e-2,
        "optim.net.warmup": "0.1 epochs",
        **(changes or {}),
    })  # fmt: skip


def pretext_cifar10(config) -> None:
    """The same task on CIFAR-10, 5 epochs."""
    config.data.name = "cifar10"
    config.total = "5 epochs"
    config.evaluate_every, config.checkpoint_every = "5 epochs", "0.5 epochs"
    config.optim.net.warmup = "0.25 epochs"
    config.log_every_steps = 50


def pretext_imagenet(config) -> None:
    """ImageNet for a task about views: evaluated at the end, with probes of every layer by SGD."""
    config.data.name, config.data.test_split = "imagenet2012", "validation"
    config.data.workers = 16
    config.evals = dict(
        layers=dict(kind="linear_by_layer", features=9600, normalization="channel", solver="sgd"),
        pretext=dict(kind="pretext", examples=10_000),
    )
    config.evaluate_every, config.checkpoint_every = "0 steps", "1 epoch"
    config.log_every_steps, config.baselines, config.best_metric = 50, (), ""


def of_two_sizes(config, large, small, count: int) -> None:
    """Multi-crop: two views by the recipe `large`, and `count` by the recipe `small`."""
    del config["views"]  # a table takes the place of a tuple
    config.views = dict(large=(large,) * 2, small=(small,) * count)


def resized(size: int):
    """Host geometry: the central square of an image at `size` pixels."""
    return (("resize_crop", dict(resize=size, crop=size)),)


def stage(recipe) -> dict:
    """A finished run that this one uses: its workdir, and a step if not the newest."""
    return dict(workdir="", step=config_dict.placeholder(int), recipe=recipe)


def backbone(recipe) -> dict:
    """The encoder that a task builds on: a finished run, or a file of weights; with untrained=True its initial weights."""
    return dict(**stage(recipe), weights="", untrained=False)


# Learning rates of a task on a backbone, in parts of `lr`.
SAME = ((".*", 1.0),)
SLOWER_BACKBONE = ((r"^net/backbone/", 0.1), (".*", 1.0))


def generation(config) -> None:
    """Evaluations of samples and features of a generative model. The best checkpoint has the lowest Frechet distance."""
    config.evals.generation = dict(kind="generation", extractor="random_conv", examples=2048)
    config.evals.judge = dict(kind="discriminator_memorization")
    config.evals.linear.update(dict(l2=(1e-3, 1e-2, 1e-1)))
    config.best_metric = "-generation/frechet"
    config.baselines = ("untrained",)
    config.log_every_steps = 50


IMAGENET_EVAL = (("resize_crop", dict(resize=256, crop=224)),)  # the central 87.5 %
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4824, 0.4467), (0.2471, 0.2435, 0.2616)

"""A deep autoencoder pre-trained as a stack of restricted Boltzmann machines (Hinton and Salakhutdinov 2006, Science 313).

  python launch.py train --config=configs/rbm_stack.py --workdir=runs/rbm_stack
  python launch.py configs rbm_stack
"""

import ml_collections

from configs import common
from configs.common import Variant


def stack(config, widths, code, steps, batch, channels):
    """Train each machine for `steps` steps; fine-tuning takes the remaining steps of the run."""
    machines = len(widths) + 1
    config.batch_size = batch
    config.model = dict(
        widths=widths,
        code_size=code,
        channels=channels,
        windows=tuple((k * steps, (k + 1) * steps) for k in range(machines)),
        tuning_start=machines * steps,
    )
    rate = dict(name="sgd", lr=0.1, momentum=0.9, weight_decay=2e-4, schedule="constant")
    config.optim = {f"rbm{k}": dict(rate, lr=0.001 if k == machines else 0.1) for k in range(1, machines + 1)}
    config.optim.net = dict(name="adam", lr=1e-3, schedule="constant")


def scenes(config):
    config.data.ops = config.data.eval_ops = common.resized(32)
    config.views = ((("random_crop", dict(size=32)), ("flip", dict(p=0.5))),)
    config.total = "4000 steps"
    stack(config, (256, 128), 32, steps=500, batch=100, channels=3)
    config.evals.linear.update(dict(l2=(1e-3, 1e-2, 1e-1)))
    config.evals.reconstruction = dict(kind="reconstruction", extractor="none")
    config.evals.reduction = dict(kind="pca_baseline")
    config.best_metric = "-reduction/squared_error"
    config.evaluate_every, config.checkpoint_every, config.log_every_steps = "500 steps", "500 steps", 50


def smoke(config):
    scenes(config)
    config.data.ops = config.data.eval_ops = common.resized(16)
    stack(config, (32,), 8, steps=2, batch=32, channels=3)
    common.shrink(config, {
        "views": ((("random_crop", dict(size=16)),),),
        "model.windows": ((0, 3), (0, 5)),  # tests check every phase in the first steps
        "model.tuning_start": 0,
    })  # fmt: skip


def cifar10_small(config):
    scenes(config)
    config.data.name = "cifar10"
    config.data.ops = config.data.eval_ops = ()
    config.total, config.evaluate_every = "8000 steps", "2000 steps"


def cifar10(config):
    cifar10_small(config)
    stack(config, (2000, 1000, 500), 128, steps=25_000, batch=100, channels=3)
    config.total, config.evaluate_every, config.checkpoint_every = "200_000 steps", "25_000 steps", "5000 steps"


def mnist_t10k(config):
    """Compare with configs/autoencoder.py:mnist_t10k_deep_logistic, the same network from a random start."""
    scenes(config)
    config.data.name, config.data.ops, config.data.eval_ops = "mnist_t10k", (), ()
    config.views = ((("random_crop", dict(size=28)),),)  # the whole image
    stack(config, (1000, 500, 250), 30, steps=800, batch=100, channels=1)
    config.total = "4800 steps"  # 4 x 800 for the machines and 1600
    config.evaluate_every, config.checkpoint_every, config.log_every_steps = "800 steps", "400 steps", 20


def mnist(config):
    """Rate 0.1, 0.001 for the normal code; decay 2e-4.

    In the paper momentum is 0.5 in the first five epochs, and tuning is by conjugate gradients. Here it is always 0.9, and by Adam.
    """
    mnist_t10k(config)
    config.data.name = "mnist"
    stack(config, (1000, 500, 250), 30, steps=30_000, batch=100, channels=1)
    config.total = "240_000 steps"  # 4 x 30,000 for the machines and 120,000
    config.evaluate_every, config.checkpoint_every, config.log_every_steps = "30_000 steps", "3000 steps", 100


VARIANTS = (
    Variant("", scenes, "embedded scenes at 32 pixels in color: 3072-256-128-32", hardware="2 CPU cores"),
    Variant("smoke", smoke, "two machines in seconds, for tests, which train at the same time"),
    Variant("cifar10_small", cifar10_small, "JPEG CIFAR-10, the networks of the default", hardware="2 CPU cores"),
    Variant("cifar10", cifar10, "CIFAR-10, 3072-2000-1000-500-128",
            hardware="1 accelerator", expected="no figure was published"),
    Variant("mnist_t10k", mnist_t10k,
            "8,000 digits: 784-1000-500-250-30, 10 epochs for each machine and 20 together",
            hardware="2 CPU cores", expected="squared error of an image 8.91 (PCA 14.03)", source="ours, 1 seed"),
    Variant("mnist", mnist, "the paper's: 50 epochs for each machine, 200 together",
            hardware="1 accelerator", expected="squared error of an image 3.00, 13.87 for 30 principal components",
            source="Hinton and Salakhutdinov 2006"),
)  # fmt: skip


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    return common.make("rbm_stack", VARIANTS, variant)

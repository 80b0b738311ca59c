"""A deep autoencoder pre-trained as a stack of restricted Boltzmann machines (Hinton and Salakhutdinov 2006, Science 313).

  python launch.py train --config=configs/rbm_stack.py --workdir=runs/rbm_stack

Variants (published figures are quoted from their source; ours are in docs/results.md):
  (default)      embedded scenes at 32 pixels in color: 3072-256-128-32
  :smoke         two machines in seconds, for tests: they do not wait for each other
  :cifar10_small JPEG CIFAR-10, the networks of the default
  :cifar10       CIFAR-10, 3072-2000-1000-500-128. No figure was published
  :mnist_t10k    8,000 digits: 784-1000-500-250-30, 10 epochs for each machine and 20 together, to be held against
                 configs/autoencoder.py:mnist_t10k_deep_logistic, the same network from a random start
  :mnist         the paper's: 50 epochs for each machine (rate 0.1, 0.001 for the normal code; decay 2e-4), 200 together. Published:
                 squared error of an image 3.00, 13.87 for 30 principal components. There momentum is 0.5 in the first five epochs
                 and tuning is by conjugate gradients; here it is 0.9 throughout, and tuning is by Adam
"""

import ml_collections

from configs import common


def stack(config, widths, code, each, batch, channels):
    """`each`: steps of a machine; the whole is tuned in what is left."""
    machines = len(widths) + 1
    config.batch_size = batch
    config.model = dict(
        widths=widths,
        code_size=code,
        channels=channels,
        windows=tuple((k * each, (k + 1) * each) for k in range(machines)),
        tuning_start=machines * each,
    )
    rate = dict(name="sgd", lr=0.1, momentum=0.9, weight_decay=2e-4, schedule="constant")
    config.optim = {f"rbm{k}": dict(rate, lr=0.001 if k == machines else 0.1) for k in range(1, machines + 1)}
    config.optim.net = dict(name="adam", lr=1e-3, schedule="constant")


def scenes(config):
    config.data.ops = config.data.eval_ops = common.resized(32)
    config.views = ((("random_crop", dict(size=32)), ("flip", dict(p=0.5))),)
    config.total_steps = 4000
    stack(config, (256, 128), 32, each=500, batch=100, channels=3)
    config.evals.linear.update(dict(l2=(1e-3, 1e-2, 1e-1), iterations=50))
    config.evals.reconstruction = dict(kind="reconstruction", extractor="none")
    config.evals.reduction = dict(kind="pca_baseline")
    config.best_metric = "-reduction/squared_error"
    config.evaluate_every_steps, config.checkpoint_every_steps, config.log_every_steps = 500, 500, 50


def smoke(config):
    scenes(config)
    config.total_steps, config.evaluate_every_steps, config.checkpoint_every_steps = 8, 4, 2
    config.log_every_steps = 1
    config.data.ops = config.data.eval_ops = common.resized(16)
    config.views = ((("random_crop", dict(size=16)),),)
    config.data.train_split, config.data.test_split = "train[:512]", "test[:256]"
    stack(config, (32,), 8, each=2, batch=32, channels=3)
    config.model.update(dict(windows=((0, 3), (0, 5)), tuning_start=0))  # the tests look at every phase in the first steps
    config.evals.linear.update(dict(l2=(1e-2,), iterations=20))


def cifar10_small(config):
    scenes(config)
    config.data.name = "cifar10"
    config.data.ops = config.data.eval_ops = ()
    config.total_steps, config.evaluate_every_steps = 8000, 2000


def cifar10(config):
    cifar10_small(config)
    stack(config, (2000, 1000, 500), 128, each=25_000, batch=100, channels=3)
    config.total_steps, config.evaluate_every_steps, config.checkpoint_every_steps = 200_000, 25_000, 5000


def mnist_t10k(config):
    scenes(config)
    config.data.name, config.data.ops, config.data.eval_ops = "mnist_t10k", (), ()
    config.views = ((("random_crop", dict(size=28)),),)  # all of it
    stack(config, (1000, 500, 250), 30, each=800, batch=100, channels=1)
    config.total_steps = 4 * 800 + 1600
    config.evaluate_every_steps, config.checkpoint_every_steps, config.log_every_steps = 800, 400, 20


def mnist(config):
    mnist_t10k(config)
    config.data.name = "mnist"
    stack(config, (1000, 500, 250), 30, each=30_000, batch=100, channels=1)
    config.total_steps = 4 * 30_000 + 120_000
    config.evaluate_every_steps, config.checkpoint_every_steps, config.log_every_steps = 30_000, 3000, 100


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    config = common.base("rbm_stack")
    named = {"": scenes, "smoke": smoke, "cifar10_small": cifar10_small, "cifar10": cifar10, "mnist_t10k": mnist_t10k,
             "mnist": mnist}  # fmt: skip
    common.variant_of(variant, named)(config)
    return config

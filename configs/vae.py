"""Variational autoencoders (Kingma and Welling 2014, arXiv:1312.6114), importance weighted ones (Burda et al. 2016, arXiv:1509.00519),
beta-VAE (Higgins et al. 2017).

  python launch.py train --config=configs/vae.py --workdir=runs/vae
  python launch.py sample --workdir=runs/vae

Variants (published figures are quoted from their source; ours are in docs/results.md):
  (default)          embedded scenes at 32 pixels: convolutions, 64 latents, discretized logistic pixels
  :smoke             the same in seconds, for tests
  :scenes_beta       embedded scenes: 10 latents, beta 4, cross-entropy; does a latent stand for one factor of the scene?
  :cifar10_small     JPEG CIFAR-10, the networks of the default
  :cifar10           CIFAR-10, wider, 256 latents, 200 epochs on one accelerator. Published with such networks: 4.51 bits per dimension
                     (van den Oord et al. 2017, arXiv:1711.00937, table in section 4.1)
  :cifar10_gaussian  the same with Gaussian pixels, 0.1 free nats a latent and 20 epochs in which the KL's weight rises
  :mnist_t10k        8,000 digits (--config.data.name=mnist for all): 784-500-20, tanh, binarized anew at each draw, 60 epochs
  :mnist_t10k_iwae   the same with the importance bound of 5 draws
  :mnist_t10k_beta4  the same with beta 4
  :mnist_t10k_2d     the same with two latents, to look at
  :mnist             Kingma and Welling 2014: 784-500-20, tanh, batch 100, here with Adam where the paper has Adagrad
  :mnist_iwae        Burda et al. 2016, one stochastic layer: 784-200-200-50, k = 50, batch 20, 3,280 epochs, the rate falling from 1e-3
                     to 1e-4 (in steps there, smoothly here). Published: 84.78 nats with 5,000 draws (VAE, k = 1: 86.76)
  :beta_vae          Locatello et al. 2019 (arXiv:1811.12359): 64 pixels, 10 latents, beta 4 of {1, 2, 4, 6, 8, 16}, Adam 1e-4, batch
                     64, 300,000 steps; images from a folder (--config.data.name=/path)
"""

import ml_collections

from configs import common


def flipped(size):
    """A window of `size` pixels of what the host gives, half of the time mirrored."""
    return ((("random_crop", dict(size=size)), ("flip", dict(p=0.5))),)


def whole(size):
    return ((("random_crop", dict(size=size)),),)


def adam(lr=1e-3, **options):
    return dict(net=dict(name="adam", lr=lr, **{"schedule": "constant", **options}))


def networks(config, name, widths, latents, likelihood, channels=3, **fields):
    """`fields` are those of encoder and decoder; `widths` are the encoder's, from the image inwards."""
    config.model = dict(
        encoder=dict(name=name, widths=widths, **fields),
        decoder=dict(name=name, widths=widths[::-1], **fields),
        channels=channels,
        latent_size=latents,
        likelihood=likelihood,
        bound="elbo",
        samples=1,
        beta=1.0,
        free_bits=0.0,
        warmup=0,
    )


def colors(config):
    config.data.ops = config.data.eval_ops = common.resized(32)
    config.views = flipped(32)
    config.batch_size = 64
    config.total_steps = 4000
    networks(config, "conv", (32, 64, 64), 64, "discretized_logistic")
    config.optim = adam()
    config.evals.linear.update(dict(l2=(1e-3, 1e-2, 1e-1), iterations=50))
    config.evals.reconstruction = dict(kind="reconstruction", extractor="none")
    config.evals.generation = dict(kind="generation", extractor="random_conv", examples=2048)
    config.evals.likelihood = dict(kind="likelihood", k=32, examples=1000)
    config.best_metric = "-likelihood/bits_per_dimension"
    config.evaluate_every_steps, config.checkpoint_every_steps, config.log_every_steps = 1000, 500, 50


def scenes(config):
    colors(config)
    config.evals.disentanglement = dict(kind="disentanglement", model="lasso")


def improper(config):
    """Cross-entropy of gray values: what the benchmark of disentanglement trains with, and no likelihood."""
    config.model.likelihood = "cross_entropy"
    del config.evals.likelihood
    config.best_metric = "-generation/frechet"


def scenes_beta(config):
    scenes(config)
    config.model.update(dict(latent_size=10, beta=4.0))
    improper(config)


def smoke(config):
    scenes(config)
    config.batch_size = 32
    config.total_steps, config.evaluate_every_steps, config.checkpoint_every_steps = 8, 4, 2
    config.log_every_steps = 1
    config.data.ops = config.data.eval_ops = common.resized(16)
    config.views = flipped(16)
    config.data.train_split, config.data.test_split = "train[:512]", "test[:256]"
    networks(config, "conv", (8, 16), 8, "discretized_logistic", hidden=(32,))
    config.evals.linear.update(dict(l2=(1e-2,), iterations=20))
    config.evals.generation.examples = 128
    config.evals.likelihood.update(dict(k=4, examples=128))


def cifar10_small(config):
    colors(config)
    config.data.name = "cifar10"
    config.data.ops = config.data.eval_ops = ()
    config.total_steps = 8000
    config.evaluate_every_steps = 2000


def cifar10(config):
    cifar10_small(config)
    networks(config, "conv", (128, 256, 512), 256, "discretized_logistic", hidden=(1024,))
    config.batch_size = 128
    config.optim = adam(3e-4, schedule="cosine", warmup_steps=1000)
    config.total_steps, config.total_epochs = None, 200.0
    config.evals.generation.examples = 10_000
    config.evaluate_every_steps, config.checkpoint_every_steps = 10_000, 2000


def cifar10_gaussian(config):
    cifar10(config)
    config.model.update(dict(likelihood="gaussian", free_bits=0.1, warmup=8000))


def mnist_t10k(config):
    config.data.name = "mnist_t10k"
    config.views = whole(28)
    config.batch_size = 100
    config.total_epochs = 60.0
    networks(config, "mlp", (500,), 20, "bernoulli", channels=1, activation="tanh")
    config.optim = adam()
    config.evals.linear.update(dict(l2=(1e-3, 1e-2, 1e-1), iterations=50))
    config.evals.reconstruction = dict(kind="reconstruction", extractor="none")
    config.evals.generation = dict(kind="generation", extractor="random_conv", examples=2000)
    config.evals.likelihood = dict(kind="likelihood", k=500)
    config.best_metric = "-likelihood/bits_per_dimension"
    config.evaluate_every_epochs, config.checkpoint_every_epochs, config.log_every_steps = 20.0, 5.0, 80


def mnist_t10k_iwae(config):
    mnist_t10k(config)
    config.model.update(dict(bound="iwae", samples=5))


def mnist_t10k_beta4(config):
    mnist_t10k(config)
    config.model.beta = 4.0


def mnist_t10k_2d(config):
    mnist_t10k(config)
    config.model.latent_size = 2


def mnist(config):
    mnist_t10k(config)
    config.data.name = "mnist"
    config.total_epochs = 500.0
    config.evaluate_every_epochs = 50.0


def mnist_iwae(config):
    mnist(config)
    networks(config, "mlp", (200, 200), 50, "bernoulli", channels=1, activation="tanh")
    config.model.update(dict(bound="iwae", samples=50))
    config.batch_size = 20
    config.optim = adam(b1=0.99, eps=1e-4, schedule="exponential", end=0.1)
    config.total_epochs, config.evaluate_every_epochs, config.checkpoint_every_epochs = 3280.0, 100.0, 10.0
    config.evals.likelihood.k = 5000


def beta_vae(config):
    colors(config)
    config.data.name = "/path/to/folder"
    config.data.ops = config.data.eval_ops = common.resized(64)
    config.views = whole(64)
    networks(config, "conv", (32, 32, 64, 64), 10, "cross_entropy")
    improper(config)
    config.model.beta = 4.0
    config.optim = adam(1e-4)
    config.total_steps, config.evaluate_every_steps, config.checkpoint_every_steps = 300_000, 20_000, 5000


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    config = common.base("vae")
    named = {"": scenes, "smoke": smoke, "scenes_beta": scenes_beta, "cifar10_small": cifar10_small, "cifar10": cifar10,
             "cifar10_gaussian": cifar10_gaussian, "mnist_t10k": mnist_t10k, "mnist_t10k_iwae": mnist_t10k_iwae,
             "mnist_t10k_beta4": mnist_t10k_beta4, "mnist_t10k_2d": mnist_t10k_2d, "mnist": mnist, "mnist_iwae": mnist_iwae,
             "beta_vae": beta_vae}  # fmt: skip
    common.variant_of(variant, named)(config)
    return config

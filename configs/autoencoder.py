"""Autoencoders: narrow, sparse, convolutional, denoising (Vincent et al. 2010), contractive (Rifai et al. 2011), recurrent.

  python launch.py train --config=configs/autoencoder.py --workdir=runs/autoencoder
  python launch.py configs autoencoder

t10k is 8,000 digits; --config.data.name=mnist has all. "keras" are networks of the tutorial
blog.keras.io/building-autoencoders-in-keras, with Adam in place of its Adadelta. Its losses are means over the 784 pixels. Here
they are sums, so the weight of sparsity is 784 times as large.
"""

import ml_collections

from configs import common
from configs.common import Variant


def flipped(size):
    """A random window of `size` pixels, mirrored half of the time."""
    return ((("random_crop", dict(size=size)), ("flip", dict(p=0.5))),)


def adam(lr=1e-3, **options):
    return dict(net=dict(name="adam", lr=lr, **{"schedule": "constant", **options}))


def networks(config, encoder, decoder, code, loss, channels=3):
    """`code`: (size, activation)."""
    config.model = dict(
        encoder=encoder,
        decoder=decoder,
        channels=channels,
        code=dict(size=code[0], activation=code[1]),
        loss=loss,
        corruption=dict(name="none", level=0.0, emphasis=(1.0, 1.0)),
        sparsity=0.0,
        contraction=0.0,
    )


def convolutions(config, widths, code, hidden=(256,)):
    encoder = dict(name="conv", widths=widths, hidden=hidden)
    networks(config, encoder, dict(encoder, widths=widths[::-1]), code, "squared")


def noise(config, name, level, emphasis=(1.0, 1.0)):
    config.model.corruption = dict(name=name, level=level, emphasis=emphasis)
    if name == "clipped_gaussian":
        config.evals.denoising = dict(kind="denoising", sigma=level)
        config.best_metric = "denoising/psnr"


# ------------------------------------------------------------------------------------------------------- colors


def scenes(config):
    config.data.ops = config.data.eval_ops = common.resized(32)
    config.views = flipped(32)
    config.batch_size = 64
    config.total = "4000 steps"
    convolutions(config, (32, 64, 64), (64, "linear"))
    config.optim = adam()
    config.evals.linear.update(dict(l2=(1e-3, 1e-2, 1e-1)))
    config.evals.reconstruction = dict(kind="reconstruction", extractor="none")
    config.evals.reduction = dict(kind="pca_baseline")
    config.best_metric = "-reduction/squared_error"
    config.evaluate_every, config.checkpoint_every, config.log_every_steps = "1000 steps", "500 steps", 50


def scenes_denoising(config):
    scenes(config)
    noise(config, "clipped_gaussian", 0.3)


def smoke(config):
    scenes(config)
    config.data.ops = config.data.eval_ops = common.resized(16)
    convolutions(config, (8, 16), (6, "sigmoid"), hidden=(32,))
    noise(config, "masking", 0.25, (1.0, 0.5))
    common.shrink(config, {"views": flipped(16), "model.sparsity": 0.01, "model.contraction": 0.01})


def cifar10_small(config):
    scenes(config)
    config.data.name = "cifar10"
    config.data.ops = config.data.eval_ops = ()
    config.total, config.evaluate_every = "8000 steps", "2000 steps"


def cifar10(config):
    cifar10_small(config)
    convolutions(config, (128, 256, 512), (256, "linear"), hidden=(1024,))
    config.batch_size = 128
    config.optim = adam(schedule="cosine", warmup="1000 steps")
    config.total = "200 epochs"
    config.evaluate_every, config.checkpoint_every = "10_000 steps", "2000 steps"


# ------------------------------------------------------------------------------------------------------- digits


def digits(config, epochs, batch, encoder, decoder, code):
    config.data.name = "mnist_t10k"
    config.views = ((("random_crop", dict(size=28)),),)  # the whole image
    config.batch_size = batch
    config.total = f"{epochs} epochs"
    networks(config, encoder, decoder, code, "cross_entropy", channels=1)
    config.optim = adam()
    config.evals.linear.update(dict(l2=(1e-3, 1e-2, 1e-1)))
    config.evals.reconstruction = dict(kind="reconstruction", extractor="none")
    config.evals.reduction = dict(kind="pca_baseline")
    config.best_metric = "-reduction/squared_error"
    config.evaluate_every, config.checkpoint_every, config.log_every_steps = f"{epochs / 4} epochs", "2.5 epochs", 20


def perceptron(config, epochs, batch, widths, code, activation="relu"):
    layers = dict(name="mlp", activation=activation)
    digits(config, epochs, batch, dict(layers, widths=widths), dict(layers, widths=widths[::-1]), code)


def mnist_t10k_deep(config):
    perceptron(config, 20.0, 100, (1000, 500, 250), (30, "linear"))


def mnist_t10k_deep_logistic(config):
    perceptron(config, 20.0, 100, (1000, 500, 250), (30, "linear"), activation="sigmoid")


def mnist_t10k_keras_simple(config):
    perceptron(config, 50.0, 256, (), (32, "relu"))


def mnist_t10k_keras_sparse(config):
    mnist_t10k_keras_simple(config)
    config.total = "100 epochs"
    config.model.sparsity = 784 * 1e-4


def mnist_t10k_keras_deep(config):
    perceptron(config, 100.0, 256, (128, 64), (32, "relu"))


def mnist_t10k_keras_conv(config):
    digits(
        config, 50.0, 128,
        dict(name="pooled", widths=(16, 8, 8)),
        dict(name="pooled", widths=(8, 8, 16), valid=(3,)),
        (4 * 4 * 8, "linear"),
    )  # fmt: skip


def mnist_t10k_keras_denoising(config):
    digits(config, 100.0, 128, dict(name="pooled", widths=(32, 32)), dict(name="pooled", widths=(32, 32)), (7 * 7 * 32, "linear"))
    del config.evals.reduction  # the code has more numbers than the image
    noise(config, "clipped_gaussian", 0.5)


def mnist_t10k_keras_recurrent(config):
    digits(config, 50.0, 128, dict(name="recurrent"), dict(name="recurrent", width=128), (32, "linear"))


def mnist_t10k_denoising(config):
    perceptron(config, 30.0, 100, (), (500, "relu"))
    noise(config, "clipped_gaussian", 0.5)


def mnist_denoising(config):
    perceptron(config, 100.0, 20, (), (1000, "sigmoid"))
    config.data.name = "mnist"
    del config.evals.reduction
    noise(config, "masking", 0.25)
    config.best_metric = "linear/top1"
    config.optim = dict(net=dict(name="sgd", lr=0.01, momentum=0.0, schedule="constant"))


def mnist_t10k_contractive(config):
    digits(config, 50.0, 100, dict(name="mlp", widths=()), dict(name="tied"), (256, "sigmoid"))
    config.model.contraction = 0.1


def mnist_t10k_contractive_deep(config):
    mnist_t10k_deep(config)
    config.model.contraction = 0.1


VARIANTS = (
    Variant("", scenes, "embedded scenes at 32 pixels: convolutions to 64 numbers", hardware="2 CPU cores"),
    Variant("smoke", smoke, "every penalty at once in seconds, for tests"),
    Variant("scenes_denoising", scenes_denoising, "the default as a denoiser, of noise of deviation 0.3",
            hardware="2 CPU cores"),
    Variant("cifar10_small", cifar10_small, "JPEG CIFAR-10, the networks of the default", hardware="2 CPU cores"),
    Variant("cifar10", cifar10, "CIFAR-10, wider, 256 numbers, 200 epochs",
            hardware="1 accelerator", expected="no figure was published"),
    Variant("mnist_t10k_deep", mnist_t10k_deep, "784-1000-500-250-30 with ReLU and Adam from a random start",
            hardware="2 CPU cores",
            expected="squared error 8.33, 8.30, 8.63 (PCA 14.03); published for their pre-training "
            "(configs/rbm_stack.py): 3.00 (PCA 13.87)", source="ours, 3 seeds; Hinton and Salakhutdinov 2006"),
    Variant("mnist_t10k_deep_logistic", mnist_t10k_deep_logistic,
            "the same with logistic units, which hardly train from a random start",
            hardware="2 CPU cores", expected="squared error 29.54 (PCA 14.03)", source="ours, 1 seed"),
    Variant("mnist_t10k_keras_simple", mnist_t10k_keras_simple, "784-32-784", hardware="2 CPU cores"),
    Variant("mnist_t10k_keras_sparse", mnist_t10k_keras_sparse,
            "the same with an L1 penalty of 1e-4 (a hundred times as much makes all codes zero)",
            hardware="2 CPU cores"),
    Variant("mnist_t10k_keras_deep", mnist_t10k_keras_deep, "784-128-64-32 and back", hardware="2 CPU cores"),
    Variant("mnist_t10k_keras_conv", mnist_t10k_keras_conv, "three convolutions with pooling to 4 x 4 x 8",
            hardware="2 CPU cores"),
    Variant("mnist_t10k_keras_denoising", mnist_t10k_keras_denoising,
            "two convolutions to 7 x 7 x 32, a denoiser of noise of deviation 0.5 clipped to 0 and 1",
            hardware="2 CPU cores"),
    Variant("mnist_t10k_keras_recurrent", mnist_t10k_keras_recurrent,
            "an LSTM that reads rows and one that writes them (the tutorial has a sketch of it)",
            hardware="2 CPU cores"),
    Variant("mnist_t10k_denoising", mnist_t10k_denoising, "784-500-784, a denoiser of the same noise",
            hardware="2 CPU cores",
            expected="PSNR 18.74, 18.72, 18.66 dB (noisy 9.41, PCA 16.16, best linear filter 17.72)",
            source="ours, 3 seeds"),
    Variant("mnist_denoising", mnist_denoising,
            "Vincent et al. 2010: 784-1000-784, logistic units, a quarter of the pixels masked, SGD; all digits",
            hardware="2 CPU cores"),
    Variant("mnist_t10k_contractive", mnist_t10k_contractive,
            "784-256-784, tied weights, logistic units, contraction 0.1",
            hardware="2 CPU cores"),
    Variant("mnist_t10k_contractive_deep", mnist_t10k_contractive_deep,
            "the deep one with the Jacobian of all layers: a backward pass for each number of the code",
            hardware="2 CPU cores"),
)  # fmt: skip


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    return common.make("autoencoder", VARIANTS, variant)

"""Products that the code calls float32 are float32 on accelerators too: programs are lowered for them on a CPU, and their text read.

By default an accelerator multiplies float32 numbers as TF32 (CUDA) or in one bfloat16 pass (TPU).
"""

import pathlib
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from ssl_jax.engine.health import spectral_norms
from ssl_jax.evals.kinds import knn, perceptual_path
from ssl_jax.evals.lib import linear_probe, logistic, rejection, second_moments
from ssl_jax.evals.lib.resize import resize
from ssl_jax.experiment import config as configs
from ssl_jax.experiment.abstract import build_abstract
from ssl_jax.methods.stylegan import generator_functions, style_sampler
from ssl_jax.models import heads
from ssl_jax.models.gan import spectral, stylegan, stylegan1
from ssl_jax.models.pretrained import vgg
from ssl_jax.objectives import autoencoding, boltzmann, contrastive, quantizers
from ssl_jax.objectives.perceptual import random_kernels

ROOT = pathlib.Path(__file__).parent.parent
NAMES = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem not in ("__init__", "common"))
PLATFORMS = ("cuda", "tpu")


def products(text, allowed=("HIGHEST",)):
    """(number of float32 products in StableHLO text, lines of those whose precision is not `allowed`)."""
    found = [line for line in text.splitlines() if re.search(r"stablehlo\.(dot_general|convolution)\b", line)]
    found = [line for line in found if re.search(r": \(tensor<[^>]*xf32>, tensor<[^>]*xf32>\) ->", line)]
    precision = [re.findall(r"\b(?:DEFAULT|HIGH|HIGHEST)\b", line) for line in found]
    return len(found), [line for line, names in zip(found, precision, strict=True) if not names or set(names) - set(allowed)]


def lowered(function, *args, **static):
    """The StableHLO text of `function` for each accelerator; `args` are arrays or shapes."""
    jitted = function if hasattr(function, "trace") else jax.jit(function)
    traced = jitted.trace(*args, **static)
    return [traced.lower(lowering_platforms=(platform,)).as_text() for platform in PLATFORMS]


def floats(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def ints(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def gradient(function, *args):
    """(function, arguments): value and gradients of the sum of all outputs with respect to all arguments of floats."""

    def total(*args):
        return sum(jnp.sum(x) for x in jax.tree.leaves(function(*args)) if jnp.issubdtype(x.dtype, jnp.floating))

    places = [i for i, x in enumerate(args) if jax.tree.all(jax.tree.map(lambda a: jnp.issubdtype(a.dtype, jnp.floating), x))]
    return jax.value_and_grad(total, places), *args


def module(module, *args, train=None):
    """`gradient` of a Flax module with respect to parameters and inputs; its state is fixed."""
    options = {} if train is None else {"train": train}
    variables = jax.eval_shape(lambda key, *args: module.init(key, *args, **options), jax.random.key(0), *args)
    params, state = variables.pop("params"), variables

    def call(params, state, *args):
        out, _ = module.apply({"params": params, **state}, *args, mutable=list(state), **options)
        return out

    return gradient(call, params, state, *args)


def path(generator, space):
    """The images of a perceptual path of a network that trains in bfloat16."""
    model = types.SimpleNamespace(latent=types.SimpleNamespace(size=8), mixing=0.0)
    net, exact = (generator_functions(x, model, 0) for x in (generator, generator.clone(dtype="float32")))
    sampler = style_sampler(net, exact, 2)
    latents = jax.eval_shape(lambda key: net.latents(key, 2), jax.random.key(0))
    params = jax.eval_shape(lambda key: generator.init(key, jnp.zeros((2, 8)), train=False), jax.random.key(0))["params"]
    return sampler.between[space], {"params": params, "w_average": floats(8)}, latents, latents, floats(2)


def machine(v=6, h=4):
    return {"kernel": floats(v, h), "hidden_bias": floats(h), "visible_bias": floats(v)}


def by_views(loss, way):
    return gradient(lambda z: contrastive.loss_of_views(loss, 0.1, way)(z)[0], floats(8, 2, 4))


ONE = Mesh(np.asarray(jax.devices()[:1]), ("shard",))
SMALL = dict(size=8, channel_base=64, channel_max=8, features=8, mapping_layers=2, dtype="bfloat16")
WEIGHTS = {name: floats(*shape) for name, shape in vgg.shapes().items()}
SEARCH = floats(1, 8, 3), ints(1, 8, 3), floats(32, 4), floats(8, 4), ints(2)
CASES = {
    "path of StyleGAN2 in w": lambda: path(stylegan.StyleGAN2(**SMALL), "w"),
    "path of StyleGAN2 in z": lambda: path(stylegan.StyleGAN2(**SMALL), "z"),
    "path of StyleGAN": lambda: path(stylegan1.StyleGAN1(**SMALL), "w"),
    "distance of lpips": lambda: (
        lambda w, a, b: perceptual_path._distances(perceptual_path._lpips, False, w, a, b), WEIGHTS,
        floats(2, 16, 16, 3), floats(2, 16, 16, 3),
    ),
    "distance of random convolutions": lambda: (
        lambda w, a, b: perceptual_path._distances(perceptual_path._random, False, w, a, b), dict(enumerate(random_kernels())),
        floats(2, 16, 16, 3), floats(2, 16, 16, 3),
    ),
    "vgg": lambda: gradient(vgg.features, WEIGHTS, floats(2, 16, 16, 3)),
    "power iteration": lambda: gradient(spectral.power_step, floats(3, 3, 4, 8), floats(8)),
    "spectral layer of float32 scores": lambda: module(spectral.SpectralDense(4), floats(2, 8), train=True),
    "spectral layers in bfloat16": lambda: module(
        spectral.SpectralConv(8, dtype="bfloat16"), floats(2, 8, 8, 3), train=True
    ),
    "spectral norms of the log": lambda: (spectral_norms, {"encoder": {"kernel": floats(3, 3, 4, 8)}}),
    "discriminator of StyleGAN2": lambda: module(
        stylegan.StyleGAN2Discriminator(8, 64, 8, dtype="bfloat16"), floats(4, 8, 8, 3), train=True
    ),
    "discriminator of StyleGAN": lambda: module(
        stylegan1.StyleGAN1Discriminator(8, 64, 8, dtype="bfloat16"), floats(4, 8, 8, 3), train=True
    ),
    "linear classifier": lambda: module(heads.LinearHead(10), floats(4, 8)),
    **{f"{loss} {way}": (lambda loss=loss, way=way: by_views(loss, way))
       for loss, way in (("nt_xent", "dense"), ("nt_xent", "chunked"), ("moco", "dense"), ("clip", "dense"))},
    "info_nce of patches": lambda: gradient(
        lambda x, z: contrastive.patch_info_nce(x, z)[0], floats(2, 2, 3, 4), floats(2, 3, 3, 4)
    ),
    "kNN": lambda: (lambda *args: knn._search(*args, metric="cosine", group=1, mesh=ONE), *SEARCH),
    "linear probe": lambda: (
        lambda *args: logistic.losses_and_grads(*args, mesh=ONE),
        floats(8, 4), ints(8), floats(8), floats(3, 4), floats(3),
    ),
    "ridge": lambda: (
        lambda *args: second_moments._chunk_sums(*args, mesh=ONE), floats(8, 4), floats(8, 3), floats(8), floats(4), floats(4)
    ),
    "rejection": lambda: (
        rejection.log_odds, linear_probe.Probe(floats(4, 1, 3), floats(1, 3), floats(4), floats(4)), floats(8, 4), ints(8)
    ),
    "resize for Inception": lambda: (lambda x: resize(x, (16, 16), "legacy"), floats(2, 8, 8, 3)),
    "nearest code": lambda: (quantizers.nearest, floats(8, 4), floats(16, 4)),
    "look-up of codes": lambda: gradient(quantizers.rows, floats(16, 4), ints(8)),
    "entropy of codes": lambda: gradient(lambda z, codes: quantizers.entropy_loss(z, codes, 0.1), floats(8, 4), floats(16, 4)),
    "Boltzmann machine": lambda: gradient(
        lambda m, v: boltzmann.contrastive_divergence(m, v, jax.random.key(0)), machine(), floats(2, 6)
    ),
    "contraction": lambda: gradient(autoencoding.contraction_of_sigmoid, floats(2, 4), floats(6, 4)),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_float32_products_have_full_precision_on_accelerators(case):
    for text in lowered(*CASES[case]()):
        count, below = products(text)
        assert count, "the program has no float32 product: the test reads nothing"
        assert not below, "\n".join(below)


def test_products_of_the_default_precision_are_found():
    (text, _) = lowered(lambda a, b: (a @ b, jnp.matmul(a, b, precision="highest")), floats(4, 4), floats(4, 4))
    assert [products(text)[0], len(products(text)[1])] == [2, 1]
    count, below = products(lowered(lambda x, k: stylegan.convolve(x, k), floats(2, 8, 8, 3), floats(3, 3, 3, 4))[1])
    assert count == len(below) == 1


def test_convolutions_of_a_training_loss_keep_the_fast_default():
    for text in lowered(lambda w, x: vgg.features(w, x, precision=None), WEIGHTS, floats(2, 16, 16, 3)):
        count, below = products(text)
        assert count == len(below) == 13


# The orthogonal penalty multiplies large kernels for a small weight (see `adversarial.orthogonality`).
WITHOUT = {"biggan": ("--config.model.orthogonal=0.0",)}


@pytest.mark.full
@pytest.mark.parametrize("recipe", NAMES)
def test_float32_products_of_a_bfloat16_step_have_full_precision(recipe):
    """A product of float32 numbers in such a step is one that the code keeps in float32. Resampling of images needs HIGH only."""
    overrides = ("--config.batch_size=32", "--config.dtype=bfloat16", *WITHOUT.get(recipe, ()))
    config = configs.load(f"{ROOT}/configs/{recipe}.py:smoke", overrides)
    exp = build_abstract(config, jax.devices()[:1], "tpu")
    traced = exp.run.trace(exp.run.abstract, exp.example, exp.run.root)
    _, below = products(traced.lower(lowering_platforms=("tpu",)).as_text(), ("HIGHEST", "HIGH"))
    assert not below, "\n".join(below)

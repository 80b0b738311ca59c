"""Denoising: reconstructions of noisy images against the noisy images, a projection on principal components and the best linear filter.

Vincent et al. 2010 (JMLR 11). Normal noise. For normal data the best filter of all is linear, Sigma (Sigma + sigma^2 I)^-1; what a
network gains beyond it, it has learned of the structure of images.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax.errors import UserError
from ssl_jax.evals.context import Context, Result
from ssl_jax.evals.evaluator import SEED, Evaluator, Option
from ssl_jax.evals.lib import linear_maps
from ssl_jax.evals.lib.features import side_by_side
from ssl_jax.evals.lib.quality import psnr


def prepare(context: Context, **_) -> None:
    """UserError for pictures that are too large for linear filters, or smaller than the images."""
    size, given = linear_maps.picture_size(context), context.images().shape[1:3]
    if size != given:
        raise UserError(f"denoising needs reconstructions of the size of images, {given}, and they are {size}; change data.eval_ops")


def evaluate(
    context: Context, *, sigma: float = 0.5, clip: bool = True, components: int = 50, examples: int = 1000, seed: int = 0
) -> Result:
    """The first `examples` test images with noise of deviation `sigma`, cut off at 0 and 1 if `clip`; gray images get gray noise.

    psnr: of reconstructions of noisy images to the clean ones, in dB, mean over images.
    gain: over psnr_noisy, that of the noisy images themselves.
    gain_pca: over psnr_pca, of the noisy images, less their mean, projected on so many principal `components` of training images.
    gain_linear: over psnr_linear, of the affine filter with the least mean squared error on training images.
    What comes out of linear maps is cut off at 0 and 1, too.
    """
    size = linear_maps.picture_size(context)
    basis = linear_maps.known_components(context, size, components)
    linear = linear_maps.learned(
        context, size, ("filter", sigma, clip), lambda x: linear_maps.best_filter(x, sigma, clip)
    )

    def encode(images, key):
        clean = linear_maps.at_size(images, size)
        noisy = add_noise(clean, key, sigma, clip, linear.channels)
        return {"all": side_by_side(clean, noisy, context.pictures.fns.reconstruct(noisy))}

    rows = context.through(context.keyed(encode, seed), "test", "all", examples).x
    clean, noisy, again = np.split(rows, 3, axis=1)
    plain, seen = (x.reshape(len(x), -1, 3)[..., : linear.channels].reshape(len(x), -1) for x in (clean, noisy))
    projection = basis.linear._replace(before=linear.linear.before)  # cutting off moves the mean
    others = {"noisy": seen, "pca": projection(seen).clip(0, 1), "linear": linear.linear(seen).clip(0, 1)}
    values = {f"psnr_{name}": psnr(plain, x).mean() for name, x in others.items()}
    values["psnr"] = psnr(clean, again).mean()
    gains = {"gain": "noisy", "gain_pca": "pca", "gain_linear": "linear"}
    metrics = values | {name: values["psnr"] - values[f"psnr_{other}"] for name, other in gains.items()}
    protocol = (
        f"denoising sigma={sigma:g} {'cut off at 0 and 1' if clip else 'not cut off'} seed={seed}"
        f" first of {context.named('test', len(clean))} pixels={size[0]}x{size[1]}x{linear.channels} in [0, 1];"
        f" {components} principal components and affine filter of {context.named('train', linear.count)}"
    )
    return Result({name: float(value) for name, value in metrics.items()}, protocol)


EVALUATOR = Evaluator(
    evaluate,
    {
        "sigma": Option("deviation of the noise; images are in [0, 1]", above=0),
        "clip": Option("cut off noisy images at 0 and 1"),
        "components": Option("principal components of training images that noisy images are projected on", least=1),
        "examples": Option("the first so many test images", least=1),
        "seed": SEED,
    },
    needs=("reconstruct",),
    prepare=prepare,
)


@functools.partial(jax.jit, static_argnames=("sigma", "clip", "channels"))
def add_noise(images: jax.Array, key: jax.Array, sigma: float, clip: bool, channels: int) -> jax.Array:
    """images [B, H, W, 3] + sigma * normal noise; with one channel all colors get the same."""
    noisy = images + sigma * jax.random.normal(key, (*images.shape[:3], channels))
    return jnp.clip(noisy, 0, 1) if clip else noisy

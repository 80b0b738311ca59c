"""Denoising: PSNR of reconstructed noisy images against the noisy images, a PCA projection and the best linear filter.

Vincent et al. 2010 (JMLR 11), with normal noise. For normal data the best filter is linear, Sigma (Sigma + sigma^2 I)^-1. A
gain over it shows that the network has learned more than the covariance of pixels.
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
    """Raises UserError if reconstructions are too large for linear filters, or differ from the images in size."""
    size, given = linear_maps.picture_size(context), context.images().shape[1:3]
    if size != given:
        raise UserError(
            f"denoising needs reconstructions of the size of images, {given}, and they are {size}; change data.eval_ops"
        )


def evaluate(
    context: Context, *, sigma: float = 0.5, clip: bool = True, components: int = 50, examples: int = 1000, seed: int = 0
) -> Result:
    """The first `examples` test images with noise of standard deviation `sigma`, clipped to [0, 1] if `clip`.

    Gray images get gray noise. The outputs of PCA and of the filter are clipped to [0, 1]. PSNR is in dB, a mean over images.

    psnr: PSNR of the reconstructions of noisy images against the clean images.
    gain: psnr - psnr_noisy, where psnr_noisy is the PSNR of the noisy images.
    gain_pca: psnr - psnr_pca, where psnr_pca is the PSNR of noisy images projected on `components` principal components.
    gain_linear: psnr - psnr_linear, where psnr_linear is the PSNR of the affine filter with the least squared error in training.
    """
    size = linear_maps.picture_size(context)
    basis = linear_maps.principal_components(context, size, components)
    linear = linear_maps.fit_once(
        context, size, ("filter", sigma, clip), lambda x: linear_maps.best_filter(x, sigma, clip)
    )

    def encode(images, key):
        clean = linear_maps.at_size(images, size)
        noisy = add_noise(clean, key, sigma, clip, linear.channels)
        return {"all": side_by_side(clean, noisy, context.model.fns.reconstruct(noisy))}

    rows = context.encode_with(context.with_batch_keys(encode, seed), "test", "all", examples).x
    clean, noisy, reconstructed = np.split(rows, 3, axis=1)
    plain, seen = (x.reshape(len(x), -1, 3)[..., : linear.channels].reshape(len(x), -1) for x in (clean, noisy))
    projection = basis.linear._replace(before=linear.linear.before)  # clipping shifts the mean of noisy images
    others = {"noisy": seen, "pca": projection(seen).clip(0, 1), "linear": linear.linear(seen).clip(0, 1)}
    values = {f"psnr_{name}": psnr(plain, x).mean() for name, x in others.items()}
    values["psnr"] = psnr(clean, reconstructed).mean()
    gains = {"gain": "noisy", "gain_pca": "pca", "gain_linear": "linear"}
    metrics = values | {name: values["psnr"] - values[f"psnr_{other}"] for name, other in gains.items()}
    protocol = (
        f"denoising sigma={sigma:g} {'cut off at 0 and 1' if clip else 'not cut off'} seed={seed}"
        f" first of {context.name('test', len(clean))} pixels={size[0]}x{size[1]}x{linear.channels} in [0, 1];"
        f" {components} principal components and affine filter of {context.name('train', linear.count)}"
    )
    return Result({name: float(value) for name, value in metrics.items()}, protocol)


EVALUATOR = Evaluator(
    evaluate,
    {
        "sigma": Option("standard deviation of the noise; images are in [0, 1]", above=0),
        "clip": Option("clip noisy images to [0, 1]"),
        "components": Option("number of principal components of training images", least=1),
        "examples": Option("number of test images, the first ones", least=1),
        "seed": SEED,
    },
    needs=("reconstruct",),
    prepare=prepare,
)


@functools.partial(jax.jit, static_argnames=("sigma", "clip", "channels"))
def add_noise(images: jax.Array, key: jax.Array, sigma: float, clip: bool, channels: int) -> jax.Array:
    """images [B, H, W, 3] + sigma * normal noise; with channels=1 all colors share the noise."""
    noisy = images + sigma * jax.random.normal(key, (*images.shape[:3], channels))
    return jnp.clip(noisy, 0, 1) if clip else noisy

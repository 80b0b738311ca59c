"""Inpainting: the removed pixels as the model paints them, beside two fillings that understand nothing of the image.

Pathak et al. 2016 (arXiv:1604.07379, section 5.1) report the mean error and PSNR of the hole. A harmonic filling is the smooth
continuation of the border, the solution of Laplace's equation: a network that is worse has learned less than that.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax.engine.pictures import grid
from ssl_jax.evals.context import Context, Result
from ssl_jax.evals.evaluator import Evaluator, Option
from ssl_jax.evals.lib.features import side_by_side
from ssl_jax.evals.lib.linear_maps import at_size

ITERATIONS = 1000  # of the harmonic filling
SHOWN = 10  # images of the picture


def evaluate(context: Context, *, examples: int = 1024) -> Result:
    """The first `examples` test images; errors of removed pixels in [0, 1], channels apart, mean over images with a hole.

    l1, mse: mean absolute and squared error; psnr: -10 log10 of mse, in dB.
    mse_harmonic, psnr_harmonic: of the smooth continuation of the border.
    mse_mean, psnr_mean: of the mean color of the pixels that are left.
    """
    shape = []

    def rows(images):
        found = context.model.fns.inpaint(images)
        shape[:] = found["pictures"].shape[1:]
        true, hole = at_size(images, tuple(shape[:2])), jnp.broadcast_to(found["removed"], found["pictures"].shape[:3])
        return {"rows": side_by_side(true, found["pictures"], harmonic(true, hole), of_one_color(true, hole), hole.astype(jnp.float32))}

    found = context.encode_with(rows, "test", "rows", examples).x
    size = int(np.prod(shape))
    *pictures, holes = np.split(found, [size, 2 * size, 3 * size, 4 * size], axis=1)
    true, *filled = (x.reshape(-1, *shape) for x in pictures)
    holes = holes.reshape(-1, *shape[:2]) > 0
    there = holes.any((1, 2))
    metrics = {}
    for suffix, x in zip(("", "_harmonic", "_mean"), filled, strict=True):
        error = [(y - t)[hole] for y, t, hole in zip(x[there], true[there], holes[there], strict=True)]
        mse = np.mean([np.mean(e.astype(np.float64) ** 2) for e in error])
        metrics |= {f"mse{suffix}": mse, f"psnr{suffix}": -10 * np.log10(mse)}
        if not suffix:
            metrics["l1"] = np.mean([np.abs(e).mean() for e in error])
    protocol = f"inpainting of {100 * holes.mean():.1f} % of the pixels, first of {context.name('test', len(true))}, pixels in [0, 1]"
    shown = np.stack([np.where(holes[..., None], 0.5, true), *filled[:2], true])[:, :SHOWN]
    return Result({name: float(value) for name, value in metrics.items()}, protocol, grid(shown))


EVALUATOR = Evaluator(evaluate, {"examples": Option("number of test images, the first ones", least=1)}, needs=("inpaint",))


def of_one_color(images: jax.Array, holes: jax.Array) -> jax.Array:
    """Images [B, H, W, 3] whose holes, bool [B, H, W], have the mean color of the other pixels of the image."""
    left = 1.0 - holes[..., None]
    color = jnp.sum(images * left, (1, 2), keepdims=True) / jnp.maximum(jnp.sum(left, (1, 2), keepdims=True), 1)
    return jnp.where(holes[..., None], color, images)


def harmonic(images: jax.Array, holes: jax.Array, iterations: int = ITERATIONS) -> jax.Array:
    """Images [B, H, W, 3] whose holes, bool [B, H, W], are the mean of their four neighbors at every pixel.

    Jacobi's iterations from the mean color. At the border of the image the missing neighbor is the pixel itself.
    """
    hole = holes[..., None]

    def step(_, x):
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), "edge")
        around = padded[:, :-2, 1:-1] + padded[:, 2:, 1:-1] + padded[:, 1:-1, :-2] + padded[:, 1:-1, 2:]
        return jnp.where(hole, around / 4, images)

    return jax.lax.fori_loop(0, iterations, step, of_one_color(images, holes))
